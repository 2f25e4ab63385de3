//! What `unmap` takes away, and what it leaves alone.

use super::field::{Field, check};
use super::{Bed, Skip};
use crate::MapError;

pub(super) fn ends_access(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    let device = field.device()?;
    check("whole pages can be mapped", field.map(1, 2), Ok(()));
    check("a device reads what is mapped", device.read(field.iova(1)), Some(Field::tag(1)));
    check("unmap returns the bytes that were mapped", field.unmap(1, 2), Ok(2 * field.page));
    for page in [1, 2] {
        check("a device does not read what was unmapped", device.read(field.iova(page)), None);
        check("a device does not write what was unmapped", device.write(field.iova(page), 0xa5), false);
    }
    field.holds_exactly(&[], "unmap takes the whole mapping away");
    Ok(())
}

pub(super) fn of_a_hole_is_no_error(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    check("an unmap where nothing is mapped returns 0", field.unmap(0, field.pages), Ok(0));
    check("whole pages can be mapped", field.map(2, 1), Ok(()));
    check("whole pages can be mapped", field.map(5, 1), Ok(()));
    check("an unmap of a hole returns 0", field.unmap(3, 2), Ok(0));
    check("an unmap of a part of a hole returns 0", field.unmap(3, 1), Ok(0));
    check("an unmap before all mappings returns 0", field.unmap(0, 2), Ok(0));
    check("an unmap behind all mappings returns 0", field.unmap(6, 2), Ok(0));
    field.holds_exactly(&[(2, 1, 2), (5, 1, 5)], "an unmap of a hole changes nothing");
    Ok(())
}

pub(super) fn covers_mappings_and_holes(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    for (at, pages) in [(0, 1), (2, 1), (3, 2), (7, 4), (13, 1)] {
        check("whole pages can be mapped", field.map(at, pages), Ok(()));
    }
    let bytes = field.unmap(1, 11);
    check("an unmap over mappings and holes returns the bytes of all mappings", bytes, Ok(7 * field.page));
    field.holds_exactly(&[(0, 1, 0), (13, 1, 13)], "an unmap leaves what it does not cover");
    Ok(())
}

pub(super) fn never_cuts(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    for (at, pages) in [(1, 1), (4, 4), (8, 1)] {
        check("whole pages can be mapped", field.map(at, pages), Ok(()));
    }
    let cuts = [
        ("cuts the head off a mapping", 4, 2),
        ("cuts the tail off a mapping", 6, 2),
        ("cuts the middle out of a mapping", 5, 2),
        ("ends inside a mapping", 0, 6),
        ("begins inside a mapping", 6, 5),
    ];
    for (what, at, pages) in cuts {
        let rule = format!("an unmap that {what} fails with `Invalid`");
        check(&rule, field.unmap(at, pages), Err(MapError::Invalid));
    }
    field.holds_exactly(&[(1, 1, 1), (4, 4, 4), (8, 1, 8)], "an unmap that would cut a mapping changes nothing");
    Ok(())
}

pub(super) fn refuses_what_is_not_pages(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    check("whole pages can be mapped", field.map(0, 2), Ok(()));
    let (iova, page) = (field.iova(0), field.page);
    let refused = [
        ("nothing", iova, 0),
        ("half a page", iova, page / 2),
        ("two pages and a byte", iova, 2 * page + 1),
        ("pages at an iova inside a page", iova + page / 2, 2 * page),
        ("iovas past the last one", page.wrapping_neg(), 2 * page),
    ];
    for (what, iova, len) in refused {
        let rule = format!("an unmap of {what} fails with `Invalid`");
        check(&rule, field.mapper.unmap(iova, len), Err(MapError::Invalid));
    }
    field.holds_exactly(&[(0, 2, 0)], "an unmap that was refused changes nothing");
    Ok(())
}

pub(super) fn makes_room_to_map_again(bed: &dyn Bed) -> Result<(), Skip> {
    let field = Field::new(bed);
    for onto in [3, 8, 3] {
        check("what was unmapped can be mapped again", field.map_onto(3, 4, onto), Ok(()));
        check("unmap returns the bytes that were mapped", field.unmap(3, 4), Ok(4 * field.page));
    }
    check("a part of what was unmapped can be mapped", field.map_onto(4, 1, 9), Ok(()));
    field.holds_exactly(&[(4, 1, 9)], "a new mapping owes nothing to the old");
    Ok(())
}
