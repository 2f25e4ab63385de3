//! RAM that comes and goes: hotplug, and firmware that moves it.

use std::ops::Range;
use std::sync::Arc;

use coiommu_dtt::{Dtt, Gfn, Gpa, PAGE_SIZE, TableMemory};

use super::Pinner;
use crate::page_set::PageSet;
use crate::pin_map::{Block, BlockNo};
use crate::region::{AbsentRegion, RamRegion, RegionError};
use crate::space::{Memory, TableSpace};

impl<S: TableSpace> Pinner<S> {
    /// RAM is there. Pages that were pinned when it went, in the same file at the same offset, are mapped again before
    /// this returns: the guest still sees them PINNED. If something else comes to their place, their PINNED is cleared.
    ///
    /// # Errors
    ///
    /// [`RegionError`]: nothing was changed.
    pub fn add_region(&self, region: RamRegion) -> Result<(), RegionError> {
        let _one_at_a_time = self.changing_regions.lock();
        let (gpa, bytes, gfns) = (region.gpa(), region.bytes(), region.gfns());
        let last = gpa.raw() + (bytes - 1);
        let limits = self.mapper.limits();
        if !limits
            .iova_ranges
            .iter()
            .any(|range| range.contains(&gpa.raw()) && range.contains(&last))
        {
            return Err(RegionError::OutsideIommu { gpa, bytes });
        }
        if self.regions.read().touches(&gfns) {
            return Err(RegionError::Overlaps { gpa, bytes });
        }
        // What could not be unmapped when the RAM here went is other memory: not before it is out.
        let stuck = self.unmap_range(&gfns);
        if stuck > 0 {
            return Err(RegionError::Stuck { gpa, pages: stuck });
        }
        let region = Arc::new(region);
        let returning = self.regions.write().add(Arc::clone(&region));
        for absent in returning {
            self.bring_back(&absent, &region);
        }
        Ok(())
    }

    /// RAM goes, which cannot be refused: when this returns, nothing of it is mapped, whoever was using it. The guest's
    /// table is not written. What was mapped is remembered for the RAM's return.
    ///
    /// # Errors
    ///
    /// [`RegionError::Unknown`] if no region is exactly there; [`RegionError::Stuck`] if the IOMMU refused to unmap some
    /// of it: its memory is never freed by the pinner, and must not be used for anything else.
    pub fn remove_region(&self, gpa: Gpa, bytes: u64) -> Result<(), RegionError> {
        let _one_at_a_time = self.changing_regions.lock();
        let first = gpa.raw() / PAGE_SIZE;
        let gfns = first..first.saturating_add(bytes / PAGE_SIZE);
        let exact = gpa.is_page_aligned() && bytes.is_multiple_of(PAGE_SIZE);
        // From here on nothing new is mapped; who is at it now holds a block's lock, which is waited for below.
        let removed = if exact {
            self.regions.write().remove(&gfns)
        } else {
            None
        };
        let region = removed.ok_or(RegionError::Unknown { gpa, bytes })?;
        let stuck = self.unmap_range(&gfns);
        if stuck > 0 {
            log::error!("{stuck} pages of the RAM at {gpa} cannot be unmapped; its memory is never freed");
            region.leak();
            return Err(RegionError::Stuck { gpa, pages: stuck });
        }
        Ok(())
    }

    /// Unmaps what is mapped in a range of regions that went, and remembers it; how many pages would not go.
    fn unmap_range(&self, gfns: &Range<u64>) -> u64 {
        let (mut gone, mut stuck) = (Vec::new(), 0);
        let Some(first) = Gfn::new(gfns.start) else {
            return stuck;
        };
        for (no, chunk) in self
            .map
            .blocks(BlockNo::of(first))
            .take_while(|(no, _)| no.gfns().start < gfns.end)
        {
            let mut block = chunk.lock(no);
            let going = block.mapped() & no.pages_in(gfns);
            if going.is_empty() {
                continue;
            }
            let extents = block.extents();
            let refused = self.unmap_extents(no, &mut block, going);
            stuck += refused.len();
            let start = no.gfns().start;
            gone.extend(
                extents
                    .filter(|extent| (going - refused).contains(extent.start))
                    .map(|extent| start + extent.start as u64..start + extent.end as u64),
            );
        }
        self.regions.write().remember(gone);
        stuck
    }

    /// Maps again what was mapped in a region that went, if it is the same memory; clears its PINNED otherwise.
    fn bring_back(&self, absent: &AbsentRegion, region: &RamRegion) {
        let same = absent.identity.is_some() && absent.identity == region.file_identity();
        let activation = self.activation.read();
        let view = self.space.view();
        for extent in &absent.extents {
            let Some(first) = Gfn::new(extent.start) else { continue };
            let no = BlockNo::of(first);
            let chunk = self.map.chunk_or_new(no);
            let mut block = chunk.lock(no);
            // A pin that came first has mapped what it needed; what is held stays out.
            let missing = no.pages_in(extent) - block.mapped();
            let back = if same {
                missing - self.holds.pages_of(no)
            } else {
                PageSet::EMPTY
            };
            let refused = self.map_again(no, &mut block, back, region);
            let lost = (missing - back) | refused;
            self.counts.pages_lost.add(lost.len());
            if let Some(dtt) = activation.dtt {
                clear_pinned(no, lost, dtt, &*view);
            }
        }
    }

    /// Forgets what was mapped when RAM went; PINNED is cleared if a table is given.
    pub(super) fn forget_absent(&self, table: Option<(Dtt, &Memory<S>)>) {
        let forgotten = self.regions.write().forget_extents();
        let Some((dtt, mem)) = table else { return };
        for extent in forgotten {
            let Some(no) = Gfn::new(extent.start).map(BlockNo::of) else {
                continue;
            };
            if let Some(chunk) = self.map.chunk(no) {
                let _block = chunk.lock(no);
                clear_pinned(no, no.pages_in(&extent), dtt, mem);
            }
        }
    }

    /// Maps pages again; those that cannot be.
    fn map_again(&self, no: BlockNo, block: &mut Block, missing: PageSet, region: &RamRegion) -> PageSet {
        let mut lost = PageSet::EMPTY;
        for run in missing.runs() {
            if let Err(error) = self.map_extent(no, block, run.clone(), region) {
                log::warn!(
                    "{} pages at {} cannot be mapped again: {error}",
                    run.len(),
                    no.gfn(run.start).gpa()
                );
                lost.insert(run);
            }
        }
        lost
    }
}

/// Clears PINNED on pages that are not mapped. Where there is no table, there is nobody who could see it.
fn clear_pinned<M: TableMemory + ?Sized>(no: BlockNo, pages: PageSet, dtt: Dtt, mem: &M) {
    if let Ok(table) = dtt.leaf_table(mem, no.gfn(0)) {
        pages.pages().for_each(|page| table.leaf(no.gfn(page)).clear_pinned());
    }
}
