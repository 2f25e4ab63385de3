//! Lets pages age, and go.

use crate::machine::Machine;
use crate::random::Random;
use crate::tally::Did;
use crate::watch::{Doing, Post};

pub(crate) fn run(machine: &Machine, post: &Post) {
    let mut random = Random::new(machine.seed, 100);
    while !machine.is_over() {
        post.is(Doing::Ticking);
        let budget = if random.once_in(2) { Some(random.within(1..200)) } else { None };
        let report = machine.pinner.tick(budget);
        machine.tally.add(Did::Tick, 1);
        machine.tally.add(Did::TickedPage, report.unpinned_pages);
        post.is(Doing::Resting);
        if !random.once_in(4) {
            random.sleep(600);
        }
    }
}
