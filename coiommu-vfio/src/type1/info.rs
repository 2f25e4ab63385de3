//! What the kernel says: of a container, of a device, of its regions and interrupts.
//!
//! An answer is a structure, and for some of them capabilities that follow it. `None`: it is cut short.

use std::ops::RangeInclusive;

use coiommu_pin::Limits;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_RESET, VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE,
    VFIO_IRQ_INFO_NORESIZE, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};

use super::interrupts::InterruptInfo;
use super::region::{Area, Region};

/// Of a container: `vfio_iommu_type1_info`. A kernel that tells no IOVA ranges has no hole in them; one that tells no
/// mappings left does not count them.
pub(super) fn limits(info: &[u8]) -> Option<Limits> {
    let flags = u32_at(info, 4)?;
    let page_sizes = if flags & VFIO_IOMMU_INFO_PGSIZES != 0 { u64_at(info, 8)? } else { 0 };
    let mut limits = Limits { page_sizes, iova_ranges: vec![0..=u64::MAX], mappings_left: None };
    let first = if flags & VFIO_IOMMU_INFO_CAPS != 0 { u32_at(info, 16)? } else { 0 };
    for (id, capability) in capabilities(info, first)? {
        match id {
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                let ranges = pairs(capability)?.into_iter().map(|[start, last]| start..=last);
                limits.iova_ranges = ranges.collect::<Vec<RangeInclusive<u64>>>();
            }
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => limits.mappings_left = Some(u32_at(capability, 8)?.into()),
            _ => {}
        }
    }
    Some(limits)
}

/// Of a device, `vfio_device_info`: whether it can be reset.
pub(super) fn is_resettable(info: &[u8]) -> Option<bool> {
    Some(u32_at(info, 4)? & VFIO_DEVICE_FLAGS_RESET != 0)
}

/// Of a region, `vfio_region_info`: with the areas of it that may be mapped, as far as the kernel knows.
pub(super) fn region(info: &[u8]) -> Option<(Region, Vec<Area>)> {
    let flags = u32_at(info, 4)?;
    let has = |flag: u32| flags & flag != 0;
    let region = Region {
        offset: u64_at(info, 24)?,
        size: u64_at(info, 16)?,
        readable: has(VFIO_REGION_INFO_FLAG_READ),
        writable: has(VFIO_REGION_INFO_FLAG_WRITE),
    };
    let whole = Area { offset: 0, size: region.size };
    let mut areas = if has(VFIO_REGION_INFO_FLAG_MMAP) { vec![whole] } else { Vec::new() };
    let first = if has(VFIO_REGION_INFO_FLAG_CAPS) { u32_at(info, 12)? } else { 0 };
    for (id, capability) in capabilities(info, first)? {
        if id == VFIO_REGION_INFO_CAP_SPARSE_MMAP && has(VFIO_REGION_INFO_FLAG_MMAP) {
            areas = pairs(capability)?.into_iter().map(|[offset, size]| Area { offset, size }).collect();
        }
    }
    Some((region, areas))
}

/// Of a kind of interrupt: `vfio_irq_info`.
pub(super) fn interrupts(info: &[u8]) -> Option<InterruptInfo> {
    let flags = u32_at(info, 4)?;
    Some(InterruptInfo {
        count: u32_at(info, 12)?,
        eventfd: flags & VFIO_IRQ_INFO_EVENTFD != 0,
        maskable: flags & VFIO_IRQ_INFO_MASKABLE != 0,
        automasked: flags & VFIO_IRQ_INFO_AUTOMASKED != 0,
        noresize: flags & VFIO_IRQ_INFO_NORESIZE != 0,
    })
}

/// The capabilities of an answer, each with its number, and from its header to the answer's end: each has the offset of the
/// next.
fn capabilities(info: &[u8], first: u32) -> Option<Vec<(u32, &[u8])>> {
    let (mut found, mut at) = (Vec::new(), first);
    while at != 0 {
        let capability = info.get(usize::try_from(at).ok()?..)?;
        found.push((u16_at(capability, 0)?.into(), capability));
        let next = u32_at(capability, 4)?;
        // They follow each other, so this ends.
        at = if next > at { next } else { 0 };
    }
    Some(found)
}

/// Of a capability that has a count and so many pairs of numbers: IOVA ranges, sparse areas.
fn pairs(capability: &[u8]) -> Option<Vec<[u64; 2]>> {
    let count = usize::try_from(u32_at(capability, 8)?).ok()?;
    let (pairs, _) = capability.get(16..)?.as_chunks::<16>();
    let numbers = |pair: &[u8; 16]| Some([u64_at(pair, 0)?, u64_at(pair, 8)?]);
    pairs.get(..count)?.iter().map(numbers).collect()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 6.12 answers with VT-d: migration, mappings left, IOVA ranges around the interrupts' hole.
    fn answer() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut words = |words: &[u32]| bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        words(&[112, 3, 0x4000_1000, 0, 24, 0]);
        words(&[2 | 1 << 16, 48, 0, 0, 0x1000, 0]);
        words(&[3 | 1 << 16, 64, 65_535, 0]);
        words(&[1 | 1 << 16, 0, 2, 0]);
        words(&[0, 0, 0xfedf_ffff, 0, 0xfef0_0000, 0, 0xffff_ffff, 0x7f]);
        bytes
    }

    #[test]
    fn capabilities_are_found_in_their_chain() {
        let wanted = Limits {
            page_sizes: 0x4000_1000,
            iova_ranges: vec![0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff],
            mappings_left: Some(65_535),
        };
        assert_eq!(limits(&answer()), Some(wanted));
    }

    #[test]
    fn an_old_kernel_has_none() {
        let mut old = answer();
        old[4] = 1;
        let wanted = Limits { page_sizes: 0x4000_1000, iova_ranges: vec![0..=u64::MAX], mappings_left: None };
        assert_eq!(limits(&old), Some(wanted));
    }

    #[test]
    fn an_answer_cut_short_or_in_circles_is_seen() {
        let answer = answer();
        for length in 0..answer.len() {
            assert_eq!(limits(&answer[..length]), None, "{length} bytes");
        }
        let mut circle = answer;
        circle[28] = 24;
        assert_eq!(limits(&circle).unwrap().mappings_left, None);
    }

    /// As Linux answers of a BAR, with or without two sparse areas.
    fn region_answer(flags: u32, sparse: bool) -> Vec<u8> {
        let mut words = vec![88, flags, 2, if sparse { 32 } else { 0 }, 0x4000, 0, 0, 0x200];
        if sparse {
            // A capability of another kind before it.
            words.extend([3 | 1 << 16, 40, 1 | 1 << 16, 0, 2, 0]);
            words.extend([0, 0, 0x1000, 0, 0x3000, 0, 0x1000, 0]);
        }
        words.iter().flat_map(|word: &u32| word.to_ne_bytes()).collect()
    }

    #[test]
    fn a_region_has_its_flags_and_its_areas() {
        let wanted = Region { offset: 0x200 << 32, size: 0x4000, readable: true, writable: true };
        let whole = Area { offset: 0, size: 0x4000 };
        assert_eq!(region(&region_answer(7, false)), Some((wanted, vec![whole])));
        let areas = vec![Area { offset: 0, size: 0x1000 }, Area { offset: 0x3000, size: 0x1000 }];
        assert_eq!(region(&region_answer(15, true)), Some((wanted, areas)));
        assert_eq!(region(&region_answer(3, false)), Some((wanted, vec![])));
        assert_eq!(region(&region_answer(11, true)), Some((wanted, vec![])), "sparse areas of what may not be mapped");
        let read_only = Region { writable: false, ..wanted };
        assert_eq!(region(&region_answer(1, false)), Some((read_only, vec![])));
        let answer = region_answer(15, true);
        for length in 0..answer.len() {
            assert_eq!(region(&answer[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn interrupts_have_their_flags() {
        let answer = |flags: u32| [16, flags, 2, 65].map(u32::to_ne_bytes).concat();
        let none = InterruptInfo { count: 65, ..InterruptInfo::default() };
        let with = [
            (1, InterruptInfo { eventfd: true, ..none }),
            (2, InterruptInfo { maskable: true, ..none }),
            (4, InterruptInfo { automasked: true, ..none }),
            (8, InterruptInfo { noresize: true, ..none }),
        ];
        assert_eq!(interrupts(&answer(0)), Some(none));
        for (flag, wanted) in with {
            assert_eq!(interrupts(&answer(flag)), Some(wanted));
        }
        assert_eq!(interrupts(&answer(15)[..15]), None);
    }

    #[test]
    fn a_device_says_whether_it_can_be_reset() {
        let answer = |flags: u32| [24, flags, 9, 5, 0, 0].map(u32::to_ne_bytes).concat();
        assert_eq!((is_resettable(&answer(3)), is_resettable(&answer(2))), (Some(true), Some(false)));
        assert_eq!(is_resettable(&answer(3)[..7]), None);
    }
}
