//! What a container says of itself.

use std::ops::RangeInclusive;

use coiommu_pin::Limits;
use vfio_bindings::bindings::vfio::{
    VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
};

/// Reads what GET_INFO has returned: `vfio_iommu_type1_info` and the capabilities that follow it, each with the offset of
/// the next. A kernel that tells no IOVA ranges has no hole in them; one that tells no mappings left does not count them.
/// `None`: it is cut short.
pub(super) fn limits(info: &[u8]) -> Option<Limits> {
    let flags = u32_at(info, 4)?;
    let page_sizes = if flags & VFIO_IOMMU_INFO_PGSIZES != 0 { u64_at(info, 8)? } else { 0 };
    let mut limits = Limits { page_sizes, iova_ranges: vec![0..=u64::MAX], mappings_left: None };
    let mut at = if flags & VFIO_IOMMU_INFO_CAPS != 0 { u32_at(info, 16)? } else { 0 };
    while at != 0 {
        let capability = info.get(usize::try_from(at).ok()?..)?;
        match u32::from(u16_at(capability, 0)?) {
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => limits.iova_ranges = ranges(capability)?,
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => limits.mappings_left = Some(u32_at(capability, 8)?.into()),
            _ => {}
        }
        let next = u32_at(capability, 4)?;
        // They follow each other, so this ends.
        at = if next > at { next } else { 0 };
    }
    Some(limits)
}

/// Of `vfio_iommu_type1_info_cap_iova_range`.
fn ranges(capability: &[u8]) -> Option<Vec<RangeInclusive<u64>>> {
    let count = usize::try_from(u32_at(capability, 8)?).ok()?;
    let (pairs, _) = capability.get(16..)?.as_chunks::<16>();
    let range = |pair: &[u8; 16]| Some(u64_at(pair, 0)?..=u64_at(pair, 8)?);
    pairs.get(..count)?.iter().map(range).collect()
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
}
