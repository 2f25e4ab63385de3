//! More pages than a container has mappings, one here and one there.

use std::time::Instant;

use coiommu_vfio::DmaMapper as _;
use fastrand::Rng;

use crate::machine::EntryLimit;
use crate::nvme::Nvme;
use crate::vm::{FREE, Vm};

/// More than type1's 65,535 mappings.
const PAGES: u64 = 80_000;
const RAM: u64 = 704 << 20;

/// Every other page, in no order: no two go into one mapping.
fn scattered() -> Vec<u64> {
    let mut pages: Vec<u64> = (0..PAGES).map(|n| FREE + 2 * n).collect();
    Rng::with_seed(1).shuffle(&mut pages);
    pages
}

/// Has all of them mapped, so many a request, and returns the VM as it is then.
fn map_all(policy: &str, batch: usize) -> Vm {
    let vm = Vm::new(&Nvme::address(), policy, 1, RAM);
    vm.activate();
    let start = Instant::now();
    for batch in scattered().chunks(batch) {
        assert!(vm.map(0, batch), "a pin failed: {:?}", vm.pinner().counters());
        vm.unmap(batch);
    }
    let (took, mappings) = (start.elapsed(), vm.pinner().mappings());
    println!("{policy}: {PAGES} scattered pages in {took:.1?}, {mappings} mappings; {:?}", vm.pinner().counters());
    vm
}

#[test]
#[ignore = "needs a device behind an IOMMU"]
fn single_pages_find_room_by_reclaim() {
    // Each request is two pieces, and room is made for each: for those of the last two requests, and not all of it at once.
    let vm = map_all("extent=page", 8_000);
    let counters = vm.pinner().counters();
    assert!(counters.reclaims >= 4 && counters.pages_unpinned_for_room > 0);
    assert!(counters.map_failures > 0, "the kernel had no mappings left");
    assert_eq!((counters.pages_failed, counters.requests_failed, counters.pages_asked), (0, 0, PAGES));
    vm.end();
}

#[test]
#[ignore = "needs a device behind an IOMMU"]
fn aligned_pieces_take_a_few_hundred_mappings() {
    // A request for many pieces of memory that was never touched takes longer than the guest waits, in software: 30 ms each.
    let vm = map_all("extent=aligned=2m", 64);
    let counters = vm.pinner().counters();
    assert!(vm.pinner().mappings() < 400);
    assert_eq!((counters.pages_failed, counters.requests_failed, counters.reclaims), (0, 0, 0));
    vm.end();
}

/// With few mappings, all in use: a pin fails. With some idle: they make room.
#[test]
#[ignore = "needs a device behind an IOMMU"]
fn a_container_that_is_full_makes_room_of_what_is_idle() {
    const ENTRIES: u64 = 64;
    let limit = EntryLimit::set(ENTRIES);
    let vm = Vm::with_mappings(&Nvme::address(), "extent=page", 1, RAM, ENTRIES);
    drop(limit);
    vm.activate();
    let in_use: Vec<u64> = (0..ENTRIES).map(|n| FREE + 2 * n).collect();
    assert!(vm.map(0, &in_use));
    assert_eq!(vm.container.limits().mappings_left, Some(0));
    let others: Vec<u64> = (0..8).map(|n| FREE + 1001 + 2 * n).collect();
    assert!(!vm.map(0, &others), "there is no room");
    let counters = vm.pinner().counters();
    assert_eq!((counters.reclaims, counters.pages_unpinned_for_room), (1, 0));
    assert!(counters.map_failures > 0);

    let (idle, rest) = in_use.split_at(20);
    vm.unmap(idle);
    assert!(vm.map(0, &others), "what is idle makes room");
    assert!(vm.pinner().counters().pages_unpinned_for_room >= 8);
    vm.unmap(&others);
    vm.unmap(rest);
    assert!(vm.map(0, &in_use), "all of them again");
    vm.unmap(&in_use);
    vm.end();
}
