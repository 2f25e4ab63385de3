//! RAM that comes and goes: hotplug, and firmware that moves it.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::Ordering::Release;

use coiommu_dtt::{Dtt, Gfn, Gpa, PAGE_SIZE};

use super::Pinner;
use super::leaves::Leaves;
use super::mapping::Tally;
use crate::page_set::PageSet;
use crate::pin_map::BlockNo;
use crate::region::{RamRegion, RegionError};
use crate::region_table::{AbsentRegion, Bank, intersection};
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
        if self.regions.read().touching(&gfns).next().is_some() {
            return Err(RegionError::Overlaps { gpa, bytes });
        }
        // What could not be unmapped when the RAM here went is other memory: not before it is out.
        let leaving = self.regions.read().leaving().map(|bank| bank.region.gfns()).collect::<Vec<_>>();
        let stuck =
            leaving.iter().filter(|old| intersection(old, &gfns).is_some()).map(|old| self.clear_out(old)).sum();
        if stuck > 0 {
            self.count_region_change();
            return Err(RegionError::Stuck { gpa, pages: stuck });
        }
        let bank = Bank::new(region);
        let (returning, forgotten) = self.regions.write().add(bank.clone());
        let lost: Vec<_> = returning.iter().flat_map(|absent| self.bring_back(absent, &bank)).collect();
        let pages: u64 = lost.iter().map(|run| run.end - run.start).sum();
        if pages > 0 {
            self.counts.pages_lost.add(pages);
            log::warn!("{pages} pages were pinned when the RAM at {gpa} went, and are not any more");
        }
        self.clear_stale(lost.into_iter().chain(forgotten));
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
        // Who is mapping still has the table of regions to read, and is waited for here. From here on nothing new is mapped.
        let removed = if exact { self.regions.write().remove(&gfns) } else { None };
        let forgotten = removed.ok_or(RegionError::Unknown { gpa, bytes })?;
        let stuck = self.clear_out(&gfns);
        self.clear_stale(forgotten);
        self.count_region_change();
        if stuck > 0 {
            log::error!("{stuck} pages of the RAM at {gpa} cannot be unmapped; its memory is kept");
            return Err(RegionError::Stuck { gpa, pages: stuck });
        }
        Ok(())
    }

    /// Called when RAM has come or gone, not before: a forced unpin that begins in the middle, and sees a part of it, must
    /// find that something changed when it ends.
    fn count_region_change(&self) {
        self.region_changes.fetch_add(1, Release);
    }

    /// Unmaps what is mapped of a region that went, and remembers it; how many pages would not go.
    fn clear_out(&self, gfns: &Range<u64>) -> u64 {
        let (mut gone, mut stuck) = (Vec::new(), 0);
        let _: ControlFlow<()> = self.visit(gfns.start, |spot| {
            if spot.first >= gfns.end {
                return ControlFlow::Break(());
            }
            let mut block = spot.block.lock();
            let (going, extents) = (*block.mapped(), block.extents());
            let refused = self.unmap_extents(spot.no, &mut block, going).refused;
            stuck += refused.len();
            let start = spot.no.gfns().start;
            gone.extend(
                extents
                    .filter(|extent| !refused.contains(extent.start))
                    .map(|extent| start + extent.start as u64..start + extent.end as u64),
            );
            ControlFlow::Continue(())
        });
        let mut regions = self.regions.write();
        regions.remember(gone);
        let gone = if stuck == 0 { regions.let_go(gfns) } else { None };
        drop(regions);
        // Not with the lock held: its owner may take long to go.
        drop(gone);
        stuck
    }

    /// Maps again what was mapped in a region that went, if it is the same memory. What is lost, as runs of gfns in one block
    /// each: its PINNED is to be cleared.
    fn bring_back(&self, absent: &AbsentRegion, bank: &Bank) -> Vec<Range<u64>> {
        let same = absent.identity.is_some() && absent.identity == bank.region.file_identity();
        let mut tally = Tally::new(self);
        let mut all_lost = Vec::new();
        for extent in &absent.extents {
            let Some((no, block)) = Gfn::new(extent.start).map(BlockNo::of).zip(bank.books.block(extent.start)) else {
                continue;
            };
            let mut block = block.lock();
            // A pin that came first has mapped what it needed. No hold has any of these pages: a forced unpin counts them
            // as busy, and begins again if they come back meanwhile.
            let mut lost = no.pages_in(extent) - *block.mapped();
            if same {
                let missing = lost;
                let is_back =
                    |run: &Range<usize>| self.map_extent(no, &mut block, run.clone(), &bank.region, &mut tally).is_ok();
                missing.runs().filter(is_back).for_each(|run| lost -= PageSet::range(run));
            }
            let start = no.gfns().start;
            all_lost.extend(lost.runs().map(|run| start + run.start as u64..start + run.end as u64));
        }
        all_lost
    }

    /// Clears PINNED on pages whose mappings are forgotten, and on those where it could not be done before because their
    /// table was away.
    fn clear_stale(&self, ranges: impl IntoIterator<Item = Range<u64>>) {
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
        let regions = self.regions.read();
        let mut rest = no.pages_in(range);
        for bank in regions.touching(range) {
            let here = rest & no.pages_in(&bank.region.gfns());
            rest -= here;
            if let Some(block) = here.first_from(0).and_then(|page| bank.books.block(no.gfn(page).raw())) {
                let block = block.lock();
                // Under the lock: until their PINNED is cleared, the guest has no reason to free the table.
                Leaves::find(no, dtt, mem).clear_pinned(here - *block.mapped());
            }
        }
        // Where there is no RAM, nothing is mapped, and nobody sets PINNED.
        let leaves = Leaves::find(no, dtt, mem);
        leaves.clear_pinned(rest);
        !leaves.are_away()
    }
}
