//! What is timed: each scene puts its contenders through the same work, on the same guest.

use std::hint::black_box;
use std::sync::Arc;

use coiommu_pin::Pinner;
use coiommu_pin::pinner::TickReport;

use super::floor::FlatTable;
use super::mappers::Nothing;
use super::ours::{self, Worker};
use super::rival::Rival;
use super::{BLOCK, BUSY, Batch, Bed, Contender, PINNED, Space, gfn};

/// Contenders at the same work.
pub(crate) struct Scene {
    /// Its name, for programs.
    pub(crate) id: &'static str,
    /// What happens in it.
    pub(crate) what: &'static str,
    /// What one unit of time is told for, and how many of them there are in the work.
    pub(crate) unit: &'static str,
    pub(crate) units: u64,
    /// How often the work is timed.
    pub(crate) rounds: usize,
    pub(crate) contenders: Vec<(&'static str, Box<dyn Contender>)>,
}

/// All of them, made one after the other: the memory of one is cold when the next begins.
pub(crate) const ALL: [fn() -> Scene; 4] = [pin_consecutive, pin_scattered, scan_busy, unpin_idle];

/// Every leaf is looked at, each page an extent of its own.
const PAGES_AND_TICKS: &str = "extent=page,unpin_gen_threshold=0";
const MILLION: u64 = 1 << 20;

/// So many pages in a row, from a block's start; the next batch is some blocks on.
fn pin_consecutive() -> Scene {
    const AT_ONCE: u64 = 8;
    const SETS: u64 = 4;
    let pages = AT_ONCE * SETS * 3 * BLOCK;
    let bed = Bed::new(1 << 30).with_tables(0..pages);
    let batch = |n: u64| bed.batch((n * 3 * BLOCK..(n * 3 + 1) * BLOCK).collect());
    let sets = leak((0..SETS).map(|set| (0..AT_ONCE).map(|n| batch(set * AT_ONCE + n)).collect()).collect());
    let contenders = pins(bed, sets, pages);
    Scene {
        id: "pin-consecutive",
        what: "pin 512 consecutive pages",
        unit: "page",
        units: AT_ONCE * BLOCK,
        rounds: 2000,
        contenders,
    }
}

/// Pages anywhere in 8 GiB, in no order, other ones each time.
fn pin_scattered() -> Scene {
    const SETS: u64 = 64;
    let pages = (8 << 30) / 4096;
    let bed = Bed::new(8 << 30).with_tables(0..pages);
    let mut random = Random(1);
    let sets = leak((0..SETS).map(|_| vec![bed.batch(random.distinct(512, pages))]).collect());
    let contenders = pins(bed, sets, pages);
    Scene {
        id: "pin-scattered",
        what: "pin 512 pages scattered over 8 GiB",
        unit: "page",
        units: 512,
        rounds: 2000,
        contenders,
    }
}

fn scan_busy() -> Scene {
    let bed = Bed::new(MILLION * 4096).with_tables(0..MILLION);
    let floor = Loads { bed, table: FlatTable::new(bed, MILLION) };
    let contenders: Vec<(_, Box<dyn Contender>)> = vec![
        ("ours", Box::new(TickOurs::new(bed, BUSY))),
        ("floor", Box::new(floor)),
        ("rival", Box::new(ScanRival::new(bed, BUSY))),
    ];
    Scene { id: "scan-busy", what: "scan a million busy pages", unit: "page", units: MILLION, rounds: 30, contenders }
}

fn unpin_idle() -> Scene {
    let bed = Bed::new(MILLION * 4096).with_tables(0..MILLION);
    let floor = Clears { bed, table: FlatTable::new(bed, MILLION) };
    let contenders: Vec<(_, Box<dyn Contender>)> = vec![
        ("ours", Box::new(TickOurs::new(bed, PINNED))),
        ("floor", Box::new(floor)),
        ("rival", Box::new(ScanRival::new(bed, PINNED))),
    ];
    Scene { id: "unpin-idle", what: "unpin a million idle pages", unit: "page", units: MILLION, rounds: 30, contenders }
}

type Sets = &'static [Vec<Batch>];

fn leak(sets: Vec<Vec<Batch>>) -> Sets {
    Box::leak(sets.into_boxed_slice())
}

fn pins(bed: &'static Bed, sets: Sets, pages: u64) -> Vec<(&'static str, Box<dyn Contender>)> {
    let ours = |policy| Ours { bed, pinner: ours::pinner(bed, Arc::new(Nothing), policy), worker: Worker::default() };
    let floor = Floor { bed, table: FlatTable::new(bed, pages) };
    let rival = Rival::new(bed, Arc::new(Nothing));
    vec![
        ("ours", Box::new(Pins::new(bed, sets, 0, ours("extent=run")))),
        ("floor", Box::new(Pins::new(bed, sets, 1, floor))),
        ("rival", Box::new(Pins::new(bed, sets, 2, rival))),
        ("ours, extent=page", Box::new(Pins::new(bed, sets, 3, ours("extent=page")))),
    ]
}

/// What can pin batches.
trait PinsBatches {
    fn pin(&mut self, batch: &Batch);
    /// Forgets all that is pinned; leaves are the caller's to clear.
    fn empty(&mut self);
    /// How many pages are pinned, if it knows.
    fn pinned(&self) -> Option<u64>;
}

struct Ours {
    bed: &'static Bed,
    pinner: Pinner<Space>,
    worker: Worker,
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

struct Floor {
    bed: &'static Bed,
    table: FlatTable<'static>,
}

impl PinsBatches for Floor {
    fn pin(&mut self, batch: &Batch) {
        self.table.set_pinned(&batch.gfns);
    }

    fn empty(&mut self) {}

    fn pinned(&self) -> Option<u64> {
        None
    }
}

/// Pins one set of batches after the other, each into an empty pin map and clear leaves.
struct Pins<P> {
    bed: &'static Bed,
    sets: Sets,
    at: usize,
    who: P,
}

impl<P> Pins<P> {
    /// Contenders take turns, and each takes another set: nobody finds what the one before has just brought into the
    /// cache.
    fn new(bed: &'static Bed, sets: Sets, turn: usize, who: P) -> Self {
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
        self.set().iter().for_each(|batch| self.bed.check(batch.gfns.iter().copied(), PINNED));
        self.who.empty();
        self.set().iter().for_each(|batch| self.bed.clear(batch));
    }
}

/// One tick over a million pinned pages whose leaves all say the same.
struct TickOurs {
    bed: &'static Bed,
    ours: Ours,
    batches: Vec<Batch>,
    entry: u32,
    looked_at: u64,
    report: TickReport,
}

impl TickOurs {
    fn new(bed: &'static Bed, entry: u32) -> Self {
        let pinner = ours::pinner(bed, Arc::new(Nothing), PAGES_AND_TICKS);
        let ours = Ours { bed, pinner, worker: Worker::default() };
        let batches = (0..MILLION).step_by(4096).map(|first| bed.batch((first..first + 4096).collect())).collect();
        Self { bed, ours, batches, entry, looked_at: 0, report: TickReport::default() }
    }
}

impl Contender for TickOurs {
    fn prepare(&mut self) {
        if self.ours.pinner.pinned_pages() != MILLION {
            self.batches.iter().for_each(|batch| self.ours.pin(batch));
        }
        assert_eq!(self.ours.pinner.mappings(), MILLION);
        self.bed.fill(0..MILLION, self.entry);
        self.looked_at = self.ours.pinner.counters().leaves_looked_at;
    }

    fn work(&mut self) {
        self.report = self.ours.pinner.tick(None);
    }

    fn finish(&mut self) {
        let looked_at = self.ours.pinner.counters().leaves_looked_at - self.looked_at;
        assert_eq!(looked_at, MILLION, "every leaf is looked at");
        assert_eq!(self.ours.pinner.counters().anomalies, 0);
        let unpinned = if self.entry == PINNED { MILLION } else { 0 };
        assert!(self.report.full_round && self.report.unpinned_pages == unpinned, "{:?}", self.report);
        assert_eq!(self.ours.pinned(), Some(MILLION - unpinned));
        self.bed.check(0..MILLION, if self.entry == PINNED { 0 } else { self.entry });
    }
}

/// One pass of the rival over its queue.
struct ScanRival {
    bed: &'static Bed,
    rival: Rival<'static>,
    entry: u32,
}

impl ScanRival {
    fn new(bed: &'static Bed, entry: u32) -> Self {
        Self { bed, rival: Rival::new(bed, Arc::new(Nothing)), entry }
    }
}

impl Contender for ScanRival {
    fn prepare(&mut self) {
        if self.rival.pinned_pages() == 0 {
            self.rival.adopt((0..MILLION).map(gfn));
        }
        self.bed.fill(0..MILLION, self.entry);
    }

    fn work(&mut self) {
        self.rival.scan();
    }

    fn finish(&mut self) {
        let left = if self.entry == PINNED { 0 } else { MILLION };
        assert_eq!(self.rival.pinned_pages() as u64, left);
        self.bed.check(0..MILLION, if self.entry == PINNED { 0 } else { self.entry });
    }
}

/// Loads every leaf.
struct Loads {
    bed: &'static Bed,
    table: FlatTable<'static>,
}

impl Contender for Loads {
    fn prepare(&mut self) {
        self.bed.fill(0..MILLION, BUSY);
    }

    fn work(&mut self) {
        black_box(self.table.load_all());
    }

    fn finish(&mut self) {}
}

/// Clears PINNED in every leaf.
struct Clears {
    bed: &'static Bed,
    table: FlatTable<'static>,
}

impl Contender for Clears {
    fn prepare(&mut self) {
        self.bed.fill(0..MILLION, PINNED);
    }

    fn work(&mut self) {
        self.table.clear_all();
    }

    fn finish(&mut self) {
        self.bed.check(0..MILLION, 0);
    }
}

/// Numbers that look random and are the same in each run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// So many numbers below `end`, each once, in no order.
    fn distinct(&mut self, count: usize, end: u64) -> Vec<u64> {
        let mut chosen = Vec::new();
        while chosen.len() < count {
            let number = self.next() % end;
            if !chosen.contains(&number) {
                chosen.push(number);
            }
        }
        chosen
    }
}
