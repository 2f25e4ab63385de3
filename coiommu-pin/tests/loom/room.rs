//! Making room from within a pin.

use crate::check::check;
use crate::host::{Host, together};

/// There is room for one page, and another is pinned and idle: it goes, unless the guest needs it again first.
#[test]
fn for_a_page_where_another_is_wanted_again() {
    check(None, || {
        let host = Host::new("quota=4k", &[0, 1]).with_ram(0..4).with_idle(0..1);
        together(host, [|host| _ = host.dma(&[0]), |host| _ = host.dma(&[1])]);
    });
}

/// Nobody is in the way: the idle page is in the block of the one that is asked for, and goes.
#[test]
fn in_the_block_of_the_page_itself() {
    check(None, || {
        let host = Host::new("quota=4k", &[0, 1]).with_ram(0..4).with_idle(0..1);
        together(host, [|host| assert!(host.dma(&[1]))]);
    });
}

/// Two pins make room at once, in blocks that the other works on.
#[test]
fn in_each_others_block() {
    check(None, || {
        let host = Host::new("quota=8k", &[0, 1, 512, 513]).with_ram(0..4).with_ram(512..516);
        let host = host.with_idle(0..1).with_idle(512..513);
        together(host, [|host| _ = host.dma(&[1]), |host| _ = host.dma(&[513])]);
    });
}

/// A park begins and ends meanwhile.
#[test]
fn while_a_guest_parks() {
    check(None, || {
        let host = Host::new("quota=4k", &[0, 1]).with_ram(0..4).with_idle(0..1);
        let park = |host: &Host| {
            host.pinner().park();
            host.pinner().unpark();
        };
        together(host, [|host| _ = host.dma(&[1]), park]);
    });
}
