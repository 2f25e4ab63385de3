//! RAM that comes and goes: hotplug, and firmware that moves it.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::Ordering::Release;

use coiommu_dtt::{Dtt, Gfn, Gpa, PAGE_SIZE};

use super::Pinner;
use super::leaves::Leaves;
use super::mapping::Tally;
use super::unpin::Need;
use crate::page_set::PageSet;
use crate::pin_map::{Block, BlockNo};
use crate::region::{RamRegion, RegionError};
use crate::region_table::{AbsentRegion, Bank, intersection};
use crate::space::{Memory, TableSpace};
use crate::sync::Mutex;

impl<S: TableSpace> Pinner<S> {
    /// RAM is there, and the [`TableSpace`] shows it already. Pages that were pinned when it went, in the same file at the
    /// same offset, are mapped again before this returns: the guest still sees them PINNED. If something else comes to
    /// their place, their PINNED is cleared. Where [all is kept](Self::keep_all) and no table is in use, they are not:
    /// [`pin_all`](Self::pin_all) does it.
    ///
    /// # Errors
    ///
    /// [`RegionError`]: the region is not there.
    pub fn add_region(&self, region: RamRegion) -> Result<(), RegionError> {
        let _one_at_a_time = self.changing_regions.write();
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
        // Where all is pinned anyway and nobody has seen what was, that takes its time later.
        let is_for_nobody = self.keeps_all() && !self.is_active();
        let lost = if is_for_nobody { Vec::new() } else { self.bring_back(&returning, &bank) };
        let pages: u64 = lost.iter().map(|run| run.end - run.start).sum();
        if let Some(all) = self.counts.pages_lost.add_and_tell(pages) {
            log::warn!("{pages} pages were pinned when the RAM at {gpa} went, and are not any more ({all} so far)");
        }
        self.clear_stale(lost.into_iter().chain(forgotten));
        self.count_region_change();
        Ok(())
    }

    /// RAM goes, which cannot be refused: when this returns, nothing of it is mapped, whoever was using it, and the
    /// [`TableSpace`] may stop showing it; views of it that were taken before are used for a moment more, and keep the
    /// memory that they show. The guest's table is not written. What was mapped is remembered for the RAM's
    /// return.
    ///
    /// # Errors
    ///
    /// [`RegionError::Unknown`] if no region is exactly there; [`RegionError::Stuck`] if the IOMMU refused to unmap some
    /// of it: the pinner keeps its memory, which must not be used for anything else.
    pub fn remove_region(&self, gpa: Gpa, bytes: u64) -> Result<(), RegionError> {
        let _one_at_a_time = self.changing_regions.write();
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
            let gone_here = extents.filter(|extent| !refused.contains(extent.start));
            gone.extend(gone_here.map(|extent| gfns_of(spot.no, extent)));
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

    /// Maps again what was mapped in regions that went, if it is the same memory. What is lost, as runs of gfns in one block
    /// each: its PINNED is to be cleared.
    fn bring_back(&self, returning: &[AbsentRegion], bank: &Bank) -> Vec<Range<u64>> {
        let identity = bank.region.file_identity();
        let is_same = |absent: &&AbsentRegion| absent.identity.is_some() && absent.identity == identity;
        let (same, other): (Vec<_>, Vec<_>) = returning.iter().partition(is_same);
        let (mut lost, need) = self.map_again(same.into_iter().flat_map(|absent| &absent.extents), bank);
        if !need.is_nothing() {
            let number = self.activation.read().number;
            let _what_there_is = self.make_room(need, number, &|| false);
            (lost, _) = self.map_again(&lost, bank);
        }
        for extent in other.into_iter().flat_map(|absent| &absent.extents) {
            if let Some((no, block)) = block_of(extent, bank) {
                // A pin that came first has mapped what it needed.
                let missing = no.pages_in(extent) - *block.lock().mapped();
                lost.extend(missing.runs().map(|run| gfns_of(no, run)));
            }
        }
        lost
    }

    /// Maps what is not mapped of some extents. What could not be, as runs of gfns in one block each, and the room that was
    /// wanting for it.
    fn map_again<'e>(&self, extents: impl IntoIterator<Item = &'e Range<u64>>, bank: &Bank) -> (Vec<Range<u64>>, Need) {
        let mut tally = Tally::new(self);
        let (mut lost, mut need) = (Vec::new(), Need::default());
        for extent in extents {
            let Some((no, block)) = block_of(extent, bank) else { continue };
            let mut block = block.lock();
            // A pin that came first has mapped what it needed. No hold has any of these pages: a forced unpin counts them
            // as busy, and begins again if they come back meanwhile.
            let missing = no.pages_in(extent) - *block.mapped();
            for run in missing.runs() {
                let Err(error) = self.map_extent(no, &mut block, run.clone(), &bank.region, &mut tally) else {
                    continue;
                };
                if let Some(shortage) = error.shortage() {
                    need += Need::of(shortage, run.len() as u64, 1);
                }
                lost.push(gfns_of(no, run));
            }
        }
        (lost, need)
    }

    /// Clears PINNED on pages whose mappings are forgotten, and on those where it could not be done before because their
    /// table was away.
    fn clear_stale(&self, ranges: impl IntoIterator<Item = Range<u64>>) {
        let mut stale = self.stale.lock();
        ranges.into_iter().for_each(|range| stale.add(&range));
        if stale.0.is_empty() {
            return;
        }
        let activation = self.activation.read();
        match activation.dtt {
            Some(dtt) => {
                let view = self.space.view();
                stale.0.retain(|&no, pages| !self.clear_pinned(no, *pages, dtt, &view));
            }
            None => stale.0.clear(),
        }
        stale.keep_within_bounds();
    }

    /// Forgets what was mapped when RAM went; PINNED is cleared if a table is given.
    pub(super) fn forget_absent(&self, table: Option<(Dtt, &Memory<S>)>) {
        let forgotten = self.regions.write().forget_extents();
        let mut stale = std::mem::take(&mut *self.stale.lock());
        if let Some((dtt, mem)) = table {
            forgotten.iter().for_each(|range| stale.add(range));
            for (no, pages) in stale.0 {
                self.clear_pinned(no, pages, dtt, mem);
            }
        }
    }

    /// Clears PINNED on those of some pages of a block that are not mapped; false if their table is away.
    fn clear_pinned(&self, no: BlockNo, pages: PageSet, dtt: Dtt, mem: &Memory<S>) -> bool {
        let regions = self.regions.read();
        let mut rest = pages;
        for bank in regions.touching(&no.gfns()) {
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

/// Pages, by their block, whose PINNED is to be cleared once their table is back.
#[derive(Debug, Default)]
pub(super) struct Stale(BTreeMap<BlockNo, PageSet>);

impl Stale {
    /// Of so many blocks. Only a guest that lets its table lead nowhere while its RAM comes and goes has more, and what is
    /// forgotten of it harms nobody else.
    const MOST: usize = 1 << 14;

    /// Adds a range of gfns in one block.
    fn add(&mut self, range: &Range<u64>) {
        if let Some(no) = Gfn::new(range.start).map(BlockNo::of) {
            *self.0.entry(no).or_default() |= no.pages_in(range);
        }
    }

    fn keep_within_bounds(&mut self) {
        while self.0.len() > Self::MOST {
            self.0.pop_first();
        }
    }
}

/// The block of an extent.
fn block_of<'b>(extent: &Range<u64>, bank: &'b Bank) -> Option<(BlockNo, &'b Mutex<Block>)> {
    Gfn::new(extent.start).map(BlockNo::of).zip(bank.books.block(extent.start))
}

/// The gfns of a run of a block's pages.
fn gfns_of(no: BlockNo, run: Range<usize>) -> Range<u64> {
    let start = no.gfns().start;
    start + run.start as u64..start + run.end as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stale_is_kept_once() {
        let mut stale = Stale::default();
        for _ in 0..3 {
            stale.add(&(3..5));
            stale.add(&(4..6));
        }
        assert_eq!(stale.0.into_iter().collect::<Vec<_>>(), [(BlockNo::of(Gfn::default()), PageSet::range(3..6))]);
    }

    #[test]
    #[cfg_attr(miri, ignore = "thousands of blocks, and nothing unsafe")]
    fn what_is_stale_is_kept_within_bounds() {
        let mut stale = Stale::default();
        let most = Stale::MOST as u64;
        (0..most + 9).for_each(|block| stale.add(&(block * 512..block * 512 + 1)));
        stale.keep_within_bounds();
        assert_eq!(stale.0.len() as u64, most);
    }
}
