//! Serving a request: piece by piece, and a piece block by block.

use std::ops::Range;
use std::time::Duration;

use coiommu_dtt::walk::WalkError;
use coiommu_dtt::{Dtt, Gfn, RequestWord};

use super::unpin::Need;
use super::{Clock, Pinner};
use crate::mapper::MapError;
use crate::page_set::{BLOCK_PAGES, PageSet};
use crate::pin_map::{Block, BlockNo};
use crate::policy::ExtentPolicy;
use crate::region::RamRegion;
use crate::request::{PinRequest, Refusal, Scratch};
use crate::space::{Memory, TableSpace};

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

/// What became of the pages of one block.
#[derive(Debug, Default)]
struct Outcome {
    /// Not pinned, and no way to.
    failed: PageSet,
    /// Not pinned, but their RAM, or that of their table, may come back.
    absent: PageSet,
    /// Not pinned for want of room.
    short: PageSet,
    /// The guest has given up, or is about to.
    timed_out: bool,
}

/// What became of a piece, in pages.
#[derive(Debug, Default)]
struct Piece {
    /// How many gfns of it are done with.
    served: usize,
    failed: u64,
    absent: u64,
    timed_out: bool,
}

/// When to look at other slots, and when to stop.
#[derive(Clone, Copy)]
struct Times<'a> {
    clock: &'a dyn Clock,
    pause: Duration,
    end: Duration,
}

impl Times<'_> {
    fn is_pause(&self) -> bool {
        self.clock.now() >= self.pause
    }

    fn is_over(&self) -> bool {
        self.clock.now() >= self.end
    }
}

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
    /// map calls at most.
    pub fn step(&self, request: &mut PinRequest, scratch: &mut Scratch, clock: &dyn Clock) -> Step {
        let step = self.serve_piece(request, scratch, clock);
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

    fn serve_piece(&self, request: &mut PinRequest, scratch: &mut Scratch, clock: &dyn Clock) -> Step {
        let activation = self.activation.read();
        let Some(dtt) = activation.dtt.filter(|_| activation.number == request.activation) else {
            return Step::Done(PinResult::Refused(Refusal::NotActive));
        };
        let now = clock.now();
        let times = Times {
            clock,
            pause: now.saturating_add(self.config.step_time),
            end: request.taken.saturating_add(self.config.request_time),
        };
        if times.is_over() {
            return Step::Done(PinResult::TimedOut);
        }
        let may_wait = request.waits && now < request.taken.saturating_add(self.config.absent_time);
        let view = self.space.view();
        if let Err(refusal) = request.read_piece(&*view, &self.config.endpoints, scratch) {
            let is_away = matches!(refusal, Refusal::Unreadable(_)) && self.regions.read().any_absent();
            return if may_wait && is_away { Step::Wait } else { Step::Done(PinResult::Refused(refusal)) };
        }
        let piece = self.pin_piece(request, scratch.piece(), dtt, &view, times);
        if piece.absent > 0 && may_wait && !piece.timed_out {
            // The same again: pages that are pinned by now cost little then.
            request.keep_piece(scratch, 0);
            return Step::Wait;
        }
        request.keep_piece(scratch, piece.served);
        request.asked += piece.served as u64;
        request.failed += piece.failed + piece.absent;
        match (piece.timed_out, request.is_served(), request.failed) {
            (true, _, _) => Step::Done(PinResult::TimedOut),
            (false, false, _) => Step::More,
            (false, true, 0) => Step::Done(PinResult::Pinned),
            (false, true, _) => Step::Done(PinResult::Failed),
        }
    }

    /// Pins the pages of a sorted piece, until its end or a time's.
    fn pin_piece(&self, request: &mut PinRequest, gfns: &[u64], dtt: Dtt, mem: &Memory<S>, times: Times<'_>) -> Piece {
        let mut piece = Piece::default();
        for same_block in gfns.chunk_by(|a, b| a / BLOCK_PAGES as u64 == b / BLOCK_PAGES as u64) {
            if piece.served > 0 && times.is_pause() {
                break;
            }
            piece.served += same_block.len();
            let Some((no, wanted)) = block_and_pages(same_block) else {
                piece.failed += same_block.len() as u64;
                continue;
            };
            let mut outcome = self.pin_block(no, wanted, dtt, mem, times);
            if !outcome.short.is_empty() && !request.made_room && !outcome.timed_out {
                request.made_room = true;
                let need = Need { pages: outcome.short.len(), mappings: outcome.short.runs().count() as u64 };
                if self.make_room(need, dtt, mem, &|| times.is_over()) {
                    let again = self.pin_block(no, outcome.short, dtt, mem, times);
                    outcome.failed |= again.failed;
                    outcome.absent |= again.absent;
                    outcome.short = again.short;
                    outcome.timed_out = again.timed_out;
                }
            }
            piece.failed += (outcome.failed | outcome.short).len();
            piece.absent += outcome.absent.len();
            if outcome.timed_out {
                piece.timed_out = true;
                break;
            }
        }
        piece
    }

    /// Pins the wanted pages of one block.
    fn pin_block(&self, no: BlockNo, wanted: PageSet, dtt: Dtt, mem: &Memory<S>, times: Times<'_>) -> Outcome {
        // Books are made for blocks with RAM only.
        let has_ram = self.regions.read().touches(&no.gfns());
        let chunk = if has_ram { Some(self.map.chunk_or_new(no)) } else { self.map.chunk(no) };
        let Some(chunk) = chunk else {
            return self.without_ram(no, wanted);
        };
        let mut block = chunk.lock(no);
        let table = match dtt.leaf_table(mem, no.gfn(0)) {
            Ok(table) => table,
            Err(WalkError::Unreadable(_)) if self.regions.read().any_absent() => {
                return Outcome { absent: wanted, ..Outcome::default() };
            }
            Err(_) => {
                return Outcome { failed: wanted, ..Outcome::default() };
            }
        };
        let before = block.mapped();
        let mut outcome = self.map_pages(no, &mut block, wanted - before);
        let new = block.mapped() - before;
        if times.is_over() {
            // The table may be somebody else's by now. What cannot be unmapped stays in the pin map, as it must.
            let _unmapped = self.unmap_extents(no, &mut block, new);
            outcome.timed_out = true;
            return outcome;
        }
        for page in (new | (wanted & before)).pages() {
            let leaf = table.leaf(no.gfn(page));
            if !leaf.is_pinned() {
                leaf.set_pinned();
            }
        }
        outcome
    }

    /// What becomes of pages of a block that has no RAM and no books.
    fn without_ram(&self, no: BlockNo, wanted: PageSet) -> Outcome {
        let regions = self.regions.read();
        let mut absent = PageSet::EMPTY;
        for page in wanted.pages().filter(|&page| regions.is_absent(no.gfn(page))) {
            absent.insert_page(page);
        }
        Outcome { failed: wanted - absent, absent, ..Outcome::default() }
    }

    /// Maps the pages of a block that are not mapped, extent by extent. One that fails does not spoil the others.
    fn map_pages(&self, no: BlockNo, block: &mut Block, mut missing: PageSet) -> Outcome {
        let mut outcome = Outcome::default();
        if missing.is_empty() {
            return outcome;
        }
        let regions = self.regions.read();
        let held = self.holds.pages_of(no);
        outcome.failed = missing & held;
        missing -= held;
        while let Some(page) = missing.first_from(0) {
            let Some(region) = regions.find(no.gfn(page)) else {
                let to = if regions.is_absent(no.gfn(page)) { &mut outcome.absent } else { &mut outcome.failed };
                to.insert_page(page);
                missing -= PageSet::range(page..page + 1);
                continue;
            };
            let free = no.pages_in(&region.gfns()) - block.mapped() - held;
            let run = match self.config.policy.extent {
                ExtentPolicy::Page => page..page + 1,
                _ => (missing & free).run_around(page),
            };
            match self.map_run(no, block, page, run.clone(), free, region) {
                Ok(()) => missing -= block.mapped(),
                Err(error) if error.is_shortage() => {
                    let here = missing & no.pages_in(&region.gfns());
                    outcome.short |= here;
                    missing -= here;
                }
                Err(_) => {
                    self.map_singly(no, block, run.clone(), region, &mut outcome);
                    missing -= PageSet::range(run);
                }
            }
        }
        // A page that failed by itself may have come along with another's aligned piece.
        outcome.failed -= block.mapped();
        outcome.short -= block.mapped();
        outcome
    }

    /// Maps the pages of a run that cannot be mapped together, as only one of them may be bad.
    fn map_singly(&self, no: BlockNo, block: &mut Block, run: Range<usize>, region: &RamRegion, outcome: &mut Outcome) {
        if run.len() == 1 {
            outcome.failed.insert(run);
            return;
        }
        for page in run.clone() {
            match self.map_extent(no, block, page..page + 1, region) {
                Ok(()) => {}
                Err(error) if error.is_shortage() => {
                    outcome.short.insert(page..run.end);
                    return;
                }
                Err(_) => outcome.failed.insert_page(page),
            }
        }
    }

    /// Maps what the policy says for the run of missing pages that begins with `page`: all of the run, or the first extent
    /// of it.
    fn map_run(
        &self,
        no: BlockNo,
        block: &mut Block,
        page: usize,
        run: Range<usize>,
        free: PageSet,
        region: &RamRegion,
    ) -> Result<(), MapError> {
        match self.config.policy.extent {
            ExtentPolicy::Page | ExtentPolicy::Run => self.map_extent(no, block, run, region),
            ExtentPolicy::Aligned(size) => {
                let pages = usize::try_from(size.bytes() / coiommu_dtt::PAGE_SIZE).unwrap_or(BLOCK_PAGES);
                let start = page - page % pages;
                let around = (free & PageSet::range(start..start + pages)).run_around(page);
                match self.map_extent(no, block, around.clone(), region) {
                    Err(_) if around != run => self.map_extent(no, block, run, region),
                    result => result,
                }
            }
        }
    }
}

/// The block of some gfns, which are all in the same, and their pages in it; `None` if no address is there.
fn block_and_pages(gfns: &[u64]) -> Option<(BlockNo, PageSet)> {
    let no = BlockNo::of(Gfn::new(*gfns.first()?)?);
    let mut pages = PageSet::EMPTY;
    for &gfn in gfns {
        pages.insert_page(BlockNo::index(Gfn::new(gfn)?));
    }
    Some((no, pages))
}
