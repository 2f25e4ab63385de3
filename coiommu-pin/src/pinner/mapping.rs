//! The calls of the mapper, each under the block lock of its pages, and what to do when it disagrees with the pin map.
//!
//! Unsafe is needed here, once: for the map call, whose promise about memory stands on the region's.
#![allow(unsafe_code)]

use std::ops::Range;

use coiommu_dtt::PAGE_SIZE;

use super::Pinner;
use crate::mapper::MapError;
use crate::page_set::{BLOCK_PAGES, PageSet};
use crate::pin_map::{Block, BlockNo};
use crate::region::RamRegion;
use crate::space::TableSpace;

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
    pub(super) fn map_extent(
        &self,
        no: BlockNo,
        block: &mut Block,
        pages: Range<usize>,
        region: &RamRegion,
    ) -> Result<(), MapError> {
        let first = no.gfn(pages.start);
        let backing = region.backing(first).ok_or(MapError::Invalid)?;
        let count = pages.len() as u64;
        if !self.map.reserve(count, self.config.policy.quota_pages()) {
            return Err(MapError::NoMemory);
        }
        let (iova, len) = (first.gpa().raw(), count * PAGE_SIZE);
        let call = || {
            self.counts.map_calls.add(1);
            // SAFETY: the region vouches for its memory as long as it lives. It lives until everything of it is unmapped:
            // the table of regions keeps it, present or absent, until its blocks, one of which is locked here, were
            // cleared under their locks; what cannot be unmapped is kept, and leaked at the end.
            unsafe { self.mapper.map(iova, backing, len) }
        };
        let mut result = call();
        if result == Err(MapError::Exists) {
            // The pin map has nothing here, so nothing may be mapped here: out with it, and once more.
            self.note_anomaly(|| format!("{len:#x} bytes at {iova:#x} were mapped behind the pin map's back"));
            if self.call_unmap(&pages, no).is_ok() {
                result = call();
            }
        }
        match result {
            Ok(()) => {
                self.map.enter(block, pages, self.round());
                self.counts.pages_pinned.add(count);
            }
            Err(_) => {
                self.counts.map_failures.add(1);
                self.map.release(count);
            }
        }
        result
    }

    /// Unmaps whole extents and takes them out of the pin map. What lies between two of them unmapped goes in one call.
    pub(super) fn unmap_extents(&self, no: BlockNo, block: &mut Block, going: PageSet) -> Unmapped {
        let mut unmapped = Unmapped::default();
        let staying = block.mapped() - going;
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
        unmapped.extents += self.map.remove(block, together, self.round());
        true
    }

    /// Counts a disagreement, and tells of the 1st, 2nd, 4th, 8th …: a guest may be able to bring them about.
    fn note_anomaly(&self, what: impl FnOnce() -> String) {
        if self.counts.anomalies.add(1).is_power_of_two() {
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
