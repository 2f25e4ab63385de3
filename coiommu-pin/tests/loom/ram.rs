//! RAM that goes, and RAM that comes.

use coiommu_pin::pinner::PinResult;

use crate::check::check;
use crate::host::{Host, NOW, other_ram, ram, together};

/// The guest's firmware takes the RAM away, uses the memory for something else, and puts it back.
fn move_ram(host: &Host) {
    host.remove(&(0..4));
    host.iommu.take(0..4);
    host.iommu.assert_unmapped(0..4);
    host.pinner().add_region(ram(&(0..4))).unwrap();
}

/// A page is in use, another is asked for: nothing is mapped while the RAM is away, and whatever the guest saw PINNED is
/// mapped when it is back.
#[test]
fn goes_and_comes_back_while_a_page_is_asked_for() {
    check(None, || {
        let host = Host::new("", &[0, 1]).with_ram(0..4);
        assert!(host.map(&[0]));
        together(host, [|host| _ = host.map(&[1]), move_ram]);
    });
}

/// The same with a tick, to which the page is idle.
#[test]
fn goes_and_comes_back_while_pages_are_taken_back() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4).with_idle(0..1);
        together(host, [|host| _ = host.pinner().tick(None), move_ram]);
    });
}

/// Asks for a page that was PINNED when its RAM went, as a batch may; if the answer is that it is pinned, it is.
fn ask_for_page_0(host: &Host) {
    if host.ask(&[0], &NOW) == PinResult::Pinned && host.is_pinned(0) {
        host.iommu.access(0);
    }
}

/// The same memory comes back while the page is asked for.
#[test]
fn comes_back_while_its_page_is_asked_for() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4);
        assert!(host.map(&[0]));
        host.remove(&(0..4));
        together(host, [ask_for_page_0, |host| host.pinner().add_region(ram(&(0..4))).unwrap()]);
    });
}

/// Other memory comes to its place: PINNED goes, unless the page was pinned anew.
#[test]
fn other_ram_comes_while_its_page_is_asked_for() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4);
        assert!(host.map(&[0]));
        host.remove(&(0..4));
        together(host, [ask_for_page_0, |host| host.pinner().add_region(other_ram(&(0..4))).unwrap()]);
    });
}
