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
    doorbells: Vec<EventFd>,
    reclaimer: Reclaimer,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl<S, N> Team<S, N>
where
    S: TableSpace + 'static,
    N: NotifyMap + 'static,
{
    /// Starts the threads.
    ///
    /// # Errors
    ///
    /// The system has no threads or file descriptors left. The service is closed then.
    pub fn spawn(service: &Arc<Service<S, N>>, config: &TeamConfig) -> io::Result<Self> {
        let vcpus = service.notify().slots().len();
        let reclaim = ReclaimWorker::new(Arc::clone(service))?;
        let (reclaimer, threads) = (reclaim.reclaimer(), Vec::new());
        // From here on, whatever fails, those that were started end as it is dropped.
        let mut team = Self { service: Arc::clone(service), doorbells: Vec::new(), reclaimer, threads };
        let count = config.pin_workers.get().min(vcpus.max(1));
        let shares = (0..count).map(|share| (share..vcpus).step_by(count));
        let workers = shares.map(|share| Ok(PinWorker::new(Arc::clone(service), share)?.with_look(config.look)));
        let workers = workers.collect::<io::Result<Vec<_>>>()?;
        for vcpu in 0..vcpus {
            let doorbell = workers.iter().find_map(|worker| worker.doorbell(vcpu));
            team.doorbells.extend(doorbell.map(EventFd::try_clone).transpose()?);
        }
        for (mut worker, number) in workers.into_iter().zip(0..) {
            team.start(&format!("coiommu-pin-{number}"), move || worker.run())?;
        }
        let mut reclaim = reclaim;
        team.start("coiommu-reclaim", move || reclaim.run())?;
        Ok(team)
    }

    fn start(&mut self, name: &str, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
        self.threads.push(thread::Builder::new().name(name.into()).spawn(work)?);
        Ok(())
    }
}

impl<S: TableSpace, N: NotifyMap> Team<S, N> {
    /// The doorbell of a vCPU, for an ioeventfd or to be written to; `None` if there is no such vCPU.
    #[must_use]
    pub fn doorbell(&self, vcpu: usize) -> Option<&EventFd> {
        self.doorbells.get(vcpu)
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

    /// Ends it all, in this order: no more requests are served, all are answered, the threads end, everything is drained.
    /// The caller has switched off the endpoints' bus mastering.
    ///
    /// # Errors
    ///
    /// [`DrainError`] if the mapper refused to unmap something.
    pub fn stop(mut self, drain: Drain) -> Result<(), DrainError> {
        self.end_threads();
        self.service.pinner().deactivate(drain)
    }

    fn end_threads(&mut self) {
        self.service.close();
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => log::error!("a worker could not wait for events: {error}"),
                // They catch what happens in their work.
                Err(_panic) => log::error!("a worker's thread ended in a panic"),
            }
        }
    }
}

/// The threads end; nothing is drained.
impl<S: TableSpace, N: NotifyMap> Drop for Team<S, N> {
    fn drop(&mut self) {
        self.end_threads();
    }
}
