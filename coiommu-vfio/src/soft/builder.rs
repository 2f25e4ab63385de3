//! What is settled when an IOMMU is made.

use std::num::NonZeroU64;
use std::ops::RangeInclusive;

use super::SoftIommu;

/// How many mappings a container holds unless told otherwise: the default of vfio_iommu_type1's `dma_entry_limit`.
pub const DEFAULT_ENTRY_LIMIT: u64 = 65_535;

/// The page of the machines that have one page size only.
const PAGE_4K: NonZeroU64 = NonZeroU64::new(4096).unwrap();

/// Settings of a [`SoftIommu`] to be; from [`SoftIommu::builder`].
#[derive(Clone, Debug)]
#[must_use]
pub struct Builder {
    pub(super) page_sizes: NonZeroU64,
    pub(super) iova_ranges: Vec<RangeInclusive<u64>>,
    pub(super) entry_limit: Option<u64>,
    pub(super) pinned_limit: Option<u64>,
}

impl Builder {
    pub(super) fn new() -> Self {
        Self {
            page_sizes: PAGE_4K,
            iova_ranges: vec![0..=u64::MAX],
            entry_limit: Some(DEFAULT_ENTRY_LIMIT),
            pinned_limit: None,
        }
    }

    /// The page sizes of the IOMMU: bit n set means pages of 2ⁿ bytes, as in [`Limits`](coiommu_pin::Limits). The
    /// smallest is the unit of all mappings. 4 KiB alone unless set.
    pub fn page_sizes(self, page_sizes: NonZeroU64) -> Self {
        Self { page_sizes, ..self }
    }

    /// The IOVAs that can be mapped, in bytes; all of them unless set. Each mapping must lie within one of the ranges,
    /// even where two of them touch. No range at all means every IOVA, as in a container without a hardware IOMMU.
    pub fn iova_ranges(self, ranges: impl IntoIterator<Item = RangeInclusive<u64>>) -> Self {
        let mut iova_ranges: Vec<_> = ranges.into_iter().collect();
        iova_ranges.sort_by_key(|range| *range.start());
        if iova_ranges.is_empty() {
            iova_ranges.push(0..=u64::MAX);
        }
        Self { iova_ranges, ..self }
    }

    /// See [`SoftIommu::set_entry_limit`]. [`DEFAULT_ENTRY_LIMIT`] unless set.
    pub fn entry_limit(self, mappings: Option<u64>) -> Self {
        Self { entry_limit: mappings, ..self }
    }

    /// See [`SoftIommu::set_pinned_limit`]. No limit unless set.
    pub fn pinned_limit(self, bytes: Option<u64>) -> Self {
        Self { pinned_limit: bytes, ..self }
    }

    /// Makes it.
    #[must_use]
    pub fn build(self) -> SoftIommu {
        SoftIommu::from_builder(self)
    }
}
