//! What others may see of the guest that is served, while it is: the control socket, and metrics.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coiommu_dtt::PAGE_SIZE;
use coiommu_pin::DmaMapper;
use coiommu_pin::pinner::UnpinReport;

use super::guest::Workers;
use super::passthrough::Gate;
use crate::control::{Pin, Stats};

/// A guest that is served.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) workers: Workers,
    /// Of the devices that are passed through.
    pub(crate) gate: Arc<Gate>,
    pub(crate) mapper: Arc<dyn DmaMapper>,
    pub(crate) parked: Parked,
    pub(crate) unpins: Unpins,
    /// The bytes of RAM that may be pinned.
    pub(crate) ram: AtomicU64,
    /// How many ranges are held, by all who hold some.
    pub(crate) held: Arc<AtomicUsize>,
}

impl Served {
    pub(crate) fn new(workers: Workers, gate: Arc<Gate>, mapper: Arc<dyn DmaMapper>) -> Self {
        Self {
            workers,
            gate,
            mapper,
            parked: Parked::default(),
            unpins: Unpins::default(),
            ram: AtomicU64::new(0),
            held: Arc::default(),
        }
    }

    /// Its figures.
    pub(crate) fn stats(&self) -> Stats {
        let service = self.workers.service();
        let pinner = service.pinner();
        let (counters, latency) = (pinner.counters(), service.doorbell_latency());
        let (pin_all, passed) = self.gate.passed();
        Stats {
            active: pinner.is_active(),
            failure: service.failure().map(ToOwned::to_owned),
            policy: pinner.policy().to_string(),
            guest_memory_bytes: self.ram.load(Relaxed),
            pinned_bytes: pinner.pinned_pages().saturating_mul(PAGE_SIZE),
            mappings: pinner.mappings(),
            requests_pinned: counters.requests_pinned,
            requests_failed: counters.requests_failed,
            requests_refused: counters.requests_refused,
            requests_timed_out: counters.requests_timed_out,
            pages_asked: counters.pages_asked,
            pages_pinned: counters.pages_pinned,
            pages_unpinned_idle: counters.pages_unpinned_idle,
            pages_unpinned_for_room: counters.pages_unpinned_for_room,
            pages_unpinned_forced: counters.pages_unpinned_forced,
            anomalies: counters.anomalies,
            parked_seconds: self.parked.time().as_secs_f64(),
            answer_p50_us: latency.value_at_quantile(0.5),
            answer_p99_us: latency.value_at_quantile(0.99),
            pin_all,
            passed,
        }
    }

    /// What is pinned, neighbours in one.
    pub(crate) fn pins(&self) -> Vec<Pin> {
        let mut pins: Vec<Pin> = Vec::new();
        for extent in self.workers.service().pinner().extents() {
            let (gpa, bytes) = (extent.first.gpa().raw(), extent.pages.saturating_mul(PAGE_SIZE));
            match pins.last_mut().filter(|last| last.gpa.saturating_add(last.bytes) == gpa) {
                Some(last) => last.bytes = last.bytes.saturating_add(bytes),
                None => pins.push(Pin { gpa, bytes }),
            }
        }
        pins
    }
}

/// How long the guest has had unpinning parked.
#[derive(Debug, Default)]
pub(crate) struct Parked(Mutex<Parks>);

#[derive(Debug, Default)]
struct Parks {
    depth: u64,
    since: Option<Instant>,
    before: Duration,
}

impl Parked {
    pub(crate) fn park(&self) {
        let mut parks = self.lock();
        parks.depth = parks.depth.saturating_add(1);
        parks.since.get_or_insert_with(Instant::now);
    }

    pub(crate) fn unpark(&self) {
        let mut parks = self.lock();
        parks.depth = parks.depth.saturating_sub(1);
        if parks.depth == 0 {
            parks.end();
        }
    }

    /// The guest's device is reset: it has nothing parked.
    pub(crate) fn clear(&self) {
        let mut parks = self.lock();
        parks.depth = 0;
        parks.end();
    }

    /// In all, until now.
    pub(crate) fn time(&self) -> Duration {
        let parks = self.lock();
        parks.before + parks.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, Parks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Parks {
    fn end(&mut self) {
        self.before += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
    }
}

/// What became of ranges that were to be unpinned.
#[derive(Debug, Default)]
pub(crate) struct Unpins {
    pub(crate) granted: AtomicU64,
    pub(crate) busy: AtomicU64,
    pub(crate) parked: AtomicU64,
}

impl Unpins {
    pub(crate) fn count(&self, report: &UnpinReport) {
        let count = match report {
            report if report.may_be_taken() => &self.granted,
            report if report.parked > 0 => &self.parked,
            _ => &self.busy,
        };
        count.fetch_add(1, Relaxed);
    }
}

/// The guest that is served, if one is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watch(Arc<Mutex<Option<Arc<Served>>>>);

impl Watch {
    /// Shows a guest, until what this returns is dropped.
    pub(crate) fn show(&self, served: &Arc<Served>) -> Shown<'_> {
        *self.lock() = Some(Arc::clone(served));
        Shown(self)
    }

    /// The guest that is served.
    pub(crate) fn served(&self) -> Option<Arc<Served>> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Served>>> {
        // It is never left half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A guest that is shown.
#[derive(Debug)]
pub(crate) struct Shown<'a>(&'a Watch);

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parks_nest() {
        let parked = Parked::default();
        parked.unpark();
        assert_eq!(parked.time(), Duration::ZERO);
        parked.park();
        parked.park();
        std::thread::sleep(Duration::from_millis(2));
        parked.unpark();
        let first = parked.time();
        assert!(first >= Duration::from_millis(2));
        std::thread::sleep(Duration::from_millis(2));
        assert!(parked.time() > first, "one of two has ended");
        parked.unpark();
        let all = parked.time();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(parked.time(), all);
        parked.park();
        parked.clear();
        parked.park();
        parked.unpark();
        assert!(parked.0.lock().unwrap().since.is_none());
    }
}
