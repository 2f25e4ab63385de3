//! Pinning all RAM, for guests whose devices are used by who does not count: what is kept, until when, and what goes then.
//!
//! RAM of the rig: 0..300, 310..1100, 1536..2100, so 6 extents.

mod rig;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use coiommu_dtt::{Bdf, Gpa};
use coiommu_pin::MapError;
use coiommu_pin::pinner::{Drain, PinAll, PinResult};
use coiommu_vfio::SoftIommu;
use rig::{PAGE, RAM, Rig, drain, is_ram, ram};

/// Each region cut into blocks.
fn all_extents() -> BTreeMap<u64, u64> {
    [(0, 300), (310, 202), (512, 512), (1024, 76), (1536, 512), (2048, 52)].into()
}

/// A rig whose guest has no driver yet, so has no table.
fn inactive(policy: &str) -> Rig {
    let rig = Rig::new(policy);
    drain(&rig);
    rig
}

/// Pins from a gfn on to the end, whatever that is, in so many steps.
fn pin_all(rig: &Rig) -> (PinAll, usize) {
    let (mut next, mut steps) = (0, 0);
    loop {
        steps += 1;
        match rig.pinner.pin_all(next, &rig.clock, Duration::ZERO) {
            PinAll::More(after) => {
                assert!(after > next, "it goes on");
                next = after;
            }
            result => return (result, steps),
        }
    }
}

fn all_pinned(policy: &str) -> Rig {
    let rig = inactive(policy);
    rig.pinner.keep_all();
    assert_eq!(pin_all(&rig).0, PinAll::Done);
    rig
}

/// A pass over all; in how many blocks something is left.
fn release(rig: &Rig) -> u64 {
    let (mut next, mut left) = (Some(0), 0);
    while let Some(from) = next {
        let released = rig.pinner.release_idle(from, &rig.clock, Duration::ZERO);
        assert!(released.next.is_none_or(|next| next > from), "it goes on");
        left += released.left;
        next = released.next;
    }
    left
}

fn activate(rig: &Rig) {
    rig.pinner.activate(rig.guest.dtt().root(), 4).unwrap();
}

#[test]
fn all_ram_is_pinned_in_the_largest_extents_there_are() {
    let rig = inactive("extent=page");
    rig.pinner.keep_all();
    let (result, steps) = pin_all(&rig);
    assert_eq!((result, steps), (PinAll::Done, 7), "a block a step where there is no time, and one to see the end");
    assert_eq!(rig.extents(), all_extents());
    rig.check_books();
    // Again, it costs no call.
    let calls = rig.pinner.counters().map_calls;
    assert_eq!(rig.pinner.pin_all(0, &rig.clock, Duration::from_secs(1)), PinAll::Done);
    assert_eq!(rig.pinner.counters().map_calls, calls);
    // No page says PINNED: nobody asked.
    assert!(rig.leaves().iter().all(|leaf| !leaf.contains(coiommu_dtt::LeafEntry::PINNED)));
}

#[test]
fn what_is_kept_stays_when_a_table_is_activated_and_is_found_pinned_by_requests() {
    let mut rig = all_pinned("unpin_policy=lru,unpin_interval=1");
    activate(&rig);
    assert_eq!(rig.extents(), all_extents());
    let calls = rig.pinner.counters().map_calls;
    assert!(rig.map(&[5, 6, 600]) && rig.is_pinned(5) && rig.is_pinned(600) && !rig.is_pinned(7));
    assert_eq!(rig.pinner.counters().map_calls, calls, "they were mapped");
    rig.unmap(&[5, 6, 600]);
    for _ in 0..5 {
        rig.pinner.tick(None);
    }
    let (report, hold) = rig.force(&(0..100));
    assert_eq!((report.busy, report.released, hold.is_none()), (100, 0, true));
    assert_eq!(rig.extents(), all_extents(), "kept, however idle and however wanted");
    rig.check_books();
}

#[test]
fn nothing_is_taken_by_force_from_a_guest_without_a_table() {
    let rig = all_pinned("");
    let (report, hold) = rig.force(&(0..300));
    assert_eq!((report.busy, hold.is_none()), (300, true));
    assert_eq!(rig.extents(), all_extents());
}

#[test]
fn what_is_idle_goes_at_last_and_what_is_used_when_it_is_not_any_more() {
    for policy in ["", "extent=aligned=2m", "unpin_policy=lru,unpin_interval=1"] {
        let mut rig = all_pinned(policy);
        activate(&rig);
        assert!(rig.map(&[5, 1600]));
        rig.pinner.let_all_age();
        assert_eq!(release(&rig), 2);
        assert_eq!(rig.extents(), [(0, 300), (1536, 512)].into(), "{policy}: two extents have a page in use");
        rig.unmap(&[5, 1600]);
        assert_eq!(release(&rig), 0, "they have aged");
        assert_eq!(rig.extents(), BTreeMap::new());
        rig.check_books();
        // What is pinned from here on is none of it.
        assert!(rig.map(&[5]));
        rig.unmap(&[5]);
        for _ in 0..3 {
            assert_eq!(release(&rig), 0);
        }
        assert!(rig.is_pinned(5), "{policy}");
    }
}

#[test]
fn nothing_is_released_while_parked() {
    let rig = all_pinned("");
    activate(&rig);
    rig.pinner.let_all_age();
    rig.pinner.park();
    assert_eq!(release(&rig), 6);
    assert_eq!(rig.extents(), all_extents());
    rig.pinner.unpark();
    assert_eq!(release(&rig), 0);
}

#[test]
fn a_deactivation_a_reset_and_another_activation_end_the_keeping() {
    for end in [Drain::Deactivate, Drain::Reset] {
        let rig = all_pinned("");
        rig.pinner.deactivate(end).unwrap();
        assert!(!rig.pinner.keeps_all());
        assert_eq!(rig.extents(), BTreeMap::new());
    }
    let rig = all_pinned("");
    activate(&rig);
    assert!(rig.pinner.keeps_all());
    activate(&rig);
    assert!(!rig.pinner.keeps_all());
    assert_eq!(rig.extents(), BTreeMap::new(), "the second is a deactivation first");
}

#[test]
fn pinning_is_over_when_the_keeping_is() {
    let rig = inactive("");
    assert_eq!(pin_all(&rig).0, PinAll::Over);
    rig.pinner.keep_all();
    assert!(matches!(rig.pinner.pin_all(0, &rig.clock, Duration::ZERO), PinAll::More(_)));
    drain(&rig);
    assert_eq!(pin_all(&rig).0, PinAll::Over);
    assert_eq!(rig.extents(), BTreeMap::new());
}

#[test]
fn an_activation_that_fails_leaves_all_as_it_was() {
    let rig = all_pinned("");
    rig.pinner.activate(Gpa::new(7), 4).unwrap_err();
    assert!(rig.pinner.keeps_all() && !rig.pinner.is_active());
    assert_eq!(rig.extents(), all_extents());
}

#[test]
fn parking_ends_with_an_activation() {
    let rig = all_pinned("");
    rig.pinner.park();
    activate(&rig);
    rig.pinner.let_all_age();
    assert_eq!(release(&rig), 0);
}

#[test]
fn what_there_is_no_room_for_is_said_and_given_up() {
    let quota = Rig::new("quota=1m");
    let entries = Rig::with_iommu("", SoftIommu::builder().entry_limit(Some(3)).build());
    for (rig, error, gpa) in [(quota, MapError::NoMemory, 0), (entries, MapError::NoEntries, 1024)] {
        drain(&rig);
        rig.pinner.keep_all();
        let PinAll::Failed(failed) = pin_all(&rig).0 else { panic!("there is no room") };
        assert_eq!((failed.error, failed.gpa), (error, Gpa::new(gpa * PAGE)));
        assert_eq!(failed.pinned, rig.pinner.pinned_pages());
        rig.pinner.give_up_all();
        assert_eq!(rig.extents(), BTreeMap::new());
        rig.check_books();
    }
}

#[test]
fn giving_up_leaves_what_a_guest_has_asked_for() {
    let mut rig = all_pinned("");
    activate(&rig);
    assert!(rig.map(&[5]));
    rig.pinner.give_up_all();
    assert!(rig.is_pinned(5) && rig.iommu.read(5 * PAGE, &mut [0]).is_ok());
    assert_eq!(release(&rig), 1);
    assert_eq!(rig.extents(), [(0, 300)].into());
}

#[test]
fn what_is_held_is_waited_for() {
    let rig = Rig::new("");
    let (report, hold) = rig.force(&(600..610));
    assert!(report.may_be_taken());
    drain(&rig);
    rig.pinner.keep_all();
    let step = |from| rig.pinner.pin_all(from, &rig.clock, Duration::from_secs(1));
    assert_eq!((step(0), step(1024)), (PinAll::Held(1024), PinAll::Done), "what is behind is pinned all the same");
    assert_eq!(rig.extents().len(), 7);
    assert_eq!(rig.pinner.pinned_pages(), 300 + 790 + 564 - 10);
    drop(hold);
    assert_eq!(step(0), PinAll::Done);
    assert!((0..rig::GFNS).filter(|&page| is_ram(page)).eq(rig.mapped_pages()));
}

#[test]
fn ram_that_comes_back_is_pinned_by_the_next_pass() {
    let rig = all_pinned("");
    rig.remove(1).unwrap();
    assert_eq!(rig.extents(), [(0, 300), (1536, 512), (2048, 52)].into());
    rig.add(&Arc::clone(&rig.ram[1])).unwrap();
    assert_eq!(rig.extents().len(), 3, "not within the call: it may be all of the guest's memory");
    assert_eq!(pin_all(&rig).0, PinAll::Done);
    assert_eq!(rig.extents(), all_extents());
    assert_eq!(rig.pinner.counters().pages_lost, 0, "nobody has lost anything");
    rig.check_books();
}

#[test]
fn ram_that_comes_back_to_a_guest_with_a_table_is_pinned_at_once() {
    let mut rig = all_pinned("");
    activate(&rig);
    assert!(rig.map(&[600]));
    rig.remove(1).unwrap();
    rig.add(&Arc::clone(&rig.ram[1])).unwrap();
    assert_eq!(rig.extents(), all_extents());
    // Other memory is not what was pinned.
    rig.remove(1).unwrap();
    rig.add(&ram(&RAM[1])).unwrap();
    assert_eq!(rig.extents().len(), 3);
    assert!(!rig.is_pinned(600));
    assert_eq!(pin_all(&rig).0, PinAll::Done);
    assert_eq!(rig.extents(), all_extents());
    rig.check_books();
}

#[test]
fn who_has_asked_is_known_until_the_next_activation() {
    let mut rig = Rig::new("");
    let (asks, silent, stranger) = (rig.bdf, Bdf::new(0x20).unwrap(), Bdf::new(0x28).unwrap());
    assert!(![asks, silent, stranger].map(|bdf| rig.pinner.has_asked(bdf)).contains(&true));
    assert_eq!(rig.request(&[3]), PinResult::Pinned);
    assert_eq!([asks, silent, stranger].map(|bdf| rig.pinner.has_asked(bdf)), [true, false, false]);
    activate(&rig);
    assert!(!rig.pinner.has_asked(asks));
    assert_eq!(rig.request(&[3, 4, 5]), PinResult::Pinned);
    assert!(rig.pinner.has_asked(asks), "a batch says it in its header");
    drain(&rig);
    assert!(!rig.pinner.has_asked(asks));
}
