//! Serving a request, step by step, a piece of its pages at a time.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use coiommu_dtt::RequestWord;

use super::share::{Serving, Times};
use super::unpin::Need;
use super::{Clock, Pinner};
use crate::mapper::Shortage;
use crate::request::{PinRequest, Refusal, Scratch};
use crate::space::TableSpace;

/// What to do after a piece of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a request that is done has to be answered"]
pub enum Step {
    /// There is more: look at the other slots, then call again.
    More,
    /// RAM that went may come back, or a hold end: call again in a moment.
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
    Short(Shortage, Need),
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
    /// map calls at most. Where there is no room, some is made in between, once a piece of mappings and of pages each, which may
    /// take until the request's time is over; if it was not enough, what is left of the request does without.
    pub fn step(&self, request: &mut PinRequest, scratch: &mut Scratch, clock: &dyn Clock) -> Step {
        let step = loop {
            // At once after room was made, before others take it. Each shortage is met once, so this ends.
            match self.serve_piece(request, scratch, clock) {
                Served::Step(step) => break step,
                Served::Short(shortage, need) => {
                    let end = request.taken.saturating_add(self.config.request_time);
                    let is_enough = self.make_room(need, request.activation, &|| clock.roughly() >= end);
                    request.room.made(shortage, is_enough);
                }
            }
        };
        if let Step::Done(result) = step {
            self.finish(request, result, clock);
        }
        step
    }

    /// Serves a request to its end, for callers that have nothing else to look at. RAM that is away and pages that are held are not
    /// waited for.
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
        let times = Times::new(clock, now.saturating_add(self.config.step_time), end);
        let may_wait = request.waits && now < request.taken.saturating_add(self.config.wait_time);
        let regions = self.regions.read();
        let view = self.space.view();
        if let Err(refusal) = request.read_piece(&*view, &self.config.endpoints, scratch) {
            let is_away = matches!(refusal, Refusal::Unreadable(_)) && regions.any_absent();
            let step = if may_wait && is_away { Step::Wait } else { Step::Done(PinResult::Refused(refusal)) };
            return Served::Step(step);
        }
        if let Some(asked) = request.endpoint().and_then(|endpoint| self.asked_of(endpoint)) {
            asked.store(true, Relaxed);
        }
        let mut serving = Serving::new(self, &regions, dtt, &*view, times);
        let piece = serving.pin_piece(request.room, scratch.piece());
        // The same again: pages that are pinned by now cost little then.
        if let Some((shortage, need)) = piece.short {
            request.keep_piece(scratch, 0);
            return Served::Short(shortage, need);
        }
        if piece.later > 0 && may_wait && !piece.timed_out {
            request.keep_piece(scratch, 0);
            return Served::Step(Step::Wait);
        }
        request.keep_piece(scratch, piece.served);
        request.asked += piece.served as u64;
        request.failed += piece.failed + piece.later;
        Served::Step(match (piece.timed_out, request.is_served(), request.failed) {
            (true, _, _) => Step::Done(PinResult::TimedOut),
            (false, false, _) => Step::More,
            (false, true, 0) => Step::Done(PinResult::Pinned),
            (false, true, _) => Step::Done(PinResult::Failed),
        })
    }
}
