//! Two calls that meet at the worst moment: the second runs whole, or as far as it can, inside a mapper call of the first.
//! The threads of the stress test met like this by chance.

// A mapper is declared here, by handing on to another.
#![allow(unsafe_code)]

mod rig;

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coiommu_dtt::guest::GuestDtt;
use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::{Bdf, Gpa, Levels, RequestWord};
use coiommu_pin::pinner::{Drain, ForcedUnpin, PinResult, Pinner, PinnerConfig, UnpinStep};
use coiommu_pin::request::Scratch;
use coiommu_pin::{Backing, DmaMapper, Limits, MapError, Policy, RamRegion};
use coiommu_vfio::SoftIommu;
use rig::{PAGE, Pages, Space, TABLES, gfn, ram};
use vm_memory::{GuestMemoryMmap, GuestRegionMmap};

/// A page of the first block, and one of the second.
const NEAR: u64 = 5;
const FAR: u64 = 600;

const BDF: Bdf = Bdf::new(0x18).unwrap();

/// Does something once, before a mapper call.
struct Meeting {
    iommu: SoftIommu,
    next: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Meeting {
    fn before_next_call(&self, meet: impl FnOnce() + Send + 'static) {
        *self.next.lock().unwrap() = Some(Box::new(meet));
    }

    fn meet(&self) {
        let next = self.next.lock().unwrap().take();
        if let Some(meet) = next {
            meet();
        }
    }
}

impl fmt::Debug for Meeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iommu.fmt(f)
    }
}

impl DmaMapper for Meeting {
    unsafe fn map(&self, iova: u64, backing: Backing<'_>, len: u64) -> Result<(), MapError> {
        self.meet();
        // SAFETY: the caller's promise is handed on.
        unsafe { self.iommu.map(iova, backing, len) }
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<u64, MapError> {
        self.meet();
        self.iommu.unmap(iova, len)
    }

    fn limits(&self) -> Limits {
        self.iommu.limits()
    }
}

struct Bed {
    meeting: Arc<Meeting>,
    pinner: Arc<Pinner<Space>>,
    memory: Space,
    guest: GuestDtt,
    ram: Arc<GuestRegionMmap>,
}

impl Bed {
    /// Two blocks of RAM with a page pinned in each, which nobody counts.
    fn new() -> Self {
        let ram = ram(&(0..1024));
        let regions = [Arc::clone(&ram)].into_iter().chain(rig::tables()).collect();
        let memory = Arc::new(GuestMemoryMmap::from_arc_regions(regions).unwrap());
        let meeting = Arc::new(Meeting { iommu: SoftIommu::new(), next: Mutex::default() });
        let config = PinnerConfig::new(Policy::default(), vec![BDF]);
        let mapper = Arc::clone(&meeting) as Arc<dyn DmaMapper>;
        let pinner = Arc::new(Pinner::new(Arc::clone(&memory), mapper, config).unwrap());
        pinner.add_region(RamRegion::from_vm_memory(Arc::clone(&ram)).unwrap()).unwrap();
        let pages = Pages(AtomicU64::new(TABLES));
        let guest = GuestDtt::new(&*memory, &pages, Levels::new(4).unwrap(), 8).unwrap();
        guest.leaf_table(&*memory, &pages, gfn(NEAR)).unwrap();
        pinner.activate(guest.dtt().root(), 4).unwrap();
        let bed = Self { meeting, pinner, memory, guest, ram };
        for page in [NEAR, FAR] {
            assert_eq!(bed.pin(page), PinResult::Pinned);
        }
        bed
    }

    fn ram_returns(&self) {
        self.pinner.add_region(RamRegion::from_vm_memory(Arc::clone(&self.ram)).unwrap()).unwrap();
    }

    fn pin(&self, page: u64) -> PinResult {
        let word = RequestWord::page(gfn(page), BDF).unwrap();
        self.pinner.pin(word, &mut Scratch::default(), &Duration::ZERO)
    }

    /// In the middle of the first mapper call of `call`, a forced unpin of the far page begins and takes a step at this time;
    /// what there is to say of it then.
    fn unpin_far_during(&self, now: Duration, call: impl FnOnce(&Self)) -> UnpinStep {
        let pinner = Arc::clone(&self.pinner);
        let (to, from) = std::sync::mpsc::channel();
        self.meeting.before_next_call(move || {
            let unpin = pinner.begin_unpin(Gpa::new(FAR * PAGE), PAGE, &Duration::ZERO);
            to.send(pinner.step_unpin(unpin, &now)).unwrap();
        });
        call(self);
        from.try_recv().expect("the call has called the mapper")
    }

    /// While a pin in its block calls the mapper, the near page is unpinned at this time by another thread; what there is to
    /// say of it then. Only who is in time may come back.
    fn unpin_near_during_a_pin(&self, now: &'static Duration) -> UnpinStep {
        let pinner = Arc::clone(&self.pinner);
        let (to, from) = std::sync::mpsc::channel();
        self.meeting.before_next_call(move || {
            let unpins = std::thread::spawn(move || {
                let unpin = pinner.begin_unpin(Gpa::new(NEAR * PAGE), PAGE, &Duration::ZERO);
                let mut step = pinner.step_unpin(unpin, now);
                loop {
                    step = match step {
                        UnpinStep::More(unpin) if now.is_zero() => pinner.step_unpin(unpin, now),
                        step => return step,
                    }
                }
            });
            to.send(unpins).unwrap();
            // Time for it to come to the block's lock. If it comes later, it has nobody to wait for, and ends the same.
            std::thread::sleep(Duration::from_millis(50));
        });
        assert_eq!(self.pin(NEAR + 1), PinResult::Pinned);
        from.try_recv().expect("the pin has called the mapper").join().unwrap()
    }

    fn go_on(&self, mut unpin: ForcedUnpin) -> UnpinStep {
        for _ in 0..100 {
            match self.pinner.step_unpin(unpin, &Duration::ZERO) {
                UnpinStep::More(more) => unpin = more,
                step => return step,
            }
        }
        panic!("a forced unpin does not end");
    }
}

/// What returning RAM maps again, after the forced unpin has been there, must not stay mapped in a range that is held.
#[test]
fn a_forced_unpin_that_begins_while_ram_returns_does_not_miss_it() {
    let bed = Bed::new();
    bed.pinner.remove_region(Gpa::new(0), 1024 * PAGE).unwrap();
    let step = bed.unpin_far_during(Duration::ZERO, Bed::ram_returns);
    assert!(bed.meeting.iommu.is_mapped(NEAR * PAGE, PAGE));
    let UnpinStep::Wait(unpin) = step else { panic!("RAM is on its way: {step:?}") };
    let UnpinStep::Done(report, Some(_hold)) = bed.go_on(unpin) else { panic!("nobody counts the page") };
    assert!(!bed.meeting.iommu.is_mapped(FAR * PAGE, PAGE), "the page is mapped, and held");
    assert_eq!(report.released, 1);
}

/// A tick passes over the block that somebody works on, and says so.
#[test]
fn a_tick_does_not_wait_for_a_pin() {
    let bed = Bed::new();
    let (pinner, (to, from)) = (Arc::clone(&bed.pinner), std::sync::mpsc::channel());
    bed.meeting.before_next_call(move || to.send(pinner.tick(None)).unwrap());
    assert_eq!(bed.pin(NEAR + 1), PinResult::Pinned);
    let report = from.try_recv().expect("the pin has called the mapper");
    assert_eq!((report.passed_over, report.unpinned_pages, report.full_round), (1, 1, false));
    let report = bed.pinner.tick(None);
    assert_eq!((report.passed_over, report.unpinned_pages, report.full_round), (0, 2, true));
}

/// A forced unpin waits for who is at work in its block, and then does what it came for.
#[test]
fn a_forced_unpin_waits_for_a_pin_in_its_block() {
    let bed = Bed::new();
    let UnpinStep::Done(report, Some(_hold)) = bed.unpin_near_during_a_pin(&Duration::ZERO) else {
        panic!("nobody counts the page");
    };
    assert_eq!((report.released, report.busy), (1, 0));
}

/// Once its time is over, it says what it knows, and does not come back.
#[test]
fn a_forced_unpin_that_is_late_does_not_come_back_to_a_pin_in_its_block() {
    let bed = Bed::new();
    let no_more_tables = Pages(AtomicU64::new(0));
    assert_eq!(bed.guest.map(&*bed.memory, &no_more_tables, gfn(NEAR)), Ok(Mapped::Pinned));
    let UnpinStep::Done(report, None) = bed.unpin_near_during_a_pin(&Duration::MAX) else { panic!("it is in use") };
    assert_eq!((report.released, report.busy), (0, 1));
}

/// One that has no time left cannot wait for what is mapped again behind it: it may be anything.
#[test]
fn a_forced_unpin_that_is_late_says_busy_of_ram_that_returns() {
    let bed = Bed::new();
    bed.pinner.remove_region(Gpa::new(0), 1024 * PAGE).unwrap();
    let step = bed.unpin_far_during(Duration::MAX, Bed::ram_returns);
    let UnpinStep::Done(report, None) = step else { panic!("it has no time to wait: {step:?}") };
    assert_eq!((report.released, report.not_pinned, report.busy, report.parked), (0, 0, 1, 0));
}

/// A guest that deactivates finds no PINNED in its table, whoever unmapped the page.
#[test]
fn a_forced_unpin_during_a_drain_leaves_no_pinned_behind() {
    let bed = Bed::new();
    let step = bed.unpin_far_during(Duration::ZERO, |bed| bed.pinner.deactivate(Drain::Deactivate).unwrap());
    assert_eq!(bed.meeting.iommu.mappings(), 0);
    for page in [NEAR, FAR] {
        assert!(!bed.guest.is_pinned(&*bed.memory, gfn(page)).unwrap(), "page {page} says PINNED");
    }
    let UnpinStep::Wait(unpin) = step else { panic!("a drain is under way: {step:?}") };
    let step = bed.go_on(unpin);
    assert!(matches!(step, UnpinStep::Done(_, Some(_))), "{step:?}");
}
