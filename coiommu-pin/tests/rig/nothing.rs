//! A mapper that does nothing: for benches, and for tests in which what is mapped does not matter.
//!
//! Unsafe is needed here: a mapper's map call is a promise about memory.
#![allow(unsafe_code, unreachable_pub)]

use coiommu_pin::{Backing, DmaMapper, Limits, MapError};

/// Maps nothing, at no cost: what is left is the pinner's own work. It says that all of a range was mapped, so a range
/// with holes counts as an anomaly; scenes that time unmapping have none.
#[derive(Debug)]
pub struct Nothing;

impl DmaMapper for Nothing {
    unsafe fn map(&self, _iova: u64, _backing: Backing<'_>, _len: u64) -> Result<(), MapError> {
        Ok(())
    }

    fn unmap(&self, _iova: u64, len: u64) -> Result<u64, MapError> {
        Ok(len)
    }

    fn limits(&self) -> Limits {
        limits()
    }
}

/// An IOMMU with 4 KiB pages and 48 bits.
pub fn limits() -> Limits {
    Limits { page_sizes: 4096, iova_ranges: vec![0..=(1 << 48) - 1], mappings_left: None }
}
