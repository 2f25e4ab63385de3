//! Pinning all RAM, for devices whose DMA nobody counts: a firmware's, or those of a guest without the driver.
//!
//! Life goes like this: [`Pinner::keep_all`], then [`Pinner::pin_all`] until it is done, and again whenever RAM has come;
//! the devices may do DMA while it is. Once all of them are counted for, [`Pinner::let_all_age`], and
//! [`Pinner::release_idle`] every so often until nothing is left of it.
//!
//! The flag that keeps what is mapped is set before the first block is looked at, and read under the lock of a block: by who
//! is to take something from it, and by `pin_all`. So whatever a block lost, it lost before `pin_all` came to it, and has
//! again after; or the flag is gone, and `pin_all` says so. It changes to "kept" only between drains, not in their midst.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use coiommu_dtt::{Gfn, Gpa, PAGE_SIZE};

use super::mapping::Tally;
use super::unpin::{Ask, Limit};
use super::{Clock, Pinner};
use crate::mapper::MapError;
use crate::page_set::BLOCK_PAGES;
use crate::pin_map::{Block, BlockNo, Spot};
use crate::space::TableSpace;

/// How far all RAM is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "all RAM is not pinned before this says so"]
pub enum PinAll {
    /// There is more: go on from this gfn.
    More(u64),
    /// Some pages were passed over as their memory is being taken: go on from this gfn, and then begin again.
    Held(u64),
    /// From the gfn that it began with, all RAM there was is pinned.
    Done,
    /// It cannot be.
    Failed(PinAllError),
    /// It is not to be any more: a drain has ended the keeping.
    Over,
}

/// Why not all RAM can be pinned; what was pinned until then is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{pages} pages at {gpa} cannot be pinned, with {pinned} pinned: {error}")]
pub struct PinAllError {
    /// Where it failed.
    pub gpa: Gpa,
    /// How many pages were to be mapped at once there.
    pub pages: u64,
    /// How many pages are pinned.
    pub pinned: u64,
    /// What the mapper says; a quota that is used up is [`MapError::NoMemory`].
    pub error: MapError,
}

/// How far what was kept is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released {
    /// Where the pass goes on; `None`: it is over.
    pub next: Option<u64>,
    /// In how many of the blocks that were looked at something is left. A block may be kept by a page that was asked for since.
    pub left: u64,
}

impl<S: TableSpace> Pinner<S> {
    /// From here on nothing is unpinned, whether idle or wanted back, until [`let_all_age`](Self::let_all_age), a
    /// deactivation, or the end of an activation: not by ticks, to make room, or by force. RAM that goes still goes. What is
    /// mapped stays when a table is [activated](Self::activate).
    pub fn keep_all(&self) {
        let _no_drain = self.changing_regions.write();
        self.keeps_all.store(true, Relaxed);
    }

    /// Whether what is mapped is kept, whoever uses it.
    #[must_use]
    pub fn keeps_all(&self) -> bool {
        self.keeps_all.load(Relaxed)
    }

    /// Maps all RAM from a gfn on that is not mapped, in extents as large as can be: a block, 2 MiB. Takes `time`, and one
    /// block's map calls more. The guest's table is not looked at. For while [all is kept](Self::keep_all): it is
    /// [over](PinAll::Over) otherwise.
    ///
    /// RAM that comes meanwhile may be missed: begin again when it has come. What is pinned already takes no time to speak of.
    pub fn pin_all(&self, from: u64, clock: &dyn Clock, time: Duration) -> PinAll {
        let end = clock.now().saturating_add(time);
        let mut next = from;
        loop {
            next = match self.pin_next_block(next) {
                ControlFlow::Continue(after) => after,
                ControlFlow::Break(result) => return result,
            };
            if clock.roughly() >= end {
                return PinAll::More(next);
            }
        }
    }

    /// Maps what is not mapped of the first block with RAM at or after a gfn, as far as it is in one region; what comes after.
    fn pin_next_block(&self, from: u64) -> ControlFlow<PinAll, u64> {
        // Held for one block, so that RAM comes and goes in between.
        let regions = self.regions.read();
        let here = regions.find(from).map(|bank| (from, bank));
        let found = here.or_else(|| regions.next_start(from).and_then(|at| Some((at, regions.find(at)?))));
        let Some((at, bank)) = found else { return ControlFlow::Break(PinAll::Done) };
        let fail = |gpa, pages, error| PinAll::Failed(PinAllError { gpa, pages, pinned: self.pinned_pages(), error });
        let Some((gfn, block)) = Gfn::new(at).zip(bank.books.block(at)) else {
            return ControlFlow::Break(fail(Gpa::new(at.saturating_mul(PAGE_SIZE)), 1, MapError::Invalid));
        };
        let no = BlockNo::of(gfn);
        let after = no.gfns().end.min(bank.region.gfns().end);
        let mut block = block.lock();
        if !self.keeps_all() {
            return ControlFlow::Break(PinAll::Over);
        }
        let held = self.holds.pages_of(no).unwrap_or_default();
        let missing = no.pages_in(&(at..after)) - *block.mapped();
        let mut tally = Tally::new(self);
        for run in (missing - held).runs() {
            let (gpa, pages) = (no.gfn(run.start).gpa(), run.len() as u64);
            if let Err(error) = self.map_extent(no, &mut block, run, &bank.region, &mut tally) {
                tally.settle();
                return ControlFlow::Break(fail(gpa, pages, error));
            }
        }
        if (missing & held).is_empty() { ControlFlow::Continue(after) } else { ControlFlow::Break(PinAll::Held(after)) }
    }

    /// Everything may be unpinned again that is idle, as the policy says; what was mapped while all was kept is to be
    /// [released](Self::release_idle) whatever it says.
    pub fn let_all_age(&self) {
        self.keeps_all.store(false, Relaxed);
    }

    /// Looks, from a gfn on and for `time`, at the blocks in which something was mapped while all was kept: what is idle there
    /// goes, the rest ages, as in a [tick](Self::tick). To be called until the pass is over, and some time later again, until
    /// nothing is left. While parked or not active, nothing goes.
    pub fn release_idle(&self, from: u64, clock: &dyn Clock, time: Duration) -> Released {
        let end = clock.now().saturating_add(time);
        let mut left = 0;
        let stopped = self.visit(from, |spot| {
            if spot.first > from && clock.roughly() >= end {
                return ControlFlow::Break(spot.first);
            }
            left += u64::from(self.release_in(spot));
            ControlFlow::Continue(())
        });
        Released { next: stopped.break_value(), left }
    }

    /// Whether something is left in a block.
    fn release_in(&self, spot: Spot<'_>) -> bool {
        if !spot.block.lock().is_kept() {
            return false;
        }
        let activation = self.activation.read();
        let work = |block: &mut Block| {
            if let Some(dtt) = activation.dtt {
                let unpinned = self.unpin_block(spot.no, block, Ask::Idle, Limit::NONE, dtt, &self.space.view());
                self.counts.pages_unpinned_idle.add(unpinned.pages);
            }
            block.is_kept()
        };
        // Who parks, or is at work there, is not waited for.
        self.try_block(spot, work).unwrap_or(true)
    }

    /// Unpins everything that was pinned for nothing, as not all of it could be. Only while no table is in use: what a guest
    /// has asked for stays.
    pub fn give_up_all(&self) {
        let _one_at_a_time = self.changing_regions.write();
        self.let_all_age();
        if !self.is_active() {
            let _counted_and_told = self.drain(super::Drain::Reset);
        }
    }
}

// An extent never crosses a block, so this is the largest there is.
const _: () = assert!(BLOCK_PAGES as u64 * PAGE_SIZE == 2 << 20);
