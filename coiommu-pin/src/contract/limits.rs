//! What `limits` says, and that it is so.

use super::field::{Field, PAGES, check};
use super::{Bed, Skip};
use crate::MapError;

pub(super) fn are_sane(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    let limits = field.mapper.limits();
    let ranges = &limits.iova_ranges;
    check("there are iova ranges", ranges.is_empty(), false);
    check("no iova range is empty", ranges.iter().any(|range| range.is_empty()), false);
    let ascending = ranges.windows(2).all(|two| two[0].end() < two[1].start());
    check("iova ranges ascend and do not overlap", ascending, true);
    let (first, last) = (field.iova(0), field.iova(field.pages) - 1);
    let usable = ranges.iter().any(|range| range.contains(&first) && range.contains(&last));
    check("the bed's iovas lie within an iova range", usable, true);
    check("asking for the limits changes nothing", field.mapper.limits(), limits);
    Ok(())
}

pub(super) fn count_every_mapping(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    let left = field.counted()?;
    let left_now = || field.mapper.limits().mappings_left;
    for mapped in 1..=PAGES {
        check("whole pages can be mapped", field.map(mapped - 1, 1), Ok(()));
        check("a mapping takes one from the mappings left", left_now(), Some(left - mapped));
    }
    check("whole pages can be unmapped", field.unmap(0, 1), Ok(field.page));
    check("an unmap gives one mapping back", left_now(), Some(left - PAGES + 1));
    check("whole pages can be unmapped", field.unmap(1, 5), Ok(5 * field.page));
    check("an unmap gives as many back as it took away", left_now(), Some(left - PAGES + 6));
    let mappings: Vec<_> = (6..PAGES).map(|at| (at, 1, at)).collect();
    field.holds_exactly(&mappings, "mappings of adjacent pages are never merged");
    Ok(())
}

pub(super) fn count_a_big_mapping_once(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    check("all memory can be mapped at once", field.map(0, field.pages), Ok(()));
    let cut = field.unmap(field.pages / 2, field.pages / 2);
    check("a big mapping cannot be cut either", cut, Err(MapError::Invalid));
    field.holds_exactly(&[(0, field.pages, 0)], "a big mapping is one mapping");
    Ok(())
}

pub(super) fn end_in_no_entries_and_recover(bed: &dyn Bed) -> Result<(), Skip> {
    const ENTRIES: u64 = 4;
    let field = Field::with_entries(bed, ENTRIES)?;
    check("the limit is the one asked for", field.counted()?, ENTRIES);
    for at in 0..ENTRIES {
        check("mappings can be made up to the limit", field.map(2 * at, 1), Ok(()));
    }
    check("a map past the limit fails with `NoEntries`", field.map(9, 1), Err(MapError::NoEntries));
    check("a mapping can go at the limit", field.unmap(2, 1), Ok(field.page));
    check("one that went makes room for one", field.map(9, 4), Ok(()));
    check("one that went makes room for no more", field.map(1, 1), Err(MapError::NoEntries));
    field.holds_exactly(&[(0, 1, 0), (4, 1, 4), (6, 1, 6), (9, 4, 9)], "a map past the limit changes nothing");
    Ok(())
}
