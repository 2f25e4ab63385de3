//! Parks unpinning, as a guest does that frees tables, and sees that nothing goes meanwhile.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::Acquire;

use coiommu_pin::Extent;

use crate::machine::{Machine, PAGE, iova, stays};
use crate::random::Random;
use crate::tally::Did;
use crate::watch::{Doing, Post};

pub(crate) fn run(machine: &Machine, post: &Post) {
    let mut random = Random::new(machine.seed, 102);
    while !machine.is_over() {
        post.is(Doing::Resting);
        random.sleep(8000);
        park(machine, post, &mut random);
    }
}

fn park(machine: &Machine, post: &Post, random: &mut Random) {
    let resets = machine.resets.load(Acquire);
    let nested = random.within(1..3);
    post.is(Doing::Parking);
    (0..nested).for_each(|_| machine.pinner.park());
    post.is(Doing::Parked);
    // RAM that moves takes its mappings along, parked or not.
    let before: Vec<_> = machine.pinner.extents().into_iter().filter(|extent| stays(extent.first.raw())).collect();
    for unparked in 0..nested {
        random.sleep(2000);
        let now: BTreeSet<_> = machine.iommu.snapshot().into_iter().collect();
        // A reset ends all parking.
        if resets.is_multiple_of(2) && machine.resets.load(Acquire) == resets {
            for Extent { first, pages } in &before {
                assert!(now.contains(&(iova(first.raw()), pages * PAGE)), "{pages} pages at {first} went while parked");
            }
            machine.tally.add(Did::Park, 1);
        }
        post.is(if unparked == 0 { Doing::Unparking } else { Doing::Parked });
        machine.pinner.unpark();
    }
}
