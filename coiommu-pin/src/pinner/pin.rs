//! Serving a request: piece by piece, a piece by the blocks that its pages are in.

use std::cell::Cell;
use std::ops::Range;
use std::time::Duration;

use arrayvec::ArrayVec;
use coiommu_dtt::memory::Word32;
use coiommu_dtt::walk::WalkError;
use coiommu_dtt::{Gfn, Leaf, LeafTable, RequestWord, TableMemory, Walker};

use super::mapping::Tally;
use super::unpin::Need;
use super::{Clock, Pinner};
use crate::mapper::MapError;
use crate::page_set::{BLOCK_PAGES, PageSet};
use crate::pin_map::{Block, BlockNo};
use crate::policy::ExtentPolicy;
use crate::prefetch::prefetch;
use crate::region::RamRegion;
use crate::region_table::{Bank, Regions};
use crate::request::{PinRequest, Refusal, Scratch};
use crate::space::{Memory, TableSpace};
use crate::sync::Mutex;

/// So many blocks are looked up before the first of them is served, so that the misses of their leaves overlap.
const BLOCKS_AHEAD: usize = 16;
/// So many leaves of each are asked for; where there are more, they are mostly neighbours.
const LEAVES_AHEAD: usize = 4;

/// What to do after a piece of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a request that is done has to be answered"]
pub enum Step {
    /// There is more: look at the other slots, then call again.
    More,
    /// RAM that went may come back: call again in a moment.
    Wait,
    /// Answer the slot.
    Done(PinResult),
}

/// How a request ended. The slot is answered in any case; the guest reads PINNED.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinResult {
    /// Every page that was asked for is pinned.
    Pinned,
    /// Some pages are not.
    Failed,
    /// It took too long; what was pinned until then is.
    TimedOut,
    /// The rest was not looked at.
    Refused(Refusal),
}

/// What became of a step.
enum Served {
    Step(Step),
    /// There is no room: some is to be made, with no lock held, before the piece is served again.
    Short(Need),
}

/// What became of a piece, in pages.
#[derive(Debug, Default)]
struct Piece {
    /// How many gfns of it are done with.
    served: usize,
    failed: u64,
    absent: u64,
    timed_out: bool,
    /// It ended for want of room.
    short: Option<Need>,
}

/// What became of a share of a piece.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    /// All of it is pinned.
    Pinned,
    /// So many pages cannot be pinned.
    Failed(u64),
    /// So many pages have no RAM, or their table has none, that may come back; so many others failed.
    Absent { absent: u64, failed: u64 },
    /// So many pages failed, and so many more for want of room.
    Short { failed: u64, short: Need },
    /// The guest has given up, or is about to: nothing more is pinned.
    TimedOut,
}

/// When to look at other slots, and when to stop.
struct Times<'a> {
    clock: &'a dyn Clock,
    /// The clock as it was read last.
    now: Cell<Duration>,
    pause: Duration,
    end: Duration,
}

impl Times<'_> {
    /// Reads the clock: whether the guest has given up, or is about to.
    fn is_over(&self) -> bool {
        // It may lag behind the first reading, which was exact.
        self.now.set(self.now.get().max(self.clock.roughly()));
        self.now.get() >= self.end
    }

    /// Whether it was time to look at other slots when the clock was last read.
    fn is_pause(&self) -> bool {
        self.now.get() >= self.pause
    }
}

/// The gfns of a piece that are in one block of one region, or in one block and in no region.
struct Share<'s, 'g, W> {
    gfns: &'g [u64],
    place: Option<Place<'s, W>>,
}

/// A block of a region, and the leaves of its pages.
struct Place<'s, W> {
    no: BlockNo,
    bank: &'s Bank,
    block: &'s Mutex<Block>,
    leaves: Result<LeafTable<'s, W>, NoLeaves>,
}

/// Why a place has no leaves.
#[derive(Clone, Copy)]
enum NoLeaves {
    /// Their table is where there is no RAM now.
    Absent,
    /// There is no table.
    Never,
}

/// One step of a request, and what it works with.
///
/// The table of regions stays as it is while a step lives, so whether a page may be mapped does not change under it. Leaf
/// tables are looked up once a step and without a lock: a guest frees none while a request of its own is not answered, and
/// one that does all the same has words of its own memory changed.
struct Serving<'s, S: TableSpace> {
    pinner: &'s Pinner<S>,
    regions: &'s Regions,
    /// The region that was looked up last.
    bank: Option<&'s Bank>,
    walker: Walker<'s, Memory<S>>,
    times: Times<'s>,
    tally: Tally<'s>,
}

type Words<S> = <Memory<S> as TableMemory>::U32;

impl<S: TableSpace> Pinner<S> {
    /// Begins to serve the request that was taken from a slot. `taken` is when its doorbell was seen: the request's time
    /// runs from then. If it is refused, answer the slot.
    ///
    /// # Errors
    ///
    /// [`Refusal`].
    pub fn begin(&self, word: RequestWord, taken: Duration) -> Result<PinRequest, Refusal> {
        let activation = self.activation.read();
        let decode = |_| PinRequest::decode(word, taken, activation.number, &self.config.endpoints);
        let begun = activation.dtt.ok_or(Refusal::NotActive).and_then(decode);
        if begun.is_err() {
            self.counts.requests_refused.add(1);
        }
        begun
    }

    /// Serves the next piece of a request, for [`PinnerConfig::step_time`](super::PinnerConfig::step_time) and one block's
    /// map calls at most. Once a request, where there is no room, some is made in between, which may take until the
    /// request's time is over.
    pub fn step(&self, request: &mut PinRequest, scratch: &mut Scratch, clock: &dyn Clock) -> Step {
        let step = match self.serve_piece(request, scratch, clock) {
            Served::Step(step) => step,
            Served::Short(need) => {
                request.made_room = true;
                let end = request.taken.saturating_add(self.config.request_time);
                self.make_room(need, request.activation, &|| clock.roughly() >= end);
                // At once, before others take the room.
                match self.serve_piece(request, scratch, clock) {
                    Served::Step(step) => step,
                    Served::Short(_) => Step::More,
                }
            }
        };
        if let Step::Done(result) = step {
            self.finish(request, result, clock);
        }
        step
    }

    /// Serves a request to its end, for callers that have nothing else to look at. RAM that is away is not waited for.
    pub fn pin(&self, word: RequestWord, scratch: &mut Scratch, clock: &dyn Clock) -> PinResult {
        let mut request = match self.begin(word, clock.now()) {
            Ok(request) => request,
            Err(refusal) => return PinResult::Refused(refusal),
        };
        loop {
            match self.step(&mut request, scratch, clock) {
                Step::Done(result) => return result,
                Step::More => {}
                Step::Wait => request.waits = false,
            }
        }
    }

    fn finish(&self, request: &PinRequest, result: PinResult, clock: &dyn Clock) {
        let count = match result {
            PinResult::Pinned => &self.counts.requests_pinned,
            PinResult::Failed => &self.counts.requests_failed,
            PinResult::TimedOut => &self.counts.requests_timed_out,
            PinResult::Refused(_) => &self.counts.requests_refused,
        };
        count.add(1);
        self.counts.pages_asked.add(request.asked);
        self.counts.pages_failed.add(request.failed);
        self.latency.record(clock.now().saturating_sub(request.taken));
    }

    fn serve_piece(&self, request: &mut PinRequest, scratch: &mut Scratch, clock: &dyn Clock) -> Served {
        let activation = self.activation.read();
        let Some(dtt) = activation.dtt.filter(|_| activation.number == request.activation) else {
            return Served::Step(Step::Done(PinResult::Refused(Refusal::NotActive)));
        };
        let now = clock.now();
        let end = request.taken.saturating_add(self.config.request_time);
        if now >= end {
            return Served::Step(Step::Done(PinResult::TimedOut));
        }
        let times = Times { clock, now: Cell::new(now), pause: now.saturating_add(self.config.step_time), end };
        let may_wait = request.waits && now < request.taken.saturating_add(self.config.absent_time);
        let regions = self.regions.read();
        let view = self.space.view();
        if let Err(refusal) = request.read_piece(&*view, &self.config.endpoints, scratch) {
            let is_away = matches!(refusal, Refusal::Unreadable(_)) && regions.any_absent();
            let step = if may_wait && is_away { Step::Wait } else { Step::Done(PinResult::Refused(refusal)) };
            return Served::Step(step);
        }
        let mut serving = Serving {
            pinner: self,
            regions: &regions,
            bank: None,
            walker: Walker::new(dtt, &*view),
            times,
            tally: Tally::new(self),
        };
        let piece = serving.pin_piece(!request.made_room, scratch.piece());
        // The same again: pages that are pinned by now cost little then.
        if let Some(need) = piece.short {
            request.keep_piece(scratch, 0);
            return Served::Short(need);
        }
        if piece.absent > 0 && may_wait && !piece.timed_out {
            request.keep_piece(scratch, 0);
            return Served::Step(Step::Wait);
        }
        request.keep_piece(scratch, piece.served);
        request.asked += piece.served as u64;
        request.failed += piece.failed + piece.absent;
        Served::Step(match (piece.timed_out, request.is_served(), request.failed) {
            (true, _, _) => Step::Done(PinResult::TimedOut),
            (false, false, _) => Step::More,
            (false, true, 0) => Step::Done(PinResult::Pinned),
            (false, true, _) => Step::Done(PinResult::Failed),
        })
    }
}

impl<'s, S: TableSpace> Serving<'s, S> {
    /// Pins the pages of a sorted piece, until its end or a time's, or until room is to be made.
    fn pin_piece(&mut self, may_make_room: bool, mut rest: &[u64]) -> Piece {
        let mut piece = Piece::default();
        let mut shares = ArrayVec::<_, BLOCKS_AHEAD>::new();
        while !rest.is_empty() {
            while let (false, Some((share, after))) = (shares.is_full(), self.next_share(rest)) {
                shares.push(share);
                rest = after;
            }
            for share in &shares {
                if piece.served > 0 && self.times.is_pause() {
                    return piece;
                }
                piece.served += share.gfns.len();
                match self.pin_share(share) {
                    Outcome::Pinned => {}
                    Outcome::Failed(failed) => piece.failed += failed,
                    Outcome::Short { short, .. } if may_make_room => {
                        piece.short = Some(short);
                        return piece;
                    }
                    Outcome::Short { failed, short } => piece.failed += failed + short.pages,
                    Outcome::Absent { absent, failed } => {
                        piece.absent += absent;
                        piece.failed += failed;
                    }
                    Outcome::TimedOut => {
                        piece.failed += share.gfns.len() as u64;
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
    fn next_share<'g>(&mut self, gfns: &'g [u64]) -> Option<(Share<'s, 'g, Words<S>>, &'g [u64])> {
        let &first = gfns.first()?;
        let block_end = (first | (BLOCK_PAGES as u64 - 1)).saturating_add(1);
        if !self.bank.is_some_and(|bank| bank.region.gfns().contains(&first)) {
            self.bank = self.regions.find(first);
        }
        let region_end = match self.bank {
            Some(bank) => bank.region.gfns().end,
            None => self.regions.next_start(first).unwrap_or(u64::MAX),
        };
        let end = block_end.min(region_end);
        let len = gfns.iter().take_while(|&&gfn| gfn < end).count();
        let (gfns, rest) = gfns.split_at(len.max(1));
        Some((Share { gfns, place: self.place(gfns) }, rest))
    }

    /// The block and the leaves of some pages of the last region looked up. The cache begins to fetch both.
    fn place(&mut self, gfns: &[u64]) -> Option<Place<'s, Words<S>>> {
        let &first = gfns.first()?;
        let bank = self.bank?;
        let block = bank.books.block(first)?;
        let gfn = Gfn::new(first)?;
        prefetch(block);
        let leaves = self.walker.leaf_table(gfn).map_err(|error| match error {
            WalkError::Unreadable(_) if self.regions.any_absent() => NoLeaves::Absent,
            _ => NoLeaves::Never,
        });
        if let Ok(table) = leaves {
            for gfn in gfns.iter().take(LEAVES_AHEAD).filter_map(|&gfn| Gfn::new(gfn)) {
                prefetch(&table.words()[gfn.leaf_index()]);
            }
        }
        Some(Place { no: BlockNo::of(gfn), bank, block, leaves })
    }

    fn pin_share(&mut self, share: &Share<'s, '_, Words<S>>) -> Outcome {
        let Some(place) = &share.place else {
            return self.without_ram(share.gfns);
        };
        let table = match place.leaves {
            Ok(table) => table,
            Err(_) if self.times.is_over() => return Outcome::TimedOut,
            Err(NoLeaves::Absent) => return Outcome::Absent { absent: share.gfns.len() as u64, failed: 0 },
            Err(NoLeaves::Never) => return Outcome::Failed(share.gfns.len() as u64),
        };
        let mut block = place.block.lock();
        let held = self.pinner.holds.pages_of(place.no);
        // Most shares are one run of pages of which none is mapped.
        if let Some(run) = whole_run(share.gfns).filter(|_| held.is_none() && !self.speculates())
            && block.mapped().has_none_of(run.clone())
        {
            return self.pin_new_run(place, &mut block, table, share.gfns, run);
        }
        let before = *block.mapped();
        let mut mapping = Mapping { place, held, failed: PageSet::EMPTY, is_short: false };
        self.map_missing(&mut mapping, &mut block, share.gfns);
        self.end_share(&mapping, &mut block, table, share.gfns, before)
    }

    /// Pins a share that is one run of pages of which none is mapped, held, or to be mapped together with others.
    fn pin_new_run(
        &mut self,
        place: &Place<'s, Words<S>>,
        block: &mut Block,
        table: LeafTable<'s, Words<S>>,
        gfns: &[u64],
        run: Range<usize>,
    ) -> Outcome {
        let pages = if self.pinner.config.policy.extent == ExtentPolicy::Page { 1 } else { run.len() };
        let mut at = run.start;
        while at < run.end {
            let tried = at..at + pages;
            at = tried.end;
            if let Err(error) = self.map_extent(place, block, tried.clone()) {
                let mut mapping = Mapping { place, held: None, failed: PageSet::EMPTY, is_short: false };
                self.refused(&mut mapping, block, tried, error);
                if at < run.end {
                    self.map_gap(&mut mapping, block, at..run.end);
                }
                let before = *block.mapped() - PageSet::range(run);
                return self.end_share(&mapping, block, table, gfns, before);
            }
        }
        if self.times.is_over() {
            return self.take_back(place.no, block, PageSet::range(run));
        }
        leaves_of(table, place.no, run).for_each(Leaf::set_pinned);
        Outcome::Pinned
    }

    /// Unmaps pages that were mapped too late: the table may be somebody else's by now. What cannot be unmapped stays in the
    /// pin map, as it must.
    fn take_back(&self, no: BlockNo, block: &mut Block, new: PageSet) -> Outcome {
        let _unmapped = self.pinner.unmap_extents(no, block, new);
        Outcome::TimedOut
    }

    /// Whether more may be mapped than is asked for.
    fn speculates(&self) -> bool {
        matches!(self.pinner.config.policy.extent, ExtentPolicy::Aligned(_))
    }

    /// Sets PINNED on what is mapped of a share, and on what was mapped with it; or takes it back, if it took too long.
    fn end_share(
        &self,
        mapping: &Mapping<'_, 's, Words<S>>,
        block: &mut Block,
        table: LeafTable<'s, Words<S>>,
        gfns: &[u64],
        before: PageSet,
    ) -> Outcome {
        let no = mapping.place.no;
        if self.times.is_over() {
            let new = *block.mapped() - before;
            return self.take_back(no, block, new);
        }
        if self.speculates() {
            for run in (*block.mapped() - before).runs() {
                leaves_of(table, no, run).for_each(Leaf::set_pinned);
            }
        }
        for run in runs(gfns) {
            // What was mapped before mostly says so already, and a look is cheaper than a write.
            let leaves = leaves_of(table, no, run.clone()).zip(run);
            let to_set = leaves.filter(|(leaf, page)| block.mapped().contains(*page) && !leaf.is_pinned());
            to_set.for_each(|(leaf, _)| leaf.set_pinned());
        }
        if mapping.is_complete() && mapping.held.is_none() {
            return Outcome::Pinned;
        }
        let mut wanted = PageSet::EMPTY;
        runs(gfns).for_each(|run| wanted.insert(run));
        self.what_is_missing(mapping, wanted - *block.mapped())
    }

    /// What becomes of pages that are in no region.
    fn without_ram(&self, gfns: &[u64]) -> Outcome {
        if self.times.is_over() {
            return Outcome::TimedOut;
        }
        let absent = gfns.iter().filter(|&&gfn| self.regions.is_absent(gfn)).count() as u64;
        Outcome::Absent { absent, failed: gfns.len() as u64 - absent }
    }

    /// Maps those pages of a share that are not mapped. One that fails does not spoil the others.
    fn map_missing(&mut self, mapping: &mut Mapping<'_, 's, Words<S>>, block: &mut Block, gfns: &[u64]) {
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
    fn what_is_missing(&self, mapping: &Mapping<'_, 's, Words<S>>, missing: PageSet) -> Outcome {
        let may_be_short = missing - mapping.failed - mapping.held.unwrap_or_default();
        let short = if mapping.is_short { may_be_short } else { PageSet::EMPTY };
        let failed = (missing - short).len();
        if short.is_empty() {
            return if failed == 0 { Outcome::Pinned } else { Outcome::Failed(failed) };
        }
        let pages = short.len();
        let mappings = match self.pinner.config.policy.extent {
            ExtentPolicy::Page => pages,
            ExtentPolicy::Run | ExtentPolicy::Aligned(_) => short.runs().count() as u64,
        };
        Outcome::Short { failed, short: Need { pages, mappings } }
    }

    /// Maps adjacent pages that are not mapped and not held, in extents as the policy says.
    fn map_gap(&mut self, mapping: &mut Mapping<'_, 's, Words<S>>, block: &mut Block, gap: Range<usize>) {
        if mapping.is_short {
            return;
        }
        match self.pinner.config.policy.extent {
            ExtentPolicy::Page => self.map_singly(mapping, block, gap),
            ExtentPolicy::Run => self.map_run(mapping, block, gap),
            ExtentPolicy::Aligned(size) => {
                let mut at = gap.start;
                while let Some(left) = block.mapped().gap_in(at..gap.end) {
                    if mapping.is_short {
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
    fn map_run(&mut self, mapping: &mut Mapping<'_, 's, Words<S>>, block: &mut Block, run: Range<usize>) {
        if mapping.is_short {
            return;
        }
        if let Err(error) = self.map_extent(mapping.place, block, run.clone()) {
            self.refused(mapping, block, run, error);
        }
    }

    /// What to do about an extent that was not mapped: it is tried page by page, as only one of them may be bad.
    fn refused(
        &mut self,
        mapping: &mut Mapping<'_, 's, Words<S>>,
        block: &mut Block,
        extent: Range<usize>,
        error: MapError,
    ) {
        match error {
            error if error.is_shortage() => mapping.is_short = true,
            _ if extent.len() == 1 => mapping.failed.insert(extent),
            _ => self.map_singly(mapping, block, extent),
        }
    }

    /// Maps the aligned piece of so many pages around a page, as far as it is free; false if that cannot be.
    fn map_around(
        &mut self,
        mapping: &Mapping<'_, 's, Words<S>>,
        block: &mut Block,
        page: usize,
        pages: usize,
    ) -> bool {
        let start = page - page % pages;
        let ram = mapping.place.no.pages_in(&mapping.place.bank.region.gfns());
        let taken = *block.mapped() | mapping.held.unwrap_or_default();
        let free = (ram - taken) & PageSet::range(start..start + pages);
        self.map_extent(mapping.place, block, free.run_around(page)).is_ok()
    }

    /// Maps each page of a run for itself.
    fn map_singly(&mut self, mapping: &mut Mapping<'_, 's, Words<S>>, block: &mut Block, run: Range<usize>) {
        run.for_each(|page| self.map_run(mapping, block, page..page + 1));
    }

    fn map_extent(
        &mut self,
        place: &Place<'s, Words<S>>,
        block: &mut Block,
        pages: Range<usize>,
    ) -> Result<(), MapError> {
        let region: &RamRegion = &place.bank.region;
        self.pinner.map_extent(place.no, block, pages, region, &mut self.tally)
    }
}

/// The mapping of a share's missing pages while it is under way.
struct Mapping<'a, 's, W> {
    place: &'a Place<'s, W>,
    /// The pages of the block that are held, if there are holds anywhere.
    held: Option<PageSet>,
    /// Pages that cannot be mapped, whatever room there is.
    failed: PageSet,
    /// There is no room: nothing more is tried.
    is_short: bool,
}

impl<W> Mapping<'_, '_, W> {
    /// Whether nothing went wrong so far.
    fn is_complete(&self) -> bool {
        !self.is_short && self.failed.is_empty()
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

/// The leaves of a run of a block's pages.
fn leaves_of<W: Word32>(table: LeafTable<'_, W>, no: BlockNo, run: Range<usize>) -> impl Iterator<Item = Leaf<'_, W>> {
    let first = no.gfn(run.start).leaf_index();
    table.words().get(first..first + run.len()).unwrap_or_default().iter().map(Leaf::new)
}
