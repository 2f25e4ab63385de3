//! RAM that comes and goes: hotplug, and firmware that moves it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use coiommu_dtt::{Dtt, Gfn, Gpa, PAGE_SIZE};

use super::Pinner;
use super::unpin::Leaves;
use crate::page_set::PageSet;
use crate::pin_map::{Block, BlockNo};
use crate::region::{AbsentRegion, RamRegion, RegionError};
use crate::space::{Memory, TableSpace};

impl<S: TableSpace> Pinner<S> {
    /// RAM is there, and the [`TableSpace`] shows it already. Pages that were pinned when it went, in the same file at the
    /// same offset, are mapped again before this returns: the guest still sees them PINNED. If something else comes to
    /// their place, their PINNED is cleared.
    ///
    /// # Errors
    ///
    /// [`RegionError`]: the region is not there.
    pub fn add_region(&self, region: RamRegion) -> Result<(), RegionError> {
        let _one_at_a_time = self.changing_regions.lock();
        let (gpa, bytes, gfns) = (region.gpa(), region.bytes(), region.gfns());
        let last = gpa.raw() + (bytes - 1);
        let limits = self.mapper.limits();
        if !limits.iova_ranges.iter().any(|range| range.contains(&gpa.raw()) && range.contains(&last)) {
            return Err(RegionError::OutsideIommu { gpa, bytes });
        }
        if self.regions.read().touches(&gfns) {
            return Err(RegionError::Overlaps { gpa, bytes });
        }
        // What could not be unmapped when the RAM here went is other memory: not before it is out.
        let stuck = self.unmap_absent(&gfns);
        if stuck > 0 {
            return Err(RegionError::Stuck { gpa, pages: stuck });
        }
        let region = Arc::new(region);
        let returning = self.regions.write().add(Arc::clone(&region));
        let lost: Vec<_> = returning.iter().flat_map(|absent| self.bring_back(absent, &region)).collect();
        let pages: u64 = lost.iter().map(|run| run.end - run.start).sum();
        if pages > 0 {
            self.counts.pages_lost.add(pages);
            log::warn!("{pages} pages were pinned when the RAM at {gpa} went, and are not any more");
        }
        self.clear_stale(lost);
        self.count_region_change();
        Ok(())
    }

    /// RAM goes, which cannot be refused: when this returns, nothing of it is mapped, whoever was using it, and the
    /// [`TableSpace`] may stop showing it. The guest's table is not written. What was mapped is remembered for the RAM's
    /// return.
    ///
    /// # Errors
    ///
    /// [`RegionError::Unknown`] if no region is exactly there; [`RegionError::Stuck`] if the IOMMU refused to unmap some
    /// of it: the pinner keeps its memory, which must not be used for anything else.
    pub fn remove_region(&self, gpa: Gpa, bytes: u64) -> Result<(), RegionError> {
        let _one_at_a_time = self.changing_regions.lock();
        let first = gpa.raw() / PAGE_SIZE;
        let gfns = first..first.saturating_add(bytes / PAGE_SIZE);
        let exact = gpa.is_page_aligned() && bytes.is_multiple_of(PAGE_SIZE);
        // From here on nothing new is mapped; who is at it now holds a block's lock, which is waited for below.
        let removed = if exact { self.regions.write().remove(&gfns) } else { None };
        let forgotten = removed.ok_or(RegionError::Unknown { gpa, bytes })?;
        let stuck = self.unmap_absent(&gfns);
        self.count_region_change();
        self.clear_stale(forgotten);
        if stuck > 0 {
            log::error!("{stuck} pages of the RAM at {gpa} cannot be unmapped; its memory is kept");
            return Err(RegionError::Stuck { gpa, pages: stuck });
        }
        Ok(())
    }

    /// Called when RAM has come or gone, not before: a forced unpin that begins in the middle, and sees a part of it, must
    /// find that something changed when it ends.
    fn count_region_change(&self) {
        self.region_changes.fetch_add(1, Relaxed);
    }

    /// Unmaps what is mapped in a range of regions that went, and remembers it; how many pages would not go.
    fn unmap_absent(&self, gfns: &Range<u64>) -> u64 {
        let (mut gone, mut stuck) = (Vec::new(), 0);
        let Some(first) = Gfn::new(gfns.start) else {
            return stuck;
        };
        for (no, chunk) in self.map.blocks(BlockNo::of(first)).take_while(|(no, _)| no.gfns().start < gfns.end) {
            let mut block = chunk.lock(no);
            let going = block.mapped() & no.pages_in(gfns);
            if going.is_empty() {
                continue;
            }
            let extents = block.extents();
            let refused = self.unmap_extents(no, &mut block, going).refused;
            stuck += refused.len();
            let start = no.gfns().start;
            gone.extend(
                extents
                    .filter(|extent| (going - refused).contains(extent.start))
                    .map(|extent| start + extent.start as u64..start + extent.end as u64),
            );
        }
        let mut regions = self.regions.write();
        regions.remember(gone);
        if stuck == 0 {
            regions.let_go(gfns);
        }
        stuck
    }

    /// Maps again what was mapped in a region that went, if it is the same memory. What is lost, as runs of gfns in one block
    /// each: its PINNED is to be cleared.
    fn bring_back(&self, absent: &AbsentRegion, region: &RamRegion) -> Vec<Range<u64>> {
        let same = absent.identity.is_some() && absent.identity == region.file_identity();
        let mut all_lost = Vec::new();
        for extent in &absent.extents {
            let Some(no) = Gfn::new(extent.start).map(BlockNo::of) else { continue };
            let chunk = self.map.chunk_or_new(no);
            let mut block = chunk.lock(no);
            // A pin that came first has mapped what it needed. No hold has any of these pages: a forced unpin counts them
            // as busy, and begins again if they come back meanwhile.
            let missing = no.pages_in(extent) - block.mapped();
            let lost = if same { self.map_again(no, &mut block, missing, region) } else { missing };
            let start = no.gfns().start;
            all_lost.extend(lost.runs().map(|run| start + run.start as u64..start + run.end as u64));
        }
        all_lost
    }

    /// Maps pages again; those that cannot be.
    fn map_again(&self, no: BlockNo, block: &mut Block, missing: PageSet, region: &RamRegion) -> PageSet {
        let mut lost = PageSet::EMPTY;
        for run in missing.runs() {
            if self.map_extent(no, block, run.clone(), region).is_err() {
                lost.insert(run);
            }
        }
        lost
    }

    /// Clears PINNED on pages whose mappings are forgotten, and on those where it could not be done before because their
    /// table was away.
    fn clear_stale(&self, ranges: Vec<Range<u64>>) {
        let mut stale = self.stale.lock();
        stale.extend(ranges);
        if stale.is_empty() {
            return;
        }
        let activation = self.activation.read();
        match activation.dtt {
            Some(dtt) => {
                let view = self.space.view();
                stale.retain(|range| !self.clear_pinned(range, dtt, &view));
            }
            None => stale.clear(),
        }
    }

    /// Forgets what was mapped when RAM went; PINNED is cleared if a table is given.
    pub(super) fn forget_absent(&self, table: Option<(Dtt, &Memory<S>)>) {
        let forgotten = self.regions.write().forget_extents();
        let stale = std::mem::take(&mut *self.stale.lock());
        if let Some((dtt, mem)) = table {
            for range in forgotten.iter().chain(&stale) {
                self.clear_pinned(range, dtt, mem);
            }
        }
    }

    /// Clears PINNED on the pages of a range, in one block, that are not mapped; false if their table is away.
    fn clear_pinned(&self, range: &Range<u64>, dtt: Dtt, mem: &Memory<S>) -> bool {
        let Some(no) = Gfn::new(range.start).map(BlockNo::of) else {
            return true;
        };
        // Something was mapped there once, so there are books.
        let Some(chunk) = self.map.chunk(no) else { return true };
        let block = chunk.lock(no);
        let pages = no.pages_in(range) - block.mapped();
        let leaves = Leaves::find(no, dtt, mem);
        leaves.clear_pinned(pages);
        !leaves.are_away()
    }
}
