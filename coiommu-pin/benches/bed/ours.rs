//! The pinner of this crate, called as a worker calls it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coiommu_dtt::RequestWord;
use coiommu_pin::pinner::{Drain, PinResult, Pinner, PinnerConfig, Step};
use coiommu_pin::request::Scratch;
use coiommu_pin::{Clock, DmaMapper, RamRegion};

use super::{Bed, Space};

/// The time since it was made.
pub(crate) struct RealClock(Instant);

impl Clock for RealClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// What one worker has of its own.
pub(crate) struct Worker {
    scratch: Scratch,
    clock: RealClock,
}

impl Default for Worker {
    fn default() -> Self {
        Self { scratch: Scratch::default(), clock: RealClock(Instant::now()) }
    }
}

impl Worker {
    /// Serves one request to its end.
    pub(crate) fn pin(&mut self, pinner: &Pinner<Space>, word: RequestWord) {
        let mut request = pinner.begin(word, self.clock.now()).expect("a request of this guest's endpoint");
        loop {
            match pinner.step(&mut request, &mut self.scratch, &self.clock) {
                Step::More => {}
                Step::Done(PinResult::Pinned) => return,
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn clock(&self) -> &RealClock {
        &self.clock
    }
}

/// A pinner for a bed, active.
pub(crate) fn pinner(bed: &Bed, mapper: Arc<dyn DmaMapper>, policy: &str) -> Pinner<Space> {
    let config = PinnerConfig::new(policy.parse().expect("a policy"), vec![bed.bdf]);
    let pinner = Pinner::new(Arc::clone(&bed.memory), mapper, config).expect("4 KiB pages");
    pinner.add_region(RamRegion::from_vm_memory(Arc::clone(&bed.ram)).expect("RAM")).expect("the first region");
    activate(&pinner, bed);
    pinner
}

pub(crate) fn activate(pinner: &Pinner<Space>, bed: &Bed) {
    pinner.activate(bed.guest.dtt().root(), 4).expect("a table");
}

/// Empties the pin map; the books of its blocks stay.
pub(crate) fn empty(pinner: &Pinner<Space>, bed: &Bed) {
    pinner.deactivate(Drain::Deactivate).expect("a mapper that unmaps");
    activate(pinner, bed);
    assert_eq!(pinner.pinned_pages(), 0);
}
