//! The 4 s rule: a request that takes too long is cut off before its guest gives up, at 5 s, and frees its table.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Duration;

use coiommu_pin::pinner::{Clock, PinResult};
use loom::sync::atomic::AtomicBool;
use loom::thread;

use crate::check::check;
use crate::host::Host;

/// A clock that is looked at so many times before the 5 s are over; it says so when they are.
struct Script<'a> {
    looks_left: Cell<u32>,
    late: &'a AtomicBool,
}

impl Clock for Script<'_> {
    fn now(&self) -> Duration {
        if self.looks_left.get() > 0 {
            self.looks_left.set(self.looks_left.get() - 1);
        } else {
            self.late.store(true, Release);
        }
        Late(self.late).now()
    }
}

/// A clock that others set.
struct Late<'a>(&'a AtomicBool);

impl Clock for Late<'_> {
    fn now(&self) -> Duration {
        if self.0.load(Relaxed) { Duration::from_secs(5) } else { Duration::ZERO }
    }
}

/// Serves a request, while the guest waits for it to be late, gives up and frees its table: it never sees the host there
/// again, and what was mapped for it is not.
fn serve(host: Host, late: &Arc<AtomicBool>, clock: &dyn Clock) -> PinResult {
    let host = Arc::new(host);
    let guest = thread::spawn({
        let (host, late) = (Arc::clone(&host), Arc::clone(late));
        move || {
            while !late.load(Acquire) {
                thread::yield_now();
            }
            host.memory.take_table(host.guest.dtt().root());
        }
    });
    let result = host.ask(&[0, 1], clock);
    if result == PinResult::TimedOut {
        host.iommu.assert_unmapped(0..4);
    }
    // If it was in time, the guest frees its table now.
    late.store(true, Release);
    guest.join().unwrap();
    result
}

fn host() -> Host {
    Host::new("", &[0, 1]).with_ram(0..4)
}

/// Wherever in a request the time ends.
#[test]
fn a_guest_that_gave_up_has_its_table_for_itself() {
    // The first look is when the request was taken.
    for looks in 1..8 {
        check(None, move || {
            let late = Arc::new(AtomicBool::new(false));
            serve(host(), &late, &Script { looks_left: Cell::new(looks), late: &late });
        });
    }
}

/// The time ends in a map call, which is where it goes.
#[test]
fn what_a_slow_map_call_mapped_is_not_pinned() {
    check(None, || {
        let late = Arc::new(AtomicBool::new(false));
        let host = host();
        host.iommu.late.set(Arc::clone(&late)).unwrap();
        assert_eq!(serve(host, &late, &Late(&late)), PinResult::TimedOut);
    });
}
