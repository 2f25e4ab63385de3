//! The whole device: what a guest maps, edu reaches, and nothing else.

use coiommu_dtt::PAGE_SIZE;

use crate::edu::{self, Edu};
use crate::vm::{FREE, Vm};

const RAM: u64 = 64 << 20;
const FROM: u64 = FREE;
const TO: u64 = FREE + 0x123;

/// A page of bytes that tell where they are.
fn pattern(seed: u8) -> Vec<u8> {
    (0..16_u8).flat_map(|row| (0..=255_u8).map(move |n| n.wrapping_mul(31).wrapping_add(row) ^ seed)).collect()
}

/// Edu copies a page of the guest to another.
fn copy(vm: &Vm, edu: &Edu, seed: u8) {
    vm.fill(FROM, &pattern(seed));
    for half in [0, edu::MOST] {
        edu.read(FROM * PAGE_SIZE + half, edu::MOST);
        edu.write(TO * PAGE_SIZE + half, edu::MOST);
    }
    assert_eq!(vm.bytes(TO, 0x1000), pattern(seed));
}

#[test]
#[ignore = "needs edu behind an IOMMU"]
fn edu_reaches_what_the_guest_has_mapped() {
    let vm = Vm::new(&Edu::address(), "", 2, RAM);
    vm.activate();
    let edu = Edu::of(&vm.container);
    assert!(vm.map(0, &[FROM]) && vm.map(1, &[TO]));
    copy(&vm, &edu, 1);

    // In use: it may not be taken, and DMA goes on.
    let (report, hold) = vm.unpin(FROM..FROM + 1);
    assert_eq!((report.busy, report.released, hold.is_none()), (1, 0, true));
    copy(&vm, &edu, 2);

    vm.unmap(&[FROM, TO]);
    copy(&vm, &edu, 3);
    for page in [FROM, TO] {
        let (report, hold) = vm.unpin(page..page + 1);
        assert_eq!((report.busy, report.released, hold.is_some()), (0, 1, true));
        assert!(!vm.map(0, &[page]), "it is held");
    }
    edu.expect_fault(FROM * PAGE_SIZE, |edu| edu.read(FROM * PAGE_SIZE, 16));
    edu.expect_fault(TO * PAGE_SIZE, |edu| edu.write(TO * PAGE_SIZE, 16));
    assert_eq!(vm.bytes(TO, 0x1000), pattern(3), "nothing got there");

    assert!(vm.map(0, &[FROM, TO]), "nobody holds it any more");
    copy(&vm, &edu, 4);
    vm.unmap(&[FROM, TO]);
    vm.end();
}

#[test]
#[ignore = "needs edu behind an IOMMU"]
fn ram_that_goes_and_comes_back_is_reached_again() {
    const GONE: u64 = FREE + 0x77;
    let vm = Vm::new(&Edu::address(), "extent=aligned=2m", 1, RAM);
    vm.activate();
    let edu = Edu::of(&vm.container);
    assert!(vm.map(0, &[FROM, TO, GONE]));
    copy(&vm, &edu, 1);
    let requests = vm.pinner().counters().requests_pinned;
    vm.remove_ram();
    edu.expect_fault(GONE * PAGE_SIZE, |edu| edu.read(GONE * PAGE_SIZE, 16));
    vm.add_ram();
    copy(&vm, &edu, 2);
    assert_eq!(vm.pinner().counters().requests_pinned, requests, "the guest did not have to ask again");
    vm.unmap(&[FROM, TO, GONE]);
    vm.end();
}
