//! Ticks: what is idle goes, what is in use stays.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::check::check;
use crate::host::{Host, together};

fn tick(host: &Host) {
    host.pinner().tick(None);
}

/// A guest maps an idle page while it is taken back: either is first, and a pin waits for the unpin in flight.
#[test]
fn a_page_that_is_going() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4).with_idle(0..1);
        together(host, [|host| assert!(host.dma(&[0])), tick]);
    });
}

/// The extent has two pages, and the guest maps the second: where the first is unpinned already, that is taken back.
#[test]
fn the_second_page_of_an_extent_that_is_going() {
    check(None, || {
        let host = Host::new("", &[0, 1]).with_ram(0..4).with_idle(0..2);
        together(host, [|host| assert!(host.dma(&[1]) && host.dma(&[0])), tick]);
    });
}

/// Two ticks at once, and a guest that maps the page again and again. At most 2 preemptions.
#[test]
fn two_ticks() {
    check(Some(2), || {
        let host = Host::new("", &[0]).with_ram(0..4).with_idle(0..1);
        together(host, [|host| assert!(host.dma(&[0]) && host.dma(&[0])), tick, tick]);
    });
}

/// What the models above stand on: somewhere among the interleavings a tick tries a block that a pin has, and passes on.
#[test]
fn a_tick_meets_a_pin_at_work() {
    static PASSED_OVER: AtomicBool = AtomicBool::new(false);
    check(None, || {
        let host = Host::new("", &[0, 1]).with_ram(0..4).with_idle(0..1);
        let tick = |host: &Host| _ = PASSED_OVER.fetch_or(host.pinner().tick(None).passed_over > 0, Relaxed);
        together(host, [|host| assert!(host.dma(&[1])), tick]);
    });
    assert!(PASSED_OVER.load(Relaxed), "no tick ever found a block locked");
}
