//! What is left of a process that is killed: nothing.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use coiommu_vfio::Type1;
use coiommu_vfio::type1::OpenError;
use fastrand::Rng;

use crate::edu::Edu;
use crate::vm::{FREE, Vm};

const PAGES: u64 = 2_048;
const READY: &str = "everything was mapped once";

/// Not a test: what the test below kills, in the middle of mapping and unmapping.
#[test]
#[ignore = "is killed by the test below"]
fn victim() {
    if std::env::var_os("COIOMMU_VICTIM").is_none() {
        return;
    }
    let vm = Vm::new(&Edu::address(), "extent=page", 1, 64 << 20);
    vm.activate();
    let pages: Vec<u64> = (FREE..FREE + PAGES).collect();
    for round in 0.. {
        pages.chunks(512).for_each(|batch| assert!(vm.map(0, batch)));
        if round == 0 {
            println!("{READY}");
            std::io::stdout().flush().unwrap();
        }
        // Half of them stay.
        vm.unmap(&pages[..pages.len() / 2]);
        assert_eq!(vm.unpin(FREE..FREE + PAGES / 2).0.released, PAGES / 2);
        vm.unmap(&pages[pages.len() / 2..]);
    }
}

#[test]
#[ignore = "needs edu behind an IOMMU"]
fn a_killed_process_leaves_nothing_pinned() {
    let mut rng = Rng::new();
    for _ in 0..5 {
        let before = pinned_pages();
        let mut victim = spawn_victim();
        thread::sleep(Duration::from_millis(rng.u64(0..300)));
        let with_victim = pinned_pages() - before;
        assert!(with_victim >= i64::try_from(PAGES).unwrap() / 2, "{with_victim} pages are pinned while it lives");
        // While it lives, nobody else has the group, and it is named.
        let busy = Type1::open([Edu::address()]).unwrap_err();
        assert!(matches!(busy, OpenError::Busy { .. }), "{busy}");
        assert!(busy.to_string().contains(&victim.id().to_string()), "{busy}");
        victim.kill().unwrap();
        assert_eq!(victim.wait().unwrap().signal(), Some(9));

        let start = Instant::now();
        drop(open_when_free(start));
        println!("{with_victim} pages were pinned; the next run starts {:.0?} after the kill", start.elapsed());
        assert_eq!(pinned_pages(), before);
    }
}

/// Starts it, and waits until it is at work.
fn spawn_victim() -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "kill::victim", "--ignored", "--nocapture"]).env("COIOMMU_VICTIM", "1");
    let mut victim = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().ends_with(READY)));
    victim
}

fn open_when_free(start: Instant) -> Type1 {
    loop {
        match Type1::open([Edu::address()]) {
            Ok(container) => return container,
            Err(OpenError::Busy { .. }) if start.elapsed() < Duration::from_secs(10) => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// How many pages the kernel holds pinned for devices, in all.
fn pinned_pages() -> i64 {
    // Each CPU counts for itself, until told to say.
    fs::write("/proc/sys/vm/stat_refresh", "1").unwrap();
    let counters = fs::read_to_string("/proc/vmstat").unwrap();
    let counter = |name: &str| -> i64 {
        let value = counters.lines().find_map(|line| line.strip_prefix(name));
        value.expect("the kernel counts them").trim().parse().unwrap()
    };
    counter("nr_foll_pin_acquired ") - counter("nr_foll_pin_released ")
}
