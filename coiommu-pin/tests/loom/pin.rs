//! Pins against each other.

use crate::check::check;
use crate::host::{Host, together};

/// Two CPUs need the same page.
#[test]
fn one_page_asked_for_twice() {
    check(None, || {
        let cpu = |host: &Host| assert!(host.dma(&[0]));
        together(Host::new("", &[0]).with_ram(0..4), [cpu, cpu]);
    });
}

/// Two workers pin neighbouring pages that one map call covers: whoever is second finds it made.
#[test]
fn two_pages_of_one_extent() {
    check(None, || {
        let host = Host::new("extent=aligned=64k", &[0, 1]).with_ram(0..16);
        together(host, [|host| assert!(host.dma(&[0])), |host| assert!(host.dma(&[1]))]);
    });
}

/// The same, while idle pages are taken back. At most 3 preemptions.
#[test]
fn two_pages_of_one_extent_and_a_tick() {
    check(Some(3), || {
        let host = Host::new("extent=aligned=64k", &[0, 1]).with_ram(0..16).with_idle(0..2);
        let tick = |host: &Host| _ = host.pinner().tick(None);
        together(host, [|host| assert!(host.dma(&[0])), |host| assert!(host.dma(&[1])), tick]);
    });
}

/// Requests in two blocks disturb nobody, and make the books of both.
#[test]
fn two_blocks() {
    check(None, || {
        let host = Host::new("", &[0, 512]).with_ram(0..4).with_ram(512..516);
        together(host, [|host| assert!(host.dma(&[0, 512])), |host| assert!(host.dma(&[512]))]);
    });
}
