//! Pinning a piece of a request: share by share, each the pages in one block of one region.

use std::cell::Cell;
use std::ops::Range;
use std::time::Duration;

use arrayvec::ArrayVec;
use coiommu_dtt::walk::WalkError;
use coiommu_dtt::{Dtt, Gfn, Leaf, TableMemory, Walker};

use super::leaves::{Words, words_of};
use super::mapping::Tally;
use super::unpin::Need;
use super::{Clock, Pinner};
use crate::mapper::{MapError, Shortage};
use crate::page_set::{BLOCK_PAGES, PageSet};
use crate::pin_map::{Block, BlockNo};
use crate::policy::ExtentPolicy;
use crate::prefetch::prefetch;
use crate::region_table::{Bank, Regions};
use crate::request::Rooms;
use crate::space::{Memory, TableSpace};
use crate::sync::Mutex;

/// So many blocks are looked up before the first of them is served, so that the misses of their leaves overlap.
const BLOCKS_AHEAD: usize = 16;
/// So many leaves of each are asked for; where there are more, they are mostly neighbours.
const LEAVES_AHEAD: usize = 4;

/// What became of a piece, in pages.
#[derive(Debug, Default)]
pub(super) struct Piece {
    /// How many gfns of it are done with.
    pub(super) served: usize,
    pub(super) failed: u64,
    pub(super) later: u64,
    pub(super) timed_out: bool,
    /// It ended for want of room.
    pub(super) short: Option<(Shortage, Need)>,
}

/// What became of a share of a piece.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    /// All of it is pinned.
    Pinned,
    /// So many pages cannot be pinned.
    Failed(u64),
    /// So many pages may be had in a moment: they are held, or RAM (their own, or their table's) is away; so many others failed.
    Later { later: u64, failed: u64 },
    /// So many pages failed, and so many more for want of room.
    Short { failed: u64, missing: u64, shortage: Shortage, need: Need },
    /// The guest has given up, or is about to: nothing more is pinned, and so many pages are not.
    TimedOut(u64),
}

/// When to look at other slots, and when to stop.
pub(super) struct Times<'a> {
    clock: &'a dyn Clock,
    /// Not after the end.
    pause: Duration,
    end: Duration,
    /// Whether it is time to look at other slots.
    is_pause: Cell<bool>,
}

impl<'a> Times<'a> {
    pub(super) fn new(clock: &'a dyn Clock, pause: Duration, end: Duration) -> Self {
        Self { clock, pause: pause.min(end), end, is_pause: Cell::new(false) }
    }

    /// Reads the clock: whether the guest has given up, or is about to. What [`is_pause`](Self::is_pause) says is as of then.
    #[inline]
    fn is_over(&self) -> bool {
        let now = self.clock.roughly();
        if now < self.pause {
            return false;
        }
        self.is_pause.set(true);
        now >= self.end
    }
}

/// The gfns of a piece that are in one block of one region, or in one block and in no region.
struct Share<'s, 'g, W> {
    gfns: &'g [u64],
    place: Option<Place<'s, W>>,
}

impl<W> Share<'_, '_, W> {
    /// The cache begins to fetch the leaves.
    fn fetch_leaves(&self) {
        if let Some(Place { words: Ok(words), .. }) = &self.place {
            let first = self.gfns.iter().take(LEAVES_AHEAD);
            first.filter_map(|&gfn| words.get(BlockNo::index(gfn))).for_each(prefetch);
        }
    }
}

/// A block of a region, and the words of its pages' leaves.
struct Place<'s, W> {
    no: BlockNo,
    bank: &'s Bank,
    block: &'s Mutex<Block>,
    words: Result<Words<'s, W>, NoLeaves>,
}

/// Why a place has no leaves.
#[derive(Clone, Copy)]
enum NoLeaves {
    /// Their table is where there is no RAM now.
    Absent,
    /// There is no table.
    Never,
}

/// The pages around those that were looked up last: a region, or a gap between two.
struct Around<'s> {
    gfns: Range<u64>,
    bank: Option<&'s Bank>,
}

/// One step of a request, and what it works with.
///
/// The table of regions stays as it is while a step lives, so whether a page may be mapped does not change under it. Leaf
/// tables are looked up once a step and without a lock: a guest frees none while a request of its own is not answered, and
/// one that does all the same has words of its own memory changed.
pub(super) struct Serving<'s, S: TableSpace> {
    pinner: &'s Pinner<S>,
    regions: &'s Regions,
    around: Around<'s>,
    walker: Walker<'s, Memory<S>>,
    times: Times<'s>,
    tally: Tally<'s>,
    /// There is no room, and some will be made: nothing more is mapped.
    short: Option<Shortage>,
}

type Word<S> = <Memory<S> as TableMemory>::U32;

impl<'s, S: TableSpace> Serving<'s, S> {
    pub(super) fn new(
        pinner: &'s Pinner<S>,
        regions: &'s Regions,
        dtt: Dtt,
        mem: &'s Memory<S>,
        times: Times<'s>,
    ) -> Self {
        let around = Around { gfns: 0..0, bank: None };
        Self { pinner, regions, around, walker: Walker::new(dtt, mem), times, tally: Tally::new(pinner), short: None }
    }

    /// Pins the pages of a sorted piece, until its end or a time's, or until room is to be made.
    pub(super) fn pin_piece(&mut self, room: Rooms, mut rest: &[u64]) -> Piece {
        let mut piece = Piece::default();
        let mut shares = ArrayVec::<_, BLOCKS_AHEAD>::new();
        while !rest.is_empty() {
            while !shares.is_full() {
                let Some((share, after)) = self.next_share(rest) else { break };
                shares.push(share);
                rest = after;
            }
            shares.iter().for_each(Share::fetch_leaves);
            for share in &shares {
                // How much room is needed is found out to the end: that takes no time to speak of, and it is made once.
                if piece.served > 0 && self.times.is_pause.get() && self.short.is_none() {
                    return piece;
                }
                piece.served += share.gfns.len();
                match self.pin_share(share) {
                    Outcome::Pinned => {}
                    Outcome::Failed(failed) => piece.failed += failed,
                    Outcome::Short { shortage, need, .. } if room.can(shortage) => {
                        // From here on nothing is mapped: it is found out how much room the rest needs.
                        self.short = Some(shortage);
                        piece.short.get_or_insert((shortage, Need::default())).1 += need;
                    }
                    Outcome::Short { failed, missing, .. } => piece.failed += failed + missing,
                    Outcome::Later { later, failed } => {
                        piece.later += later;
                        piece.failed += failed;
                    }
                    Outcome::TimedOut(failed) => {
                        piece.failed += failed;
                        piece.timed_out = true;
                        return piece;
                    }
                }
            }
            shares.clear();
        }
        piece
    }

    /// Cuts the first share off some sorted gfns.
    fn next_share<'g>(&mut self, gfns: &'g [u64]) -> Option<(Share<'s, 'g, Word<S>>, &'g [u64])> {
        let &first = gfns.first()?;
        if !self.around.gfns.contains(&first) {
            self.around = self.look_around(first);
        }
        let block_end = (first | (BLOCK_PAGES as u64 - 1)).saturating_add(1);
        let len = count_below(gfns, block_end.min(self.around.gfns.end));
        let (gfns, rest) = gfns.split_at_checked(len)?;
        Some((Share { gfns, place: self.place(gfns) }, rest))
    }

    fn look_around(&self, gfn: u64) -> Around<'s> {
        let bank = self.regions.find(gfn);
        let gap = || gfn..self.regions.next_start(gfn).unwrap_or(u64::MAX);
        Around { gfns: bank.map_or_else(gap, |bank| bank.region.gfns()), bank }
    }

    /// The block and the leaves of some pages of the last region looked up. The cache begins to fetch the block.
    #[inline]
    fn place(&mut self, gfns: &[u64]) -> Option<Place<'s, Word<S>>> {
        let &first = gfns.first()?;
        let bank = self.around.bank?;
        let block = bank.books.block(first)?;
        let gfn = Gfn::new(first)?;
        let no = BlockNo::of(gfn);
        prefetch(block);
        let words = match self.walker.leaf_table(gfn) {
            Ok(table) => words_of(table, no).ok_or(NoLeaves::Never),
            Err(WalkError::Unreadable(_)) if self.regions.any_absent() => Err(NoLeaves::Absent),
            Err(_) => Err(NoLeaves::Never),
        };
        Some(Place { no, bank, block, words })
    }

    fn pin_share(&mut self, share: &Share<'s, '_, Word<S>>) -> Outcome {
        let Some(place) = &share.place else {
            return self.without_ram(share.gfns);
        };
        let pages = share.gfns.len() as u64;
        let words = match place.words {
            Ok(words) => words,
            Err(_) if self.times.is_over() => return Outcome::TimedOut(pages),
            Err(NoLeaves::Absent) => return Outcome::Later { later: pages, failed: 0 },
            Err(NoLeaves::Never) => return Outcome::Failed(pages),
        };
        let mut block = place.block.lock();
        let held = self.pinner.holds.pages_of(place.no);
        // Most shares are one run of pages of which none is mapped.
        if let Some(run) =
            whole_run(share.gfns).filter(|_| held.is_none() && self.short.is_none() && !self.speculates())
            && block.mapped().has_none_of(run.clone())
        {
            return self.pin_new_run(place, &mut block, words, share.gfns, run);
        }
        let before = *block.mapped();
        let mut mapping = Mapping { place, held, failed: PageSet::EMPTY, short: self.short };
        self.map_missing(&mut mapping, &mut block, share.gfns);
        self.end_share(&mapping, &mut block, words, share.gfns, before)
    }

    /// Pins a share that is one run of pages of which none is mapped, held, or to be mapped together with others.
    #[inline]
    fn pin_new_run(
        &mut self,
        place: &Place<'s, Word<S>>,
        block: &mut Block,
        words: Words<'_, Word<S>>,
        gfns: &[u64],
        run: Range<usize>,
    ) -> Outcome {
        let pages = if self.pinner.config.policy.extent == ExtentPolicy::Page { 1 } else { run.len() };
        let mut at = run.start;
        while at < run.end {
            let tried = at..at + pages;
            at = tried.end;
            if let Err(error) = self.map_extent(place, block, tried.clone()) {
                let mut mapping = Mapping { place, held: None, failed: PageSet::EMPTY, short: None };
                self.refused(&mut mapping, block, tried, error);
                if at < run.end {
                    self.map_gap(&mut mapping, block, at..run.end);
                }
                let before = *block.mapped() - PageSet::range(run);
                return self.end_share(&mapping, block, words, gfns, before);
            }
        }
        if self.times.is_over() {
            return self.take_back(place.no, block, PageSet::range(run.clone()), run.len() as u64);
        }
        words.get(run).unwrap_or_default().iter().for_each(|word| Leaf::new(word).set_pinned());
        Outcome::Pinned
    }

    /// Unmaps pages that were mapped too late: the table may be somebody else's by now. What cannot be unmapped stays in the
    /// pin map, as it must.
    fn take_back(&self, no: BlockNo, block: &mut Block, new: PageSet, failed: u64) -> Outcome {
        let _unmapped = self.pinner.unmap_extents(no, block, new);
        Outcome::TimedOut(failed)
    }

    /// Whether more may be mapped than is asked for.
    fn speculates(&self) -> bool {
        matches!(self.pinner.config.policy.extent, ExtentPolicy::Aligned(_))
    }

    /// Sets PINNED on what is mapped of a share, and on what was mapped with it; or takes it back, if it took too long.
    fn end_share(
        &self,
        mapping: &Mapping<'_, 's, Word<S>>,
        block: &mut Block,
        words: Words<'_, Word<S>>,
        gfns: &[u64],
        before: PageSet,
    ) -> Outcome {
        let mut wanted = PageSet::EMPTY;
        runs(gfns).for_each(|run| wanted.insert(run));
        let new = *block.mapped() - before;
        if self.times.is_over() {
            return self.take_back(mapping.place.no, block, new, (wanted - before).len());
        }
        let to_set = if self.speculates() { wanted | new } else { wanted };
        for run in (to_set & *block.mapped()).runs() {
            let leaves = words.get(run).unwrap_or_default().iter().map(Leaf::new);
            // What was mapped before mostly says so already, and a look is cheaper than a write.
            leaves.filter(|leaf| !leaf.is_pinned()).for_each(Leaf::set_pinned);
        }
        self.what_is_missing(mapping, wanted - *block.mapped())
    }

    /// What becomes of pages that are in no region.
    fn without_ram(&self, gfns: &[u64]) -> Outcome {
        if self.times.is_over() {
            return Outcome::TimedOut(gfns.len() as u64);
        }
        let absent = gfns.iter().filter(|&&gfn| self.regions.is_absent(gfn)).count() as u64;
        Outcome::Later { later: absent, failed: gfns.len() as u64 - absent }
    }

    /// Maps those pages of a share that are not mapped. One that fails does not spoil the others.
    fn map_missing(&mut self, mapping: &mut Mapping<'_, 's, Word<S>>, block: &mut Block, gfns: &[u64]) {
        for run in runs(gfns) {
            let mut at = run.start;
            while let Some(gap) = block.mapped().gap_in(at..run.end) {
                at = gap.end;
                match mapping.held {
                    None => self.map_gap(mapping, block, gap),
                    Some(held) => (PageSet::range(gap) - held).runs().for_each(|gap| self.map_gap(mapping, block, gap)),
                }
            }
        }
    }

    /// What became of a share of which some pages are not mapped.
    fn what_is_missing(&self, mapping: &Mapping<'_, 's, Word<S>>, missing: PageSet) -> Outcome {
        let held = missing & mapping.held.unwrap_or_default();
        let may_be_short = missing - mapping.failed - held;
        let (Some(shortage), false) = (mapping.short, may_be_short.is_empty()) else {
            return match ((missing - held).len(), held.len()) {
                (0, 0) => Outcome::Pinned,
                (failed, 0) => Outcome::Failed(failed),
                (failed, later) => Outcome::Later { later, failed },
            };
        };
        let (short, failed) = (may_be_short, (missing - may_be_short).len());
        let pages = short.len();
        let mappings = match self.pinner.config.policy.extent {
            ExtentPolicy::Page => pages,
            ExtentPolicy::Run | ExtentPolicy::Aligned(_) => short.runs().count() as u64,
        };
        Outcome::Short { failed, missing: pages, shortage, need: Need::of(shortage, pages, mappings) }
    }

    /// Maps adjacent pages that are not mapped and not held, in extents as the policy says.
    fn map_gap(&mut self, mapping: &mut Mapping<'_, 's, Word<S>>, block: &mut Block, gap: Range<usize>) {
        match self.pinner.config.policy.extent {
            ExtentPolicy::Page => self.map_singly(mapping, block, gap),
            ExtentPolicy::Run => self.map_run(mapping, block, gap),
            ExtentPolicy::Aligned(size) => {
                let mut at = gap.start;
                while let Some(left) = block.mapped().gap_in(at..gap.end) {
                    if mapping.short.is_some() {
                        return;
                    }
                    if !self.map_around(mapping, block, left.start, size.pages()) {
                        at = left.end;
                        self.map_run(mapping, block, left);
                    }
                }
            }
        }
    }

    /// Maps a run as one extent.
    fn map_run(&mut self, mapping: &mut Mapping<'_, 's, Word<S>>, block: &mut Block, run: Range<usize>) {
        if mapping.short.is_some() {
            return;
        }
        if let Err(error) = self.map_extent(mapping.place, block, run.clone()) {
            self.refused(mapping, block, run, error);
        }
    }

    /// What to do about an extent that was not mapped: it is tried page by page, as only one of them may be bad.
    fn refused(
        &mut self,
        mapping: &mut Mapping<'_, 's, Word<S>>,
        block: &mut Block,
        extent: Range<usize>,
        error: MapError,
    ) {
        match error {
            error if error.is_shortage() => mapping.short = error.shortage(),
            _ if extent.len() == 1 => mapping.failed.insert(extent),
            _ => self.map_singly(mapping, block, extent),
        }
    }

    /// Maps the aligned piece of so many pages around a page, as far as it is free; false if that cannot be.
    fn map_around(&mut self, mapping: &Mapping<'_, 's, Word<S>>, block: &mut Block, page: usize, pages: usize) -> bool {
        let start = page - page % pages;
        let ram = mapping.place.no.pages_in(&mapping.place.bank.region.gfns());
        let taken = *block.mapped() | mapping.held.unwrap_or_default();
        let free = (ram - taken) & PageSet::range(start..start + pages);
        self.map_extent(mapping.place, block, free.run_around(page)).is_ok()
    }

    /// Maps each page of a run for itself.
    fn map_singly(&mut self, mapping: &mut Mapping<'_, 's, Word<S>>, block: &mut Block, run: Range<usize>) {
        run.for_each(|page| self.map_run(mapping, block, page..page + 1));
    }

    fn map_extent(
        &mut self,
        place: &Place<'s, Word<S>>,
        block: &mut Block,
        pages: Range<usize>,
    ) -> Result<(), MapError> {
        self.pinner.map_extent(place.no, block, pages, &place.bank.region, &mut self.tally)
    }
}

/// The mapping of a share's missing pages while it is under way.
struct Mapping<'a, 's, W> {
    place: &'a Place<'s, W>,
    /// The pages of the block that are held, if there are holds near.
    held: Option<PageSet>,
    /// Pages that cannot be mapped, whatever room there is.
    failed: PageSet,
    /// There is no room: nothing more is tried.
    short: Option<Shortage>,
}

/// How many of some sorted gfns, each of which is there once, are below `end`; at least one.
#[inline]
fn count_below(gfns: &[u64], end: u64) -> usize {
    let &[first, second, ..] = gfns else { return 1 };
    if second >= end {
        return 1;
    }
    // There can be no more, and mostly there are so many: neighbours.
    let most = usize::try_from(end - first).unwrap_or(usize::MAX).min(gfns.len());
    match gfns.get(most - 1) {
        Some(&last) if last < end => most,
        _ => gfns.iter().position(|&gfn| gfn >= end).unwrap_or(gfns.len()),
    }
}

/// The pages of sorted gfns of one block, if they are adjacent, as indexes in the block.
fn whole_run(gfns: &[u64]) -> Option<Range<usize>> {
    let (&first, &last) = (gfns.first()?, gfns.last()?);
    let start = BlockNo::index(first);
    (last - first == gfns.len() as u64 - 1).then_some(start..start + gfns.len())
}

/// The runs of adjacent pages among sorted gfns of one block, as indexes in the block.
fn runs(gfns: &[u64]) -> impl Iterator<Item = Range<usize>> {
    let mut rest = gfns;
    std::iter::from_fn(move || {
        let &first = rest.first()?;
        let len = match whole_run(rest) {
            Some(run) => run.len(),
            None => rest.iter().zip(first..).take_while(|&(&gfn, next)| gfn == next).count(),
        };
        rest = rest.get(len..).unwrap_or_default();
        let start = BlockNo::index(first);
        Some(start..start + len)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Sorted gfns are cut where a plain look at each would cut them.
        #[test]
        fn gfns_are_cut_at_ends_and_gaps(
            gfns in prop::collection::btree_set(prop_oneof![0..40_u64, 500..520_u64, u64::MAX - 20..=u64::MAX], 1..30),
            more in 0..600_u64,
        ) {
            let gfns: Vec<_> = BTreeSet::into_iter(gfns).collect();
            let end = gfns[0].saturating_add(more);
            prop_assert_eq!(count_below(&gfns, end), gfns.iter().filter(|&&gfn| gfn < end).count().max(1));
            let plain: Vec<_> = gfns.chunk_by(|a, b| a + 1 == *b).collect();
            prop_assert_eq!(whole_run(&gfns).is_some(), plain.len() == 1);
            // Runs are of one block.
            for block in gfns.chunk_by(|a, b| a / 512 == b / 512) {
                let cut = runs(block).map(|run| run.start as u64..run.end as u64);
                let runs = block.chunk_by(|a, b| a + 1 == *b).map(|run| run[0] % 512..run[0] % 512 + run.len() as u64);
                prop_assert!(cut.eq(runs));
            }
        }
    }
}
