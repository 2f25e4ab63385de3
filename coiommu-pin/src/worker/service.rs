//! What the workers of one guest share.

use std::any::Any;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Duration;

use coiommu_dtt::notify::NoSlot;
use hdrhistogram::Histogram;
use vmm_sys_util::eventfd::EventFd;

use super::Polled;
use super::events::eventfd;
use super::rings::Rings;
use crate::notify_map::NotifyMap;
use crate::pinner::Pinner;
use crate::space::TableSpace;
use crate::stats::hdrhistogram;
use crate::sync::Mutex;
use crate::sync::atomic::AtomicBool;

/// Why slots cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SlotsError {
    /// A vCPU has none.
    #[error(transparent)]
    None(#[from] NoSlot),
    /// A vCPU's slot has a server already.
    #[error("the slot of vcpu {vcpu} is served by another worker")]
    Claimed {
        /// The vCPU.
        vcpu: usize,
    },
}

/// One guest's pinner and slots, as its workers share them.
///
/// It serves until it is told to [refuse](Self::refuse), or a worker panics. From then on, requests are answered and nothing
/// else is done for them. Once it is [closed](Self::close), the workers end as well.
pub struct Service<S: TableSpace, N> {
    pinner: Pinner<S>,
    notify: N,
    rings: Rings,
    /// The vCPUs whose slots have a server. Held for one look.
    served: Mutex<BTreeSet<usize>>,
    /// Requests are not served any more. Orders nothing: whoever sees it late serves a piece more.
    refuses: AtomicBool,
    failure: OnceLock<String>,
    /// The workers are to end. Release, and acquire by the workers: whoever sees it finds in the slots what was there before
    /// it, and answers it before it ends.
    is_closed: AtomicBool,
    /// Readable from when it is closed; never read.
    closing: EventFd,
}

impl<S: TableSpace, N: NotifyMap> Service<S, N> {
    /// A service that is open, for workers to be made for.
    ///
    /// # Errors
    ///
    /// The system has no eventfd left.
    pub fn new(pinner: Pinner<S>, notify: N) -> io::Result<Self> {
        let closing = eventfd()?;
        let [refuses, is_closed] = [(); 2].map(|()| AtomicBool::new(false));
        let rings = Rings::new(notify.slots().len());
        Ok(Self {
            pinner,
            notify,
            rings,
            served: Mutex::default(),
            refuses,
            failure: OnceLock::new(),
            is_closed,
            closing,
        })
    }

    /// The pinner: to be activated and deactivated, parked, told of RAM, and asked.
    #[must_use]
    pub const fn pinner(&self) -> &Pinner<S> {
        &self.pinner
    }

    /// The slots.
    #[must_use]
    pub const fn notify(&self) -> &N {
        &self.notify
    }

    /// Takes note that a vCPU's doorbell rang `at` this time of the [`SystemClock`](crate::pinner::SystemClock), for
    /// [`doorbell_latency`](Self::doorbell_latency). For those who see it ring, before they tell the worker.
    pub fn rang(&self, vcpu: usize, at: Duration) {
        self.rings.rang(vcpu, at, || matches!(self.notify.slots().take(vcpu), Ok(None)));
    }

    /// How long it took from doorbells that were [taken note of](Self::rang) to their answers, in microseconds. 0 is a request
    /// that a worker had found before its doorbell came.
    #[must_use]
    pub fn doorbell_latency(&self) -> Histogram<u64> {
        self.rings.latency()
    }

    /// A vCPU's slot is answered.
    pub(super) fn answered(&self, vcpu: usize, now: impl FnOnce() -> Duration) {
        self.rings.answered(vcpu, now);
    }

    /// Serves no more requests, for good: those in service end with their piece, they and all that come are answered. What is
    /// pinned stays until the pinner is deactivated.
    pub fn refuse(&self) {
        self.refuses.store(true, Relaxed);
    }

    /// Refuses, and the workers end once they have answered what is there.
    pub fn close(&self) {
        self.refuse();
        self.is_closed.store(true, Release);
        // It fails only if it was written 2^64 - 2 times, and then it is readable.
        let _full = self.closing.write(1);
    }

    /// Why the service failed, if it did: what a worker said in its panic.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// A server claims its slots.
    pub(super) fn claim(&self, vcpus: &BTreeSet<usize>) -> Result<(), SlotsError> {
        let slots = self.notify.slots().len();
        if let Some(&vcpu) = vcpus.last().filter(|&&vcpu| vcpu >= slots) {
            return Err(SlotsError::None(NoSlot { vcpu, slots }));
        }
        let mut served = self.served.lock();
        if let Some(&vcpu) = served.intersection(vcpus).next() {
            return Err(SlotsError::Claimed { vcpu });
        }
        served.extend(vcpus);
        Ok(())
    }

    /// A server gives its slots back.
    pub(super) fn release(&self, vcpus: impl Iterator<Item = usize>) {
        let mut served = self.served.lock();
        vcpus.for_each(|vcpu| _ = served.remove(&vcpu));
    }

    /// Whether requests are answered without being served.
    pub(super) fn refuses(&self) -> bool {
        self.refuses.load(Relaxed)
    }

    /// Readable once the service is closed.
    pub(super) fn closing_fd(&self) -> RawFd {
        self.closing.as_raw_fd()
    }

    /// A worker's turn: its work. Where requests are refused, as they are once a worker has panicked, it answers everything
    /// instead.
    pub(super) fn turn<W>(
        &self,
        name: &str,
        worker: &mut W,
        work: impl FnOnce(&mut W) -> Polled,
        refuse: impl FnOnce(&mut W),
    ) -> Polled {
        if !self.refuses()
            && let Some(polled) = self.guard(name, || work(worker))
        {
            return polled;
        }
        // Before the last look at what was asked: what was there when it was closed is answered.
        let is_closed = self.is_closed.load(Acquire);
        refuse(worker);
        if is_closed { Polled::Closed } else { Polled::Idle }
    }

    /// Does some work of a worker. `None` if it panics: then the service fails.
    fn guard<T>(&self, worker: &str, work: impl FnOnce() -> T) -> Option<T> {
        // What a panic leaves half done is behind locks that are taken all the same, for draining; and nothing is pinned
        // any more.
        catch_unwind(AssertUnwindSafe(work)).map_err(|panic| self.fail(worker, said(&*panic))).ok()
    }

    /// A worker cannot go on.
    pub(super) fn fail(&self, worker: &str, why: &str) {
        if self.failure.set(format!("{worker}: {why}")).is_ok() {
            log::error!("{}; nothing more is pinned for this guest", self.failure().unwrap_or_default());
        }
        self.refuse();
    }
}

/// The words of a panic.
fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words")
}

impl<S: TableSpace, N> std::fmt::Debug for Service<S, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { pinner, is_closed, failure, .. } = self;
        let mut fields = f.debug_struct("Service");
        fields.field("pinner", pinner).field("is_closed", is_closed).field("failure", failure).finish_non_exhaustive()
    }
}
