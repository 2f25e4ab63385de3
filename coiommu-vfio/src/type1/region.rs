//! Regions of a device, and what of them another process may map.

use std::ops::Range;

/// A region of a device, in the file of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// Its length in bytes; 0: there is none.
    pub size: u64,
    /// Whether it can be read.
    pub readable: bool,
    /// Whether it can be written.
    pub writable: bool,
}

/// A part of a region, in bytes from the region's beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Where it begins.
    pub offset: u64,
    /// Its length.
    pub size: u64,
}

/// What is left of `allowed` within a region of `size` bytes without the pages that hold a byte of `forbidden`: whole pages,
/// ascending, none twice. `page` is the length of a page, a power of two.
pub(super) fn mappable(size: u64, allowed: &[Area], forbidden: &[Range<u64>], page: u64) -> Vec<Area> {
    let mut left = merged(allowed.iter().filter_map(|area| whole_pages(area, size, page)).collect());
    for bytes in forbidden.iter().filter(|bytes| !bytes.is_empty()) {
        let start = bytes.start & !(page - 1);
        // Past the last page there is nothing to cut.
        let end = bytes.end.checked_next_multiple_of(page).unwrap_or(u64::MAX);
        let around = |area: Range<u64>| [area.start..area.end.min(start), area.start.max(end)..area.end];
        left = left.into_iter().flat_map(around).filter(|area| !area.is_empty()).collect();
    }
    left.into_iter().map(|area| Area { offset: area.start, size: area.end - area.start }).collect()
}

/// The whole pages of an area that lie in the region.
fn whole_pages(area: &Area, size: u64, page: u64) -> Option<Range<u64>> {
    let end = area.offset.saturating_add(area.size).min(size) & !(page - 1);
    let start = area.offset.checked_next_multiple_of(page)?;
    (start < end).then_some(start..end)
}

/// The same, sorted, and with those that touch as one.
fn merged(mut areas: Vec<Range<u64>>) -> Vec<Range<u64>> {
    areas.sort_unstable_by_key(|area| area.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(areas.len());
    for area in areas {
        match merged.last_mut() {
            Some(last) if area.start <= last.end => last.end = last.end.max(area.end),
            _ => merged.push(area),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 0x1000;

    fn area(offset: u64, size: u64) -> Area {
        Area { offset, size }
    }

    #[test]
    fn the_pages_of_tables_are_cut_out() {
        let whole = [area(0, 0x4000)];
        // QEMU's nvme: table and PBA at the end.
        assert_eq!(mappable(0x4000, &whole, &[0x2000..0x2410, 0x3000..0x3010], PAGE), [area(0, 0x2000)]);
        // Its xHCI: both in the last page.
        assert_eq!(mappable(0x4000, &whole, &[0x3000..0x3100, 0x3800..0x3808], PAGE), [area(0, 0x3000)]);
        // In the middle, over the edge of a page.
        let cut = mappable(0x4000, &whole, &[0x1ff0..0x2010], PAGE);
        assert_eq!(cut, [area(0, 0x1000), area(0x3000, 0x1000)]);
        assert_eq!(mappable(0x1000, &[area(0, 0x1000)], &[0..0x10], PAGE), []);
        assert_eq!(mappable(0x4000, &whole, &[], PAGE), whole);
    }

    #[test]
    fn what_is_no_whole_page_stays_out() {
        assert_eq!(mappable(0x800, &[area(0, 0x800)], &[], PAGE), []);
        assert_eq!(mappable(0x2800, &[area(0, 0x2800)], &[], PAGE), [area(0, 0x2000)]);
        assert_eq!(mappable(0x4000, &[area(0x800, 0x2000)], &[], PAGE), [area(0x1000, 0x1000)]);
        assert_eq!(mappable(0x4000, &[area(0x2000, u64::MAX), area(0, 0x2000)], &[], PAGE), [area(0, 0x4000)]);
        assert_eq!(mappable(0, &[], &[0..8], PAGE), []);
    }

    #[test]
    fn tables_beyond_the_region_cut_nothing_of_it() {
        let whole = [area(0, 0x2000)];
        assert_eq!(mappable(0x2000, &whole, &[0x2000..0x3000, u64::MAX - 8..u64::MAX], PAGE), whole);
    }

    /// Numbers around the edges of some pages, and far off.
    fn place() -> impl Strategy<Value = u64> {
        prop_oneof![
            8 => (0..20_u64, -2..=2_i64).prop_map(|(page, near)| (page * PAGE).saturating_add_signed(near)),
            4 => (0..20_u64).prop_map(|page| page * PAGE),
            2 => 0..20 * PAGE,
            1 => prop::sample::select(vec![u64::MAX, u64::MAX - 1, !(PAGE - 1), 1 << 63]),
        ]
    }

    proptest! {
        /// Page by page: it may be mapped exactly if all of it was allowed and none of it is forbidden.
        #[test]
        fn a_page_is_in_exactly_if_it_may_be(
            size in place(),
            allowed in prop::collection::vec((place(), place()), 0..4),
            forbidden in prop::collection::vec((place(), place()), 0..3),
        ) {
            let allowed: Vec<_> = allowed.into_iter().map(|(offset, size)| area(offset, size)).collect();
            let forbidden: Vec<_> = forbidden.into_iter().map(|(start, length)| start..start.saturating_add(length)).collect();
            let areas = mappable(size, &allowed, &forbidden, PAGE);
            for area in &areas {
                prop_assert!(area.size > 0 && area.offset % PAGE == 0 && area.size % PAGE == 0, "{area:x?}");
                prop_assert!(area.offset.checked_add(area.size).is_some_and(|end| end <= size), "{area:x?}");
            }
            for two in areas.windows(2) {
                prop_assert!(two[0].offset + two[0].size <= two[1].offset, "{areas:x?}");
            }
            for page in (0..24).map(|number| number * PAGE) {
                let is_inside = page + PAGE <= size;
                let is_allowed =
                    allowed.iter().any(|area| area.offset <= page && page + PAGE - area.offset <= area.size);
                let is_forbidden = forbidden.iter().any(|bytes| bytes.start.max(page) < bytes.end.min(page + PAGE));
                let is_in = areas.iter().any(|area| area.offset <= page && page - area.offset < area.size);
                prop_assert_eq!(is_in, is_inside && is_allowed && !is_forbidden, "page {:#x}", page);
            }
        }
    }
}
