//! The pinner against a plain model: page by page, without blocks, bits or locks. Everything that the pinner does is
//! predicted: each extent, each leaf entry, each report.

mod rig;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use coiommu_dtt::LeafEntry;
use coiommu_pin::pinner::PinAll;
use proptest::prelude::*;
use rig::{GFNS, PAGE, RAM, Rig, is_ram};

/// The ends of what a run has: steps, and in a step pages here and there, or in a row. Small under Miri, which takes a tenth
/// of a second for a page.
const STEPS: usize = if cfg!(miri) { 8 } else { 60 };
const SCATTERED: usize = if cfg!(miri) { 5 } else { 40 };
const RUN: u64 = if cfg!(miri) { 10 } else { 80 };

#[derive(Clone, Debug)]
enum Op {
    /// The guest maps pages, and keeps them mapped.
    Map(Vec<u64>),
    /// The guest gives back what it mapped n-th.
    Unmap(usize),
    /// A request out of the blue: duplicates, pages that are no RAM, pages nobody counts.
    Ask(Vec<u64>),
    Tick,
    Force(Range<u64>),
    Park,
    Unpark,
    Deactivate,
    /// All RAM is pinned and kept; before a table is there, or while one is in use.
    PinAll {
        is_active: bool,
    },
    LetAllAge,
    Release,
}

fn pages() -> impl Strategy<Value = Vec<u64>> {
    let page = prop_oneof![8 => 0..GFNS, 4 => 290_u64..330, 4 => 505_u64..520, 1 => 1_u64 << 30..1 << 31];
    let runs = (0..GFNS, 1..RUN).prop_map(|(first, pages)| (first..first + pages).collect());
    prop_oneof![prop::collection::vec(page, 1..SCATTERED), runs]
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let range = (0..GFNS, 1_u64..600).prop_map(|(first, pages)| first..first + pages);
    let op = prop_oneof![
        6 => pages().prop_map(Op::Map),
        4 => (0_usize..100).prop_map(Op::Unmap),
        2 => pages().prop_map(Op::Ask),
        4 => Just(Op::Tick),
        2 => range.prop_map(Op::Force),
        1 => Just(Op::Park),
        1 => Just(Op::Unpark),
        1 => Just(Op::Deactivate),
        1 => any::<bool>().prop_map(|is_active| Op::PinAll { is_active }),
        1 => Just(Op::LetAllAge),
        2 => Just(Op::Release),
    ];
    prop::collection::vec(op, 1..STEPS)
}

/// What one page's leaf says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Leaf {
    pinned: bool,
    accessed: bool,
    count: u32,
}

#[derive(Clone, Copy)]
enum Extents {
    Page,
    Run,
    Aligned(u64),
}

struct Model {
    extents_of: Extents,
    threshold: u32,
    extents: BTreeMap<u64, u64>,
    leaves: BTreeMap<u64, Leaf>,
    /// The round in which a block of a region last changed, by its first page.
    changed: BTreeMap<u64, u32>,
    round: u32,
    parked: u32,
    keeps_all: bool,
    /// The blocks of regions in which something was mapped while all was kept.
    kept: BTreeSet<u64>,
}

/// The pages of a page's block that are in its region.
fn block_of(page: u64) -> Range<u64> {
    let region = RAM.iter().find(|ram| ram.contains(&page)).unwrap();
    let start = page / 512 * 512;
    start.max(region.start)..(start + 512).min(region.end)
}

impl Model {
    fn is_mapped(&self, page: u64) -> bool {
        self.extents.range(..=page).next_back().is_some_and(|(first, pages)| page < first + pages)
    }

    /// The pages around or after `page` that one map call covers, if all of them satisfy `free`.
    fn extent(&self, page: u64, wanted: &BTreeSet<u64>) -> Range<u64> {
        let region = RAM.iter().find(|ram| ram.contains(&page)).unwrap();
        let (low, high, free): (u64, u64, Box<dyn Fn(u64) -> bool>) = match self.extents_of {
            Extents::Page => (page, page + 1, Box::new(|_| true)),
            Extents::Run => (page, (page / 512 + 1) * 512, Box::new(|p| wanted.contains(&p) && !self.is_mapped(p))),
            Extents::Aligned(pages) => {
                let start = page / pages * pages;
                (start, start + pages, Box::new(|p| !self.is_mapped(p)))
            }
        };
        let free = |p: &u64| (low..high).contains(p) && region.contains(p) && free(*p);
        let start = (0..=page).rev().take_while(&free).last().unwrap();
        let end = (page..).take_while(&free).last().unwrap() + 1;
        start..end
    }

    fn ask(&mut self, pages: &[u64]) {
        let wanted: BTreeSet<_> = pages.iter().copied().filter(|&page| is_ram(page)).collect();
        for &page in &wanted {
            if !self.is_mapped(page) {
                let extent = self.extent(page, &wanted);
                self.enter(&extent);
                extent.for_each(|page| self.leaves.entry(page).or_default().pinned = true);
            }
            self.leaves.entry(page).or_default().pinned = true;
        }
    }

    fn enter(&mut self, extent: &Range<u64>) {
        let block = block_of(extent.start).start;
        self.extents.insert(extent.start, extent.end - extent.start);
        self.changed.insert(block, self.round);
        if self.keeps_all {
            self.kept.insert(block);
        }
    }

    /// What no extent has of each block, as an extent.
    fn pin_all(&mut self) {
        self.keeps_all = true;
        let mut page = 0;
        while page < GFNS {
            if !is_ram(page) || self.is_mapped(page) {
                page += 1;
                continue;
            }
            let end = (page..block_of(page).end).take_while(|&page| !self.is_mapped(page)).last().unwrap() + 1;
            self.enter(&(page..end));
            page = end;
        }
    }

    fn map(&mut self, pages: &[u64]) -> bool {
        let mut missing = Vec::new();
        for &page in pages {
            let leaf = self.leaves.entry(page).or_default();
            leaf.count += 1;
            leaf.accessed = true;
            if !leaf.pinned {
                missing.push(page);
            }
        }
        self.ask(&missing);
        let pinned = missing.iter().all(|page| self.leaves[page].pinned);
        if !pinned {
            self.unmap(pages);
        }
        pinned
    }

    fn unmap(&mut self, pages: &[u64]) {
        pages.iter().for_each(|page| self.leaves.get_mut(page).unwrap().count -= 1);
    }

    /// Takes the extents away whose pages all satisfy `idle`; the pages that went.
    fn take(&mut self, candidates: Range<u64>, idle: impl Fn(&Leaf) -> bool) -> BTreeSet<u64> {
        if self.keeps_all {
            return BTreeSet::new();
        }
        let going: Vec<_> = (self.extents.iter())
            .map(|(&first, &pages)| first..first + pages)
            .filter(|extent| extent.start < candidates.end && extent.end > candidates.start)
            .filter(|extent| extent.clone().all(|page| idle(&self.leaves.get(&page).copied().unwrap_or_default())))
            .collect();
        for extent in &going {
            self.extents.remove(&extent.start);
            self.changed.insert(block_of(extent.start).start, self.round);
        }
        let gone: BTreeSet<_> = going.into_iter().flatten().collect();
        gone.iter().for_each(|page| self.leaves.entry(*page).or_default().pinned = false);
        let extents = &self.extents;
        self.kept.retain(|&block| extents.range(block..block_of(block).end).next().is_some());
        gone
    }

    fn tick(&mut self) -> (u64, u64) {
        if self.parked > 0 || self.keeps_all {
            return (0, 0);
        }
        let (mut unpinned, mut aged) = (0, 0);
        let blocks: BTreeMap<_, _> =
            self.extents.keys().map(|&first| (block_of(first).start, block_of(first))).collect();
        for (start, pages) in blocks {
            let age = self.round - self.changed.get(&start).copied().unwrap_or(0);
            if self.threshold != 0 && age >= self.threshold && !age.is_multiple_of(self.threshold) {
                continue;
            }
            let (unpinned_here, aged_here) = self.look_at(start, pages);
            unpinned += unpinned_here;
            aged += aged_here;
        }
        self.round += 1;
        (unpinned, aged)
    }

    /// What is idle in a block goes, the rest ages.
    fn look_at(&mut self, start: u64, pages: Range<u64>) -> (u64, u64) {
        let unpinned = self.take(pages.clone(), |leaf| leaf.count == 0 && !leaf.accessed).len() as u64;
        let mut aged = 0;
        for page in pages.filter(|&page| self.is_mapped(page)).collect::<Vec<_>>() {
            let leaf = self.leaves.entry(page).or_default();
            aged += u64::from(leaf.accessed);
            if std::mem::take(&mut leaf.accessed) && leaf.count == 0 {
                self.changed.insert(start, self.round);
            }
        }
        (unpinned, aged)
    }

    /// How many blocks are left of those that were kept.
    fn release(&mut self) -> u64 {
        if self.parked == 0 && !self.keeps_all {
            for block in self.kept.clone() {
                self.look_at(block, block_of(block));
            }
        }
        self.kept.len() as u64
    }

    /// Released, not pinned, busy, parked.
    fn force(&mut self, range: &Range<u64>) -> [u64; 4] {
        let mapped = |model: &Self| range.clone().filter(|&page| model.is_mapped(page)).count() as u64;
        let before = mapped(self);
        let all = range.end - range.start;
        if self.parked > 0 {
            return [0, all - before, 0, before];
        }
        let gone = self.take(range.clone(), |leaf| leaf.count == 0);
        // ACCESSED is cleared before the swap.
        gone.iter().for_each(|page| self.leaves.entry(*page).or_default().accessed = false);
        let after = mapped(self);
        [before - after, all - before, after, 0]
    }

    fn deactivate(&mut self) {
        for page in (0..GFNS).filter(|&page| self.is_mapped(page)).collect::<Vec<_>>() {
            self.leaves.entry(page).or_default().pinned = false;
            self.changed.insert(block_of(page).start, self.round);
        }
        self.extents.clear();
        self.kept.clear();
        (self.parked, self.keeps_all) = (0, false);
    }
}

fn compare(rig: &Rig, model: &Model) {
    rig.check_books();
    assert_eq!(rig.extents(), model.extents);
    for (page, entry) in (0..).zip(rig.leaves()) {
        let leaf = Leaf {
            pinned: entry.contains(LeafEntry::PINNED),
            accessed: entry.contains(LeafEntry::ACCESSED),
            count: entry.count(),
        };
        assert_eq!(leaf, model.leaves.get(&page).copied().unwrap_or_default(), "leaf of page {page:#x}");
        // What is pinned for who does not count says nothing to who does, until that asks.
        let may_be_quiet = model.is_mapped(page) && is_ram(page) && model.kept.contains(&block_of(page).start);
        assert!(leaf.pinned == model.is_mapped(page) || may_be_quiet, "PINNED is the pin map's, page {page:#x}");
    }
}

fn run(extents_of: Extents, extent: &str, threshold: u32, ops: Vec<Op>) {
    let mut rig = Rig::new(&format!("extent={extent},unpin_gen_threshold={threshold}"));
    let mut model = Model {
        extents_of,
        threshold,
        extents: BTreeMap::new(),
        leaves: BTreeMap::new(),
        changed: BTreeMap::new(),
        round: 0,
        parked: 0,
        keeps_all: false,
        kept: BTreeSet::new(),
    };
    let mut open: Vec<Vec<u64>> = Vec::new();
    for op in ops {
        match op {
            Op::Map(pages) => {
                let pages: Vec<_> = pages.into_iter().filter(|&page| page < GFNS).collect();
                let mapped = rig.map(&pages);
                assert_eq!(mapped, model.map(&pages));
                assert_eq!(mapped, pages.iter().all(|&page| is_ram(page)));
                if mapped {
                    open.push(pages);
                }
            }
            Op::Unmap(n) if !open.is_empty() => {
                let pages = open.swap_remove(n % open.len());
                rig.unmap(&pages);
                model.unmap(&pages);
            }
            Op::Unmap(_) => {}
            Op::Ask(pages) => {
                let _ = rig.request(&pages);
                model.ask(&pages);
            }
            Op::Tick => {
                let report = rig.pinner.tick(None);
                assert_eq!((report.unpinned_pages, report.aged_pages), model.tick());
            }
            Op::Force(range) => {
                let (report, hold) = rig.force(&range);
                let [released, not_pinned, busy, parked] = model.force(&range);
                let counts = (report.released, report.not_pinned, report.busy, report.parked);
                assert_eq!(counts, (released, not_pinned, busy, parked));
                assert_eq!(hold.is_some(), busy == 0 && parked == 0);
                if let Some(hold) = hold {
                    assert_eq!(
                        (hold.gpa().raw(), hold.bytes()),
                        (range.start * PAGE, (range.end - range.start) * PAGE)
                    );
                    assert_eq!(rig.iommu.mapped_bytes_in(hold.gpa().raw(), hold.bytes()), 0);
                }
            }
            Op::Park => {
                rig.pinner.park();
                model.parked += 1;
            }
            Op::Unpark => {
                rig.pinner.unpark();
                model.parked = model.parked.saturating_sub(1);
            }
            Op::Deactivate => {
                rig::drain(&rig);
                model.deactivate();
                assert!(!rig.pinner.is_active());
                rig.pinner.activate(rig.guest.dtt().root(), 4).unwrap();
            }
            Op::PinAll { is_active } => {
                if !is_active {
                    rig::drain(&rig);
                    model.deactivate();
                }
                rig.pinner.keep_all();
                assert_eq!(rig.pinner.pin_all(0, &rig.clock, Duration::from_secs(1)), PinAll::Done);
                model.pin_all();
                if !is_active {
                    rig.pinner.activate(rig.guest.dtt().root(), 4).unwrap();
                }
            }
            Op::LetAllAge => {
                rig.pinner.let_all_age();
                model.keeps_all = false;
            }
            Op::Release => {
                let released = rig.pinner.release_idle(0, &rig.clock, Duration::from_secs(1));
                assert_eq!((released.next, released.left), (None, model.release()));
            }
        }
        compare(&rig, &model);
        for &page in open.iter().flatten() {
            // A drain takes mapped pages away: its caller has switched the devices off.
            if model.leaves[&page].pinned {
                assert!(rig.iommu.is_mapped(page * PAGE, PAGE), "the device reaches what is mapped, page {page:#x}");
            }
        }
    }
    assert_eq!(rig.pinner.counters().anomalies, 0);
}

proptest! {
    #[test]
    fn page_by_page(threshold in 0_u32..4, ops in ops()) {
        run(Extents::Page, "page", threshold, ops);
    }

    #[test]
    fn run_by_run(threshold in 0_u32..4, ops in ops()) {
        run(Extents::Run, "run", threshold, ops);
    }

    #[test]
    fn piece_by_piece(threshold in 0_u32..4, ops in ops(), (pages, size) in prop_oneof![Just((16, "64k")), Just((128, "512k")), Just((512, "2m"))]) {
        run(Extents::Aligned(pages), &format!("aligned={size}"), threshold, ops);
    }
}
