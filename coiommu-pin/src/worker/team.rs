//! Threads for all workers of a guest, for VMMs that have none of their own to give.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::pin::LOOK;
use super::{PinWorker, ReclaimWorker, Reclaimer, Service};
use crate::notify_map::NotifyMap;
use crate::pinner::{Drain, DrainError};
use crate::space::TableSpace;
use crate::sync::Mutex;

/// How a team is made up.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TeamConfig {
    /// How many threads pin; the vCPUs are dealt out to them. One is enough for most guests.
    pub pin_workers: NonZeroUsize,
    /// The longest that a pin worker keeps looking before it sleeps; 0: sleeps at once.
    pub look: Duration,
}

impl Default for TeamConfig {
    fn default() -> Self {
        Self { pin_workers: NonZeroUsize::MIN, look: LOOK }
    }
}

/// The workers of a guest, each in a thread.
#[derive(Debug)]
pub struct Team<S: TableSpace, N: NotifyMap> {
    service: Arc<Service<S, N>>,
    /// By vCPU.
    doorbells: Vec<Arc<EventFd>>,
    reclaimer: Reclaimer,
    /// Those that have not been waited for. Held while they are.
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl<S, N> Team<S, N>
where
    S: TableSpace + 'static,
    N: NotifyMap + 'static,
{
    /// Starts the threads. It takes a file descriptor a vCPU and a few more: mind the limit of open files.
    ///
    /// # Errors
    ///
    /// The system has no threads or file descriptors left, or a slot has a worker already
    /// ([`SlotsError`](super::service::SlotsError), as invalid input). If some threads were started, the service is closed
    /// then, and they end.
    pub fn spawn(service: &Arc<Service<S, N>>, config: &TeamConfig) -> io::Result<Self> {
        let vcpus = service.notify().slots().len();
        let mut reclaim = ReclaimWorker::new(Arc::clone(service))?;
        let count = config.pin_workers.get().min(vcpus.max(1));
        let shares = (0..count).map(|share| (share..vcpus).step_by(count));
        let workers = shares.map(|share| Ok(PinWorker::new(Arc::clone(service), share)?.with_look(config.look)));
        let workers = workers.collect::<io::Result<Vec<_>>>()?;
        let doorbell = |vcpu| workers.iter().find_map(|worker| worker.shared_doorbell(vcpu)).map(Arc::clone);
        let team = Self {
            service: Arc::clone(service),
            doorbells: (0..vcpus).filter_map(doorbell).collect(),
            reclaimer: reclaim.reclaimer(),
            threads: Mutex::default(),
        };
        // From here on, whatever fails, those that were started end as the team is dropped.
        for (mut worker, number) in workers.into_iter().zip(0..) {
            team.start(format!("coiommu-pin-{number}"), move || worker.run())?;
        }
        team.start("coiommu-reclaim".into(), move || reclaim.run())?;
        Ok(team)
    }

    fn start(&self, name: String, run: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
        let (service, worker) = (Arc::clone(&self.service), name.clone());
        let work = move || {
            // Its slots have nobody any more; with the others, everything is refused.
            run().unwrap_or_else(|error| service.fail(&worker, &error.to_string()));
        };
        self.threads.lock().push(thread::Builder::new().name(name).spawn(work)?);
        Ok(())
    }
}

impl<S: TableSpace, N: NotifyMap> Team<S, N> {
    /// The doorbell of a vCPU, for an ioeventfd or to be written to; `None` if there is no such vCPU.
    #[must_use]
    pub fn doorbell(&self, vcpu: usize) -> Option<&EventFd> {
        self.doorbells.get(vcpu).map(Arc::as_ref)
    }

    /// By which ranges are unpinned.
    #[must_use]
    pub const fn reclaimer(&self) -> &Reclaimer {
        &self.reclaimer
    }

    /// What the workers share.
    #[must_use]
    pub const fn service(&self) -> &Arc<Service<S, N>> {
        &self.service
    }

    /// Ends it all, in this order: no more requests are served, and everything is drained, while requests are still
    /// answered; then the threads end. The caller has switched off the endpoints' bus mastering.
    ///
    /// # Errors
    ///
    /// [`DrainError`] if the mapper refused to unmap something.
    pub fn stop(&self, drain: Drain) -> Result<(), DrainError> {
        self.service.refuse();
        let drained = self.service.pinner().deactivate(drain);
        self.end_threads();
        drained
    }

    fn end_threads(&self) {
        self.service.close();
        for thread in self.threads.lock().drain(..) {
            // They catch what happens in their work.
            thread.join().unwrap_or_else(|_panic| log::error!("a worker's thread ended in a panic"));
        }
    }
}

/// The threads end; nothing is drained.
impl<S: TableSpace, N: NotifyMap> Drop for Team<S, N> {
    fn drop(&mut self) {
        self.end_threads();
    }
}
