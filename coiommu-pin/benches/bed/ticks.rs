//! Looking for idle pages among those that are pinned.

use std::hint::black_box;
use std::sync::Arc;

use coiommu_pin::DmaMapper;
use coiommu_pin::pinner::TickReport;

use super::contest::Contender;
use super::floor::FlatTable;
use super::ours::{self, Worker};
use super::pins::{Ours, PinsBatches};
use super::rival::Rival;
use super::{BUSY, Batch, Bed, PINNED};

/// Pages that are pinned, and what their leaves say: [`BUSY`], or [`PINNED`] and nothing else, which is idle.
#[derive(Clone, Copy)]
pub(crate) struct Pages {
    pub(crate) bed: &'static Bed,
    pub(crate) batches: &'static [Batch],
    pub(crate) entry: u32,
}

impl Pages {
    fn all(self) -> impl Iterator<Item = u64> {
        self.batches.iter().flat_map(|batch| batch.gfns.iter().copied())
    }

    fn count(self) -> u64 {
        self.all().count() as u64
    }

    fn fill(self) {
        self.bed.fill(self.all(), self.entry);
    }

    /// How many stay, and what their leaves say then.
    fn check(self) -> u64 {
        if self.entry == BUSY {
            self.bed.check(self.all(), BUSY);
            self.count()
        } else {
            self.bed.check(self.all(), 0);
            0
        }
    }
}

/// One tick of the pinner.
pub(crate) struct Tick {
    pages: Pages,
    ours: Ours,
    looked_at: u64,
    report: TickReport,
}

impl Tick {
    /// Every leaf is looked at in each tick.
    pub(crate) fn new(pages: Pages, mapper: Arc<dyn DmaMapper>, extent: &str) -> Self {
        let pinner = ours::pinner(pages.bed, mapper, &format!("extent={extent},unpin_gen_threshold=0"));
        let ours = Ours { bed: pages.bed, pinner, worker: Worker::default() };
        Self { pages, ours, looked_at: 0, report: TickReport::default() }
    }
}

impl Contender for Tick {
    fn prepare(&mut self) {
        if self.ours.pinned() == Some(0) {
            self.pages.batches.iter().for_each(|batch| self.ours.pin(batch));
        }
        assert_eq!(self.ours.pinned(), Some(self.pages.count()));
        self.pages.fill();
        self.looked_at = self.ours.pinner.counters().leaves_looked_at;
    }

    fn work(&mut self) {
        self.report = self.ours.pinner.tick(None);
    }

    fn finish(&mut self) {
        let counters = self.ours.pinner.counters();
        let (all, left) = (self.pages.count(), self.pages.check());
        assert_eq!(counters.leaves_looked_at - self.looked_at, all, "every leaf is looked at");
        assert_eq!((self.report.full_round, self.report.unpinned_pages), (true, all - left));
        assert_eq!((self.ours.pinned(), counters.anomalies), (Some(left), 0));
    }
}

/// One pass of the rival over its queue.
pub(crate) struct Scan {
    pages: Pages,
    rival: Rival<'static>,
}

impl Scan {
    pub(crate) fn new(pages: Pages, mapper: Arc<dyn DmaMapper>) -> Self {
        Self { pages, rival: Rival::new(pages.bed, mapper) }
    }
}

impl Contender for Scan {
    fn prepare(&mut self) {
        if self.rival.pinned() == Some(0) {
            // Left by whoever was before, they would be taken for pinned.
            self.pages.bed.fill(self.pages.all(), 0);
            self.pages.batches.iter().for_each(|batch| PinsBatches::pin(&mut self.rival, batch));
        }
        assert_eq!(self.rival.pinned(), Some(self.pages.count()));
        self.pages.fill();
    }

    fn work(&mut self) {
        self.rival.scan();
    }

    fn finish(&mut self) {
        assert_eq!(self.rival.pinned(), Some(self.pages.check()));
    }
}

/// Loads every leaf.
pub(crate) struct Loads(pub(crate) Pages, pub(crate) FlatTable<'static>);

impl Contender for Loads {
    fn prepare(&mut self) {
        self.0.fill();
    }

    fn work(&mut self) {
        black_box(self.1.load_all());
    }
}

/// Clears PINNED in every leaf.
pub(crate) struct Clears(pub(crate) Pages, pub(crate) FlatTable<'static>);

impl Contender for Clears {
    fn prepare(&mut self) {
        self.0.fill();
    }

    fn work(&mut self) {
        self.1.clear_all();
    }

    fn finish(&mut self) {
        self.0.bed.check(self.0.all(), self.0.entry & !PINNED);
    }
}
