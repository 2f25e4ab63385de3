//! When doorbells rang, and how long their answers took.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::stats::{Latency, hdrhistogram};

/// One time a vCPU: of its doorbell, until its slot is answered. Relaxed, as times speak of nothing but
/// themselves: whoever sees one late measures one request wrongly.
#[derive(Debug)]
pub(super) struct Rings {
    /// Nanoseconds, or one of the two below.
    at: Box<[AtomicU64]>,
    latency: Latency,
}

/// It has not rung since the last answer.
const SILENT: u64 = 0;
/// Its slot was answered before it rang.
const EARLY: u64 = u64::MAX;

impl Rings {
    pub(super) fn new(vcpus: usize) -> Self {
        Self { at: (0..vcpus).map(|_| AtomicU64::new(SILENT)).collect(), latency: Latency::new() }
    }

    /// A doorbell rang. Where a worker that keeps looking has answered already, that took no time; with nothing in the
    /// slot before, `is_empty`, and nothing answered, it means nothing.
    pub(super) fn rang(&self, vcpu: usize, at: Duration, is_empty: impl Fn() -> bool) {
        let Some(slot) = self.at.get(vcpu) else { return };
        if is_empty() {
            if slot.swap(SILENT, Relaxed) == EARLY {
                self.latency.record(Duration::ZERO);
            }
            return;
        }
        let nanos = u64::try_from(at.as_nanos()).unwrap_or(EARLY);
        slot.store(nanos.clamp(SILENT + 1, EARLY - 1), Relaxed);
        // Perhaps answered in this moment, by a worker that did not see the time yet: the next request is not to be
        // measured by it.
        if is_empty() && slot.swap(SILENT, Relaxed) != SILENT {
            self.latency.record(Duration::ZERO);
        }
    }

    /// A slot is answered, now.
    pub(super) fn answered(&self, vcpu: usize, now: impl FnOnce() -> Duration) {
        let Some(slot) = self.at.get(vcpu) else { return };
        match slot.swap(SILENT, Relaxed) {
            SILENT | EARLY => slot.store(EARLY, Relaxed),
            rang => self.latency.record(now().saturating_sub(Duration::from_nanos(rang))),
        }
    }

    pub(super) fn latency(&self) -> Histogram<u64> {
        self.latency.read()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn an_answer_is_measured_from_its_doorbell() {
        let rings = Rings::new(2);
        rings.rang(1, SECOND, || false);
        rings.answered(0, || panic!("vcpu 0 did not ring"));
        rings.answered(1, || SECOND + Duration::from_micros(70));
        rings.answered(1, || panic!("it is answered"));
        rings.rang(1, SECOND * 9, || false);
        rings.answered(1, || SECOND * 9);
        rings.rang(2, SECOND, || panic!("there is no vcpu 2"));
        rings.answered(2, || panic!("there is no vcpu 2"));
        assert_eq!((rings.latency().len(), rings.latency().max()), (2, 70));
    }

    #[test]
    fn an_answer_that_came_before_its_doorbell_took_no_time() {
        let rings = Rings::new(1);
        rings.rang(0, SECOND, || true);
        assert_eq!(rings.latency().len(), 0, "nothing was answered: it rang for nothing");
        rings.answered(0, || panic!("it did not ring yet"));
        rings.rang(0, SECOND, || true);
        rings.rang(0, SECOND, || true);
        assert_eq!((rings.latency().len(), rings.latency().max()), (1, 0));
        let looks = std::cell::Cell::new(0);
        // Answered between the two looks.
        rings.rang(0, SECOND, || looks.replace(looks.get() + 1) > 0);
        rings.answered(0, || panic!("the time is not left for the next request"));
        assert_eq!((rings.latency().len(), rings.latency().max()), (2, 0));
    }
}
