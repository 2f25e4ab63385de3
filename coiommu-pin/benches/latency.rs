//! From a doorbell to its answer, as a vCPU sees it: it puts a request for one page into its slot, rings, and spins. Beside
//! it the floor: an eventfd that is written, and a thread that epoll wakes for it.
//!
//! `cargo bench -p coiommu-pin --bench latency`

mod bed;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::thread;
use std::time::{Duration, Instant};

use bed::{Bed, Space, gfn, ours};
use coiommu_dtt::RequestWord;
use coiommu_pin::NotifyMap;
use coiommu_pin::pinner::Drain;
use coiommu_pin::stats::hdrhistogram::Histogram;
use coiommu_pin::worker::team::TeamConfig;
use coiommu_pin::worker::{Service, Team};
use coiommu_vfio::SoftIommu;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const ROUNDS: u64 = 5;
/// Of each scene in each round.
const SAMPLES: u64 = 5_000;
/// Between two requests of a guest that is nearly idle: longer than a worker keeps looking.
const REST: Duration = Duration::from_micros(300);
/// Who asks for one page, and who sends batches.
const SINGLE: usize = 0;
const BATCHES: usize = 1;
const BATCH_PAGES: u64 = 100_000;
/// Long batches, one after the other, each of pages that were not pinned before.
const BATCH_COUNT: u64 = 18;
/// Single pages come from behind those of the batches.
const SINGLES: u64 = BATCH_COUNT * BATCH_PAGES;
const PAGES: u64 = 1 << 21;
/// The most gfns that are served before other slots are looked at.
const PIECE: u64 = 4096;

fn main() {
    let bed = Bed::new(PAGES * 4096).with_tables(0..PAGES);
    let piece = time_of_a_piece(bed);
    println!("a piece of {PIECE} pages takes {:.0} µs\n", micros(piece));
    let mut scenes: Vec<_> =
        scenes(bed).into_iter().map(|(what, run)| Scene { what, run, rounds: Vec::new() }).collect();
    for _ in 0..ROUNDS {
        for scene in &mut scenes {
            scene.rounds.push((scene.run)());
        }
    }
    println!("{:50} {:>9} {:>9} {:>9}", format!("µs, medians of {ROUNDS} rounds"), "p50", "p99", "p99.9");
    scenes.iter().for_each(Scene::print);
    for ways in scenes[2..].chunks_exact(3) {
        let bound = 3 * ways[0].quantile(0.99) + piece;
        let verdict = if ways[2].quantile(0.99) <= bound { "ok" } else { "MORE THAN THAT" };
        println!("{}: p99 at most 3 times the idle one, and a piece, {:.1}: {verdict}", ways[2].what, micros(bound));
    }
}

/// Something to measure, and how it went in each round: one after the other, so that what disturbs the machine for a while
/// disturbs all alike.
struct Scene {
    what: String,
    run: Run,
    rounds: Vec<Histogram<u64>>,
}

type Run = Box<dyn Fn() -> Histogram<u64>>;

/// The floor, idle and busy; then, for each way, idle, busy, and beside batches.
fn scenes(bed: &'static Bed) -> Vec<(String, Run)> {
    let mut scenes: Vec<(String, Run)> = vec![
        ("eventfd to epoll, 300 µs apart".into(), Box::new(|| floor(REST))),
        ("eventfd to epoll, one after the other".into(), Box::new(|| floor(Duration::ZERO))),
    ];
    for (look, how) in [(TeamConfig::default().look, "polling"), (Duration::ZERO, "no polling")] {
        scenes.push((format!("one page, 300 µs apart, {how}"), Box::new(move || singles(bed, look, REST))));
        scenes.push((format!("one page after the other, {how}"), Box::new(move || singles(bed, look, Duration::ZERO))));
        scenes
            .push((format!("one page beside batches of 100,000, {how}"), Box::new(move || beside_batches(bed, look))));
    }
    scenes
}

impl Scene {
    /// The median of the rounds' quantiles.
    fn quantile(&self, quantile: f64) -> Duration {
        let mut all: Vec<_> = self.rounds.iter().map(|nanos| nanos.value_at_quantile(quantile)).collect();
        all.sort_unstable();
        Duration::from_nanos(all[all.len() / 2])
    }

    fn print(&self) {
        let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|q| micros(self.quantile(q)));
        let samples: u64 = self.rounds.iter().map(Histogram::len).sum();
        println!("{:50} {p50:9.1} {p99:9.1} {p999:9.1}   ({samples} samples)", self.what);
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("three digits are allowed")
}

fn record(nanos: &mut Histogram<u64>, took: Duration) {
    nanos.record(u64::try_from(took.as_nanos()).expect("far from 500 years")).expect("it grows as it must");
}

/// A thread that does nothing but say that it was woken.
fn floor(rest: Duration) -> Histogram<u64> {
    let (bell, woken) = (EventFd::new(EFD_NONBLOCK).expect("an eventfd"), AtomicU64::new(0));
    let mut nanos = histogram();
    thread::scope(|scope| {
        scope.spawn(|| {
            let epoll = Epoll::new().expect("an epoll");
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, bell.as_raw_fd(), event).expect("a bell that can be waited for");
            for round in 1..=SAMPLES {
                epoll.wait(-1, &mut [EpollEvent::default()]).expect("events");
                bell.read().expect("it rang");
                woken.store(round, Release);
            }
        });
        for round in 1..=SAMPLES {
            thread::sleep(rest);
            let start = Instant::now();
            bell.write(1).expect("room for one more");
            while woken.load(Acquire) != round {
                std::hint::spin_loop();
            }
            record(&mut nanos, start.elapsed());
        }
    });
    nanos
}

/// A guest of two vCPUs on a team with one pin worker.
struct Guest {
    bed: &'static Bed,
    team: Team<Space, Vec<AtomicU64>>,
}

impl Guest {
    fn new(bed: &'static Bed, look: Duration) -> Self {
        let pinner = ours::pinner(bed, Arc::new(SoftIommu::new()), "extent=run");
        let slots = (0..2).map(|_| AtomicU64::new(0)).collect();
        let mut config = TeamConfig::default();
        config.look = look;
        let service = Arc::new(Service::new(pinner, slots).expect("an eventfd"));
        Self { bed, team: Team::spawn(&service, &config).expect("two threads") }
    }

    fn ask(&self, vcpu: usize, word: RequestWord) {
        self.team.service().notify().slots().post(vcpu, word).expect("a slot");
        self.team.doorbell(vcpu).expect("a doorbell").write(1).expect("room for one more");
    }

    fn is_answered(&self, vcpu: usize) -> bool {
        self.team.service().notify().slots().is_answered(vcpu).expect("a slot")
    }

    /// Asks for a page as a driver does, which spins until the answer is there.
    fn time_single(&self, page: u64) -> Duration {
        let word = RequestWord::page(gfn(page), self.bed.bdf).expect("a small gfn");
        let start = Instant::now();
        self.ask(SINGLE, word);
        while !self.is_answered(SINGLE) {
            std::hint::spin_loop();
        }
        start.elapsed()
    }

    fn stop(self) {
        self.team.stop(Drain::Deactivate).expect("a mapper that unmaps");
    }
}

fn singles(bed: &'static Bed, look: Duration, rest: Duration) -> Histogram<u64> {
    let (guest, mut nanos) = (Guest::new(bed, look), histogram());
    for sample in 0..SAMPLES {
        thread::sleep(rest);
        record(&mut nanos, guest.time_single(SINGLES + sample));
    }
    guest.stop();
    nanos
}

/// The same while another vCPU's batches are served, one after the other. One thread plays both vCPUs: a third that wants a
/// CPU would take it from the one that asks or the one that answers, and that would be measured.
fn beside_batches(bed: &'static Bed, look: Duration) -> Histogram<u64> {
    let batches: Vec<_> =
        (0..BATCH_COUNT).map(|n| bed.batch((n * BATCH_PAGES..(n + 1) * BATCH_PAGES).collect())).collect();
    let mut nanos = histogram();
    let mut page = SINGLES;
    while nanos.len() < SAMPLES {
        let guest = Guest::new(bed, look);
        for batch in &batches {
            guest.ask(BATCHES, batch.word);
            loop {
                thread::sleep(Duration::from_micros(50));
                let took = guest.time_single(page);
                page = if page + 1 < PAGES { page + 1 } else { SINGLES };
                if guest.is_answered(BATCHES) {
                    break;
                }
                // The batch was in service all the while.
                record(&mut nanos, took);
            }
        }
        guest.stop();
    }
    nanos
}

/// The median of serving a piece of pages that were not pinned before, by itself.
fn time_of_a_piece(bed: &'static Bed) -> Duration {
    let pinner = ours::pinner(bed, Arc::new(SoftIommu::new()), "extent=run");
    let mut worker = ours::Worker::default();
    let mut times: Vec<_> = (0..101)
        .map(|n| {
            let batch = bed.batch((n * PIECE..(n + 1) * PIECE).collect());
            let start = Instant::now();
            worker.pin(&pinner, batch.word);
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}
