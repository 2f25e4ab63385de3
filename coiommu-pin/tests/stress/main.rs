//! The production pinner under threads that do everything at once, with every access of a device checked.
//!
//! Four vCPUs count pages, ask for them and let their device use them; two workers pin; around them pages age, are taken
//! back by force, RAM comes and goes, the guest parks, and the device is reset. The rule that must survive it: **from
//! the moment a guest finds a page PINNED until it counts it down, the device reaches that page, and the right memory**;
//! and its reverse: memory that was taken is reached by no device.
//!
//! | file | who |
//! | --- | --- |
//! | `machine.rs` | what they share: RAM, pinner, IOMMU, slots; what must hold once all is quiet |
//! | `guest.rs` | a vCPU and its device |
//! | `worker.rs` | serves the slots of some vCPUs |
//! | `ticker.rs`, `taker.rs`, `parker.rs`, `mover.rs`, `resetter.rs` | ageing, forced unpins, parks, RAM that moves, resets |
//! | `pause.rs` | how guests come to rest for a reset |
//! | `watch.rs` | what each thread is doing, and the end of a run in which one is stuck |
//! | `tally.rs`, `random.rs` | what was done; chance |
//!
//! `COIOMMU_STRESS_SECONDS` says how long (3 unless set); `COIOMMU_STRESS_SEED` repeats the choices of a run, though not
//! how its threads met. `cargo xtask tsan` runs it under ThreadSanitizer. For that, nothing here but what is tested
//! orders one thread after another: tallies and posts are relaxed atomics, pauses concern the resetter alone.

mod guest;
mod machine;
mod mover;
mod parker;
mod pause;
mod random;
mod resetter;
mod taker;
mod tally;
mod ticker;
mod watch;
mod worker;

use std::env;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use machine::{Machine, VCPUS, WORKERS};
use tally::Did;
use watch::{Crew, STUCK};

/// Policies, and how many mappings the IOMMU takes. Room runs short in most of them, so that pins take pages back too.
const POLICIES: [(&str, u64); 5] = [
    ("extent=page,quota=4m", 900),
    ("extent=run,unpin_gen_threshold=3", 150),
    ("extent=aligned=64k,quota=5m", 65_535),
    ("extent=aligned=2m,quota=7m,unpin_gen_threshold=0", 65_535),
    ("extent=run", 65_535),
];

#[test]
fn every_access_of_a_device_is_covered() {
    let seconds = number_from_env("COIOMMU_STRESS_SECONDS").unwrap_or(3);
    let now =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() ^ u64::from(now.subsec_nanos()));
    let seed = number_from_env("COIOMMU_STRESS_SEED").unwrap_or(now);
    println!("{seconds} s, COIOMMU_STRESS_SEED={seed}");
    for (policy, mappings) in POLICIES {
        println!("{policy}, at most {mappings} mappings");
        let time = Duration::from_secs(seconds) / u32::try_from(POLICIES.len()).unwrap();
        run(policy, mappings, seed, time);
    }
}

fn number_from_env(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// One policy, for at least so long, and at least until everything happened that can.
fn run(policy: &str, mappings: u64, seed: u64, time: Duration) {
    let (bells, calls): (Vec<_>, Vec<_>) = (0..WORKERS).map(|_| mpsc::channel()).unzip();
    let machine = Arc::new(Machine::new(policy, mappings, seed, bells));
    let mut workers = Crew::new(&machine);
    for call in calls {
        workers.spawn("worker", move |machine, post| worker::run(machine, post, &call));
    }
    let mut others = Crew::new(&machine);
    for vcpu in 0..VCPUS {
        others.spawn("guest", move |machine, post| guest::run(machine, post, vcpu));
    }
    others.spawn("ticker", ticker::run);
    others.spawn("taker", taker::run);
    others.spawn("parker", parker::run);
    others.spawn("mover", mover::run);
    others.spawn("resetter", resetter::run);

    let start = Instant::now();
    let done = || start.elapsed() >= time && machine.tally.never().is_empty();
    watch::until(&[&workers, &others], time + 2 * STUCK, done);
    machine.stop();
    watch::until(&[&workers, &others], 2 * STUCK, || others.all_ended());
    others.join();
    machine.close();
    watch::until(&[&workers], STUCK, || workers.all_ended());
    workers.join();

    machine.check_at_rest();
    println!("  {}", machine.tally);
    assert_eq!(machine.tally.of(Did::Anomaly), 0);
}
