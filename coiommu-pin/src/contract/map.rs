//! What `map` takes, what it refuses, and what a device sees of it.

use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::sync::atomic::Ordering;

use super::field::{Field, PAGES, check};
use super::{Bed, Skip};
use crate::MapError;

pub(super) fn makes_every_byte_reachable(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    let device = field.device()?;
    check("whole pages can be mapped", field.map(2, 3), Ok(()));
    for page in 2..5 {
        for offset in [page * field.page, (page + 1) * field.page - 1] {
            let iova = field.iova(0) + offset;
            let byte = field.byte(offset);
            check("a device reads what is mapped", device.read(iova), Some(Field::tag(page)));
            check("a device writes what is mapped", device.write(iova, 0xa5), true);
            check("a device's write reaches the memory", byte.load(Ordering::SeqCst), 0xa5);
            byte.store(Field::tag(page), Ordering::SeqCst);
        }
    }
    field.holds_exactly(&[(2, 3, 2)], "a device reaches what is mapped and nothing else");
    Ok(())
}

pub(super) fn reaches_the_backing_it_was_given(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    field.device()?;
    let mappings: Vec<_> = (0..PAGES / 2).map(|at| (at * 2, 1, PAGES - 1 - at)).collect();
    for &(at, pages, onto) in &mappings {
        check("any memory can be mapped at any iova", field.map_onto(at, pages, onto), Ok(()));
    }
    field.holds_exactly(&mappings, "a mapping leads to the memory it was made with");
    Ok(())
}

pub(super) fn takes_the_same_memory_twice(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    check("memory can be mapped", field.map_onto(0, 2, 4), Ok(()));
    check("memory can be mapped at a second iova", field.map_onto(2, 2, 4), Ok(()));
    check("one of two mappings of a page can go", field.unmap(0, 2), Ok(2 * field.page));
    field.holds_exactly(&[(2, 2, 4)], "a mapping is its own, whatever else maps its memory");
    Ok(())
}

pub(super) fn refuses_any_overlap(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    check("whole pages can be mapped", field.map(4, 4), Ok(()));
    let overlaps = [
        ("the same range", 4, 4),
        ("its first page", 4, 1),
        ("its last page", 7, 1),
        ("a range inside it", 5, 2),
        ("a range around it", 3, 6),
        ("a range with the same start", 4, 6),
        ("a range with the same end", 2, 6),
        ("a range over its start", 2, 3),
        ("a range over its end", 7, 3),
    ];
    for (what, at, pages) in overlaps {
        let rule = format!("a map of {what} fails with `Exists`");
        // Other memory, so that a device would see a map that took place.
        check(&rule, field.map_onto(at, pages, 0), Err(MapError::Exists));
    }
    field.holds_exactly(&[(4, 4, 4)], "a map that overlaps changes nothing");
    Ok(())
}

pub(super) fn takes_neighbours(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    for (at, pages) in [(4, 2), (2, 2), (6, 1)] {
        check("a range that touches a mapping does not overlap it", field.map(at, pages), Ok(()));
    }
    field.holds_exactly(&[(2, 2, 2), (4, 2, 4), (6, 1, 6)], "neighbours stay mappings of their own");
    Ok(())
}

pub(super) fn refuses_what_is_not_pages(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    let (iova, page) = (field.iova(0), field.page);
    let last_page = page.wrapping_neg();
    let past_memory = field.to_the_last_address() + page;
    let refused = [
        ("nothing", iova, 0, 0),
        ("half a page", iova, 0, page / 2),
        ("a page and a byte", iova, 0, page + 1),
        ("a page at an iova inside a page", iova + page / 2, 0, page),
        ("memory that begins inside a page", iova, page / 2, page),
        ("iovas past the last one", last_page, 0, 2 * page),
        ("memory past the last address", iova, 0, past_memory),
    ];
    for (what, iova, offset, len) in refused {
        let rule = format!("a map of {what} fails with `Invalid`");
        check(&rule, field.map_bytes(iova, offset, len), Err(MapError::Invalid));
    }
    field.holds_exactly(&[], "a map that was refused changes nothing");
    Ok(())
}

pub(super) fn refuses_iovas_outside_the_ranges(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    let ranges = field.mapper.limits().iova_ranges;
    let last = *ranges.last().ok_or(Skip("there are no iova ranges"))?.end();
    // A gap between two ranges, else what comes after the last.
    let gap = ranges.windows(2).map(|two| *two[0].end()..=*two[1].start()).find(|gap| pages_in(gap, field.page) > 0);
    let before = gap.map_or(last, |gap| *gap.start());
    let outside = before.checked_add(1).ok_or(Skip("all iovas can be mapped"))?.next_multiple_of(field.page);

    let refused = field.map_bytes(outside, 0, field.page);
    check("a map outside the iova ranges fails with `Invalid`", refused, Err(MapError::Invalid));
    let refused = field.map_bytes(outside - field.page, 0, 2 * field.page);
    check("a map that leaves an iova range fails with `Invalid`", refused, Err(MapError::Invalid));
    let unmapped = field.mapper.unmap(outside - field.page, 2 * field.page);
    check("a map that was refused changes nothing", unmapped, Ok(0));
    field.holds_exactly(&[], "a map that was refused changes nothing");
    Ok(())
}

/// Whole pages strictly between the ends of a gap.
fn pages_in(gap: &RangeInclusive<u64>, page: u64) -> u64 {
    let first = (gap.start() + 1).next_multiple_of(page);
    gap.end().saturating_sub(first) / page
}

pub(super) fn refuses_memory_that_is_not_there(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    // Below what `vm.mmap_min_addr` leaves to processes, and at the end of the kernel's half.
    for (what, hva) in [("near null", 0x8000), ("of the kernel", usize::MAX << 20)] {
        let rule = format!("a map of an address {what} fails with `Fault`");
        let aligned = (hva as u64).is_multiple_of(field.page);
        if let Some(hva) = NonZeroUsize::new(hva).filter(|_| aligned) {
            check(&rule, field.map_nothing_at(hva), Err(MapError::Fault));
        }
    }
    field.holds_exactly(&[], "a map that failed changes nothing");
    Ok(())
}
