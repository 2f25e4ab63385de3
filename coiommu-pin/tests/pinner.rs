//! The pinner's rules one by one: time, room, anomalies, RAM that comes and goes.

mod rig;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coiommu_dtt::{Bdf, Gpa, Request, RequestWord};
use coiommu_pin::pinner::{Clock, Drain, PinResult, Pinner, PinnerConfig, PinnerError, Step, UnpinStep};
use coiommu_pin::region::RegionError;
use coiommu_pin::request::{Refusal, Scratch};
use coiommu_pin::{Backing, DmaMapper, MapError, RamRegion};
use coiommu_vfio::{Call, SoftIommu};
use rig::nothing::Nothing;
use rig::{PAGE, RAM, Rig, gfn};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const SECOND: Duration = Duration::from_secs(1);
/// Where a test needs many pages. Miri takes a second for a few.
const MANY: u64 = if cfg!(miri) { 8 } else { 100 };

fn extents(pairs: &[(u64, u64)]) -> BTreeMap<u64, u64> {
    pairs.iter().copied().collect()
}

/// A clock that goes on by itself at every look.
struct Hasty(AtomicU64, Duration);

impl Clock for Hasty {
    fn now(&self) -> Duration {
        self.1 * u32::try_from(self.0.fetch_add(1, Ordering::Relaxed)).unwrap()
    }
}

#[test]
fn requests_that_make_no_sense_are_refused_and_counted() {
    let mut rig = Rig::new("");
    let unknown = Bdf::new(0x30).unwrap();
    let pin = |rig: &mut Rig, word| rig.pinner.pin(word, &mut rig.scratch, &rig.clock);
    let word = RequestWord::page(gfn(1), unknown).unwrap();
    assert_eq!(pin(&mut rig, word), PinResult::Refused(Refusal::UnknownEndpoint(unknown)));
    let nowhere = RequestWord::batch(Gpa::new(0x7_0000_0000)).unwrap();
    assert!(matches!(pin(&mut rig, nowhere), PinResult::Refused(Refusal::Unreadable(_))));
    assert_eq!(rig.request(&[]), PinResult::Pinned, "nothing is asked for, nothing is missing");
    rig::drain(&rig);
    assert_eq!(rig.request(&[1]), PinResult::Refused(Refusal::NotActive));
    assert_eq!(rig.pinner.counters().requests_refused, 3);
    assert_eq!(rig.pinner.mappings(), 0);
}

#[test]
fn what_is_no_table_is_not_activated_and_ends_what_was_active() {
    let rig = Rig::new("");
    let root = rig.guest.dtt().root();
    for (times, (root, levels)) in
        [(root, 0), (root, 6), (root, u64::MAX), (Gpa::new(0x7_0000_0000), 4), (Gpa::new(root.raw() + 8), 4)]
            .into_iter()
            .enumerate()
    {
        rig.pinner.activate(rig.guest.dtt().root(), 4).unwrap();
        assert!(rig.pinner.activate(root, levels).is_err(), "{root}, {levels} levels");
        assert!(!rig.pinner.is_active());
        assert_eq!(rig.pinner.counters().activations_refused, times as u64 + 1);
    }
}

#[test]
fn a_request_of_an_earlier_activation_is_not_served_from_the_next() {
    let mut rig = Rig::new("");
    let mut request = rig.pinner.begin(rig.word(&[1]), rig.clock.now()).unwrap();
    rig.pinner.activate(rig.guest.dtt().root(), 4).unwrap();
    let step = rig.pinner.step(&mut request, &mut rig.scratch, &rig.clock);
    assert_eq!(step, Step::Done(PinResult::Refused(Refusal::NotActive)));
    assert_eq!(rig.pinner.mappings(), 0);
}

#[test]
fn a_request_that_takes_too_long_is_cut_off_and_leaves_no_half_page() {
    let mut rig = Rig::new("extent=page");
    let mut request = rig.pinner.begin(rig.word(&[1, 320, 600, 1600]), Duration::ZERO).unwrap();
    let clock = Hasty(AtomicU64::new(0), SECOND);
    let result = loop {
        if let Step::Done(result) = rig.pinner.step(&mut request, &mut rig.scratch, &clock) {
            break result;
        }
    };
    assert_eq!(result, PinResult::TimedOut);
    rig.check_books();
    let pinned: Vec<_> = (0..).zip(rig.leaves()).filter(|(_, leaf)| leaf.bits() != 0).map(|(page, _)| page).collect();
    assert_eq!(rig.mapped_pages(), pinned);
    assert!(pinned.len() < 4);
    assert_eq!(rig.pinner.counters().requests_timed_out, 1);
}

/// Serves a request whose first map call ends when its time is over.
fn serve_too_late(rig: &mut Rig, pages: &[u64]) -> Step {
    let mut request = rig.pinner.begin(rig.word(pages), rig.clock.now()).unwrap();
    let clock = rig.clock.clone();
    rig.iommu.inject(move |_| {
        clock.pass(SECOND * 5);
        None
    });
    rig.pinner.step(&mut request, &mut rig.scratch, &rig.clock)
}

#[test]
fn a_map_call_that_ends_after_the_time_is_taken_back() {
    let mut rig = Rig::new("");
    assert_eq!(serve_too_late(&mut rig, &[1, 2, 3]), Step::Done(PinResult::TimedOut));
    assert_eq!((rig.iommu.calls().map, rig.iommu.mappings()), (1, 0));
    assert!(rig.leaves().iter().all(|leaf| leaf.bits() == 0), "the table is not written any more");
    assert_eq!(rig.pinner.counters().pages_failed, 3);
}

#[test]
fn what_was_mapped_before_stays_when_the_rest_comes_too_late() {
    let mut rig = Rig::new("");
    assert_eq!(rig.request(&[2, 7]), PinResult::Pinned);
    assert_eq!(serve_too_late(&mut rig, &[1, 2, 3]), Step::Done(PinResult::TimedOut));
    assert_eq!(rig.mapped_pages(), [2, 7]);
    assert!([1, 3].iter().all(|&page| rig.leaf(page).bits() == 0), "the table is not written any more");
    assert_eq!(rig.pinner.counters().pages_failed, 2);
    rig.check_books();
}

#[test]
fn what_was_mapped_around_a_page_too_late_is_taken_back() {
    let mut rig = Rig::new("extent=aligned=64k");
    assert_eq!(serve_too_late(&mut rig, &[1]), Step::Done(PinResult::TimedOut));
    assert_eq!((rig.iommu.calls().map, rig.iommu.mappings()), (1, 0));
    assert!(rig.leaves().iter().all(|leaf| leaf.bits() == 0), "the table is not written any more");
}

#[test]
fn gfns_that_cannot_be_fail_and_spoil_no_others() {
    let mut rig = Rig::new("");
    let mut list = Vec::new();
    for page in [u64::MAX, 1 << 52, (1 << 52) - 1, 3, u64::MAX - 1, u64::MAX, 1, 2, 1 << 60] {
        list.extend(page.to_le_bytes());
    }
    let mut header = Vec::new();
    header.extend(u64::from(rig.bdf.raw()).to_le_bytes());
    header.extend((list.len() as u64 / 8).to_le_bytes());
    let word = rig.word(&[1, 2]);
    let at = word.raw() & !(1 << 63);
    rig.memory.write_slice(&[header, list].concat(), GuestAddress(at)).unwrap();
    assert_eq!(rig.pinner.pin(word, &mut rig.scratch, &rig.clock), PinResult::Failed);
    assert_eq!(rig.extents(), extents(&[(1, 3)]));
    let counters = rig.pinner.counters();
    assert_eq!((counters.pages_asked, counters.pages_failed), (8, 5), "one was there twice");
}

#[test]
fn a_long_batch_lets_other_slots_be_looked_at() {
    let mut rig = Rig::new("extent=page");
    let pages: Vec<_> = (0..300).chain(310..1100).step_by(if cfg!(miri) { 40 } else { 1 }).collect();
    let mut request = rig.pinner.begin(rig.word(&pages), Duration::ZERO).unwrap();
    let clock = Hasty(AtomicU64::new(0), Duration::from_millis(20));
    let mut steps = 1;
    while rig.pinner.step(&mut request, &mut rig.scratch, &clock) == Step::More {
        // Another request in between, with the same scratch.
        assert_eq!(rig.request(&[1600]), PinResult::Pinned);
        steps += 1;
    }
    assert_eq!(steps, 4, "one a block of a region");
    let asked = pages.len() as u64;
    assert_eq!(rig.pinner.pinned_pages(), asked + 1);
    assert_eq!(rig.pinner.counters().pages_asked, asked + 3);
}

#[test]
fn one_bad_page_does_not_spoil_the_others() {
    let mut rig = Rig::new("extent=run");
    rig.iommu.inject(|call| match *call {
        Call::Map { iova, len } if (iova..iova + len).contains(&(17 * PAGE)) => Some(MapError::Fault),
        _ => None,
    });
    let pages: Vec<_> = (10..20).collect();
    assert_eq!(rig.request(&pages), PinResult::Failed);
    assert_eq!(rig.mapped_pages(), [10, 11, 12, 13, 14, 15, 16, 18, 19]);
    assert!(!rig.is_pinned(17) && rig.is_pinned(19));
    assert_eq!(rig.iommu.calls().map, 11, "all together, then each by itself");
    assert_eq!(rig.pinner.counters().pages_failed, 1);
}

#[test]
fn an_aligned_piece_that_cannot_be_mapped_is_tried_as_a_run() {
    let mut rig = Rig::new("extent=aligned=64k");
    rig.iommu.inject(|call| matches!(call, Call::Map { len, .. } if *len > 2 * PAGE).then_some(MapError::Fault));
    assert_eq!(rig.request(&[20, 21]), PinResult::Pinned);
    assert_eq!(rig.extents(), extents(&[(20, 2)]));
    rig.iommu.inject_nothing();
    assert_eq!(rig.request(&[24]), PinResult::Pinned);
    assert_eq!(rig.extents(), extents(&[(20, 2), (22, 10)]), "as far as it is not mapped");
    assert!(rig.is_pinned(30), "speculative pages are PINNED too");
    assert_eq!(rig.request(&[299, 310]), PinResult::Pinned);
    assert_eq!(rig.extents(), extents(&[(20, 2), (22, 10), (288, 12), (310, 10)]), "no extent crosses a hole");
}

#[test]
fn neighbours_that_go_together_go_in_one_call() {
    let mut rig = Rig::new("extent=page");
    let pages: Vec<_> = (0..MANY).collect();
    assert!(rig.map(&pages));
    assert!(rig.map(&[MANY / 2]));
    rig.unmap(&pages);
    rig.pinner.tick(None);
    assert_eq!(rig.iommu.calls().unmap, 0, "they were accessed");
    let report = rig.pinner.tick(None);
    assert_eq!((report.unpinned_pages, report.full_round), (MANY - 1, true));
    assert_eq!(rig.iommu.calls().unmap, 2, "before and after the one that stays");
    rig.unmap(&[MANY / 2]);
    assert_eq!(rig.pinner.tick(None).unpinned_pages, 1);
}

#[test]
fn one_extent_that_cannot_be_unmapped_does_not_keep_its_neighbours() {
    let mut rig = Rig::new("extent=page");
    assert_eq!(rig.request(&[1, 2, 3]), PinResult::Pinned);
    rig.iommu.inject(|call| match *call {
        Call::Unmap { iova, len } if (iova..iova + len).contains(&(2 * PAGE)) => Some(MapError::Other(5)),
        _ => None,
    });
    assert_eq!(rig.pinner.tick(None).unpinned_pages, 2);
    assert_eq!(rig.mapped_pages(), [2]);
    assert!(rig.is_pinned(2), "what stays mapped is PINNED again");
    assert_eq!(rig.pinner.deactivate(Drain::Reset).unwrap_err().pages, 1);
    rig.iommu.inject_nothing();
    rig.pinner.deactivate(Drain::Reset).unwrap();
    assert_eq!(rig.iommu.mappings(), 0);
}

#[test]
fn a_tick_stops_at_its_budget_and_the_next_goes_on() {
    let mut rig = Rig::new("extent=page");
    let pages: Vec<_> = (0..10).chain(600..610).chain(1600..1610).collect();
    assert_eq!(rig.request(&pages), PinResult::Pinned);
    for left in [23, 16, 9, 2, 0] {
        rig.pinner.tick(Some(7));
        assert_eq!(rig.mapped_pages(), pages[pages.len() - left..]);
    }
    let mut rig = Rig::new("extent=run");
    assert_eq!(rig.request(&pages), PinResult::Pinned);
    assert_eq!(rig.pinner.tick(Some(7)).unpinned_pages, 10, "an extent goes whole, be it larger than the budget");
}

#[test]
fn blocks_where_nothing_changes_are_looked_at_less_often() {
    let mut rig = Rig::new("extent=page,unpin_gen_threshold=4");
    assert!(rig.map(&(0..MANY).collect::<Vec<_>>()));
    let looked_at: Vec<_> = (0..13)
        .map(|_| {
            let before = rig.pinner.counters().leaves_looked_at;
            rig.pinner.tick(None);
            rig.pinner.counters().leaves_looked_at - before
        })
        .collect();
    assert_eq!(looked_at, [1, 1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1].map(|times| times * MANY));
    assert!(rig.map(&[200]), "a new extent makes its block young");
    rig.pinner.tick(None);
    rig.pinner.tick(None);
    assert_eq!(rig.pinner.counters().leaves_looked_at, (MANY + 1) * 2 + 7 * MANY);
}

#[test]
fn buffers_that_are_used_over_and_over_go_soon_after() {
    let mut rig = Rig::new("extent=page,unpin_gen_threshold=4");
    // One page that a driver keeps, and one that comes and goes in the same block.
    assert!(rig.map(&[1]));
    for _ in 0..13 {
        assert!(rig.map(&[2]));
        rig.unmap(&[2]);
        assert_eq!(rig.pinner.tick(None).unpinned_pages, 0);
    }
    assert_eq!(rig.pinner.tick(None).unpinned_pages, 1);
    assert_eq!(rig.mapped_pages(), [1]);
}

#[test]
fn a_tick_tells_what_it_did() {
    let mut rig = Rig::new("extent=run,unpin_gen_threshold=2");
    let told = |rig: &Rig| {
        let report = rig.pinner.tick(None);
        assert!(report.full_round && report.passed_over == 0);
        (report.unpinned_pages, report.aged_pages, report.resting)
    };
    assert!(rig.map(&[1, 2, 600, 1600]));
    assert_eq!(told(&rig), (0, 4, 0));
    assert!(rig.map(&[1, 600]));
    rig.unmap(&[1, 2, 1600]);
    rig.unmap(&[1]);
    assert_eq!(told(&rig), (1, 2, 0), "the page at 1600; 1 and 600 were accessed again");
    assert_eq!(told(&rig), (2, 0, 0));
    assert_eq!(told(&rig), (0, 0, 1), "600 is in use, and long as it was");
    assert_eq!(told(&rig), (0, 0, 0), "every other time it is looked at");
    rig.pinner.skip_rounds(1);
    assert_eq!(told(&rig), (0, 0, 0), "and its turn was skipped");
    rig.pinner.park();
    assert_eq!(rig.pinner.tick(None), Default::default());
}

#[test]
fn pages_that_cannot_be_pinned_are_counted() {
    let mut rig = Rig::new("");
    // In no RAM: 305, 1400 and 1401; then what went, too.
    assert_eq!(rig.request(&[10, 305, 1400, 1401]), PinResult::Failed);
    assert_eq!(rig.pinner.counters().pages_failed, 3);
    rig.remove(2).unwrap();
    assert_eq!(rig.request(&[10, 305, 1600, 1601]), PinResult::Failed);
    assert_eq!(rig.pinner.counters().pages_failed, 6);
    assert_eq!(rig.pinner.counters().pages_asked, 8);
}

#[test]
fn room_is_made_of_idle_pages_those_that_aged_first() {
    let mut rig = Rig::new("extent=page");
    rig.iommu.set_entry_limit(Some(4));
    assert!(rig.map(&[1, 2, 600, 700]));
    rig.unmap(&[2, 600]);
    // 2 and 600 age; then 2 is used again for a moment.
    rig.pinner.tick(None);
    assert!(rig.map(&[2]));
    rig.unmap(&[2]);
    assert!(rig.map(&[1700]));
    assert_eq!(rig.mapped_pages(), [1, 2, 700, 1700], "600 was idle longer");
    assert!(rig.map(&[1701]));
    assert_eq!(rig.mapped_pages(), [1, 700, 1700, 1701], "2 is idle all the same");
    assert!(!rig.map(&[1702]), "everything is in use");
    rig.unmap(&[700]);
    rig.pinner.park();
    assert!(!rig.map(&[1702]), "no room is made while parked");
    rig.pinner.unpark();
    assert!(rig.map(&[1702]));
    assert_eq!(rig.pinner.counters().pages_unpinned_for_room, 3);
}

#[test]
#[cfg_attr(miri, ignore = "640 mappings, made one by one, take Miri minutes")]
fn making_room_frees_a_sixty_fourth_of_the_mappings() {
    let mut rig = Rig::new("extent=page");
    rig.iommu.set_entry_limit(Some(192));
    assert!(rig.map(&(10..198).collect::<Vec<_>>()));
    // One in each block.
    let idle = [1, 600, 1030, 1600];
    assert_eq!(rig.request(&idle), PinResult::Pinned);
    assert!(rig.map(&[1700]));
    let counters = rig.pinner.counters();
    assert_eq!((counters.reclaims, counters.pages_unpinned_for_room), (1, 3));
}

#[test]
fn a_quota_is_kept_and_room_made_within_it() {
    let mut rig = Rig::new("extent=run,quota=64k");
    assert!(rig.map(&(0..10).collect::<Vec<_>>()));
    assert!(!rig.map(&(20..30).collect::<Vec<_>>()));
    rig.unmap(&(0..10).collect::<Vec<_>>());
    assert!(rig.map(&(20..30).collect::<Vec<_>>()));
    assert_eq!(rig.extents(), extents(&[(20, 10)]));
    assert!(!rig.map(&(600..617).collect::<Vec<_>>()), "more than the quota at once");
}

#[test]
fn room_is_made_at_once_for_all_that_a_request_needs() {
    let mut rig = Rig::new("quota=24k");
    assert_eq!(rig.request(&[10, 11, 12]), PinResult::Pinned);
    assert_eq!(rig.request(&[1000, 1001, 1002]), PinResult::Pinned);
    // Pages in three blocks, of which only one would have room when the first idle extent went.
    assert_eq!(rig.request(&[1, 2, 600, 601, 1600, 1601]), PinResult::Pinned);
    assert_eq!(rig.mapped_pages(), [1, 2, 600, 601, 1600, 1601]);
    assert_eq!(rig.pinner.counters().reclaims, 1);
}

#[test]
fn room_is_made_at_once_however_slow_mapping_is() {
    // 70 in each of three blocks, of which none is done within a step; there is room for 30 more.
    let pages = |from: u64| -> Vec<_> {
        [0, 512, 1536].iter().flat_map(|block| (0..70).map(move |n| block + from + 3 * n)).collect()
    };
    let mut rig = Rig::new("extent=page");
    rig.iommu.set_entry_limit(Some(240));
    let slow = Slow(Cell::new(Duration::ZERO));
    for from in [0, 1] {
        let word = rig.word(&pages(from));
        assert_eq!(rig.pinner.pin(word, &mut rig.scratch, &slow), PinResult::Pinned);
    }
    assert!(pages(1).iter().all(|&page| rig.is_pinned(page)));
    assert_eq!(rig.pinner.counters().reclaims, 1);
}

/// A clock by which each look takes 30 ms: longer than a step.
struct Slow(Cell<Duration>);

impl Clock for Slow {
    fn now(&self) -> Duration {
        self.0.set(self.0.get() + Duration::from_millis(30));
        self.0.get()
    }
}

#[test]
fn room_is_made_in_mappings_as_well_as_in_pages() {
    let mut rig = Rig::with_iommu("", SoftIommu::builder().entry_limit(Some(3)).build());
    for idle in [vec![0, 1, 2, 3, 4, 5, 6, 7], vec![600], vec![1600]] {
        assert_eq!(rig.request(&idle), PinResult::Pinned);
    }
    // The first of them has pages enough for all three.
    assert_eq!(rig.request(&[20, 700, 1700]), PinResult::Pinned);
    assert_eq!(rig.mapped_pages(), [20, 700, 1700]);
    assert_eq!(rig.pinner.counters().reclaims, 1);
}

#[test]
fn room_is_made_of_what_is_wanting_alone() {
    let mut rig = Rig::with_iommu("", SoftIommu::builder().entry_limit(Some(3)).build());
    for idle in [0, 600, 1600] {
        assert_eq!(rig.request(&[idle]), PinResult::Pinned);
    }
    // Twelve pages, but one mapping: one block's will do.
    assert_eq!(rig.request(&(700..712).collect::<Vec<_>>()), PinResult::Pinned);
    assert_eq!(rig.pinner.counters().pages_unpinned_for_room, 1);
}

#[test]
fn room_is_made_of_both_where_both_are_wanting() {
    let mut rig = Rig::with_iommu("quota=20k", SoftIommu::builder().entry_limit(Some(2)).build());
    assert_eq!(rig.request(&[0, 1, 2, 3]), PinResult::Pinned);
    assert_eq!(rig.request(&[600]), PinResult::Pinned);
    // Five of the quota are pinned, in both of the mappings.
    assert_eq!(rig.request(&[1000, 1536]), PinResult::Pinned);
    assert_eq!(rig.mapped_pages(), [1000, 1536]);
}

#[test]
fn what_was_mapped_behind_our_back_is_unmapped_and_counted() {
    let mut rig = Rig::new("extent=run");
    let hva = std::ptr::NonNull::new(rig.memory_at(3)).unwrap();
    // SAFETY: the rig's RAM lives longer than the mapping, which the pinner replaces below.
    #[allow(unsafe_code, reason = "to do what nobody should")]
    unsafe {
        rig.iommu.map(3 * PAGE, Backing { hva, file: None }, PAGE).unwrap();
    }
    assert_eq!(rig.request(&[2, 3, 4]), PinResult::Pinned);
    assert_eq!(rig.extents(), extents(&[(2, 3)]));
    rig.check_books();
    assert_eq!(rig.pinner.counters().anomalies, 1);
}

#[test]
fn what_was_unmapped_behind_our_back_is_forgotten_and_counted() {
    let mut rig = Rig::new("extent=page");
    assert_eq!(rig.request(&[1, 2, 3]), PinResult::Pinned);
    rig.iommu.unmap(2 * PAGE, PAGE).unwrap();
    assert_eq!(rig.pinner.tick(None).unpinned_pages, 3);
    rig.check_books();
    assert_eq!(rig.pinner.counters().anomalies, 1);
}

#[test]
fn parking_nests_and_stops_ticks_and_forced_unpins() {
    let mut rig = Rig::new("extent=page");
    assert_eq!(rig.request(&[1]), PinResult::Pinned);
    rig.pinner.park();
    rig.pinner.park();
    rig.pinner.unpark();
    assert_eq!(rig.pinner.tick(None).unpinned_pages, 0);
    let started = rig.clock.now();
    let (report, hold) = rig.force(&(0..4));
    assert_eq!((report.parked, report.not_pinned, hold.is_none()), (1, 3, true));
    assert_eq!(rig.clock.now() - started, SECOND, "it waits for the park to end");
    let unpin = rig.pinner.begin_unpin(Gpa::new(PAGE), PAGE, &rig.clock);
    let UnpinStep::Wait(unpin) = rig.pinner.step_unpin(unpin, &rig.clock) else { panic!("it does not wait") };
    rig.pinner.unpark();
    let UnpinStep::Done(report, Some(_hold)) = rig.pinner.step_unpin(unpin, &rig.clock) else { panic!("not done") };
    assert_eq!(report.released, 1);
    rig.pinner.unpark();
    rig.pinner.unpark();
}

#[test]
fn each_hold_holds_whatever_others_there_are() {
    let mut rig = Rig::new("extent=page");
    let mut holds: Vec<_> = [0, 600, 1600].into_iter().map(|page| (page, rig.force(&(page..page + 1)).1)).collect();
    // The outer ones first: the one between is left to itself, and then there is none.
    for last in [0, 1600, 600] {
        for page in [0, 20, 600, 700, 1600, 1700] {
            let is_held = holds.iter().any(|(held, _)| *held == page);
            let wanted = if is_held { PinResult::Failed } else { PinResult::Pinned };
            assert_eq!(rig.request(&[page]), wanted, "page {page} with holds {holds:?}");
        }
        holds.retain(|(held, _)| *held != last);
    }
    assert_eq!(rig.request(&[0, 600, 1600]), PinResult::Pinned);
}

#[test]
fn a_forced_unpin_tells_of_its_range_and_counts_all_it_unmaps() {
    let mut rig = Rig::new("extent=run");
    assert_eq!(rig.request(&[10, 11, 12, 13, 20]), PinResult::Pinned);
    let (report, hold) = rig.force(&(12..20));
    assert_eq!((report.released, report.not_pinned, hold.is_some()), (2, 6, true));
    let counters = rig.pinner.counters();
    assert_eq!((counters.pages_unpinned_forced, counters.pages_unpinned), (4, 4));
}

#[test]
fn a_held_range_is_not_pinned_until_it_is_let_go() {
    let mut rig = Rig::new("extent=aligned=2m");
    assert!(rig.map(&[5]));
    let (report, hold) = rig.force(&(4..6));
    assert_eq!((report.busy, hold.is_none()), (2, true), "the whole extent is in use");
    rig.unmap(&[5]);
    let (report, hold) = rig.force(&(4..6));
    assert_eq!((report.released, report.may_be_taken()), (2, true));
    assert_eq!(rig.iommu.mapped_bytes(), 0, "extents go whole");
    assert!(!rig.map(&[5]), "a held page is answered with PINNED clear");
    assert!(rig.map(&[7]));
    assert_eq!(rig.extents(), extents(&[(6, 294)]), "no extent reaches into what is held");
    drop(hold);
    assert!(rig.map(&[5]));
    assert_eq!(rig.extents(), extents(&[(0, 6), (6, 294)]));
}

#[test]
fn a_tick_goes_by_the_table_a_drain_does_not() {
    let mut rig = Rig::new("");
    assert!(rig.map(&[1]));
    rig.pinner.deactivate(Drain::Reset).unwrap();
    assert_eq!(rig.iommu.mappings(), 0);
    assert!(rig.is_pinned(1), "a reset does not write the table");
    rig.pinner.activate(rig.guest.dtt().root(), 4).unwrap();
    assert_eq!(rig.request(&[1]), PinResult::Pinned, "PINNED is a message: the pin map says that it is not");
    rig::drain(&rig);
    assert!(!rig.is_pinned(1), "a DEACTIVATE clears it");
}

#[test]
fn ram_that_goes_and_returns_is_mapped_again() {
    let mut rig = Rig::new("extent=run");
    assert!(rig.map(&[320, 321, 322, 600]));
    let before = rig.extents();
    rig.remove(1).unwrap();
    assert_eq!(rig.iommu.mappings(), 0);
    assert!(rig.is_pinned(320), "the table is not written");
    let (report, hold) = rig.force(&(310..330));
    assert_eq!((report.busy, hold.is_none()), (3, true), "it will be mapped again");
    rig.add(&Arc::clone(&rig.ram[1])).unwrap();
    assert_eq!(rig.extents(), before);
    rig.remove(1).unwrap();
    rig.add(&rig::ram(&RAM[1])).unwrap();
    assert_eq!(rig.iommu.mappings(), 0, "other memory");
    assert!(!rig.is_pinned(320) && !rig.is_pinned(600));
    assert_eq!(rig.pinner.counters().pages_lost, 4);
}

#[test]
fn room_is_made_for_what_returns_with_its_ram() {
    let mut rig = Rig::new("quota=8k");
    assert!(rig.map(&[1, 2]));
    let memory = Arc::clone(&rig.ram[0]);
    rig.remove(0).unwrap();
    assert_eq!(rig.request(&[1600, 1601]), PinResult::Pinned, "the quota is another's now");
    rig.add(&memory).unwrap();
    assert_eq!(rig.mapped_pages(), [1, 2], "which was idle");
    assert!(!rig.is_pinned(1600) && rig.is_pinned(1) && rig.is_pinned(2));
    assert_eq!(rig.pinner.counters().pages_lost, 0);
    // Nothing is idle this time.
    rig.remove(0).unwrap();
    assert!(rig.map(&[1600, 1601]));
    rig.add(&memory).unwrap();
    assert_eq!((rig.mapped_pages(), rig.pinner.counters().pages_lost), (vec![1600, 1601], 2));
    assert!(!rig.is_pinned(1) && !rig.is_pinned(2));
}

#[test]
fn a_forced_unpin_sees_what_returns_behind_it() {
    let mut rig = Rig::new("extent=run");
    assert!(rig.map(&[320, 321]));
    rig.remove(1).unwrap();
    // It has passed all blocks, but the RAM is just going: it is not done.
    let unpin = rig.pinner.begin_unpin(Gpa::new(310 * PAGE), 20 * PAGE, &rig.clock);
    rig.add(&Arc::clone(&rig.ram[1])).unwrap();
    assert!(rig.iommu.is_mapped(320 * PAGE, 2 * PAGE), "in use, so it is mapped again, held or not");
    let mut step = UnpinStep::More(unpin);
    let (report, hold) = loop {
        step = match step {
            UnpinStep::More(unpin) | UnpinStep::Wait(unpin) => rig.pinner.step_unpin(unpin, &rig.clock),
            UnpinStep::Done(report, hold) => break (report, hold),
        };
    };
    assert_eq!((report.busy, report.not_pinned, hold.is_none()), (2, 18, true));
    assert!(rig.is_pinned(320));
}

#[test]
fn a_forced_unpin_that_released_all_in_time_gives_its_hold_whatever_ram_went() {
    let mut rig = Rig::new("extent=page");
    assert_eq!(rig.request(&[1]), PinResult::Pinned);
    let unpin = rig.pinner.begin_unpin(Gpa::new(PAGE), PAGE, &rig.clock);
    rig.remove(1).unwrap();
    let mut step = UnpinStep::More(unpin);
    let (report, hold) = loop {
        rig.clock.pass(SECOND);
        step = match step {
            UnpinStep::More(unpin) | UnpinStep::Wait(unpin) => rig.pinner.step_unpin(unpin, &rig.clock),
            UnpinStep::Done(report, hold) => break (report, hold),
        };
    };
    assert!(report.may_be_taken() && hold.is_some(), "{report:?}");
    assert_eq!(rig.request(&[1]), PinResult::Failed);
}

#[test]
fn a_forced_unpin_counts_each_page_once_when_ram_goes_meanwhile() {
    let mut rig = Rig::new("extent=page");
    assert!(rig.map(&[320, 321, 1600]));
    assert_eq!(rig.request(&[1601]), PinResult::Pinned);
    let unpin = rig.pinner.begin_unpin(Gpa::new(310 * PAGE), 1400 * PAGE, &rig.clock);
    // Its first look is over when the RAM goes.
    rig.pinner.park();
    let UnpinStep::Wait(unpin) = rig.pinner.step_unpin(unpin, &rig.clock) else { panic!("it does not wait") };
    rig.pinner.unpark();
    rig.remove(1).unwrap();
    let mut step = UnpinStep::More(unpin);
    let (report, hold) = loop {
        step = match step {
            UnpinStep::More(unpin) | UnpinStep::Wait(unpin) => rig.pinner.step_unpin(unpin, &rig.clock),
            UnpinStep::Done(report, hold) => break (report, hold),
        };
    };
    assert_eq!((report.released, report.busy, report.parked, report.not_pinned), (1, 3, 0, 1396));
    assert!(hold.is_none());
}

#[test]
fn a_request_for_ram_that_went_waits_a_second() {
    let mut rig = Rig::new("extent=run");
    rig.remove(1).unwrap();
    let word = rig.word(&[1, 320]);
    let mut request = rig.pinner.begin(word, rig.clock.now()).unwrap();
    for _ in 0..3 {
        assert_eq!(rig.pinner.step(&mut request, &mut rig.scratch, &rig.clock), Step::Wait);
        assert_eq!(rig.mapped_pages(), [1]);
        rig.clock.pass(SECOND / 4);
        // Nothing of it is left in the scratch.
        assert_eq!(rig.request(&[2]), PinResult::Pinned);
        rig.pinner.tick(None);
        rig.request(&[1]);
        rig.pinner.tick(None);
        rig.request(&[1]);
        assert_eq!(rig.force(&(2..3)).0.not_pinned, 1);
    }
    rig.add(&Arc::clone(&rig.ram[1])).unwrap();
    assert_eq!(rig.pinner.step(&mut request, &mut rig.scratch, &rig.clock), Step::Done(PinResult::Pinned));
    assert!(rig.is_pinned(320));
    rig.remove(1).unwrap();
    let mut request = rig.pinner.begin(rig.word(&[1, 321]), rig.clock.now()).unwrap();
    assert_eq!(rig.pinner.step(&mut request, &mut rig.scratch, &rig.clock), Step::Wait);
    rig.clock.pass(SECOND);
    assert_eq!(rig.pinner.step(&mut request, &mut rig.scratch, &rig.clock), Step::Done(PinResult::Failed));
    assert_eq!(rig.request(&[305]), PinResult::Failed, "what never was RAM is not waited for");
}

#[test]
fn a_request_for_what_is_held_waits_a_second() {
    for policy in ["extent=run", "extent=page", "extent=aligned=2m"] {
        let mut rig = Rig::new(policy);
        let begin = |rig: &mut Rig, gfns: &[u64]| {
            let word = rig.word(gfns);
            rig.pinner.begin(word, rig.clock.now()).unwrap()
        };
        let step = |rig: &mut Rig, request: &mut _| rig.pinner.step(request, &mut rig.scratch, &rig.clock);
        let (_, hold) = rig.force(&(4..6));
        let mut request = begin(&mut rig, &[3, 5, 7]);
        assert_eq!(step(&mut rig, &mut request), Step::Wait);
        assert_eq!([3, 5, 7].map(|page| rig.is_pinned(page)), [true, false, true], "{policy}");
        rig.clock.pass(SECOND / 2);
        drop(hold);
        assert_eq!(step(&mut rig, &mut request), Step::Done(PinResult::Pinned));
        assert!(rig.is_pinned(5));

        let (_, hold) = rig.force(&(1000..1001));
        let mut request = begin(&mut rig, &[1000]);
        assert_eq!(step(&mut rig, &mut request), Step::Wait);
        rig.clock.pass(SECOND);
        assert_eq!(step(&mut rig, &mut request), Step::Done(PinResult::Failed));
        assert!(hold.is_some());
    }
}

#[test]
fn a_request_that_cannot_be_read_waits_for_ram_that_went() {
    let mut rig = Rig::new("");
    let nowhere = RequestWord::batch(Gpa::new(0x7_0000_0000)).unwrap();
    let endless = rig.word(&[1, 2]);
    let Ok(Request::Batch { header }) = endless.decode() else { panic!("two pages are a batch") };
    rig.memory.write_obj(u64::MAX, GuestAddress(header.raw() + 8)).unwrap();
    let begin = |rig: &Rig, word| rig.pinner.begin(word, rig.clock.now()).unwrap();
    let step = |rig: &mut Rig, request: &mut _| rig.pinner.step(request, &mut rig.scratch, &rig.clock);
    let is_refused = |step| matches!(step, Step::Done(PinResult::Refused(_)));
    for word in [nowhere, endless] {
        let mut request = begin(&rig, word);
        assert!(is_refused(step(&mut rig, &mut request)), "no RAM went that may come back");
    }
    rig.remove(1).unwrap();
    let mut request = begin(&rig, endless);
    assert!(is_refused(step(&mut rig, &mut request)), "no RAM makes that a request");
    let mut request = begin(&rig, nowhere);
    assert_eq!(step(&mut rig, &mut request), Step::Wait);
    rig.clock.pass(SECOND);
    assert!(is_refused(step(&mut rig, &mut request)));
}

#[test]
fn pages_whose_table_is_away_count_as_in_use() {
    let mut rig = Rig::new("");
    assert_eq!(rig.request(&[1]), PinResult::Pinned);
    let first_entry = GuestAddress(rig.guest.dtt().root().raw());
    let entry: u64 = rig.memory.read_obj(first_entry).unwrap();
    rig.memory.write_obj(0x7_0000_0001_u64, first_entry).unwrap();
    assert_eq!(rig.pinner.tick(None).unpinned_pages, 0);
    let (report, hold) = rig.force(&(0..4));
    assert_eq!((report.busy, report.not_pinned, hold.is_none()), (1, 3, true));
    rig.memory.write_obj(entry, first_entry).unwrap();
    assert_eq!(rig.pinner.tick(None).unpinned_pages, 1);
}

#[test]
fn a_page_whose_table_is_away_fails_unless_its_ram_may_come_back() {
    let mut rig = Rig::new("");
    rig.memory.write_obj(0x7_0000_0001_u64, GuestAddress(rig.guest.dtt().root().raw())).unwrap();
    let mut request = rig.pinner.begin(rig.word(&[1, 2]), rig.clock.now()).unwrap();
    assert_eq!(rig.pinner.step(&mut request, &mut rig.scratch, &rig.clock), Step::Done(PinResult::Failed));
    assert_eq!(rig.pinner.counters().pages_failed, 2);
    rig.remove(1).unwrap();
    let mut request = rig.pinner.begin(rig.word(&[1]), rig.clock.now()).unwrap();
    assert_eq!(rig.pinner.step(&mut request, &mut rig.scratch, &rig.clock), Step::Wait);
    rig.clock.pass(SECOND);
    assert_eq!(rig.pinner.step(&mut request, &mut rig.scratch, &rig.clock), Step::Done(PinResult::Failed));
}

#[test]
fn pages_for_which_there_is_no_room_are_counted() {
    let mut rig = Rig::new("quota=4k");
    assert!(rig.map(&[1]));
    for (pages, failed) in [(vec![3, 4, 6], 3), (vec![1, 600], 4)] {
        assert_eq!(rig.request(&pages), PinResult::Failed);
        assert_eq!(rig.pinner.counters().pages_failed, failed);
    }
}

#[test]
fn pinned_is_cleared_late_where_the_table_was_away_when_ram_was_lost() {
    let mut rig = Rig::new("");
    assert_eq!(rig.request(&[320]), PinResult::Pinned);
    rig.remove(1).unwrap();
    let first_entry = GuestAddress(rig.guest.dtt().root().raw());
    let entry: u64 = rig.memory.read_obj(first_entry).unwrap();
    rig.memory.write_obj(0x7_0000_0001_u64, first_entry).unwrap();
    rig.add(&rig::ram(&RAM[1])).unwrap();
    rig.memory.write_obj(entry, first_entry).unwrap();
    assert!(rig.is_pinned(320), "it could not be cleared");
    rig.remove(2).unwrap();
    assert!(!rig.is_pinned(320));
    // Once is enough: from now on it is the guest's to say what it likes.
    rig.set_pinned(320);
    rig.add(&rig::ram(&RAM[2])).unwrap();
    assert!(rig.is_pinned(320));
}

#[test]
fn calls_of_the_mapper_are_counted() {
    let mut rig = Rig::new("extent=page");
    let calls = |rig: &Rig| {
        let counters = rig.pinner.counters();
        [counters.map_calls, counters.map_failures, counters.unmap_calls, counters.unmap_failures]
    };
    assert_eq!(rig.request(&[1, 3, 5]), PinResult::Pinned);
    assert_eq!(calls(&rig), [3, 0, 0, 0]);
    rig.iommu.fail_next_maps(2, MapError::Other(5));
    assert_eq!(rig.request(&[7, 8, 9]), PinResult::Failed);
    assert_eq!(calls(&rig), [6, 2, 0, 0]);
    rig.iommu.fail_next_unmaps(1, MapError::Other(5));
    assert_eq!(rig.force(&(1..2)).0.busy, 1);
    assert_eq!(rig.force(&(1..2)).0.released, 1);
    assert_eq!(calls(&rig), [6, 2, 2, 1]);
}

#[test]
fn regions_are_checked_when_they_come_and_go() {
    let iommu = SoftIommu::builder().iova_ranges([0..=(1 << 24) - 1]).build();
    let rig = Rig::with_iommu("", iommu);
    let region = |gfns: Range<u64>| rig::ram(&gfns);
    assert!(matches!(rig.add(&region(299..310)), Err(RegionError::Overlaps { .. })));
    assert!(matches!(rig.add(&region(4000..4097)), Err(RegionError::OutsideIommu { .. })));
    rig.add(&region(4000..4096)).unwrap();
    rig.add(&region(300..310)).unwrap();
    for (gpa, bytes) in [(0, 299 * PAGE), (1, 300 * PAGE), (0, 300 * PAGE + 1), (PAGE, PAGE)] {
        assert!(matches!(rig.pinner.remove_region(Gpa::new(gpa), bytes), Err(RegionError::Unknown { .. })));
    }
    rig.remove(0).unwrap();
    assert!(matches!(rig.remove(0), Err(RegionError::Unknown { .. })));
}

#[test]
fn ram_that_cannot_be_unmapped_keeps_its_memory_and_its_place() {
    let mut rig = Rig::new("");
    assert_eq!(rig.request(&[320]), PinResult::Pinned);
    rig.iommu.fail_next_unmaps(10, MapError::Other(5));
    assert!(matches!(rig.remove(1), Err(RegionError::Stuck { pages: 1, .. })));
    assert_eq!(rig.request(&[321]), PinResult::Failed);
    let other = rig::ram(&RAM[1]);
    assert!(matches!(rig.add(&other), Err(RegionError::Stuck { .. })));
    rig.iommu.inject_nothing();
    rig.add(&other).unwrap();
    assert_eq!(rig.iommu.mappings(), 0);
    assert_eq!(rig.request(&[320]), PinResult::Pinned);
}

#[test]
fn ram_that_cannot_be_unmapped_is_kept_until_a_drain_has_unmapped_it() {
    let mut rig = Rig::new("");
    assert_eq!(rig.request(&[320]), PinResult::Pinned);
    let region = Arc::clone(&rig.ram[1]);
    let owners = Arc::strong_count(&region);
    rig.iommu.fail_next_unmaps(10, MapError::Other(5));
    rig.remove(1).unwrap_err();
    assert_eq!(Arc::strong_count(&region), owners, "a device may still reach it");
    rig.iommu.inject_nothing();
    rig::drain(&rig);
    assert_eq!((rig.iommu.mappings(), Arc::strong_count(&region)), (0, owners - 1));
}

#[test]
fn memory_that_stays_mapped_is_never_freed() {
    let mut rig = Rig::new("");
    assert_eq!(rig.request(&[1]), PinResult::Pinned);
    let used = Arc::clone(&rig.ram[0]);
    rig.iommu.inject(|call| matches!(call, Call::Unmap { .. }).then_some(MapError::Other(5)));
    let iommu = Arc::clone(&rig.iommu);
    let owners = Arc::strong_count(&used);
    drop(rig);
    assert_eq!(iommu.mappings(), 1);
    // The rig and its guest memory had one each.
    assert_eq!(Arc::strong_count(&used), owners - 2, "the pinner's is leaked");
}

#[test]
fn what_went_with_its_ram_is_not_pinned_after_a_deactivation() {
    let mut rig = Rig::new("");
    assert!(rig.map(&[320, 321]));
    rig.remove(1).unwrap();
    rig.pinner.deactivate(Drain::Deactivate).unwrap();
    assert!(!rig.is_pinned(320) && !rig.is_pinned(321), "the guest would believe it");
    assert!(!rig.pinner.is_active());
    rig.pinner.activate(rig.guest.dtt().root(), 4).unwrap();
    assert!(rig.pinner.is_active());
    rig.add(&Arc::clone(&rig.ram[1])).unwrap();
    assert_eq!(rig.iommu.mappings(), 0);
}

#[test]
#[cfg_attr(miri, ignore = "a file is printed with its flags, which Miri's has not")]
fn what_is_printed_shows_no_guest_memory() {
    let mut rig = Rig::new("extent=run");
    assert!(rig.map(&[1, 2]));
    let text = format!("{:?}", rig.pinner);
    assert!(text.contains("pinned_pages: 2") && text.contains("mappings: 1") && text.len() < 2000, "{text}");
    let region = format!("{:?}", RamRegion::from_vm_memory(Arc::clone(&rig.ram[1])).unwrap());
    assert!(region.contains("gpa: 0x136000") && region.contains("bytes: 0x316000"), "{region}");
}

#[test]
fn a_list_in_any_order_is_pinned_once_a_page() {
    let mut rig = Rig::new("extent=run");
    assert_eq!(rig.request(&[9, 8, 7]), PinResult::Pinned);
    assert_eq!(rig.request(&[20, 20, 21]), PinResult::Pinned);
    assert_eq!(rig.extents(), extents(&[(7, 3), (20, 2)]));
    assert_eq!(rig.pinner.counters().pages_asked, 5);
}

#[test]
fn a_pinner_that_is_dropped_leaves_nothing_mapped() {
    let mut rig = Rig::new("extent=page");
    assert_eq!(rig.request(&[1, 2, 600]), PinResult::Pinned);
    let iommu = Arc::clone(&rig.iommu);
    drop(rig);
    assert_eq!(iommu.mappings(), 0);
}

#[test]
fn an_iommu_without_small_pages_is_refused() {
    let iommu = SoftIommu::builder().page_sizes(std::num::NonZeroU64::new(1 << 16).unwrap()).build();
    let memory = Arc::new(GuestMemoryMmap::<()>::new());
    let config = PinnerConfig::new("".parse().unwrap(), vec![]);
    assert_eq!(Pinner::new(memory, Arc::new(iommu), config).unwrap_err(), PinnerError::PageSize(1 << 16));
}

#[test]
#[cfg_attr(miri, ignore = "it reserves 16 GiB, which Miri would fill with zeros")]
fn the_books_cost_under_a_hundredth_of_a_percent() {
    // 16 GiB that are never touched, with one page of every 2 MiB pinned, the dearest way.
    const BYTES: u64 = 16 << 30;
    let bytes = usize::try_from(BYTES).unwrap();
    let ram = Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), bytes, None).unwrap());
    let tables = Arc::new(GuestRegionMmap::from_range(GuestAddress(1 << 40), 64 << 20, None).unwrap());
    let memory = Arc::new(GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&ram), tables]).unwrap());
    let bdf = Bdf::new(1).unwrap();
    let config = PinnerConfig::new("extent=page".parse().unwrap(), vec![bdf]);
    let pinner = Pinner::new(Arc::clone(&memory), Arc::new(Nothing), config).unwrap();
    pinner.add_region(RamRegion::from_vm_memory(ram).unwrap()).unwrap();
    let pages = rig::Pages(AtomicU64::new(1 << 40));
    let levels = coiommu_dtt::Levels::new(4).unwrap();
    let guest = coiommu_dtt::guest::GuestDtt::new(&*memory, &pages, levels, 1).unwrap();
    pinner.activate(guest.dtt().root(), 4).unwrap();
    let mut scratch = Scratch::default();
    for page in (0..BYTES / PAGE).step_by(512) {
        let _ = guest.map(&*memory, &pages, gfn(page)).unwrap();
        let word = RequestWord::page(gfn(page), bdf).unwrap();
        assert_eq!(pinner.pin(word, &mut scratch, &Duration::ZERO), PinResult::Pinned);
    }
    assert_eq!(pinner.pinned_pages(), BYTES / PAGE / 512);
    let overhead = pinner.overhead_bytes();
    assert!(overhead / (BYTES / PAGE / 512) >= 2 * 512 / 8, "two bits a page at least: {overhead}");
    assert!(overhead * 10_000 < BYTES, "{overhead} bytes for {BYTES}");
    assert_eq!(pinner.latency().len(), BYTES / PAGE / 512);
}
