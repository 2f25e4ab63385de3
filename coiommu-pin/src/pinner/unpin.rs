//! Taking extents back: of one block, tick by tick, and to make room.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use coiommu_dtt::memory::Word32;
use coiommu_dtt::walk::WalkError;
use coiommu_dtt::{Dtt, Gfn, Leaf, LeafEntry, LeafTable, TableMemory};

use super::Pinner;
use crate::page_set::{PageSet, WORD_PAGES};
use crate::pin_map::{Block, BlockNo, Chunk};
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

/// What became of one block.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Taken {
    /// Pages that were unmapped.
    pub(super) gone: PageSet,
    /// Extents that were unmapped.
    pub(super) extents: u64,
    /// Pages whose ACCESSED was cleared so that they may go next time.
    pub(super) aged: u64,
    /// An extent that could have gone stays, as the budget is used up.
    pub(super) budget_ended: bool,
}

/// Why a block was not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotNow {
    /// The guest has parked unpinning.
    Parked,
    /// Somebody works on the block.
    Busy,
}

/// How much room is needed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    pub(super) pages: u64,
    pub(super) mappings: u64,
}

/// What one tick did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TickReport {
    /// Pages unmapped.
    pub unpinned_pages: u64,
    /// Pages that are not idle yet, but may be next time: their ACCESSED was cleared.
    pub aged_pages: u64,
    /// Whether every block was passed once; otherwise the next tick goes on where this one ended.
    pub full_round: bool,
}

/// The pages of a block by what their leaves say.
#[derive(Debug)]
struct Look {
    /// Count 0.
    uncounted: PageSet,
    accessed: PageSet,
}

/// Where the leaves of a block are.
enum Leaves<'m, W> {
    Table(LeafTable<'m, W>),
    /// The guest has no table there, so nobody uses the pages.
    Freed,
    /// The table's RAM is away: anybody may use them.
    Unreadable,
}

impl<S: TableSpace> Pinner<S> {
    /// Passes over the blocks that have pages, from where the last tick ended, and takes back what is idle: at most
    /// `budget` pages, but for one extent that is larger by itself. Everything else ages. Does nothing while parked or
    /// not active.
    pub fn tick(&self, budget: Option<u64>) -> TickReport {
        let start = *self.hand.lock();
        let mut report = TickReport::default();
        // To the end, then from the beginning to where it started.
        if let Some(at) = self.sweep(start, None, budget, &mut report) {
            *self.hand.lock() = at;
            return report;
        }
        let first = BlockNo::of(Gfn::default());
        self.round.fetch_add(1, Relaxed);
        let stopped = self.sweep(first, Some(start), budget, &mut report);
        report.full_round = stopped.is_none();
        *self.hand.lock() = stopped.unwrap_or(start);
        report
    }

    /// Ticks over the blocks of a range; the block it stopped at, if the budget ended or unpinning is parked.
    fn sweep(
        &self,
        from: BlockNo,
        to: Option<BlockNo>,
        budget: Option<u64>,
        report: &mut TickReport,
    ) -> Option<BlockNo> {
        for (no, chunk) in self.map.blocks(from) {
            if to.is_some_and(|to| no >= to) {
                break;
            }
            let activation = self.activation.read();
            let dtt = activation.dtt?;
            let left = budget.map(|budget| budget.saturating_sub(report.unpinned_pages));
            if left == Some(0) {
                return Some(no);
            }
            let whole = report.unpinned_pages == 0;
            match self.try_block(no, &chunk, |block| {
                if block.mapped().is_empty() || is_resting(&self.config.policy, block.changed(), self.round()) {
                    return Taken::default();
                }
                self.take(no, block, Ask::Idle, left, whole, dtt, &self.space.view())
            }) {
                Ok(taken) => {
                    let gone = taken.gone.len();
                    self.counts.pages_unpinned_idle.add(gone);
                    report.unpinned_pages += gone;
                    report.aged_pages += taken.aged;
                    if taken.budget_ended {
                        return Some(no);
                    }
                }
                Err(NotNow::Busy) => {}
                Err(NotNow::Parked) => return Some(no),
            }
        }
        None
    }

    /// Frees idle extents until there is room, and at least 1/64 of the mappings: first those that were not accessed
    /// since they aged. Called with no block locked. Whether anything was freed.
    pub(super) fn make_room(&self, need: Need, dtt: Dtt, mem: &Memory<S>) -> bool {
        self.counts.reclaims.add(1);
        let mappings = need.mappings.max(self.map.mappings() / 64);
        let (mut freed_pages, mut freed_mappings) = (0, 0);
        for ask in [Ask::IdleOnly, Ask::Uncounted] {
            for (no, chunk) in self.map.blocks(BlockNo::of(Gfn::default())) {
                if freed_pages >= need.pages && freed_mappings >= mappings {
                    return true;
                }
                match self.try_block(no, &chunk, |block| self.take(no, block, ask, None, true, dtt, mem)) {
                    Ok(taken) => {
                        self.counts.pages_unpinned_for_room.add(taken.gone.len());
                        freed_pages += taken.gone.len();
                        freed_mappings += taken.extents;
                    }
                    Err(NotNow::Busy) => {}
                    Err(NotNow::Parked) => return freed_pages > 0,
                }
            }
        }
        freed_pages > 0
    }

    /// Works on one block under the park guard and the block's lock, which is only tried.
    pub(super) fn try_block<T>(
        &self,
        no: BlockNo,
        chunk: &Chunk,
        work: impl FnOnce(&mut Block) -> T,
    ) -> Result<T, NotNow> {
        let parked = self.park.read();
        if *parked > 0 {
            return Err(NotNow::Parked);
        }
        let mut block = chunk.try_lock(no).ok_or(NotNow::Busy)?;
        Ok(work(&mut block))
    }

    /// Takes those extents of a block that may go. `budget` is in pages; with `whole`, the first extent may pass it.
    #[allow(clippy::too_many_arguments, reason = "one block's work, all of it needed")]
    pub(super) fn take(
        &self,
        no: BlockNo,
        block: &mut Block,
        ask: Ask,
        budget: Option<u64>,
        whole: bool,
        dtt: Dtt,
        mem: &Memory<S>,
    ) -> Taken {
        let mut taken = Taken::default();
        let asked = match ask {
            Ask::Forced(pages) => block.extents_touching(pages),
            _ => block.mapped(),
        };
        let leaves = find_leaves(no, dtt, mem);
        if asked.is_empty() || matches!(leaves, Leaves::Unreadable) {
            return taken;
        }
        let look = self.look(no, &leaves, asked);
        let free = match ask {
            Ask::Idle | Ask::IdleOnly => look.uncounted - look.accessed,
            Ask::Uncounted | Ask::Forced(_) => look.uncounted,
        };
        let clear_first = matches!(ask, Ask::Uncounted | Ask::Forced(_));
        let mut going = PageSet::EMPTY;
        // Most blocks of a busy guest have nothing to give: their extents are not even looked for.
        let extents = if (free & asked).is_empty() {
            None
        } else {
            Some(block.extents())
        };
        for extent in extents.into_iter().flatten() {
            if !free.contains_all(extent.clone()) || !asked.contains(extent.start) {
                continue;
            }
            let pages = extent.len() as u64;
            let passes = budget.is_some_and(|budget| going.len() + pages > budget);
            if passes && !(whole && going.is_empty()) {
                taken.budget_ended = true;
                break;
            }
            if clear_first {
                clear_accessed(no, &leaves, look.accessed & PageSet::range(extent.clone()));
            }
            if swap_away(no, &leaves, extent.clone()) {
                going.insert(extent);
            }
        }
        if !going.is_empty() {
            let before = self.map.mappings();
            let refused = self.unmap_extents(no, block, going);
            set_pinned(no, &leaves, refused);
            taken.gone = going - refused;
            taken.extents = before.saturating_sub(self.map.mappings());
        }
        if matches!(ask, Ask::Idle) {
            let aging = look.accessed & block.mapped();
            clear_accessed(no, &leaves, aging);
            taken.aged = aging.len();
        }
        taken
    }

    /// Takes everything of a block out of the IOMMU, whatever its users; PINNED is cleared first if a table is given.
    /// The pages that the mapper refuses to unmap.
    pub(super) fn drain_block(&self, no: BlockNo, block: &mut Block, table: Option<(Dtt, &Memory<S>)>) -> u64 {
        let mapped = block.mapped();
        if mapped.is_empty() {
            return 0;
        }
        if let Some(Leaves::Table(table)) = table.map(|(dtt, mem)| find_leaves(no, dtt, mem)) {
            mapped.pages().for_each(|page| table.leaf(no.gfn(page)).clear_pinned());
        }
        // What is refused stays in the pin map, and PINNED stays clear: the table is given up.
        self.unmap_extents(no, block, mapped).len()
    }

    /// Reads the leaves of some pages of a block.
    fn look<W: Word32>(&self, no: BlockNo, leaves: &Leaves<'_, W>, pages: PageSet) -> Look {
        let Leaves::Table(table) = leaves else {
            return Look {
                uncounted: PageSet::ALL,
                accessed: PageSet::EMPTY,
            };
        };
        let mut look = Look {
            uncounted: PageSet::EMPTY,
            accessed: PageSet::EMPTY,
        };
        let first = no.gfn(0).leaf_index();
        for (at, words) in table
            .words()
            .get(first..)
            .unwrap_or_default()
            .chunks(WORD_PAGES)
            .enumerate()
        {
            if pages.word(at) == 0 {
                continue;
            }
            let (mut uncounted, mut accessed) = (0_u64, 0_u64);
            for (bit, word) in words.iter().enumerate() {
                let entry = Leaf::new(word).load();
                uncounted |= u64::from(entry.count() == 0) << bit;
                accessed |= u64::from(entry.contains(LeafEntry::ACCESSED)) << bit;
            }
            look.uncounted.set_word(at, uncounted);
            look.accessed.set_word(at, accessed);
            self.counts.leaves_looked_at.add(u64::from(pages.word(at).count_ones()));
        }
        look
    }
}

/// Whether a block is passed over in this round: old ones are looked at once in so many rounds.
fn is_resting(policy: &Policy, changed: u32, round: u32) -> bool {
    let threshold = policy.unpin_gen_threshold;
    let age = round.wrapping_sub(changed);
    threshold != 0 && age >= threshold && !age.is_multiple_of(threshold)
}

fn find_leaves<'m, M: TableMemory + ?Sized>(no: BlockNo, dtt: Dtt, mem: &'m M) -> Leaves<'m, M::U32> {
    match dtt.leaf_table(mem, no.gfn(0)) {
        Ok(table) => Leaves::Table(table),
        Err(WalkError::NotPresent { .. } | WalkError::Beyond { .. }) => Leaves::Freed,
        Err(WalkError::Unreadable(_)) => Leaves::Unreadable,
    }
}

/// Swaps PINNED away on each page of an extent; if one refuses, none is.
fn swap_away<W: Word32>(no: BlockNo, leaves: &Leaves<'_, W>, extent: Range<usize>) -> bool {
    let Leaves::Table(table) = leaves else { return true };
    let refused = extent
        .clone()
        .find(|&page| table.leaf(no.gfn(page)).try_unpin().is_err());
    match refused {
        None => true,
        Some(refused) => {
            set_pinned(no, leaves, PageSet::range(extent.start..refused));
            false
        }
    }
}

fn set_pinned<W: Word32>(no: BlockNo, leaves: &Leaves<'_, W>, pages: PageSet) {
    if let Leaves::Table(table) = leaves {
        pages.pages().for_each(|page| table.leaf(no.gfn(page)).set_pinned());
    }
}

fn clear_accessed<W: Word32>(no: BlockNo, leaves: &Leaves<'_, W>, pages: PageSet) {
    if let Leaves::Table(table) = leaves {
        pages.pages().for_each(|page| table.leaf(no.gfn(page)).clear_accessed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_blocks_are_looked_at_every_so_many_rounds() {
        let policy = Policy {
            unpin_gen_threshold: 3,
            ..Policy::default()
        };
        let looked_at: Vec<u32> = (0..12_u32)
            .filter(|age| !is_resting(&policy, u32::MAX, age.wrapping_add(u32::MAX)))
            .collect();
        assert_eq!(looked_at, [0, 1, 2, 3, 6, 9]);
        let never = Policy {
            unpin_gen_threshold: 0,
            ..Policy::default()
        };
        assert!((0..100).all(|round| !is_resting(&never, 0, round)));
    }
}
