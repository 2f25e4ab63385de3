//! A guest that parks unpinning, frees a leaf table that is all zeros, and unparks.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use coiommu_dtt::memory::{Word32, Word64};
use coiommu_dtt::{Gfn, Gpa, TableMemory};

use crate::check::check;
use crate::host::{Host, together};

/// Frees the leaf table of page 0 if nothing is in it, as the guest's shrinker does. The guest's own lock keeps its other
/// CPUs out of the table meanwhile.
fn shrink(host: &Host) {
    host.pinner().park();
    let table = host.guest.dtt().leaf_table(&*host.memory, Gfn::new(0).unwrap()).unwrap();
    if table.words()[0].load(Relaxed) == 0 {
        let directory = &host.memory.words64(host.guest.dtt().root(), 1).unwrap()[0];
        let table = Gpa::new(directory.load(Acquire) & !0xfff);
        directory.store(0, Release);
        host.memory.take_table(table);
    }
    host.pinner().unpark();
}

/// Page 0 was pinned and is idle; its table is not the root.
fn host() -> Host {
    Host::with_tables("", &[0], 2).with_ram(0..4).with_idle(0..1)
}

/// No tick is in the table when it goes, and none finds it later; the guest, which needs page 0 again, makes a new one.
#[test]
fn frees_a_table_that_a_tick_has_emptied() {
    check(None, || {
        let guest = |host: &Host| {
            shrink(host);
            assert!(host.dma(&[0]));
        };
        together(host(), [|host| _ = host.pinner().tick(None), guest]);
    });
}

/// The same with two ticks, of which the first may empty the table and the second find it gone.
#[test]
fn frees_a_table_between_ticks() {
    check(None, || {
        let ticks = |host: &Host| {
            host.pinner().tick(None);
            host.pinner().tick(None);
        };
        let guest = |host: &Host| {
            shrink(host);
            assert!(host.dma(&[0]));
        };
        together(host(), [ticks, guest]);
    });
}

/// A forced unpin waits for the park to end. While it holds the page, the guest is told no.
#[test]
fn frees_a_table_that_a_forced_unpin_has_emptied() {
    check(None, || {
        let force = |host: &Host| drop(host.force(0..1));
        let guest = |host: &Host| {
            shrink(host);
            host.dma(&[0]);
        };
        together(host(), [force, guest]);
    });
}

/// A request makes room where the table goes: it never waits for the park to end.
#[test]
fn frees_a_table_that_making_room_has_emptied() {
    check(None, || {
        let host = Host::with_tables("quota=4k", &[0, 1024], 2).with_ram(0..4).with_ram(1024..1028).with_idle(0..1);
        together(host, [|host| _ = host.dma(&[1024]), shrink]);
    });
}
