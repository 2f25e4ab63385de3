//! `SoftIommu` keeps the contract of mappers.

// A bed promises that its memory may be mapped, which is unsafe to promise.
#![allow(unsafe_code)]

mod soft_bed;

use coiommu_pin::contract::run_all;

#[test]
fn soft_iommu_keeps_the_contract() {
    let bed = soft_bed::SoftBed::new(|iommu| iommu);
    assert_eq!(run_all(&bed), [], "software can do all that a case needs");
}

#[test]
fn larger_pages_change_nothing() {
    // 64 KiB and 512 MiB, as on an arm64 kernel of 64 KiB pages.
    let page_sizes = (0x1_0000 | 0x2000_0000).try_into().unwrap();
    let bed = soft_bed::SoftBed::new(|iommu| iommu).with_page_sizes(page_sizes);
    assert_eq!(run_all(&bed), []);
}
