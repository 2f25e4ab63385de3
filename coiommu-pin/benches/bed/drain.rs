//! A large guest of which little is pinned, drained.

use std::sync::Arc;

use coiommu_pin::pinner::Drain as Why;
use coiommu_pin::{DmaMapper, Pinner};

use super::contest::Contender;
use super::ours::{self, Worker};
use super::{Batch, Bed, Space};

/// Takes everything out of the IOMMU.
pub(crate) struct Drain {
    bed: &'static Bed,
    batches: &'static [Batch],
    pinner: Pinner<Space>,
    worker: Worker,
    map_calls: u64,
    unmap_calls: u64,
}

impl Drain {
    pub(crate) fn new(bed: &'static Bed, batches: &'static [Batch], mapper: Arc<dyn DmaMapper>) -> Self {
        let pinner = ours::pinner(bed, mapper, "extent=run");
        Self { bed, batches, pinner, worker: Worker::default(), map_calls: 0, unmap_calls: 0 }
    }
}

impl Contender for Drain {
    fn prepare(&mut self) {
        ours::activate(&self.pinner, self.bed);
        let before = self.pinner.counters();
        self.batches.iter().for_each(|batch| self.worker.pin(&self.pinner, batch.word));
        self.map_calls = self.pinner.counters().map_calls - before.map_calls;
        self.unmap_calls = before.unmap_calls;
    }

    fn work(&mut self) {
        self.pinner.deactivate(Why::Deactivate).expect("a mapper that unmaps");
    }

    fn finish(&mut self) {
        let counters = self.pinner.counters();
        self.unmap_calls = counters.unmap_calls - self.unmap_calls;
        assert_eq!((self.pinner.pinned_pages(), counters.anomalies), (0, 0));
        self.batches.iter().for_each(|batch| self.bed.check(batch.gfns.iter().copied(), 0));
    }

    fn calls(&self) -> Option<(u64, u64)> {
        Some((self.map_calls, self.unmap_calls))
    }
}
