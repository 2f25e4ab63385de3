//! A worker that takes pages back: by and by, and on request.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use coiommu_dtt::Gpa;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use vmm_sys_util::eventfd::EventFd;

use super::events::Events;
use super::{Polled, Service};
use crate::notify_map::NotifyMap;
use crate::pinner::{Clock, ForcedUnpin, Hold, SystemClock, UnpinReport, UnpinStep};
use crate::space::TableSpace;

/// How many requests wait at most; who asks is the host, not the guest.
const MOST_WAITING: usize = 64;
/// How many are worked on at a time.
const MOST_RUNNING: usize = 16;
/// How long a request that waits for an unpark waits between two looks.
const MOMENT: Duration = Duration::from_millis(1);

/// What came of a request to unpin a range: with the hold, which is there if the range may be taken, nothing in it is
/// pinned; drop it once the memory is taken.
pub type Unpinned = Result<(UnpinReport, Option<Hold>), UnpinError>;

/// Why a range was not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnpinError {
    /// The device is gone, or going, or its workers failed: see [`Service::failure`].
    #[error("the device's service has ended")]
    Ended,
    /// Too many others are waiting.
    #[error("{MOST_WAITING} requests to unpin are waiting already: wait for their replies")]
    TooMany,
}

/// A request to unpin a range. It is replied to in any case, if not otherwise then when it is dropped.
struct Ask {
    gpa: Gpa,
    bytes: u64,
    /// When it was asked: its time runs from then.
    at: Duration,
    reply: Option<Box<dyn FnOnce(Unpinned) + Send>>,
}

impl Ask {
    /// The first time it is called, that is.
    fn reply(&mut self, unpinned: Unpinned) {
        let Some(reply) = self.reply.take() else { return };
        // Who asked is not the guest, and its troubles are not to be the guest's.
        if catch_unwind(AssertUnwindSafe(|| reply(unpinned))).is_err() {
            log::error!("the reply to a request to unpin {} ended in a panic", self.gpa);
        }
    }
}

impl Drop for Ask {
    fn drop(&mut self) {
        self.reply(Err(UnpinError::Ended));
    }
}

/// By which a [`ReclaimWorker`] is asked to unpin ranges, from any thread.
#[derive(Clone, Debug)]
pub struct Reclaimer(Arc<Queue>);

/// What the worker has not taken yet.
#[derive(Debug)]
struct Queue {
    to: Sender<Ask>,
    from: Receiver<Ask>,
    bell: Arc<EventFd>,
    /// Nobody takes any more. Sequentially consistent, as the queue is: whoever queues looks at this after, and the worker
    /// sets it before it empties the queue for the last time, so one of the two finds what is queued.
    has_ended: AtomicBool,
}

impl Queue {
    /// Turns everybody away: each is replied to as it is dropped.
    fn turn_away(&self) {
        self.from.try_iter().for_each(drop);
    }

    fn end(&self) {
        self.has_ended.store(true, SeqCst);
        self.turn_away();
    }
}

impl std::fmt::Debug for Ask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ask").field("gpa", &self.gpa).field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Reclaimer {
    /// Asks for a range to be unpinned, as its memory is about to be taken. `reply` is called once, with what came of it, by
    /// the worker or here; it should not take long, and must not wait for another reply.
    pub fn unpin(&self, gpa: Gpa, bytes: u64, reply: impl FnOnce(Unpinned) + Send + 'static) {
        let ask = Ask { gpa, bytes, at: SystemClock.now(), reply: Some(Box::new(reply)) };
        let Self(queue) = self;
        match queue.to.try_send(ask) {
            // It fails only if it rings already.
            Ok(()) => _ = queue.bell.write(1),
            Err(TrySendError::Full(mut ask)) => ask.reply(Err(UnpinError::TooMany)),
            Err(TrySendError::Disconnected(ask)) => drop(ask),
        }
        if queue.has_ended.load(SeqCst) {
            queue.turn_away();
        }
    }

    /// The same, and waits for the reply. Not for the thread that the worker runs in.
    ///
    /// # Errors
    ///
    /// [`UnpinError`].
    pub fn unpin_and_wait(&self, gpa: Gpa, bytes: u64) -> Unpinned {
        let (to, from) = bounded(1);
        self.unpin(gpa, bytes, move |unpinned| _ = to.send(unpinned));
        from.recv().unwrap_or(Err(UnpinError::Ended))
    }
}

/// Takes idle pages back, as often as the policy says, and unpins ranges on request.
pub struct ReclaimWorker<S: TableSpace, N: NotifyMap> {
    service: Arc<Service<S, N>>,
    queue: Arc<Queue>,
    running: Vec<(ForcedUnpin, Ask)>,
    ticks: Option<Ticks>,
    events: Events,
}

/// When the next tick is due.
#[derive(Debug)]
struct Ticks {
    interval: Duration,
    next: Duration,
}

impl<S: TableSpace, N: NotifyMap> ReclaimWorker<S, N> {
    /// A worker for a service, which needs one.
    ///
    /// # Errors
    ///
    /// The system has no file descriptor left.
    pub fn new(service: Arc<Service<S, N>>) -> io::Result<Self> {
        let mut events = Events::new(1, service.closing_fd())?;
        let bell = events.bell(0).map(Arc::clone).ok_or(io::ErrorKind::NotFound)?;
        let (to, from) = bounded(MOST_WAITING);
        let queue = Arc::new(Queue { to, from, bell, has_ended: AtomicBool::new(false) });
        let interval = service.pinner().policy().tick_interval();
        let ticks = interval.map(|interval| Ticks { interval, next: SystemClock.now().saturating_add(interval) });
        // In somebody else's event loop, nothing else calls for the first one.
        interval.map_or(Ok(()), |interval| events.wake_after(interval))?;
        Ok(Self { service, queue, running: Vec::new(), ticks, events })
    }

    /// By which it is asked.
    #[must_use]
    pub fn reclaimer(&self) -> Reclaimer {
        Reclaimer(Arc::clone(&self.queue))
    }

    /// Takes requests, goes a step on with each, and with a tick if one is due. Waits for nothing but unmap calls.
    pub fn poll_once(&mut self) -> Polled {
        let service = Arc::clone(&self.service);
        service.turn("the reclaim worker", self, |worker| worker.work(&SystemClock), Self::refuse)
    }

    /// Replies to everything, and does nothing.
    fn refuse(&mut self) {
        // Each is replied to as it is dropped.
        self.running.clear();
        self.queue.turn_away();
    }

    /// Does a piece of work: to be called whenever the worker is readable, which it is as long as there is some.
    ///
    /// # Errors
    ///
    /// Those of waiting for events, none of which is to be expected.
    pub fn handle_event(&mut self) -> io::Result<Polled> {
        self.events.wait(Some(Duration::ZERO))?;
        let polled = self.poll_once();
        if let Some(time) = self.rest(polled) {
            self.events.wake_after(time)?;
        }
        Ok(polled)
    }

    /// Works until the service is closed.
    ///
    /// # Errors
    ///
    /// As [`handle_event`](Self::handle_event).
    pub fn run(&mut self) -> io::Result<()> {
        loop {
            let polled = self.poll_once();
            match polled {
                Polled::More => {}
                Polled::Wait | Polled::Idle => {
                    let time = self.rest(polled);
                    self.events.wait(time)?;
                }
                Polled::Closed => return Ok(()),
            }
        }
    }

    /// How long there is nothing to do unless somebody asks; `None`: for ever.
    fn rest(&self, polled: Polled) -> Option<Duration> {
        match polled {
            Polled::More => Some(Duration::ZERO),
            Polled::Wait => Some(MOMENT),
            Polled::Idle if self.service.refuses() => None,
            Polled::Idle => self.ticks.as_ref().map(|ticks| ticks.next.saturating_sub(SystemClock.now())),
            Polled::Closed => None,
        }
    }

    fn work(&mut self, clock: &dyn Clock) -> Polled {
        let mut polled = Polled::Idle;
        while self.running.len() < MOST_RUNNING {
            let Ok(ask) = self.queue.from.try_recv() else { break };
            let unpin = self.service.pinner().begin_unpin(ask.gpa, ask.bytes, &ask.at);
            self.running.push((unpin, ask));
        }
        for (unpin, mut ask) in std::mem::take(&mut self.running) {
            match self.service.pinner().step_unpin(unpin, clock) {
                UnpinStep::Done(report, hold) => {
                    ask.reply(Ok((report, hold)));
                    polled = Polled::More;
                }
                UnpinStep::More(unpin) => {
                    self.running.push((unpin, ask));
                    polled = Polled::More;
                }
                UnpinStep::Wait(unpin) => {
                    self.running.push((unpin, ask));
                    polled = polled.max(Polled::Wait);
                }
            }
        }
        self.tick(clock.now());
        polled
    }

    /// Ticks, if it is time to. In one piece: a second part would find idle what the first has aged.
    fn tick(&mut self, now: Duration) {
        let Some(ticks) = self.ticks.as_mut().filter(|ticks| now >= ticks.next) else { return };
        // From now, not from when it was due: those that were missed are not made up for.
        ticks.next = now.saturating_add(ticks.interval);
        self.service.pinner().tick(self.service.pinner().policy().unpin_limit.map(NonZeroU64::get));
    }
}

/// Nobody is left waiting.
impl<S: TableSpace, N: NotifyMap> Drop for ReclaimWorker<S, N> {
    fn drop(&mut self) {
        self.queue.end();
    }
}

/// Readable when there is something to do, and for good once the service is closed.
impl<S: TableSpace, N: NotifyMap> AsRawFd for ReclaimWorker<S, N> {
    fn as_raw_fd(&self) -> RawFd {
        self.events.as_raw_fd()
    }
}

impl<S: TableSpace, N: NotifyMap> std::fmt::Debug for ReclaimWorker<S, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReclaimWorker")
            .field("running", &self.running.len())
            .field("ticks", &self.ticks)
            .finish_non_exhaustive()
    }
}
