//! Serving the slots of some vCPUs, a piece at a time.

use std::collections::BTreeSet;
use std::sync::Arc;

use coiommu_dtt::RequestWord;
use coiommu_dtt::notify::{Answered, NoSlot};

use super::Polled;
use super::service::{Service, SlotsError};
use crate::notify_map::NotifyMap;
use crate::pinner::{Clock, PinResult, Step, SystemClock};
use crate::request::{PinRequest, Refusal, Scratch};
use crate::space::TableSpace;

/// Serves the slots of some vCPUs, and has one piece of one request in hand at a time: a long batch of one vCPU keeps the
/// others waiting for a piece, not for all of it.
///
/// It needs no thread and no file descriptor: [`PinWorker`](super::PinWorker) has those. A slot has one server at a time:
/// once a request is answered, the guest may free the table that a second one would still be writing to.
pub struct SlotServer<S: TableSpace, N: NotifyMap> {
    service: Arc<Service<S, N>>,
    slots: Box<[Slot]>,
    scratch: Scratch,
    /// Which slot's request comes next, of those in service.
    next: usize,
    /// Which slot is looked at first for a new one.
    first: usize,
}

/// A vCPU's slot, and the request that was taken from it, until it is answered.
#[derive(Debug)]
struct Slot {
    vcpu: usize,
    request: Option<PinRequest>,
}

impl<S: TableSpace, N: NotifyMap> SlotServer<S, N> {
    /// A server for the slots of these vCPUs.
    ///
    /// # Errors
    ///
    /// [`SlotsError`]: one of them has none, or it is served by another.
    pub fn new(service: Arc<Service<S, N>>, vcpus: impl IntoIterator<Item = usize>) -> Result<Self, SlotsError> {
        let vcpus = BTreeSet::from_iter(vcpus);
        service.claim(&vcpus)?;
        let slots = vcpus.into_iter().map(|vcpu| Slot { vcpu, request: None }).collect();
        Ok(Self { service, slots, scratch: Scratch::default(), next: 0, first: 0 })
    }

    /// The vCPUs whose slots it serves, in ascending order.
    pub fn vcpus(&self) -> impl Iterator<Item = usize> {
        self.slots.iter().map(|slot| slot.vcpu)
    }

    /// What it shares with the others.
    #[must_use]
    pub const fn service(&self) -> &Arc<Service<S, N>> {
        &self.service
    }

    /// Serves another piece of a request that takes longer, one of them in turn, and then, looking at every slot, the first
    /// piece of each new one, for [`step_time`](crate::PinnerConfig::step_time) and one piece at most. Waits for nothing but
    /// map calls; and, where there is no room, for some to be made.
    pub fn poll_once(&mut self, clock: &dyn Clock) -> Polled {
        let service = Arc::clone(&self.service);
        service.turn("a pin worker", self, |server| server.serve(clock), Self::refuse)
    }

    /// How many requests are in service: taken, and not answered yet.
    #[must_use]
    pub fn in_service(&self) -> usize {
        self.slots.iter().filter(|slot| slot.request.is_some()).count()
    }

    /// Whether a slot has something in it that is not in service: cheaper than to look and serve.
    #[must_use]
    pub fn has_new_request(&self) -> bool {
        let slots = self.service.notify().slots();
        let is_new = |slot: &&Slot| slot.request.is_none() && matches!(slots.take(slot.vcpu), Ok(Some(_)));
        self.slots.iter().any(|slot| is_new(&slot))
    }

    fn serve(&mut self, clock: &dyn Clock) -> Polled {
        let mut polled = Polled::Idle;
        // A piece of one that was begun before, in turn; but who waits lets the next one go.
        for _ in 0..self.slots.len() {
            self.next = (self.next + 1) % self.slots.len();
            polled = polled.max(self.step(self.next, clock));
            if polled == Polled::More {
                break;
            }
        }
        // After a piece, the first one of all that are new, or of as many as there is time for.
        let end = clock.now().saturating_add(self.service.pinner().step_time());
        for n in 0..self.slots.len() {
            let at = (self.first + n) % self.slots.len();
            let taken = self.take(at, clock);
            polled = polled.max(taken);
            if taken > Polled::Idle && (self.service.refuses() || clock.now() >= end) {
                self.first = at + 1;
                return Polled::More;
            }
        }
        polled
    }

    /// Takes a request out of a slot, if there is a new one, and serves its first piece.
    fn take(&mut self, at: usize, clock: &dyn Clock) -> Polled {
        let Slot { vcpu, request } = &mut self.slots[at];
        let taken = if request.is_none() { self.service.notify().slots().take(*vcpu) } else { Ok(None) };
        let Ok(Some(word)) = taken else { return Polled::Idle };
        match self.service.pinner().begin(word, clock.now()) {
            Ok(begun) => {
                *request = Some(begun);
                self.step(at, clock)
            }
            Err(_refused_and_counted) => {
                self.answer(at, word, clock);
                Polled::More
            }
        }
    }

    /// Serves a piece of the request that is in service for a slot, if there is one.
    fn step(&mut self, at: usize, clock: &dyn Clock) -> Polled {
        let Some(request) = self.slots[at].request.as_mut() else { return Polled::Idle };
        match self.service.pinner().step(request, &mut self.scratch, clock) {
            Step::Wait => Polled::Wait,
            Step::More => Polled::More,
            // Deactivated meanwhile. What is in the slot may be the next guest's, in the same words: it is taken afresh.
            Step::Done(PinResult::Refused(Refusal::NotActive)) => {
                self.slots[at].request = None;
                Polled::More
            }
            Step::Done(_told_by_pinned) => {
                let word = request.word();
                self.slots[at].request = None;
                self.answer(at, word, clock);
                Polled::More
            }
        }
    }

    /// Answers what was taken from a slot. If there is another request by now, it is found when the slot is looked at again.
    fn answer(&self, at: usize, word: RequestWord, clock: &dyn Clock) {
        let vcpu = self.slots[at].vcpu;
        let _found_later: Result<Answered, NoSlot> = self.service.notify().slots().answer(vcpu, word);
        self.service.answered(vcpu, || clock.now());
    }

    /// Answers everything, and serves nothing.
    fn refuse(&mut self) {
        for at in 0..self.slots.len() {
            self.slots[at].request = None;
            if let Ok(Some(word)) = self.service.notify().slots().take(self.slots[at].vcpu) {
                self.answer(at, word, &SystemClock);
            }
        }
    }
}

/// Nobody is left waiting.
impl<S: TableSpace, N: NotifyMap> Drop for SlotServer<S, N> {
    fn drop(&mut self) {
        self.refuse();
        self.service.release(self.vcpus());
    }
}

impl<S: TableSpace, N: NotifyMap> std::fmt::Debug for SlotServer<S, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SlotServer").field("slots", &self.slots).finish_non_exhaustive()
    }
}
