//! Removes RAM, sees that nothing of it is mapped, and returns it: mostly the same, now and then other memory.

use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Release};

use coiommu_dtt::Gpa;
use coiommu_pin::RamRegion;
use vm_memory::GuestMemoryRegion;

use crate::machine::{MOVING, Machine, PAGE, iova, moving_file, ram};
use crate::random::Random;
use crate::tally::Did;
use crate::watch::{Doing, Post};

pub(crate) fn run(machine: &Machine, post: &Post) {
    let mut random = Random::new(machine.seed, 103);
    while !machine.is_over() {
        post.is(Doing::Resting);
        random.sleep(12_000);
        remove(machine, post, &mut random);
        put_back(machine, post, &mut random);
    }
}

fn remove(machine: &Machine, post: &Post, random: &mut Random) {
    let bytes = (MOVING.end - MOVING.start) * PAGE;
    post.is(Doing::RemovingRam);
    machine.moving.moves.fetch_add(1, AcqRel);
    machine.pinner.remove_region(Gpa::new(iova(MOVING.start)), bytes).unwrap();
    machine.tally.add(Did::Removal, 1);
    for _ in 0..random.within(1..6) {
        post.is(Doing::RamAway);
        assert_eq!(machine.iommu.mapped_bytes_in(iova(MOVING.start), bytes), 0, "bytes mapped in RAM that went");
        machine.probe(random.within(MOVING), "whose RAM went");
        random.sleep(500);
    }
}

fn put_back(machine: &Machine, post: &Post, random: &mut Random) {
    post.is(Doing::ReturningRam);
    let region = {
        let mut now = machine.moving.lock();
        match random.within(0..6) {
            0 => {
                machine.moving.others.fetch_add(1, Release);
                *now = ram(&MOVING, Some(moving_file()));
                machine.tally.add(Did::OtherBack, 1);
            }
            1 | 2 => {
                *now = ram(&MOVING, now.file_offset().cloned());
                machine.tally.add(Did::RemappedBack, 1);
            }
            _ => machine.tally.add(Did::SameBack, 1),
        }
        Arc::clone(&now)
    };
    machine.pinner.add_region(RamRegion::from_vm_memory(region).unwrap()).unwrap();
    machine.moving.moves.fetch_add(1, AcqRel);
}
