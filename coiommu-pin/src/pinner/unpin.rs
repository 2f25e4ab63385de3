//! Taking extents back: of one block, tick by tick, and to make room.

use std::ops::{AddAssign, ControlFlow};
use std::sync::atomic::Ordering::Relaxed;

use coiommu_dtt::Dtt;

use super::Pinner;
use super::leaves::Leaves;
use crate::mapper::Shortage;
use crate::page_set::PageSet;
use crate::pin_map::{Block, BlockNo, Spot};
use crate::policy::Policy;
use crate::space::{Memory, TableSpace};

/// Which extents of a block are to go.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ask {
    /// Those that are idle; the others age.
    Idle,
    /// Those that are idle; the others are left as they are.
    IdleOnly,
    /// Those that nobody counts, accessed or not.
    Uncounted,
    /// Those that nobody counts and that touch these pages.
    Forced(PageSet),
}

/// How much of a block may go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit {
    /// So many pages; `None`: all.
    pub(super) pages: Option<u64>,
    /// But for the first extent, which may be larger.
    pub(super) first_may_pass: bool,
}

impl Limit {
    /// All of it.
    pub(super) const NONE: Self = Self { pages: None, first_may_pass: true };
}

/// What became of one block.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unpinned {
    pub(super) pages: u64,
    pub(super) extents: u64,
    /// Pages whose ACCESSED was cleared so that they may go next time.
    pub(super) aged: u64,
    /// An extent that could have gone stays, as the limit is reached.
    pub(super) limit_ended: bool,
    /// The block was not looked at, as nothing changed there for long.
    pub(super) resting: bool,
    /// Some extent that stays has no page that is counted.
    pub(super) any_uncounted: bool,
}

/// Why a block was not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotNow {
    /// The guest has parked unpinning.
    Parked,
    /// Somebody works on the block.
    Busy,
    /// The table that it was to be done by is not in use any more, and maybe everything is being drained.
    Over,
}

/// How much room is needed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Need {
    pages: u64,
    mappings: u64,
}

impl Need {
    /// For so many pages in so many mappings, of what there is too little of: the other may be there in plenty.
    pub(super) fn of(shortage: Shortage, pages: u64, mappings: u64) -> Self {
        match shortage {
            Shortage::Mappings => Self { pages: 0, mappings },
            Shortage::Pages => Self { pages, mappings: 0 },
        }
    }

    pub(super) const fn is_nothing(self) -> bool {
        self.pages == 0 && self.mappings == 0
    }
}

impl AddAssign for Need {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.mappings += other.mappings;
    }
}

/// The room that was made.
#[derive(Debug, Default)]
struct Room {
    pages: u64,
    mappings: u64,
    any_uncounted: bool,
}

impl Room {
    fn add(&mut self, unpinned: Unpinned) {
        self.pages += unpinned.pages;
        self.mappings += unpinned.extents;
        self.any_uncounted |= unpinned.any_uncounted;
    }

    const fn is_enough(&self, need: Need) -> bool {
        self.pages >= need.pages && self.mappings >= need.mappings
    }
}

/// What one tick did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TickReport {
    /// Pages unmapped.
    pub unpinned_pages: u64,
    /// Pages that are not idle yet, but may be next time: their ACCESSED was cleared.
    pub aged_pages: u64,
    /// Blocks that were not looked at because nothing changed there for long.
    pub resting: u64,
    /// Blocks that somebody else worked on.
    pub passed_over: u64,
    /// Whether every block was looked at, but for those that rest; otherwise the next tick goes on where this one ended.
    pub full_round: bool,
}

impl<S: TableSpace> Pinner<S> {
    /// Passes over the blocks that have pages, from where the last tick ended, and takes back what is idle: at most
    /// `budget` pages, but for one extent that is larger by itself. Everything else ages. Does nothing while parked or
    /// not active, or while [all is kept](Self::keep_all).
    pub fn tick(&self, budget: Option<u64>) -> TickReport {
        let mut report = TickReport::default();
        if *self.park.read() > 0 || self.keeps_all() {
            return report;
        }
        let start = *self.hand.lock();
        // To the end, then from the beginning to where it started.
        if let Some(at) = self.sweep(start, u64::MAX, budget, &mut report) {
            *self.hand.lock() = at;
            return report;
        }
        self.round.fetch_add(1, Relaxed);
        let stopped = self.sweep(0, start, budget, &mut report);
        report.full_round = stopped.is_none() && report.passed_over == 0;
        *self.hand.lock() = stopped.unwrap_or(start);
        report
    }

    /// Lets rounds pass in which ticks would find nothing, as nobody has done anything since one that looked at every
    /// block found nothing. For virtual time, where a gap may be longer than there is time to tick through.
    pub fn skip_rounds(&self, rounds: u32) {
        self.round.fetch_add(rounds, Relaxed);
    }

    /// Ticks over the blocks that begin in a range of gfns; where it stopped, if not at the end: the budget ended, or there
    /// is no unpinning now.
    fn sweep(&self, from: u64, to: u64, budget: Option<u64>, report: &mut TickReport) -> Option<u64> {
        let stopped = self.visit(from, |spot| {
            if spot.first >= to {
                return ControlFlow::Break(None);
            }
            if self.tick_block(spot, budget, report) {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(Some(spot.first))
            }
        });
        stopped.break_value().flatten()
    }

    /// Ticks over one block; false if there it ends.
    fn tick_block(&self, spot: Spot<'_>, budget: Option<u64>, report: &mut TickReport) -> bool {
        let limit = Limit {
            pages: budget.map(|budget| budget.saturating_sub(report.unpinned_pages)),
            first_may_pass: report.unpinned_pages == 0,
        };
        let activation = self.activation.read();
        let Some(dtt) = activation.dtt.filter(|_| limit.pages != Some(0)) else {
            return false;
        };
        let work = |block: &mut Block| {
            if is_resting(&self.config.policy, block.changed(), self.round()) {
                return Unpinned { resting: !block.mapped().is_empty(), ..Unpinned::default() };
            }
            self.unpin_block(spot.no, block, Ask::Idle, limit, dtt, &self.space.view())
        };
        match self.try_block(spot, work) {
            Ok(unpinned) => {
                self.counts.pages_unpinned_idle.add(unpinned.pages);
                report.unpinned_pages += unpinned.pages;
                report.aged_pages += unpinned.aged;
                report.resting += u64::from(unpinned.resting);
                !unpinned.limit_ended
            }
            Err(NotNow::Busy) => {
                report.passed_over += 1;
                true
            }
            Err(NotNow::Parked | NotNow::Over) => false,
        }
    }

    /// Frees idle extents until there is room, and at least 1/64 of the mappings: first those that were not accessed
    /// since they aged. Goes on where it ended the last time, for as long as the activation with this number lasts. Called
    /// with no lock held, but for that of changing regions. False: there is less than is needed.
    pub(super) fn make_room(&self, need: Need, activation: u64, is_over: &dyn Fn() -> bool) -> bool {
        self.counts.reclaims.add(1);
        let wanted = Need { mappings: need.mappings.max(self.totals.mappings() / 64), ..need };
        let start = *self.room_hand.lock();
        let mut room = Room::default();
        for ask in [Ask::IdleOnly, Ask::Uncounted] {
            for part in [start..u64::MAX, 0..start] {
                let stopped = self.visit(part.start, |spot| {
                    if spot.first >= part.end {
                        return ControlFlow::Break(false);
                    }
                    if room.is_enough(wanted) || is_over() {
                        *self.room_hand.lock() = spot.first;
                        return ControlFlow::Break(true);
                    }
                    match self.make_room_in(spot, ask, activation) {
                        Ok(unpinned) => room.add(unpinned),
                        Err(NotNow::Busy) => {}
                        Err(NotNow::Parked | NotNow::Over) => return ControlFlow::Break(true),
                    }
                    ControlFlow::Continue(())
                });
                if stopped == ControlFlow::Break(true) {
                    return room.is_enough(need);
                }
            }
            if !room.any_uncounted {
                // Everything is in use: a second pass would find no more.
                break;
            }
        }
        room.is_enough(need)
    }

    /// Frees what may go of one block.
    fn make_room_in(&self, spot: Spot<'_>, ask: Ask, number: u64) -> Result<Unpinned, NotNow> {
        let activation = self.activation.read();
        let dtt = activation.dtt.filter(|_| activation.number == number).ok_or(NotNow::Over)?;
        let work = |block: &mut Block| self.unpin_block(spot.no, block, ask, Limit::NONE, dtt, &self.space.view());
        let unpinned = self.try_block(spot, work)?;
        self.counts.pages_unpinned_for_room.add(unpinned.pages);
        Ok(unpinned)
    }

    /// Works on one block under the park guard and the block's lock, which is only tried.
    pub(super) fn try_block<T>(&self, spot: Spot<'_>, work: impl FnOnce(&mut Block) -> T) -> Result<T, NotNow> {
        let parked = self.park.read();
        if *parked > 0 {
            return Err(NotNow::Parked);
        }
        let mut block = spot.block.try_lock().ok_or(NotNow::Busy)?;
        Ok(work(&mut block))
    }

    /// Unpins those extents of a block that may go.
    pub(super) fn unpin_block(
        &self,
        no: BlockNo,
        block: &mut Block,
        ask: Ask,
        limit: Limit,
        dtt: Dtt,
        mem: &Memory<S>,
    ) -> Unpinned {
        let mut unpinned = Unpinned::default();
        let candidates = match ask {
            Ask::Forced(pages) => block.extents_touching(pages),
            _ => *block.mapped(),
        };
        if candidates.is_empty() || self.keeps_all() {
            return unpinned;
        }
        let leaves = Leaves::find(no, dtt, mem);
        if leaves.are_away() {
            return unpinned;
        }
        let look = leaves.look(candidates);
        self.counts.leaves_looked_at.add(look.leaves);
        let free = match ask {
            Ask::Idle | Ask::IdleOnly => look.uncounted - look.accessed,
            Ask::Uncounted | Ask::Forced(_) => look.uncounted,
        };
        let clear_first = matches!(ask, Ask::Uncounted | Ask::Forced(_));
        let chosen;
        (chosen, unpinned.limit_ended) = choose(block, candidates & free, limit);
        let going = leaves.swap_away(block, chosen, clear_first);
        if matches!(ask, Ask::IdleOnly) {
            let (uncounted, _) = choose(block, candidates & look.uncounted, Limit::NONE);
            unpinned.any_uncounted = uncounted != going;
        }
        if !going.is_empty() {
            let unmapped = self.unmap_extents(no, block, going);
            leaves.set_pinned(unmapped.refused);
            unpinned.pages = (going - unmapped.refused).len();
            unpinned.extents = unmapped.extents;
        }
        if matches!(ask, Ask::Idle) {
            let aging = look.accessed & *block.mapped();
            leaves.clear_accessed(aging);
            unpinned.aged = aging.len();
            // Buffers that are used over and over are not to stay for long once they are not: only what drivers keep mapped is
            // worth no look.
            if !(aging & look.uncounted).is_empty() {
                block.keep_looking(self.round());
            }
        }
        unpinned
    }

    /// Takes everything of a block out of the IOMMU, whatever its users; PINNED is cleared first if a table is given. How
    /// many pages the mapper refuses to unmap.
    pub(super) fn drain_block(&self, no: BlockNo, block: &mut Block, table: Option<(Dtt, &Memory<S>)>) -> u64 {
        let mapped = *block.mapped();
        if mapped.is_empty() {
            return 0;
        }
        if let Some((dtt, mem)) = table {
            Leaves::find(no, dtt, mem).clear_pinned(mapped);
        }
        // What is refused stays in the pin map, and PINNED stays clear: the table is given up.
        self.unmap_extents(no, block, mapped).refused.len()
    }
}

/// Whether a block is passed over in this round: old ones are looked at once in so many rounds. A block is old when nothing
/// was mapped or unmapped in it for so long, and nothing was found that its users had let go.
fn is_resting(policy: &Policy, changed: u32, round: u32) -> bool {
    let threshold = policy.unpin_gen_threshold;
    let age = round.wrapping_sub(changed);
    threshold != 0 && age >= threshold && !age.is_multiple_of(threshold)
}

/// Those extents of a block whose pages are all `free`, up to the limit; and whether the limit ended it.
fn choose(block: &Block, free: PageSet, limit: Limit) -> (PageSet, bool) {
    if free.is_empty() {
        // Most blocks of a busy guest have nothing to give.
        return (free, false);
    }
    let going = free - block.extents_touching(*block.mapped() - free);
    let Some(most) = limit.pages.filter(|&most| going.len() > most) else {
        return (going, false);
    };
    let mut first = PageSet::EMPTY;
    for extent in block.extents().filter(|extent| going.contains(extent.start)) {
        let passes = first.len() + extent.len() as u64 > most;
        if passes && !(limit.first_may_pass && first.is_empty()) {
            break;
        }
        first.insert(extent);
    }
    (first, first != going)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_blocks_are_looked_at_every_so_many_rounds() {
        let policy = Policy { unpin_gen_threshold: 3, ..Policy::default() };
        let looked_at: Vec<u32> =
            (0..12_u32).filter(|age| !is_resting(&policy, u32::MAX, age.wrapping_add(u32::MAX))).collect();
        assert_eq!(looked_at, [0, 1, 2, 3, 6, 9]);
        let never = Policy { unpin_gen_threshold: 0, ..Policy::default() };
        assert!((0..100).all(|round| !is_resting(&never, 0, round)));
    }
}
