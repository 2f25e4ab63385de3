//! The scenes: who does what, on which guest.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use coiommu_pin::DmaMapper;
use coiommu_vfio::SoftIommu;

use super::contest::{Contender, Scene};
use super::drain::Drain;
use super::floor::FlatTable;
use super::nothing::Nothing;
use super::ours::{self, Worker};
use super::pins::{Floor, Ours, Pins, Sets};
use super::rival::Rival;
use super::team::{Job, Share, Team};
use super::ticks::{Clears, Loads, Pages, Scan, Tick};
use super::uring::{Calls, Registered};
use super::{BLOCK, BUSY, Batch, Bed, PINNED};

type Contenders = Vec<(&'static str, Box<dyn Contender>)>;
type Make = fn() -> io::Result<Scene>;

/// All scenes by their names, each made when its turn comes. An error: the system does not let us.
pub(crate) const ALL: [(&str, Make); 11] = [
    ("pin-consecutive", || Ok(pin_consecutive())),
    ("pin-scattered", || Ok(pin_scattered())),
    ("scan-busy", || Ok(scan_busy())),
    ("unpin-idle", || Ok(unpin_idle())),
    ("uring-pin", uring_pin),
    ("uring-unpin", uring_unpin),
    ("threads-pin-consecutive", || Ok(threads(consecutive_shares(), Job::Pin, "pin 512 consecutive pages"))),
    ("threads-pin-scattered", || Ok(threads(scattered_shares(), Job::Pin, "pin 512 scattered pages"))),
    ("threads-unpin-consecutive", || Ok(threads(consecutive_shares(), Job::Unpin, "unpin 512 consecutive pages"))),
    ("threads-unpin-scattered", || Ok(threads(scattered_shares(), Job::Unpin, "unpin 512 scattered pages"))),
    ("drain-sparse", || Ok(drain_sparse())),
];

const MILLION: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The pages of 8 GiB.
const SCATTERED_OVER: u64 = 8 * GIB / 4096;
/// Pages of a run that is pinned for real.
const RUN: u64 = 64;

/// So many pages in a row, from a block's start; the next batch is some blocks on.
fn pin_consecutive() -> Scene {
    const AT_ONCE: u64 = 8;
    const SETS: u64 = 4;
    let pages = AT_ONCE * SETS * 3 * BLOCK;
    let bed = Bed::new(GIB).with_tables(0..pages);
    let batch = |n: u64| bed.batch((n * 3 * BLOCK..(n * 3 + 1) * BLOCK).collect());
    let sets = leak((0..SETS).map(|set| (0..AT_ONCE).map(|n| batch(set * AT_ONCE + n)).collect()).collect());
    let contenders = pins(bed, sets, pages);
    Scene { what: "pin 512 consecutive pages", unit: "page", units: AT_ONCE * BLOCK, rounds: 1000, contenders }
}

/// Pages anywhere in 8 GiB, in no order, other ones each time: their leaves are not in the nearest cache.
fn pin_scattered() -> Scene {
    const SETS: u64 = 64;
    let bed = Bed::new(8 * GIB).with_tables(0..SCATTERED_OVER);
    let mut random = Random(1);
    let sets = leak((0..SETS).map(|_| vec![bed.batch(random.distinct(512, 0, SCATTERED_OVER))]).collect());
    let contenders = pins(bed, sets, SCATTERED_OVER);
    Scene { what: "pin 512 pages scattered over 8 GiB", unit: "page", units: 512, rounds: 1000, contenders }
}

fn pins(bed: &'static Bed, sets: Sets, pages: u64) -> Contenders {
    let ours = |policy| Ours { bed, pinner: ours::pinner(bed, Arc::new(Nothing), policy), worker: Worker::default() };
    vec![
        ("ours", Box::new(Pins::new(bed, sets, 0, ours("extent=run")))),
        ("floor", Box::new(Pins::new(bed, sets, 1, Floor(FlatTable::new(bed, pages))))),
        ("rival", Box::new(Pins::new(bed, sets, 2, Rival::new(bed, Arc::new(Nothing))))),
        ("ours, extent=page", Box::new(Pins::new(bed, sets, 3, ours("extent=page")))),
    ]
}

fn scan_busy() -> Scene {
    let pages = a_million(BUSY);
    let floor = Loads(pages, FlatTable::new(pages.bed, MILLION));
    let contenders: Contenders = vec![
        ("ours", Box::new(Tick::new(pages, Arc::new(Nothing), "page"))),
        ("floor", Box::new(floor)),
        ("rival", Box::new(Scan::new(pages, Arc::new(Nothing)))),
    ];
    Scene { what: "look at a million busy pages", unit: "page", units: MILLION, rounds: 30, contenders }
}

fn unpin_idle() -> Scene {
    let pages = a_million(PINNED);
    let floor = Clears(pages, FlatTable::new(pages.bed, MILLION));
    let contenders: Contenders = vec![
        ("ours", Box::new(Tick::new(pages, Arc::new(Nothing), "page"))),
        ("floor", Box::new(floor)),
        ("rival", Box::new(Scan::new(pages, Arc::new(Nothing)))),
    ];
    Scene { what: "unpin a million idle pages", unit: "page", units: MILLION, rounds: 30, contenders }
}

fn a_million(entry: u32) -> Pages {
    let bed = Bed::new(MILLION * 4096).with_tables(0..MILLION);
    let batches = (0..MILLION).step_by(4096).map(|first| bed.batch((first..first + 4096).collect()));
    Pages { bed, batches: leak(batches.collect()), entry }
}

fn uring_pin() -> io::Result<Scene> {
    let (bed, batches) = runs();
    let sets = leak(vec![batches]);
    let pinner = ours::pinner(bed, registered(sets)?, "extent=run");
    let contenders: Contenders = vec![
        ("ours", Box::new(Pins::new(bed, sets, 0, Ours { bed, pinner, worker: Worker::default() }))),
        ("floor", Box::new(Pins::new(bed, sets, 0, Calls::new(bed, registered(sets)?)))),
        ("rival", Box::new(Pins::new(bed, sets, 0, Rival::new(bed, registered(sets)?)))),
    ];
    let units = sets[0].len() as u64 * RUN;
    Ok(Scene { what: "pin runs of 64 pages for real (io_uring)", unit: "page", units, rounds: 200, contenders })
}

fn uring_unpin() -> io::Result<Scene> {
    let (bed, batches) = runs();
    let sets = leak(vec![batches]);
    let pages = Pages { bed, batches: &sets[0], entry: PINNED };
    let contenders: Contenders = vec![
        ("ours", Box::new(Tick::new(pages, registered(sets)?, "run"))),
        ("rival", Box::new(Scan::new(pages, registered(sets)?))),
    ];
    let units = sets[0].len() as u64 * RUN;
    Ok(Scene { what: "unpin runs of 64 pages for real (io_uring)", unit: "page", units, rounds: 200, contenders })
}

/// Runs in blocks of their own, their memory there. Together less than what anybody may lock, which is 8 MiB.
fn runs() -> (&'static Bed, Vec<Batch>) {
    const RUNS: u64 = 16;
    let bed = Bed::new(GIB).with_tables(0..RUNS * BLOCK);
    let batches: Vec<_> = (0..RUNS).map(|run| bed.batch((run * BLOCK..run * BLOCK + RUN).collect())).collect();
    batches.iter().for_each(|batch| bed.touch(&batch.gfns));
    (bed, batches)
}

/// A mapper with room for each page of some batches by itself.
fn registered(sets: Sets) -> io::Result<Arc<dyn DmaMapper>> {
    let pages: usize = sets.iter().flatten().map(|batch| batch.gfns.len()).sum();
    Ok(Arc::new(Registered::new(u32::try_from(pages).expect("few pages"))?))
}

fn threads((bed, shares): (&'static Bed, &'static [Share]), job: Job, what: &'static str) -> Scene {
    let team = |threads| Box::new(Team::new(bed, shares, threads, job));
    let contenders: Contenders = vec![("two threads", team(2)), ("one thread", team(1))];
    let batches = shares.iter().flat_map(|share| &share.batches);
    let units = batches.map(|batch| batch.gfns.len() as u64).sum();
    Scene { what, unit: "page", units, rounds: 200, contenders }
}

fn consecutive_shares() -> (&'static Bed, &'static [Share]) {
    const BLOCKS: u64 = 128;
    let bed = Bed::new(GIB).with_tables(0..2 * BLOCKS * BLOCK);
    let share = |first: u64| Share {
        batches: (first..first + BLOCKS).map(|no| bed.batch((no * BLOCK..(no + 1) * BLOCK).collect())).collect(),
        gfns: first * BLOCK..(first + BLOCKS) * BLOCK,
    };
    (bed, leak(vec![share(0), share(BLOCKS)]))
}

fn scattered_shares() -> (&'static Bed, &'static [Share]) {
    let bed = Bed::new(8 * GIB).with_tables(0..SCATTERED_OVER);
    let mut random = Random(2);
    let mut share = |first: u64, end: u64| Share {
        batches: random.distinct(16 * 512, first, end).chunks(512).map(|pages| bed.batch(pages.to_vec())).collect(),
        gfns: first..end,
    };
    let middle = SCATTERED_OVER / 2;
    (bed, leak(vec![share(0, middle), share(middle, SCATTERED_OVER)]))
}

fn drain_sparse() -> Scene {
    const EVERY: u64 = (64 << 20) / 4096;
    let bed = Bed::new(64 * GIB);
    let batches = (0..64 * GIB / 4096 / EVERY).map(|n| {
        let first = n * EVERY;
        bed.with_tables(first..first + BLOCK);
        bed.batch((first..first + BLOCK).collect())
    });
    let batches = leak(batches.collect());
    let contenders: Contenders = vec![
        ("ours", Box::new(Drain::new(bed, batches, Arc::new(Nothing)))),
        ("ours, SoftIommu", Box::new(Drain::new(bed, batches, Arc::new(SoftIommu::new())))),
    ];
    let units = batches.len() as u64;
    Scene { what: "drain 64 GiB with 2 MiB of every 64 MiB pinned", unit: "2 MiB", units, rounds: 100, contenders }
}

fn leak<T>(list: Vec<T>) -> &'static [T] {
    Box::leak(list.into_boxed_slice())
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

    /// So many numbers of a range, each once, in no order.
    fn distinct(&mut self, count: usize, first: u64, end: u64) -> Vec<u64> {
        let mut chosen = HashSet::new();
        std::iter::repeat_with(|| first + self.next() % (end - first))
            .filter(|&number| chosen.insert(number))
            .take(count)
            .collect()
    }
}
