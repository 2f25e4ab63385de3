//! The calls of the mapper, each under the block lock of its pages, and what to do when it disagrees with the pin map.
//!
//! Unsafe is needed here, once: for the map call, whose promise about memory stands on the region's.
#![allow(unsafe_code)]

use std::ops::Range;

use coiommu_dtt::PAGE_SIZE;

use super::Pinner;
use crate::mapper::{Backing, MapError};
use crate::page_set::{BLOCK_PAGES, PageSet};
use crate::pin_map::{Block, BlockNo, Totals};
use crate::region::RamRegion;
use crate::space::TableSpace;
use crate::stats::Counts;

/// What map calls have done, until it is added to what is counted for all: the workers would pull at those counters, page
/// by page.
pub(super) struct Tally<'p> {
    totals: &'p Totals,
    counts: &'p Counts,
    quota: Option<u64>,
    calls: u64,
    failures: u64,
    pages: u64,
    mappings: u64,
}

impl<'p> Tally<'p> {
    pub(super) fn new<S: TableSpace>(pinner: &'p Pinner<S>) -> Self {
        let quota = pinner.config.policy.quota_pages();
        let (totals, counts) = (&pinner.totals, &pinner.counts);
        Self { totals, counts, quota, calls: 0, failures: 0, pages: 0, mappings: 0 }
    }

    /// Adds it all up, and begins at 0.
    pub(super) fn settle(&mut self) {
        // What is under a quota was counted when it was reserved.
        self.totals.add(if self.quota.is_none() { self.pages } else { 0 }, self.mappings);
        self.counts.pages_pinned.add(std::mem::take(&mut self.pages));
        self.counts.map_calls.add(std::mem::take(&mut self.calls));
        self.counts.map_failures.add(std::mem::take(&mut self.failures));
        self.mappings = 0;
    }

    fn reserve(&self, pages: u64) -> bool {
        self.quota.is_none_or(|quota| self.totals.reserve(pages, quota))
    }

    fn mapped(&mut self, pages: u64) {
        self.pages += pages;
        self.mappings += 1;
    }

    /// Gives back what was reserved.
    fn give_back(&self, pages: u64) {
        if self.quota.is_some() {
            self.totals.remove(pages, 0);
        }
    }
}

/// Whatever happens, what was mapped is counted.
impl Drop for Tally<'_> {
    fn drop(&mut self) {
        self.settle();
    }
}

/// What became of extents that were to be unmapped.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unmapped {
    /// How many are.
    pub(super) extents: u64,
    /// The pages of those that the mapper refused to unmap: they stay in the pin map.
    pub(super) refused: PageSet,
}

impl<S: TableSpace> Pinner<S> {
    /// Maps pages that are not mapped, all in `region`, as one extent, and enters it.
    ///
    /// # Errors
    ///
    /// [`MapError`]; nothing was mapped or entered. A quota that is used up is [`MapError::NoMemory`].
    // Once a page at the worst: the call alone is felt.
    #[inline(always)]
    pub(super) fn map_extent(
        &self,
        no: BlockNo,
        block: &mut Block,
        pages: Range<usize>,
        region: &RamRegion,
        tally: &mut Tally<'_>,
    ) -> Result<(), MapError> {
        let first = no.gfn(pages.start);
        let backing = region.backing(first).ok_or(MapError::Invalid)?;
        let count = pages.len() as u64;
        if !tally.reserve(count) {
            return Err(MapError::NoMemory);
        }
        let iova = first.gpa().raw();
        let mut result = self.call_map(iova, backing, count, tally);
        if result == Err(MapError::Exists) {
            // The pin map has nothing here, so nothing may be mapped here: out with it, and once more.
            self.note_anomaly(|| format!("some of {count} pages at {iova:#x} were mapped behind the pin map's back"));
            if self.call_unmap(&pages, no).is_ok() {
                result = self.call_map(iova, backing, count, tally);
            }
        }
        if result.is_ok() {
            block.enter(pages, self.round(), self.keeps_all());
            tally.mapped(count);
        } else {
            tally.give_back(count);
        }
        result
    }

    #[inline]
    fn call_map(&self, iova: u64, backing: Backing<'_>, pages: u64, tally: &mut Tally<'_>) -> Result<(), MapError> {
        tally.calls += 1;
        // SAFETY: the region vouches for its memory as long as it lives. It lives until everything of it is unmapped: the
        // table of regions keeps it, present or leaving, until its blocks, one of which is locked here, were cleared under
        // their locks; what cannot be unmapped is kept, and leaked at the end.
        let result = unsafe { self.mapper.map(iova, backing, pages * PAGE_SIZE) };
        tally.failures += u64::from(result.is_err());
        result
    }

    /// Unmaps whole extents and takes them out of the pin map. What lies between two of them unmapped goes in one call.
    pub(super) fn unmap_extents(&self, no: BlockNo, block: &mut Block, going: PageSet) -> Unmapped {
        let mut unmapped = Unmapped::default();
        let staying = *block.mapped() - going;
        let mut next = going.first_from(0);
        while let Some(start) = next {
            let limit = staying.first_from(start).unwrap_or(BLOCK_PAGES);
            let together = going & PageSet::range(start..limit);
            next = going.first_from(limit);
            if self.unmap_together(no, block, together, &mut unmapped) {
                continue;
            }
            // Only one of them may be what the mapper refuses: each for itself.
            for extent in block.extents().filter(|extent| together.contains(extent.start)) {
                let extent = PageSet::range(extent);
                if extent == together || !self.unmap_together(no, block, extent, &mut unmapped) {
                    unmapped.refused |= extent;
                }
            }
        }
        unmapped
    }

    /// Unmaps extents that have no others between them, in one call; false if the mapper refuses.
    fn unmap_together(&self, no: BlockNo, block: &mut Block, together: PageSet, unmapped: &mut Unmapped) -> bool {
        let span = together.first_from(0).unwrap_or(0)..together.last().map_or(0, |last| last + 1);
        let Ok(bytes) = self.call_unmap(&span, no) else {
            return false;
        };
        let pages = together.len();
        if bytes != pages * PAGE_SIZE {
            // Out of the IOMMU it is, whoever took it: the books follow.
            self.note_anomaly(|| format!("{bytes:#x} bytes were mapped where the pin map had {pages} pages"));
        }
        self.counts.pages_unpinned.add(pages);
        let extents = block.remove(together, self.round());
        self.totals.remove(pages, extents);
        unmapped.extents += extents;
        true
    }

    /// Counts a disagreement, and tells of the 1st, 2nd, 4th, 8th ….
    fn note_anomaly(&self, what: impl FnOnce() -> String) {
        if self.counts.anomalies.add_and_tell(1).is_some() {
            log::warn!("{}", what());
        }
    }

    fn call_unmap(&self, pages: &Range<usize>, no: BlockNo) -> Result<u64, MapError> {
        self.counts.unmap_calls.add(1);
        let result = self.mapper.unmap(no.gfn(pages.start).gpa().raw(), pages.len() as u64 * PAGE_SIZE);
        if result.is_err() {
            self.counts.unmap_failures.add(1);
        }
        result
    }
}
