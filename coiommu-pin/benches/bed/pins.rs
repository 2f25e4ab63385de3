//! Pinning batches, each into an empty pin map and clear leaves.

use coiommu_pin::Pinner;

use super::contest::Contender;
use super::floor::FlatTable;
use super::ours::{self, Worker};
use super::rival::Rival;
use super::{Batch, Bed, PINNED, Space};

/// Batches that are pinned together; contenders take one set after the other.
pub(crate) type Sets = &'static [Vec<Batch>];

/// What can pin batches.
pub(crate) trait PinsBatches {
    fn pin(&mut self, batch: &Batch);
    /// Forgets all that is pinned; leaves are the caller's to clear.
    fn empty(&mut self);
    /// How many pages are pinned, if it knows.
    fn pinned(&self) -> Option<u64>;
    /// Whether the guest is told.
    fn sets_leaves(&self) -> bool {
        true
    }
}

pub(crate) struct Ours {
    pub(crate) bed: &'static Bed,
    pub(crate) pinner: Pinner<Space>,
    pub(crate) worker: Worker,
}

impl PinsBatches for Ours {
    fn pin(&mut self, batch: &Batch) {
        self.worker.pin(&self.pinner, batch.word);
    }

    fn empty(&mut self) {
        ours::empty(&self.pinner, self.bed);
    }

    fn pinned(&self) -> Option<u64> {
        Some(self.pinner.pinned_pages())
    }
}

impl PinsBatches for Rival<'_> {
    fn pin(&mut self, batch: &Batch) {
        Self::pin(self, batch.word);
    }

    fn empty(&mut self) {
        Self::empty(self);
    }

    fn pinned(&self) -> Option<u64> {
        Some(self.pinned_pages() as u64)
    }
}

/// Sets PINNED, and that is all.
pub(crate) struct Floor(pub(crate) FlatTable<'static>);

impl PinsBatches for Floor {
    fn pin(&mut self, batch: &Batch) {
        self.0.set_pinned(&batch.gfns);
    }

    fn empty(&mut self) {}

    fn pinned(&self) -> Option<u64> {
        None
    }
}

/// Pins one set of batches after the other, each into an empty pin map and clear leaves.
pub(crate) struct Pins<P> {
    bed: &'static Bed,
    sets: Sets,
    at: usize,
    who: P,
}

impl<P> Pins<P> {
    /// Contenders take turns, and each takes another set: nobody finds what the one before has just brought into the
    /// cache.
    pub(crate) fn new(bed: &'static Bed, sets: Sets, turn: usize, who: P) -> Self {
        Self { bed, sets, at: turn * sets.len() / 4, who }
    }

    fn set(&self) -> &'static [Batch] {
        &self.sets[self.at % self.sets.len()]
    }
}

impl<P: PinsBatches> Contender for Pins<P> {
    fn prepare(&mut self) {
        self.at += 1;
    }

    fn work(&mut self) {
        self.set().iter().for_each(|batch| self.who.pin(batch));
    }

    fn finish(&mut self) {
        let pages: u64 = self.set().iter().map(|batch| batch.gfns.len() as u64).sum();
        assert!(self.who.pinned().is_none_or(|pinned| pinned == pages));
        if self.who.sets_leaves() {
            self.set().iter().for_each(|batch| self.bed.check(batch.gfns.iter().copied(), PINNED));
        }
        self.who.empty();
        self.set().iter().for_each(|batch| self.bed.clear(batch));
    }
}
