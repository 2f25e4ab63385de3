//! All RAM is pinned for who does not count, while what was pinned before is being taken back, or wanted.

use std::sync::Arc;

use coiommu_pin::pinner::{Drain, PinAll};
use loom::thread;

use crate::check::check;
use crate::host::{Host, NOW, ram, together};

/// Keeps and pins all RAM; then a device that nobody counts for reaches all of it.
fn keep(host: &Host) {
    host.pinner().keep_all();
    pin_and_use(host);
}

fn pin_and_use(host: &Host) {
    if pin(host) == PinAll::Done {
        host.iommu.access(0);
    }
}

fn pin(host: &Host) -> PinAll {
    let mut next = 0;
    loop {
        match host.pinner().pin_all(next, &NOW, NOW) {
            PinAll::More(after) => next = after,
            result => return result,
        }
    }
}

/// A tick takes an idle page: before, and it is mapped again, or not any more.
#[test]
fn a_tick() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4).with_idle(0..1);
        together(host, [keep, |host| _ = host.pinner().tick(None)]);
    });
}

/// The page's memory is to be taken: either it is, and is not pinned as long as it is held, or it is not.
#[test]
fn a_forced_unpin() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4).with_idle(0..1);
        let take = |host: &Host| {
            if let (_, Some(hold)) = host.force(0..1) {
                host.iommu.take(0..1);
                host.iommu.assert_unmapped(0..1);
                drop(hold);
            }
        };
        together(host, [keep, take]);
    });
}

/// A guest with a table asks for pages meanwhile.
#[test]
fn a_request() {
    check(None, || {
        let host = Host::new("", &[0, 1]).with_ram(0..4);
        together(host, [keep, |host| assert!(host.dma(&[0, 1]))]);
    });
}

/// All was kept, and is let age: what the guest uses stays, the rest goes.
#[test]
fn a_release() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4);
        host.pinner().keep_all();
        assert_eq!(pin(&host), PinAll::Done);
        let release = |host: &Host| {
            host.pinner().let_all_age();
            host.pinner().release_idle(0, &NOW, NOW);
        };
        together(host, [release, |host| assert!(host.dma(&[0]))]);
    });
}

/// RAM goes and comes back meanwhile: another pass has it.
#[test]
fn ram_that_moves() {
    check(Some(3), || {
        let host = Host::new("", &[0]).with_ram(0..4);
        let firmware = |host: &Host| {
            host.remove(&(0..4));
            host.iommu.assert_unmapped(0..1);
            host.pinner().add_region(ram(&(0..4))).unwrap();
            pin_and_use(host);
        };
        host.pinner().keep_all();
        let pin = |host: &Host| _ = pin(host);
        together(host, [pin, firmware]);
    });
}

/// Everything is drained meanwhile, and the keeping ends with it, or begins after it. Where all is pinned and kept in the end,
/// it is.
#[test]
fn a_drain() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4).with_idle(0..1);
        let host = Arc::new(host);
        let drain = {
            let host = Arc::clone(&host);
            thread::spawn(move || host.pinner().deactivate(Drain::Deactivate).unwrap())
        };
        host.pinner().keep_all();
        let result = pin(&host);
        drain.join().unwrap();
        if host.pinner().keeps_all() {
            assert_eq!(result, PinAll::Done);
            host.iommu.access(0);
        } else {
            host.iommu.assert_unmapped(0..4);
        }
        host.check_at_rest();
    });
}

/// A table is activated meanwhile, where none was in use.
#[test]
fn an_activation() {
    check(Some(3), || {
        let host = Host::new("", &[0]).with_ram(0..4);
        host.pinner().deactivate(Drain::Reset).unwrap();
        let activate = |host: &Host| host.pinner().activate(host.guest.dtt().root(), 1).unwrap();
        together(host, [keep, activate]);
    });
}
