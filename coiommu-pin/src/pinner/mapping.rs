//! The calls of the mapper, each under the block lock of its pages, and what to do when it disagrees with the pin map.
//!
//! Unsafe is needed here, once: for the map call, whose promise about memory stands on the region's.
#![allow(unsafe_code)]

use std::ops::Range;

use coiommu_dtt::PAGE_SIZE;

use super::Pinner;
use crate::mapper::MapError;
use crate::page_set::PageSet;
use crate::pin_map::{Block, BlockNo};
use crate::region::RamRegion;
use crate::space::TableSpace;

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
            // it leaves the table of regions first, and is dropped after its blocks were cleared under their locks, one
            // of which is held here; what cannot be unmapped is leaked.
            unsafe { self.mapper.map(iova, backing, len) }
        };
        let mut result = call();
        if result == Err(MapError::Exists) {
            // The pin map has nothing here, so nothing may be mapped here.
            self.counts.anomalies.add(1);
            log::warn!("{len:#x} bytes at {iova:#x} were mapped behind the pin map's back");
            self.counts.map_failures.add(1);
            result = self.call_unmap(&pages, no).and_then(|_| call());
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

    /// Unmaps whole extents and takes them out of the pin map; the pages that the mapper refused to unmap, which stay.
    /// What lies between two of them unmapped goes in one call.
    pub(super) fn unmap_extents(&self, no: BlockNo, block: &mut Block, going: PageSet) -> PageSet {
        let mut refused = PageSet::EMPTY;
        let staying = block.mapped() - going;
        let mut next = going.first_from(0);
        while let Some(start) = next {
            let limit = staying
                .first_from(start)
                .unwrap_or(going.last().map_or(0, |last| last + 1));
            let together = going & PageSet::range(start..limit);
            let span = start..together.last().map_or(start, |last| last + 1);
            next = going.first_from(limit.max(start + 1));
            match self.call_unmap(&span, no) {
                Ok(bytes) => {
                    if bytes != together.len() * PAGE_SIZE {
                        // Out of the IOMMU it is, whoever took it: the books follow.
                        self.counts.anomalies.add(1);
                        log::warn!(
                            "{bytes:#x} bytes were mapped where the pin map had {} pages",
                            together.len()
                        );
                    }
                    self.counts.pages_unpinned.add(together.len());
                    self.map.remove(block, together, self.round());
                }
                Err(_) => refused |= together,
            }
        }
        refused
    }

    fn call_unmap(&self, pages: &Range<usize>, no: BlockNo) -> Result<u64, MapError> {
        self.counts.unmap_calls.add(1);
        let result = self
            .mapper
            .unmap(no.gfn(pages.start).gpa().raw(), pages.len() as u64 * PAGE_SIZE);
        if result.is_err() {
            self.counts.unmap_failures.add(1);
        }
        result
    }
}
