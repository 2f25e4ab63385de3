//! The pinner of this crate, called as a worker calls it.

use std::sync::Arc;

use coiommu_dtt::RequestWord;
use coiommu_pin::pinner::{Drain, PinResult, Pinner, PinnerConfig, Step};
use coiommu_pin::request::Scratch;
use coiommu_pin::{Clock, DmaMapper, RamRegion, SystemClock};

use super::{Bed, Space};

/// What one worker has of its own.
#[derive(Default)]
pub(crate) struct Worker {
    scratch: Scratch,
    clock: SystemClock,
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

    pub(crate) fn clock(&self) -> &SystemClock {
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
