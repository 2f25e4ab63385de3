//! The thread at work: a guest's pinner on an IOMMU in software, and devices that are a bit each.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use coiommu_dtt::{Bdf, Gfn, Gpa, RequestWord};
use coiommu_pin::pinner::{Drain, PinResult, UnpinStep};
use coiommu_pin::request::Scratch;
use coiommu_pin::worker::TeamConfig;
use coiommu_vfio_user::{DmaFile, DmaFlags, DmaMap, DmaRange};
use rustix::fs::{MemfdFlags, memfd_create};

use super::super::gate::{Master, WithoutDriver};
use super::*;
use crate::control::All;
use crate::serve::guest::Guest;
use crate::serve::passthrough::Memory;
use crate::serve::{Config, Host};

const RAM: u64 = 8 << 20;
/// A page that is empty, so a table in which nothing is counted.
const TABLE: u64 = 6 << 20;

#[derive(Debug, Default)]
struct Bit(AtomicBool);

impl Master for Bit {
    fn address(&self) -> &str {
        "0000:03:00.0"
    }

    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        self.0.store(on, SeqCst);
        Ok(())
    }

    fn is_bus_master(&self) -> io::Result<bool> {
        Ok(self.0.load(SeqCst))
    }

    fn reset(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A guest with one device, which the thread works for.
struct Bed {
    guest: Guest<'static>,
    served: Arc<Served>,
    device: Arc<Bit>,
    worker: AllPinner,
}

fn endpoint() -> Bdf {
    "00:05.0".parse().unwrap()
}

impl Bed {
    fn new(policy: &str) -> Self {
        let device = Arc::new(Bit::default());
        let gate = Arc::new(Gate::new(WithoutDriver::PinAll, [(Arc::clone(&device) as _, endpoint())]));
        // As long as the tests.
        let host = Box::leak(Box::new(Host { passthrough: None, gate, memory: Memory::default() }));
        let team = TeamConfig::default();
        let config = Config {
            vcpus: 1,
            endpoints: vec![endpoint()],
            policy: policy.parse().unwrap(),
            pin_workers: team.pin_workers,
            look: team.look,
        };
        let guest = Guest::new(&config, host).unwrap();
        let served = Arc::clone(guest.served());
        served.gate.guest_comes();
        let worker = AllPinner::spawn(Arc::clone(&served)).unwrap();
        Self { guest, served, device, worker }
    }

    fn with_ram(policy: &str) -> Self {
        let mut bed = Self::new(policy);
        bed.ram_comes();
        bed
    }

    fn ram_comes(&mut self) {
        let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(RAM).unwrap();
        let map = DmaMap {
            range: DmaRange::new(0, RAM).unwrap(),
            flags: DmaFlags::READ | DmaFlags::WRITE,
            file: Some(DmaFile { fd: file.into(), offset: 0 }),
        };
        self.guest.change_ram(|ram, pinner| ram.map(map, pinner)).unwrap();
    }

    fn is_on(&self) -> bool {
        self.device.0.load(SeqCst)
    }

    fn all(&self) -> All {
        self.served.gate.passed().0
    }

    fn pinned(&self) -> u64 {
        self.served.workers.service().pinner().pinned_pages() * PAGE_SIZE
    }

    fn wait_for(&self, what: &str, is: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !is(self) {
            assert!(start.elapsed() < Duration::from_secs(60), "waited in vain: {what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn end(self) {
        self.served.gate.guest_goes();
        self.worker.join();
        assert!(!self.device.0.load(SeqCst));
        self.guest.end(Drain::Reset).unwrap();
    }
}

#[test]
fn a_guest_that_loads_its_driver_late_has_less_pinned_then() {
    let bed = Bed::with_ram("");
    bed.served.gate.wish(0, true);
    assert_eq!((bed.is_on(), bed.pinned(), bed.all()), (true, RAM, All::Pinned));
    let pinner = bed.served.workers.service().pinner();
    pinner.activate(Gpa::new(TABLE), 1).unwrap();
    bed.served.gate.activated();
    assert_eq!((bed.is_on(), bed.pinned()), (true, RAM), "who was there before the driver goes on");
    let word = RequestWord::page(Gfn::new(1).unwrap(), endpoint()).unwrap();
    assert_eq!(pinner.pin(word, &mut Scratch::default(), &SystemClock), PinResult::Pinned);
    bed.wait_for("the release", |bed| bed.all() == All::No);
    assert_eq!((bed.is_on(), bed.pinned()), (true, 0), "nobody counts the page");
    bed.end();
}

#[test]
fn what_is_not_allowed_is_not_begun() {
    let bed = Bed::with_ram("quota=1m");
    bed.served.gate.wish(0, true);
    assert_eq!((bed.is_on(), bed.pinned(), bed.all()), (false, 0, All::Failed));
    assert_eq!(bed.served.workers.service().pinner().counters().map_calls, 0);
    bed.end();
}

#[test]
fn a_device_that_is_started_before_there_is_memory_waits_for_it() {
    let mut bed = Bed::new("");
    bed.served.gate.wish(0, true);
    assert_eq!((bed.is_on(), bed.all()), (false, All::Failed));
    bed.ram_comes();
    bed.wait_for("the memory", Bed::is_on);
    assert_eq!(bed.pinned(), RAM);
    bed.end();
}

#[test]
fn a_device_waits_for_memory_that_is_held_and_for_no_more() {
    let bed = Bed::with_ram("");
    let pinner = bed.served.workers.service().pinner();
    let step = pinner.step_unpin(pinner.begin_unpin(Gpa::new(0), PAGE_SIZE, &SystemClock), &SystemClock);
    let UnpinStep::Done(_, Some(hold)) = step else { panic!("nothing is pinned: {step:?}") };
    thread::scope(|scope| {
        scope.spawn(|| bed.served.gate.wish(0, true));
        bed.wait_for("all else", |bed| bed.pinned() == RAM - PAGE_SIZE);
        assert!(!bed.is_on());
        drop(hold);
        bed.wait_for("the page", Bed::is_on);
    });
    assert_eq!(bed.pinned(), RAM);
    bed.end();
}
