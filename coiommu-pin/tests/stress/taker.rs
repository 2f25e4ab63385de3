//! Takes memory from the guest: unpins a range by force, and while it is held writes what no device may see or change.

use std::ops::Range;
use std::thread;
use std::time::Duration;

use coiommu_dtt::Gpa;
use coiommu_pin::pinner::UnpinStep;
use vm_memory::{Bytes, GuestAddress};

use crate::machine::{GFNS, Machine, PAGE, iova, stays};
use crate::random::Random;
use crate::tally::Did;
use crate::watch::{Doing, Post};

/// What the taker puts into memory.
const TAKEN: [u8; 4096] = [0xee; 4096];

pub(crate) fn run(machine: &Machine, post: &Post) {
    let mut random = Random::new(machine.seed, 101);
    while !machine.is_over() {
        let first = random.within(0..GFNS);
        let most = if random.once_in(10) { 600 } else { 40 };
        take(machine, post, first..first + random.within(1..most), &mut random);
        post.is(Doing::Resting);
        random.sleep(1000);
    }
}

fn take(machine: &Machine, post: &Post, range: Range<u64>, random: &mut Random) {
    let (pinner, clock) = (&machine.pinner, &machine.clock);
    let pages = range.end - range.start;
    let mut unpin = pinner.begin_unpin(Gpa::new(iova(range.start)), pages * PAGE, clock);
    let (report, hold) = loop {
        post.is(Doing::Unpinning);
        unpin = match pinner.step_unpin(unpin, clock) {
            UnpinStep::Done(report, hold) => break (report, hold),
            UnpinStep::More(unpin) => unpin,
            UnpinStep::Wait(unpin) => {
                post.is(Doing::WaitingForUnpark);
                thread::sleep(Duration::from_micros(100));
                unpin
            }
        };
    };
    assert_eq!(report.released + report.not_pinned + report.busy + report.parked, pages, "{report:?}");
    assert_eq!(hold.is_some(), report.may_be_taken(), "{report:?}");
    machine.tally.add(Did::ForcedPage, report.released);
    let Some(hold) = hold else {
        machine.tally.add(Did::NoTake, 1);
        return;
    };
    machine.tally.add(Did::Take, 1);
    post.is(Doing::Holding);
    // RAM that moves is looked at only: guests write to it whether or not it is there.
    let taken: Vec<_> = range.clone().filter(|&page| stays(page)).map(|page| GuestAddress(iova(page))).collect();
    for &page in &taken {
        machine.memory.write_slice(&TAKEN, page).unwrap();
    }
    for _ in 0..random.within(1..6) {
        let mapped = machine.iommu.mapped_bytes_in(iova(range.start), pages * PAGE);
        assert_eq!(mapped, 0, "bytes mapped in pages {range:x?}, which are held");
        machine.probe(random.within(range.clone()), "which is held");
        random.sleep(200);
        post.is(Doing::Holding);
    }
    let mut bytes = TAKEN;
    for &page in &taken {
        machine.memory.read_slice(&mut bytes, page).unwrap();
        assert!(bytes == TAKEN, "a device wrote to {page:x?}, which was taken");
    }
    drop(hold);
}
