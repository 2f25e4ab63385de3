//! Forced unpins: memory is taken after its users, and stays out of the IOMMU until it is taken.

use coiommu_pin::pinner::PinResult;

use crate::check::check;
use crate::host::{Host, NOW, ram, together};

/// Takes the memory of a page, if it may; the guest loses what was in it, and gets other memory there, which is nothing
/// that the pinner sees.
fn take_page_0(host: &Host) {
    let (report, hold) = host.force(0..1);
    assert_eq!(hold.is_some(), report.may_be_taken());
    if let Some(hold) = hold {
        host.iommu.take(0..1);
        host.iommu.assert_unmapped(0..1);
        drop(hold);
    }
}

/// A guest uses the page: it is taken before or after, or not at all. While it is held, the guest is told no.
#[test]
fn a_page_that_is_in_use() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4).with_idle(0..1);
        together(host, [|host| _ = host.dma(&[0]), take_page_0]);
    });
}

/// The page was never pinned, so there is nothing to unpin, but a hold that must hold.
#[test]
fn a_page_that_is_not_pinned_yet() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4);
        together(host, [|host| _ = host.dma(&[0]), take_page_0]);
    });
}

/// An extent of two pages, one of which is wanted, the other in use now and then.
#[test]
fn an_extent_whose_other_page_is_in_use() {
    check(None, || {
        let host = Host::new("", &[0, 1]).with_ram(0..4).with_idle(0..2);
        together(host, [|host| assert!(host.dma(&[1])), take_page_0]);
    });
}

/// Two holds on the same page, and a guest: when one ends, the other still holds, and neither waits for the other. At most 3
/// preemptions.
#[test]
fn two_holds() {
    check(Some(3), || {
        let hold_page_0 = |host: &Host| {
            if let (_, Some(hold)) = host.force_at_once(0..1) {
                host.iommu.assert_unmapped(0..1);
                host.iommu.assert_unmapped(0..1);
                drop(hold);
            }
        };
        let host = Host::new("", &[0]).with_ram(0..4);
        together(host, [|host| _ = host.dma(&[0]), hold_page_0, hold_page_0]);
    });
}

/// A tick takes the same page at the same time. At most 3 preemptions.
#[test]
fn a_page_that_is_going_anyway() {
    check(Some(3), || {
        let host = Host::new("", &[0]).with_ram(0..4).with_idle(0..1);
        let tick = |host: &Host| _ = host.pinner().tick(None);
        together(host, [|host| _ = host.dma(&[0]), tick, take_page_0]);
    });
}

/// The page is in use, its RAM goes and comes back meanwhile: what is mapped again is never held. At most 4 preemptions.
#[test]
fn a_page_whose_ram_goes_and_comes_back() {
    check(Some(4), || {
        let host = Host::new("", &[0]).with_ram(0..4);
        assert!(host.map(&[0]));
        let firmware = |host: &Host| {
            host.remove(&(0..4));
            host.pinner().add_region(ram(&(0..4))).unwrap();
        };
        together(host, [firmware, take_page_0]);
    });
}

/// The same page asked for once more when its RAM is back, as a batch may: the answer is right. At most 3 preemptions.
#[test]
fn a_page_that_is_asked_for_when_its_ram_comes_back() {
    check(Some(3), || {
        let host = Host::new("", &[0]).with_ram(0..4);
        assert!(host.map(&[0]));
        host.remove(&(0..4));
        let ask = |host: &Host| {
            if host.ask(&[0], &NOW) == PinResult::Pinned && host.is_pinned(0) {
                host.iommu.access(0);
            }
        };
        together(host, [ask, |host| host.pinner().add_region(ram(&(0..4))).unwrap(), take_page_0]);
    });
}
