//! Unpinning a range on demand, because its memory is about to be taken from the guest, and holding it until it is.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::Duration;

use coiommu_dtt::{Gfn, Gpa, PAGE_SIZE};

use super::unpin::{Ask, Limit, NotNow};
use super::{Clock, Pinner};
use crate::page_set::PageSet;
use crate::pin_map::{self, BlockNo, Spot};
use crate::space::TableSpace;
use crate::sync::Mutex;
use crate::sync::atomic::AtomicU64;

/// How many blocks one step of a forced unpin works on.
const STEP_BLOCKS: usize = 64;

/// A range that is being unpinned on demand. No page of it is pinned anew from [`Pinner::begin_unpin`] on, and for as long
/// as this or the [`Hold`] it ends in lives.
#[derive(Debug)]
#[must_use = "nothing is unpinned before its steps"]
pub struct ForcedUnpin {
    hold: Hold,
    /// The gfn from which blocks are yet to be worked on.
    next: u64,
    started: Duration,
    /// How many regions had come and gone when it began.
    region_changes: u64,
    report: UnpinReport,
}

/// What became of the pages of a range. The four numbers add up to the range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnpinReport {
    /// Pages that were pinned and are not any more.
    pub released: u64,
    /// Pages that were not pinned.
    pub not_pinned: u64,
    /// Pages that stay pinned: in use, in an extent with one in use, [kept](Pinner::keep_all), or the IOMMU refused. Also pages
    /// that were pinned when their RAM went, and will be again when it returns, and pages of which it cannot be told in time.
    pub busy: u64,
    /// Pages that stay pinned because the guest has parked unpinning.
    pub parked: u64,
}

impl UnpinReport {
    /// Whether the range's memory may be taken: nothing of it is mapped.
    #[must_use]
    pub const fn may_be_taken(&self) -> bool {
        self.busy == 0 && self.parked == 0
    }
}

/// How far a forced unpin is.
#[derive(Debug)]
#[must_use = "a forced unpin is not done until it says so"]
pub enum UnpinStep {
    /// There is more: call again.
    More(ForcedUnpin),
    /// Unpinning is parked, or RAM comes or goes, or everything is being drained: call again in a moment.
    Wait(ForcedUnpin),
    /// It is done. With the hold, which is there if the range may be taken, nothing in it is pinned; drop it once the
    /// memory is taken.
    Done(UnpinReport, Option<Hold>),
}

/// While it lives, no page of a range is pinned: requests for one wait for its end, as long as they wait for RAM
/// ([`PinnerConfig::wait_time`](super::PinnerConfig::wait_time)), and are answered with PINNED clear then.
#[derive(Debug)]
pub struct Hold {
    holds: Arc<Holds>,
    id: u64,
    gfns: Range<u64>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.holds.remove(self.id);
    }
}

/// The ranges that are held.
#[derive(Debug, Default)]
pub(super) struct Holds {
    /// From the first page that is held to the end of the last; nothing, if the end is not behind it. Written with the list
    /// locked. Whoever locks a block after the holder has locked it sees values that are no older than the hold, and as long
    /// as that lives, each of them has its pages within: so it does not matter if the two are of different moments.
    first: AtomicU64,
    end: AtomicU64,
    list: Mutex<List>,
}

#[derive(Debug, Default)]
struct List {
    next_id: u64,
    held: Vec<(u64, Range<u64>)>,
}

impl Holds {
    fn add(self: &Arc<Self>, gfns: Range<u64>) -> Hold {
        let mut list = self.list.lock();
        let id = list.next_id;
        list.next_id += 1;
        list.held.push((id, gfns.clone()));
        self.set_bounds(&list);
        Hold { holds: Arc::clone(self), id, gfns }
    }

    fn remove(&self, id: u64) {
        let mut list = self.list.lock();
        list.held.retain(|(held, _)| *held != id);
        self.set_bounds(&list);
    }

    fn set_bounds(&self, list: &List) {
        let ranges = || list.held.iter().map(|(_, gfns)| gfns);
        self.first.store(ranges().map(|gfns| gfns.start).min().unwrap_or(0), Release);
        self.end.store(ranges().map(|gfns| gfns.end).max().unwrap_or(0), Release);
    }

    /// The pages of a block that are held; `None` if there are no holds anywhere near. Called under its lock.
    #[inline]
    pub(super) fn pages_of(&self, no: BlockNo) -> Option<PageSet> {
        let (block, held) = (no.gfns(), self.first.load(Acquire)..self.end.load(Acquire));
        let is_near = block.start < held.end && held.start < block.end;
        is_near.then(|| self.listed_pages_of(no))
    }

    fn listed_pages_of(&self, no: BlockNo) -> PageSet {
        let list = self.list.lock();
        list.held.iter().fold(PageSet::EMPTY, |pages, (_, gfns)| pages | no.pages_in(gfns))
    }
}

impl<S: TableSpace> Pinner<S> {
    /// Begins to unpin a range; pages that the range has in part belong to it. Go on with
    /// [`step_unpin`](Self::step_unpin) of the same pinner.
    pub fn begin_unpin(&self, gpa: Gpa, bytes: u64, clock: &dyn Clock) -> ForcedUnpin {
        let first = Gfn::containing(gpa);
        let last = Gfn::containing(Gpa::new(gpa.raw().saturating_add(bytes.saturating_sub(1))));
        let end = if bytes == 0 { first.raw() } else { last.raw() + 1 };
        let hold = self.holds.add(first.raw()..end);
        let region_changes = self.region_changes.load(Acquire);
        let report = UnpinReport::default();
        ForcedUnpin { hold, next: first.raw(), started: clock.now(), region_changes, report }
    }

    /// Unpins the next blocks of a range.
    pub fn step_unpin(&self, mut unpin: ForcedUnpin, clock: &dyn Clock) -> UnpinStep {
        let gfns = unpin.hold.gfns.clone();
        let in_time = clock.now() < unpin.started.saturating_add(self.config.park_time);
        let mut blocks = 0..STEP_BLOCKS;
        // A block that was not made yet is made, and locked: a pin of one of its pages may be about to make it, and see
        // the hold only if it locks it after us.
        let from = unpin.next;
        let mut visit = |spot: Spot<'_>| {
            unpin.next = spot.first;
            if blocks.next().is_none() {
                return ControlFlow::Break(Stop::Pause);
            }
            let pages = spot.no.pages_in(&gfns);
            let mapped = || (*spot.block.lock().mapped() & pages).len();
            match self.unpin_in_block(spot, pages) {
                Ok(report) => unpin.report.add(report),
                Err(NotNow::Parked | NotNow::Over) if in_time => return ControlFlow::Break(Stop::Wait),
                Err(NotNow::Parked) => unpin.report.parked += mapped(),
                Err(NotNow::Busy) if in_time => {
                    // Wait for whoever is there, with the park guard let go, and come back.
                    drop(spot.block.lock());
                    return ControlFlow::Break(Stop::Pause);
                }
                Err(NotNow::Busy | NotNow::Over) => unpin.report.busy += mapped(),
            }
            ControlFlow::Continue(())
        };
        let next_books = |gfn: u64| if gfn < gfns.end { self.next_books(gfn) } else { None };
        let stopped = pin_map::visit(from, next_books, |books, from| books.visit_all(from..gfns.end, &mut visit));
        match stopped {
            ControlFlow::Continue(()) => {
                // Whoever comes back only to finish works on no block twice.
                unpin.next = u64::MAX;
                self.finish_unpin(unpin, in_time)
            }
            ControlFlow::Break(Stop::Pause) => UnpinStep::More(unpin),
            ControlFlow::Break(Stop::Wait) => UnpinStep::Wait(unpin),
        }
    }

    fn finish_unpin(&self, mut unpin: ForcedUnpin, in_time: bool) -> UnpinStep {
        let all = unpin.hold.gfns.end - unpin.hold.gfns.start;
        // RAM that is just going is not remembered yet.
        let no_region_changes = self.changing_regions.try_read();
        let region_changes = self.region_changes.load(Acquire);
        if no_region_changes.is_none() || unpin.region_changes != region_changes {
            // RAM came or went, and with it maybe, behind us, what was pinned. What was released is held, and stays so.
            let released = unpin.report.released;
            if !in_time {
                let busy = all.saturating_sub(released);
                let report = UnpinReport { released, busy, ..UnpinReport::default() };
                return UnpinStep::Done(report, report.may_be_taken().then_some(unpin.hold));
            }
            if no_region_changes.is_none() {
                return UnpinStep::Wait(unpin);
            }
            unpin.region_changes = region_changes;
            unpin.next = unpin.hold.gfns.start;
            unpin.report = UnpinReport { released, ..UnpinReport::default() };
            return UnpinStep::More(unpin);
        }
        let ForcedUnpin { hold, mut report, .. } = unpin;
        // What was in use when its RAM went will be mapped again when it returns.
        report.busy += self.regions.read().remembered(&hold.gfns);
        report.not_pinned = all.saturating_sub(report.released + report.busy + report.parked);
        UnpinStep::Done(report, report.may_be_taken().then_some(hold))
    }

    fn unpin_in_block(&self, spot: Spot<'_>, pages: PageSet) -> Result<UnpinReport, NotNow> {
        let (no, activation) = (spot.no, self.activation.read());
        // A drain that is under way clears PINNED on what it unmaps: leave that to it. The lock comes before those that are
        // held here, so it is only tried.
        let _no_drain = match activation.dtt {
            Some(_) => None,
            None => Some(self.changing_regions.try_read().ok_or(NotNow::Over)?),
        };
        self.try_block(spot, |block| {
            let before = *block.mapped();
            match activation.dtt {
                Some(dtt) => {
                    self.unpin_block(no, block, Ask::Forced(pages), Limit::NONE, dtt, &self.space.view());
                }
                // Anybody may use it.
                None if self.keeps_all() => {}
                // Nobody uses what a drain could not unmap, but it is still mapped: try again.
                None => {
                    self.drain_block(no, block, None);
                }
            }
            let unpinned = before - *block.mapped();
            self.counts.pages_unpinned_forced.add(unpinned.len());
            let (released, busy) = ((unpinned & pages).len(), (*block.mapped() & pages).len());
            UnpinReport { released, busy, ..UnpinReport::default() }
        })
    }
}

/// Why a step of a forced unpin ends.
enum Stop {
    /// There is more to do.
    Pause,
    /// Unpinning is parked, or a drain is under way.
    Wait,
}

impl UnpinReport {
    fn add(&mut self, other: Self) {
        self.released += other.released;
        self.busy += other.busy;
    }
}

impl Hold {
    /// Where the range begins.
    #[must_use]
    pub fn gpa(&self) -> Gpa {
        Gfn::new(self.gfns.start).unwrap_or(Gfn::MAX).gpa()
    }

    /// The range's size, in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        (self.gfns.end - self.gfns.start).saturating_mul(PAGE_SIZE)
    }
}
