//! The gate against a plain statement of who may do DMA, with devices that are a bit each.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;

use proptest::prelude::*;

use super::*;

/// A device that is its bit for bus mastering.
#[derive(Debug, Default)]
struct Bit {
    is_on: AtomicBool,
    is_broken: AtomicBool,
}

impl Master for Bit {
    fn address(&self) -> &str {
        "0000:03:00.0"
    }

    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        if !self.is_broken.load(SeqCst) {
            self.is_on.store(on, SeqCst);
        }
        Ok(())
    }

    fn is_bus_master(&self) -> io::Result<bool> {
        Ok(self.is_on.load(SeqCst))
    }

    fn reset(&self) -> io::Result<()> {
        self.is_on.store(false, SeqCst);
        Ok(())
    }
}

fn bdf(number: usize) -> Bdf {
    Bdf::new(u16::try_from(number + 1).unwrap() << 3).unwrap()
}

struct Bed {
    gate: Gate,
    devices: Vec<Arc<Bit>>,
}

impl Bed {
    /// Two devices; messages wait so long.
    fn new(without_driver: WithoutDriver, patience: Duration) -> Self {
        let devices: Vec<_> = (0..2).map(|_| Arc::new(Bit::default())).collect();
        let masters = devices.iter().enumerate().map(|(at, bit)| (Arc::clone(bit) as _, bdf(at)));
        let gate = Gate { patience, ..Gate::new(without_driver, masters) };
        Self { gate, devices }
    }

    fn with_guest(without_driver: WithoutDriver) -> Self {
        let bed = Self::new(without_driver, Duration::ZERO);
        bed.gate.guest_comes();
        bed
    }

    fn is_on(&self, device: usize) -> bool {
        self.devices[device].is_on.load(SeqCst)
    }

    /// The thread that pins comes by, and says so; whether it was wanted.
    fn pin(&self, is_pinned: bool) -> bool {
        if self.gate.lock().all != All::Pinning {
            return false;
        }
        let Work::Pin(round) = self.gate.next_work(None) else { return false };
        assert!(self.gate.is_current(round));
        self.gate.pinned(round, is_pinned);
        self.gate.lock().is_busy = false;
        true
    }

    fn all(&self) -> All {
        self.gate.passed().0
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Wish(usize, bool),
    GuestComes,
    GuestGoes,
    Drain,
    Activate,
    RamComes,
    Pin(bool),
    Asks(usize),
    Released,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..2_usize, any::<bool>()).prop_map(|(at, on)| Step::Wish(at, on)),
        2 => Just(Step::GuestComes),
        1 => Just(Step::GuestGoes),
        1 => Just(Step::Drain),
        2 => Just(Step::Activate),
        2 => Just(Step::RamComes),
        3 => any::<bool>().prop_map(Step::Pin),
        2 => (0..2_usize).prop_map(Step::Asks),
        1 => Just(Step::Released),
    ]
}

/// What somebody knows who reads the table at the gate's top.
#[derive(Debug, Default)]
struct Model {
    has_guest: bool,
    is_active: bool,
    wish: [bool; 2],
    counted: [bool; 2],
    /// All RAM that there is was pinned for them, and has not been let go.
    covered: bool,
}

impl Model {
    fn close(&mut self) {
        *self = Self { has_guest: self.has_guest, ..Self::default() };
    }

    fn needs_all(&self) -> bool {
        self.has_guest && (0..2).any(|at| self.wish[at] && !self.counted[at])
    }
}

proptest! {
    #[test]
    fn devices_do_dma_when_they_may_and_never_else(
        without_driver in prop_oneof![Just(WithoutDriver::PinAll), Just(WithoutDriver::Hold), Just(WithoutDriver::Refuse)],
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let bed = Bed::new(without_driver, Duration::ZERO);
        let gate = &bed.gate;
        let mut model = Model::default();
        for step in steps {
            let before = [0, 1].map(|at| bed.is_on(at));
            match step {
                Step::Wish(at, on) => {
                    gate.wish(at, on);
                    let is_refused = !model.is_active && without_driver == WithoutDriver::Refuse;
                    if !on || model.has_guest && !is_refused {
                        model.wish[at] = on;
                        model.counted[at] |= !on && model.is_active;
                    }
                }
                Step::GuestComes => {
                    gate.guest_comes();
                    model.has_guest = true;
                }
                Step::GuestGoes => {
                    gate.guest_goes();
                    model.close();
                    model.has_guest = false;
                }
                Step::Drain => {
                    drop(gate.drain());
                    model.close();
                }
                // Only of a guest, and another table only after a drain.
                Step::Activate if model.has_guest && !model.is_active => {
                    gate.activated();
                    model.is_active = true;
                    model.counted = model.wish.map(|wish| !wish);
                }
                Step::Activate => {}
                Step::RamComes => {
                    gate.ram_has_come(Instant::now());
                    model.covered = false;
                }
                Step::Pin(is_pinned) => {
                    if bed.pin(is_pinned) {
                        model.covered = is_pinned;
                    }
                }
                Step::Asks(at) => {
                    gate.has_asked(bdf(at));
                    model.counted[at] |= model.is_active;
                }
                Step::Released => gate.released(),
            }
            if model.is_active && !model.needs_all() {
                // It is let go from here on.
                model.covered = false;
            }
            for (at, was_on) in before.into_iter().enumerate() {
                let is_on = bed.is_on(at);
                let is_counted = model.is_active && model.counted[at];
                let may = model.has_guest && model.wish[at] && (is_counted || match without_driver {
                    WithoutDriver::PinAll => model.covered,
                    WithoutDriver::Hold => model.is_active,
                    WithoutDriver::Refuse => false,
                });
                prop_assert!(is_on == may, "{at} after {step:?}: {was_on} {is_on}, {model:?}");
                prop_assert_eq!(gate.is_wished(at), model.wish[at]);
            }
        }
    }
}

#[test]
fn a_guest_without_the_driver_has_its_devices_once_all_memory_is_pinned() {
    let bed = Bed::with_guest(WithoutDriver::PinAll);
    bed.gate.wish(0, true);
    assert_eq!((bed.gate.is_wished(0), bed.is_on(0), bed.all()), (true, false, All::Pinning), "it sees it on");
    assert!(bed.pin(true));
    assert_eq!([bed.is_on(0), bed.is_on(1)], [true, false]);
    bed.gate.wish(1, true);
    assert!(bed.is_on(1), "all is pinned already");
}

#[test]
fn what_cannot_be_pinned_is_tried_again_when_something_has_changed() {
    let bed = Bed::with_guest(WithoutDriver::PinAll);
    bed.gate.wish(0, true);
    assert!(bed.pin(false));
    assert_eq!((bed.is_on(0), bed.all()), (false, All::Failed));
    assert!(!bed.pin(true), "not by itself");
    bed.gate.wish(1, true);
    assert!(bed.pin(true) && bed.is_on(0) && bed.is_on(1));

    let bed = Bed::with_guest(WithoutDriver::PinAll);
    bed.gate.wish(0, true);
    assert!(bed.pin(false));
    bed.gate.ram_has_come(Instant::now());
    assert!(bed.pin(true) && bed.is_on(0));
}

#[test]
fn a_driver_that_was_there_before_the_one_that_counts_keeps_its_memory() {
    let bed = Bed::with_guest(WithoutDriver::PinAll);
    bed.gate.wish(0, true);
    bed.gate.wish(1, true);
    assert!(bed.pin(true));
    bed.gate.activated();
    assert_eq!((bed.is_on(0), bed.all()), (true, All::Pinned));
    assert_eq!(bed.gate.uncounted(), [bdf(0), bdf(1)]);
    bed.gate.has_asked(bdf(0));
    assert_eq!(bed.all(), All::Pinned, "the other has not");
    bed.gate.wish(1, false);
    assert_eq!((bed.all(), bed.is_on(1)), (All::Leaving, false));
    bed.gate.wish(1, true);
    assert!(bed.is_on(0) && bed.is_on(1));
    bed.gate.released();
    assert_eq!(bed.all(), All::No);
}

#[test]
fn a_device_in_use_is_not_held_while_memory_that_has_come_is_pinned_in_time() {
    for (comes_in_time, is_on) in [(true, true), (false, false)] {
        let bed = Bed {
            gate: Gate {
                patience: Duration::from_secs(if comes_in_time { 600 } else { 0 }),
                ..Bed::with_guest(WithoutDriver::PinAll).gate
            },
            devices: Vec::new(),
        };
        let bit = Arc::new(Bit::default());
        bed.gate.lock().endpoints[0].device = Arc::clone(&bit) as _;
        thread::scope(|scope| {
            let pin = || {
                while !bed.pin(true) {
                    thread::yield_now()
                }
            };
            scope.spawn(pin);
            bed.gate.wish(0, true);
        });
        assert!(bit.is_on.load(SeqCst));
        thread::scope(|scope| {
            if comes_in_time {
                scope.spawn(|| {
                    while bed.gate.lock().all != All::Pinning {
                        thread::yield_now()
                    }
                    assert!(bit.is_on.load(SeqCst), "the guest has not been told of the memory");
                    assert!(bed.pin(true));
                });
            }
            bed.gate.ram_has_come(Instant::now());
        });
        assert_eq!(bit.is_on.load(SeqCst), is_on);
        assert_eq!(bed.pin(true), !comes_in_time);
        assert!(bit.is_on.load(SeqCst));
    }
}

/// As another thread's, of a guest that means harm.
#[test]
fn a_wish_in_the_midst_of_a_drain_waits_for_its_end() {
    for without_driver in [WithoutDriver::PinAll, WithoutDriver::Hold] {
        let bed = Bed::with_guest(without_driver);
        bed.gate.activated();
        bed.gate.wish(0, true);
        assert!(bed.is_on(0));
        let draining = bed.gate.drain();
        bed.gate.wish(0, true);
        bed.gate.ram_has_come(Instant::now());
        assert_eq!((bed.is_on(0), bed.gate.is_wished(0), bed.pin(true)), (false, true, false));
        drop(draining);
        assert!(!bed.is_on(0));
        assert_eq!(bed.pin(true), without_driver == WithoutDriver::PinAll);
        assert_eq!(bed.is_on(0), without_driver == WithoutDriver::PinAll);
    }
}

#[test]
fn a_device_that_cannot_be_stopped_is_reset() {
    let bed = Bed::with_guest(WithoutDriver::Hold);
    bed.gate.activated();
    bed.gate.wish(0, true);
    bed.devices[0].is_broken.store(true, SeqCst);
    drop(bed.gate.drain());
    assert!(!bed.is_on(0));
}

/// As one does that is woken up from sleep.
#[test]
fn a_device_that_comes_back_with_its_bus_mastering_on_is_held() {
    let bed = Bed::with_guest(WithoutDriver::Hold);
    bed.gate.write_config(0, |is_on| {
        assert!(!is_on);
        bed.devices[0].is_on.store(true, SeqCst);
    });
    assert!(!bed.is_on(0));
}

#[test]
fn nothing_is_started_without_a_guest() {
    let bed = Bed::new(WithoutDriver::Hold, Duration::ZERO);
    bed.gate.wish(0, true);
    assert!(!bed.gate.is_wished(0));
    bed.gate.guest_comes();
    bed.gate.activated();
    assert!(!bed.is_on(0));
}

#[test]
fn the_vmm_may_have_switched_it_on_itself() {
    let bed = Bed::with_guest(WithoutDriver::Hold);
    bed.devices[1].is_on.store(true, SeqCst);
    drop(bed.gate.drain());
    assert!(!bed.is_on(1));
}

#[test]
fn what_does_not_go_off_is_switched_off_again() {
    let bed = Bed::with_guest(WithoutDriver::Hold);
    bed.gate.activated();
    bed.gate.wish(0, true);
    assert!(bed.is_on(0));
    bed.devices[0].is_broken.store(true, SeqCst);
    bed.gate.wish(0, false);
    assert_eq!((bed.is_on(0), bed.gate.is_wished(0)), (true, false));
    bed.devices[0].is_broken.store(false, SeqCst);
    bed.gate.wish(1, true);
    assert!(!bed.is_on(0));
}

/// Whoever drains comes after the last step of the thread that pins.
#[test]
fn a_drain_waits_for_the_thread_that_pins() {
    let bed = Bed::with_guest(WithoutDriver::PinAll);
    bed.gate.wish(0, true);
    let Work::Pin(round) = bed.gate.next_work(None) else { panic!("there is something to pin") };
    let is_at_work = AtomicBool::new(true);
    thread::scope(|scope| {
        scope.spawn(|| {
            while bed.gate.is_current(round) {
                thread::yield_now();
            }
            is_at_work.store(false, SeqCst);
            // Too late to be heard.
            bed.gate.pinned(round, true);
            assert_eq!(bed.gate.next_work(None), Work::End);
        });
        bed.gate.guest_goes();
        assert!(!is_at_work.load(SeqCst) && !bed.is_on(0));
    });
    assert_eq!(bed.all(), All::No);
}

#[test]
fn nobody_waits_for_a_thread_that_has_ended() {
    let bed = Bed::with_guest(WithoutDriver::PinAll);
    bed.gate.wish(0, true);
    let Work::Pin(round) = bed.gate.next_work(None) else { panic!("there is something to pin") };
    bed.gate.worker_ends();
    assert!(!bed.gate.is_current(round));
    assert_eq!((bed.all(), bed.is_on(0)), (All::Failed, false));
    // Nor the next time.
    bed.gate.wish(0, false);
    bed.gate.wish(0, true);
    bed.gate.ram_has_come(Instant::now());
    assert_eq!((bed.all(), bed.is_on(0)), (All::Failed, false));
    drop(bed.gate.drain());
}
