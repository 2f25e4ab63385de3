//! Drains the device in each way there is, and starts it again. Guests rest meanwhile; all others go on.

use std::sync::atomic::Ordering::AcqRel;

use coiommu_dtt::RequestWord;
use coiommu_pin::pinner::{Clock as _, Drain};
use coiommu_pin::request::Refusal;

use crate::machine::{Machine, gfn};
use crate::random::Random;
use crate::tally::Did;
use crate::watch::{Doing, Post};

pub(crate) fn run(machine: &Machine, post: &Post) {
    let mut random = Random::new(machine.seed, 104);
    while !machine.is_over() {
        post.is(Doing::Resting);
        random.sleep(60_000);
        machine.pause.guests(post, || {
            machine.resets.fetch_add(1, AcqRel);
            let root = || machine.tables.now().0.dtt().root();
            match random.within(0..3) {
                0 => {
                    drain(machine, Drain::Deactivate);
                    machine.check_leaves(true);
                    machine.tally.add(Did::Deactivation, 1);
                }
                1 => {
                    reset(machine);
                    machine.tables.begin_anew(&machine.memory);
                    machine.tally.add(Did::Reset, 1);
                }
                _ => machine.tally.add(Did::Reactivation, 1),
            }
            machine.pinner.activate(root(), 4).unwrap();
            machine.check_empty();
            machine.resets.fetch_add(1, AcqRel);
        });
    }
}

fn drain(machine: &Machine, drain: Drain) {
    machine.pinner.deactivate(drain).unwrap();
    machine.check_empty();
    let word = RequestWord::page(gfn(20), machine.bdf).unwrap();
    assert_eq!(machine.pinner.begin(word, machine.clock.now()).unwrap_err(), Refusal::NotActive);
    machine.tally.add(Did::Refused, 1);
}

/// The table is not the guest's any more by then, so the drain must not write it: PINNED stays where it was.
fn reset(machine: &Machine) {
    // Nobody else takes pages back meanwhile. More often than the parker, whose parks the last reset ended, may undo.
    (0..8).for_each(|_| machine.pinner.park());
    let pinned = machine.pinned_in_table();
    drain(machine, Drain::Reset);
    assert_eq!(machine.pinned_in_table(), pinned, "PINNED before and after a reset");
}
