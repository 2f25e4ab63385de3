//! The invariants of the house when things go wrong: a mapper that fails at random and runs short, RAM that comes and
//! goes, a guest that writes anything into its table.

mod rig;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use coiommu_dtt::LeafEntry;
use coiommu_pin::MapError;
use coiommu_pin::pinner::{Drain, Hold, PinResult};
use coiommu_pin::region::RegionError;
use coiommu_vfio::SoftIommu;
use proptest::prelude::*;
use rig::{GFNS, PAGE, RAM, Rig};
use vm_memory::GuestRegionMmap;

/// The ends of what a run has: steps, and in a step pages here and there, or in a row. Small under Miri, which takes a tenth
/// of a second for a page.
const STEPS: usize = if cfg!(miri) { 8 } else { 80 };
const SCATTERED: usize = if cfg!(miri) { 5 } else { 40 };
const RUN: u64 = if cfg!(miri) { 10 } else { 80 };

#[derive(Clone, Debug)]
enum Op {
    Map(Vec<u64>),
    Unmap(usize),
    Ask(Vec<u64>),
    Tick(Option<u64>),
    /// Force a range, and keep the hold if there is one.
    Force(Range<u64>),
    LetGo,
    Park,
    Unpark,
    Deactivate(bool),
    Activate,
    /// RAM goes.
    Remove(usize),
    /// It comes back: the same, or other memory.
    Return(usize, bool),
    /// The next calls fail, by turns as the bits say.
    Fail(u16, MapError),
    EntryLimit(u64),
    /// The guest changes a leaf as it should not.
    Lie(u64, u32),
}

fn pages() -> impl Strategy<Value = Vec<u64>> {
    let page = prop_oneof![8 => 0..GFNS, 4 => 290_u64..330, 1 => 1_u64 << 30..1 << 31];
    let runs = (0..GFNS, 1..RUN).prop_map(|(first, pages)| (first..first + pages).collect());
    prop_oneof![prop::collection::vec(page, 1..SCATTERED), runs]
}

fn errors() -> impl Strategy<Value = MapError> {
    prop_oneof![
        Just(MapError::NoEntries),
        Just(MapError::NoMemory),
        Just(MapError::Invalid),
        Just(MapError::Fault),
        Just(MapError::Other(5)),
    ]
}

fn ops(lies: bool) -> impl Strategy<Value = Vec<Op>> {
    let range = (0..GFNS, 1_u64..600).prop_map(|(first, pages)| first..first + pages);
    let op = prop_oneof![
        8 => pages().prop_map(Op::Map),
        5 => (0_usize..100).prop_map(Op::Unmap),
        2 => pages().prop_map(Op::Ask),
        4 => prop::option::of(1_u64..100).prop_map(Op::Tick),
        2 => range.prop_map(Op::Force),
        2 => Just(Op::LetGo),
        1 => Just(Op::Park),
        2 => Just(Op::Unpark),
        1 => any::<bool>().prop_map(Op::Deactivate),
        2 => Just(Op::Activate),
        1 => (0..RAM.len()).prop_map(Op::Remove),
        2 => (0..RAM.len(), prop::bool::weighted(0.7)).prop_map(|(region, same)| Op::Return(region, same)),
        4 => (any::<u16>(), errors()).prop_map(|(calls, error)| Op::Fail(calls, error)),
        1 => (0_u64..300).prop_map(Op::EntryLimit),
        4 => (0..GFNS, any::<u32>()).prop_map(move |(page, word)| if lies { Op::Lie(page, word) } else { Op::Tick(None) }),
    ];
    prop::collection::vec(op, 1..STEPS)
}

struct World {
    rig: Rig,
    /// What the guest has mapped, and its device may use.
    open: Vec<Vec<u64>>,
    holds: Vec<Hold>,
    parked: bool,
    /// The memory at each place, if it is there.
    ram: Vec<Option<Arc<GuestRegionMmap>>>,
    /// Memory that went.
    gone: BTreeMap<usize, Arc<GuestRegionMmap>>,
    /// Since a drain that does not write the table, it says PINNED where nothing is.
    table_is_stale: bool,
    lied: bool,
    /// A drain that the mapper refused has left pages mapped, without PINNED.
    left_over: bool,
}

impl World {
    fn new(policy: &str) -> Self {
        let rig = Rig::with_iommu(policy, SoftIommu::new());
        let ram = rig.ram.iter().cloned().map(Some).collect();
        Self {
            rig,
            open: Vec::new(),
            holds: Vec::new(),
            parked: false,
            ram,
            gone: BTreeMap::new(),
            table_is_stale: false,
            lied: false,
            left_over: false,
        }
    }

    fn is_present(&self, page: u64) -> bool {
        RAM.iter().zip(&self.ram).any(|(gfns, ram)| gfns.contains(&page) && ram.is_some())
    }

    fn play(&mut self, op: Op) {
        match op {
            Op::Map(pages) => {
                let pages: Vec<_> = pages.into_iter().filter(|&page| page < GFNS).collect();
                // With a stale table, or one it lied in, a guest maps what is not there: its own harm.
                if self.rig.map(&pages) && !self.table_is_stale && !self.lied && self.rig.pinner.is_active() {
                    self.open.push(pages);
                }
            }
            Op::Unmap(n) if !self.open.is_empty() => {
                let pages = self.open.swap_remove(n % self.open.len());
                self.rig.unmap(&pages);
            }
            Op::Unmap(_) => {}
            Op::Ask(pages) => {
                let reclaims = self.rig.pinner.counters().reclaims;
                let result = self.rig.request(&pages);
                let refused = matches!(result, PinResult::Refused(_));
                assert_eq!(refused, !self.rig.pinner.is_active());
                let asked: Vec<_> = pages.iter().copied().filter(|&page| page < GFNS).collect();
                let pinned = |page: &u64| self.rig.iommu.is_mapped(page * PAGE, PAGE) && self.rig.is_pinned(*page);
                if self.rig.pinner.counters().reclaims > reclaims {
                    // Room was made, maybe of pages of this very request: nobody counts them.
                } else if result == PinResult::Pinned {
                    assert!(asked.len() == pages.len() && asked.iter().all(pinned));
                } else if !self.table_is_stale && !self.lied {
                    // What could not be unmapped when its RAM went is still mapped, and not asked for with success.
                    let there = |page: &u64| self.is_present(*page) && pinned(page);
                    assert!(asked.len() < pages.len() || !asked.iter().all(there));
                }
            }
            Op::Tick(budget) => {
                let before = self.rig.pinner.pinned_pages();
                let report = self.rig.pinner.tick(budget);
                assert_eq!(before - self.rig.pinner.pinned_pages(), report.unpinned_pages);
                assert!(!self.parked || report.unpinned_pages == 0);
                // One extent may be larger than the budget by itself.
                assert!(budget.is_none_or(|budget| report.unpinned_pages <= budget.max(512)));
            }
            Op::Force(range) => {
                let (report, hold) = self.rig.force(&range);
                let sum = report.released + report.not_pinned + report.busy + report.parked;
                assert_eq!(sum, range.end - range.start);
                assert_eq!(hold.is_some(), report.may_be_taken());
                self.holds.extend(hold);
            }
            Op::LetGo => drop(self.holds.pop()),
            Op::Park => {
                self.rig.pinner.park();
                self.parked = true;
            }
            Op::Unpark => {
                // Every park is ended at once: nesting is for the tests of parking.
                (0..100).for_each(|_| self.rig.pinner.unpark());
                self.parked = false;
            }
            Op::Deactivate(reset) => {
                let was_active = self.rig.pinner.is_active();
                let drain = if reset { Drain::Reset } else { Drain::Deactivate };
                let left = self.rig.pinner.deactivate(drain);
                let pages = left.map_or_else(|error| error.pages, |()| 0);
                assert_eq!(pages, self.rig.pinner.pinned_pages());
                self.left_over |= pages > 0;
                self.table_is_stale |= reset && was_active;
                self.forget_open();
                self.parked = false;
                if !self.any_absent() && !reset && !self.table_is_stale && !self.lied {
                    self.check_pinned_is_mapped();
                }
            }
            Op::Activate => {
                if !self.rig.pinner.is_active() {
                    self.left_over |= self.rig.pinner.pinned_pages() > 0;
                    self.rig.pinner.activate(self.rig.guest.dtt().root(), 4).unwrap();
                    self.parked = false;
                }
            }
            Op::Remove(region) => self.remove(region),
            Op::Return(region, same) => self.bring_back(region, same),
            Op::Fail(calls, error) => {
                let mut bits = calls;
                self.rig.iommu.inject(move |_| {
                    let fails = bits & 1 == 1;
                    bits >>= 1;
                    fails.then_some(error)
                });
            }
            Op::EntryLimit(limit) => self.rig.iommu.set_entry_limit(Some(limit)),
            Op::Lie(page, word) => {
                use std::sync::atomic::Ordering::Relaxed;
                let table = self.rig.guest.dtt().leaf_table(&*self.rig.memory, rig::gfn(page)).unwrap();
                let leaf = &table.words()[rig::gfn(page).leaf_index()];
                leaf.fetch_and(0, Relaxed);
                leaf.fetch_or(word, Relaxed);
                self.lied = true;
                self.open.clear();
            }
        }
    }

    fn forget_open(&mut self) {
        for pages in std::mem::take(&mut self.open) {
            self.rig.unmap(&pages);
        }
    }

    fn any_absent(&self) -> bool {
        self.ram.iter().any(Option::is_none)
    }

    fn remove(&mut self, region: usize) {
        let Some(memory) = self.ram[region].take() else {
            assert!(matches!(self.rig.remove(region), Err(RegionError::Unknown { .. })));
            return;
        };
        let left =
            |world: &Self| world.rig.mapped_pages().iter().filter(|page| RAM[region].contains(page)).count() as u64;
        let leaves = self.rig.leaves();
        match self.rig.remove(region) {
            Ok(()) => assert_eq!(left(self), 0, "nothing of RAM that went is mapped"),
            Err(RegionError::Stuck { pages, .. }) => assert_eq!(left(self), pages),
            Err(error) => panic!("{error}"),
        }
        assert_eq!(self.rig.leaves(), leaves, "the table is not written when RAM goes");
        self.gone.insert(region, memory);
    }

    fn bring_back(&mut self, region: usize, same: bool) {
        if self.ram[region].is_some() {
            return;
        }
        let lost = self.rig.pinner.counters().pages_lost;
        let memory = if same { Arc::clone(&self.gone[&region]) } else { rig::ram(&RAM[region]) };
        match self.rig.add(&memory) {
            Ok(()) => self.ram[region] = Some(memory),
            Err(RegionError::Stuck { pages, .. }) => assert!(pages > 0),
            Err(error) => panic!("{error}"),
        }
        if self.ram[region].is_some() && self.rig.pinner.counters().pages_lost > lost {
            // What the guest had mapped there may be gone: its device would fault.
            let lost = |pages: &Vec<u64>| pages.iter().any(|page| RAM[region].contains(page));
            for pages in self.open.extract_if(.., |pages| lost(pages)).collect::<Vec<_>>() {
                self.rig.unmap(&pages);
            }
        }
    }

    fn check_pinned_is_mapped(&self) {
        for (page, entry) in (0..).zip(self.rig.leaves()) {
            if entry.contains(LeafEntry::PINNED) {
                assert!(self.rig.iommu.is_mapped(page * PAGE, PAGE), "PINNED outlives its mapping, page {page:#x}");
            }
        }
    }

    fn check(&self) {
        self.rig.check_books();
        // So it is the IOMMU's too, which is slower to ask.
        let mapped: BTreeSet<_> = self.rig.mapped_pages().into_iter().collect();
        for hold in &self.holds {
            assert_eq!(self.rig.iommu.mapped_bytes_in(hold.gpa().raw(), hold.bytes()), 0, "a held page is mapped");
        }
        if self.lied || self.table_is_stale {
            return;
        }
        let leaves = self.rig.leaves();
        for (page, entry) in (0..).zip(&leaves) {
            let mapped = mapped.contains(&page);
            let pinned = entry.contains(LeafEntry::PINNED);
            if self.is_present(page) {
                assert!(!pinned || mapped, "PINNED outlives its mapping, page {page:#x}");
            }
            if self.rig.pinner.is_active() && self.is_present(page) && !self.left_over {
                assert!(!mapped || pinned, "a mapped page is not PINNED, page {page:#x}");
            }
        }
        for &page in self.open.iter().flatten() {
            if self.is_present(page) {
                assert!(self.rig.iommu.is_mapped(page * PAGE, PAGE), "the device does not reach page {page:#x}");
            }
        }
    }
}

fn run(policy: &str, ops: Vec<Op>) {
    let mut world = World::new(policy);
    for op in ops {
        world.play(op);
        world.check();
    }
    // Whatever happened: a drain with a mapper that works leaves nothing.
    world.rig.iommu.inject_nothing();
    world.rig.pinner.deactivate(Drain::Reset).unwrap();
    assert_eq!(world.rig.iommu.mappings(), 0);
    assert_eq!(world.rig.pinner.pinned_pages(), 0);
    let iommu = Arc::clone(&world.rig.iommu);
    drop(world);
    assert_eq!(iommu.mappings(), 0);
}

fn policies() -> impl Strategy<Value = String> {
    let extent = prop_oneof![Just("page"), Just("run"), Just("aligned=64k"), Just("aligned=2m")];
    let quota = prop_oneof![Just("none"), Just("256k"), Just("3m")];
    (extent, quota, 0_u32..4)
        .prop_map(|(extent, quota, rounds)| format!("extent={extent},quota={quota},unpin_gen_threshold={rounds}"))
}

proptest! {
    #[test]
    fn an_honest_guest_on_a_mapper_that_fails(policy in policies(), ops in ops(false)) {
        run(&policy, ops);
    }

    #[test]
    fn a_guest_that_lies_hurts_itself_only(policy in policies(), ops in ops(true)) {
        run(&policy, ops);
    }
}
