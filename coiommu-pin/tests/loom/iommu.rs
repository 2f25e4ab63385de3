//! An IOMMU with VFIO's rules, and the devices behind it.
//!
//! That a page is mapped is a loom atomic, written and read without any order: a device sees a mapping only if the
//! protocol's own orders make its user come after the map call. The pages' memory is watched: it is used from the map call
//! on, and taken by the unmap call, so that an unmap that does not come after all that the devices did is a race.
//!
//! Unsafe is needed to implement the map call, whose promise is not used: nobody touches the memory behind a page.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::{Arc, Mutex, OnceLock};

use coiommu_dtt::PAGE_SIZE;
use coiommu_pin::{Backing, DmaMapper, Limits, MapError};
use loom::sync::atomic::AtomicBool;

use crate::watched::Watched;

#[derive(Debug)]
pub struct Iommu {
    /// Those that the model looks at, by gfn.
    live: BTreeMap<u64, Page>,
    /// Start and end of each mapping, in gfns. No part of the model: the kernel has a lock of its own, which orders nothing
    /// that a guest could rely on.
    mappings: Mutex<BTreeMap<u64, u64>>,
    /// If it is there, each map call takes 5 s, and sets it.
    pub late: OnceLock<Arc<AtomicBool>>,
}

#[derive(Debug, Default)]
struct Page {
    mapped: AtomicBool,
    memory: Watched,
}

impl Iommu {
    pub fn new(live: &[u64]) -> Self {
        Self {
            live: live.iter().map(|&gfn| (gfn, Page::default())).collect(),
            mappings: Mutex::default(),
            late: OnceLock::new(),
        }
    }

    /// A device reads or writes a page.
    pub fn access(&self, gfn: u64) {
        let page = &self.live[&gfn];
        assert!(page.mapped.load(Relaxed), "a device faults at gfn {gfn:#x}");
        page.memory.used();
    }

    /// The memory of pages is put to another use, which it must be out of the IOMMU for; no device may come to it before
    /// the caller lets it.
    pub fn take(&self, gfns: Range<u64>) {
        self.assert_unmapped(gfns.clone());
        for (_, page) in self.live.range(gfns) {
            page.memory.taken();
        }
    }

    /// Nothing in a range is mapped, whatever the order in which one looks.
    pub fn assert_unmapped(&self, gfns: Range<u64>) {
        for (gfn, page) in self.live.range(gfns.clone()) {
            assert!(!page.mapped.load(Relaxed), "gfn {gfn:#x} is mapped");
        }
        assert_eq!(self.touching(&gfns), [], "these are mapped");
    }

    /// The mappings, in gfns.
    pub fn mappings(&self) -> Vec<Range<u64>> {
        self.touching(&(0..u64::MAX))
    }

    fn touching(&self, gfns: &Range<u64>) -> Vec<Range<u64>> {
        let mappings = self.mappings.lock().unwrap();
        mappings.range(..gfns.end).map(|(&start, &end)| start..end).filter(|mapping| mapping.end > gfns.start).collect()
    }
}

impl DmaMapper for Iommu {
    unsafe fn map(&self, iova: u64, _backing: Backing<'_>, len: u64) -> Result<(), MapError> {
        let gfns = iova / PAGE_SIZE..(iova + len) / PAGE_SIZE;
        if !self.touching(&gfns).is_empty() {
            return Err(MapError::Exists);
        }
        self.mappings.lock().unwrap().insert(gfns.start, gfns.end);
        for (_, page) in self.live.range(gfns) {
            page.mapped.store(true, Relaxed);
            page.memory.used();
        }
        if let Some(late) = self.late.get() {
            late.store(true, Release);
        }
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<u64, MapError> {
        let gfns = iova / PAGE_SIZE..(iova + len) / PAGE_SIZE;
        let going = self.touching(&gfns);
        if going.iter().any(|mapping| mapping.start < gfns.start || mapping.end > gfns.end) {
            return Err(MapError::Invalid);
        }
        for (_, page) in self.live.range(gfns) {
            page.mapped.store(false, Relaxed);
            page.memory.taken();
        }
        let mut mappings = self.mappings.lock().unwrap();
        mappings.retain(|start, _| going.iter().all(|mapping| mapping.start != *start));
        Ok(going.iter().map(|mapping| (mapping.end - mapping.start) * PAGE_SIZE).sum())
    }

    fn limits(&self) -> Limits {
        Limits { page_sizes: PAGE_SIZE, iova_ranges: vec![0..=u64::MAX], mappings_left: None }
    }
}
