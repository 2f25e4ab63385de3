//! What the threads share: RAM, pinner, IOMMU, slots; and what must hold once all is quiet.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};

use coiommu_dtt::guest::{GuestDtt, TablePages};
use coiommu_dtt::{Bdf, Gfn, Gpa, LeafEntry, Levels, NotifySlots, RequestWord, TableMemory};
use coiommu_pin::pinner::{Drain, PinResult, Pinner, PinnerConfig, SystemClock};
use coiommu_pin::request::Scratch;
use coiommu_pin::{DmaMapper, Extent, Policy, RamRegion};
use coiommu_vfio::SoftIommu;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::pause::Pause;
use crate::tally::{Did, Tally};

pub(crate) const VCPUS: usize = 4;
pub(crate) const WORKERS: usize = 2;
pub(crate) const PAGE: u64 = 4096;
/// RAM that stays, in gfns: a hole inside a block, ends inside blocks, a block without any.
pub(crate) const STAYING: [Range<u64>; 3] = [0..300, 310..1100, 1536..2100];
/// RAM that comes and goes. It shares a block with RAM that stays.
pub(crate) const MOVING: Range<u64> = 2100..2700;
/// Gfns that are asked for reach beyond RAM.
pub(crate) const GFNS: u64 = 2720;
/// Each vCPU has one page that no other vCPU maps, for its lies.
pub(crate) const PRIVATE: Range<u64> = 1000..1000 + VCPUS as u64;
/// Room for the longest batch.
pub(crate) const BATCH_BYTES: u64 = 64 << 10;
const TABLES: u64 = 1 << 30;
const ARENA_PAGES: u64 = 64;
const BATCHES: u64 = TABLES + (4 << 20);
/// What is in memory that is not the guest's table any more.
const FOREIGN: u8 = 0xa5;

/// The pinner's view of memory: what stays. Tables and batches lie there, so what moves need not be in it.
pub(crate) type Space = Arc<GuestMemoryMmap>;

/// Pages for a guest's tables, from the first of an arena up.
#[derive(Debug)]
struct Arena {
    first: u64,
    used: AtomicU64,
}

impl TablePages for Arena {
    fn alloc(&self) -> Option<Gpa> {
        let page = self.used.fetch_add(1, Ordering::Relaxed);
        (page < ARENA_PAGES).then(|| Gpa::new(self.first + page * PAGE))
    }

    fn free(&self, _page: Gpa) {}
}

/// The guest's table. After a reset it is in other memory than before.
#[derive(Debug)]
pub(crate) struct Tables {
    arenas: [Arena; 2],
    dtts: [GuestDtt; 2],
    used: AtomicUsize,
    /// Whether the arena that is not used is somebody else's memory by now.
    other_is_foreign: AtomicBool,
}

impl Tables {
    fn new(memory: &GuestMemoryMmap) -> Self {
        let arenas = [0, 1].map(|n| Arena { first: TABLES + n * ARENA_PAGES * PAGE, used: AtomicU64::new(0) });
        let levels = Levels::new(4).unwrap();
        let dtts = [0, 1].map(|n: usize| GuestDtt::new(memory, &arenas[n], levels, 64).unwrap());
        Self { arenas, dtts, used: AtomicUsize::new(0), other_is_foreign: AtomicBool::new(false) }
    }

    /// The table in use, and where its pages come from. Guests ask after each pause.
    pub(crate) fn now(&self) -> (&GuestDtt, &impl TablePages) {
        let used = self.used.load(Ordering::Acquire);
        (&self.dtts[used], &self.arenas[used])
    }

    /// The guest's system is gone, and another starts with a table of its own. While guests rest.
    pub(crate) fn begin_anew(&self, memory: &GuestMemoryMmap) {
        let old = self.used.load(Ordering::Acquire);
        let new = 1 - old;
        let mut bytes = vec![0; usize::try_from(ARENA_PAGES * PAGE).unwrap()];
        if self.other_is_foreign.swap(true, Ordering::Relaxed) {
            memory.read(Gpa::new(self.arenas[new].first), &mut bytes).unwrap();
            assert!(bytes.iter().all(|&byte| byte == FOREIGN), "a table was written after its reset");
        }
        bytes.fill(0);
        memory.write(Gpa::new(self.arenas[new].first), &bytes).unwrap();
        // The root is the first page.
        self.arenas[new].used.store(1, Ordering::Relaxed);
        bytes.fill(FOREIGN);
        memory.write(Gpa::new(self.arenas[old].first), &bytes).unwrap();
        self.used.store(new, Ordering::Release);
    }
}

/// The RAM that comes and goes.
#[derive(Debug)]
pub(crate) struct Moving {
    /// Counts up when it starts to go, and when it is all back: odd in between.
    pub(crate) moves: AtomicU64,
    /// How often other memory came back.
    pub(crate) others: AtomicU64,
    now: Mutex<Arc<GuestRegionMmap>>,
}

impl Moving {
    /// The memory that is there, or was last, and how many others came before it.
    pub(crate) fn now(&self) -> (Arc<GuestRegionMmap>, u64) {
        let now = self.lock();
        (Arc::clone(&now), self.others.load(Ordering::Acquire))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Arc<GuestRegionMmap>> {
        self.now.lock().unwrap()
    }
}

#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) memory: Space,
    pub(crate) moving: Moving,
    pub(crate) iommu: Arc<SoftIommu>,
    pub(crate) pinner: Pinner<Space>,
    pub(crate) tables: Tables,
    pub(crate) slots: [AtomicU64; VCPUS],
    /// Whether a vCPU's last request was served in full. The slot's answer orders it.
    pub(crate) served: [AtomicU8; VCPUS],
    pub(crate) bells: Vec<Sender<usize>>,
    pub(crate) pause: Pause,
    /// Counts up when a reset begins and when it is over: odd in between.
    pub(crate) resets: AtomicU64,
    pub(crate) tally: Tally,
    pub(crate) clock: SystemClock,
    pub(crate) seed: u64,
    pub(crate) bdf: Bdf,
    over: AtomicBool,
    closed: AtomicBool,
}

pub(crate) fn gfn(page: u64) -> Gfn {
    Gfn::new(page).unwrap()
}

pub(crate) fn iova(page: u64) -> u64 {
    page * PAGE
}

pub(crate) fn stays(page: u64) -> bool {
    STAYING.iter().any(|ram| ram.contains(&page))
}

/// A file for the RAM that moves.
pub(crate) fn moving_file() -> FileOffset {
    let file = tempfile::tempfile().unwrap();
    file.set_len((MOVING.end - MOVING.start) * PAGE).unwrap();
    FileOffset::new(file, 0)
}

/// RAM at a place, mapped into this process anew.
pub(crate) fn ram(gfns: &Range<u64>, file: Option<FileOffset>) -> Arc<GuestRegionMmap> {
    let bytes = usize::try_from((gfns.end - gfns.start) * PAGE).unwrap();
    Arc::new(GuestRegionMmap::from_range(GuestAddress(iova(gfns.start)), bytes, file).unwrap())
}

impl Machine {
    pub(crate) fn new(policy: &str, mappings: u64, seed: u64, bells: Vec<Sender<usize>>) -> Self {
        let policy: Policy = policy.parse().unwrap();
        let staying = STAYING.map(|gfns| ram(&gfns, None));
        let moving = ram(&MOVING, Some(moving_file()));
        let tables = Arc::new(GuestRegionMmap::from_range(GuestAddress(TABLES), 8 << 20, None).unwrap());
        let regions = staying.iter().cloned().chain([tables]).collect();
        let memory = Arc::new(GuestMemoryMmap::from_arc_regions(regions).unwrap());
        let iommu = Arc::new(SoftIommu::builder().entry_limit(Some(mappings)).build());
        let bdf = Bdf::new(0x18).unwrap();
        let config = PinnerConfig::new(policy, vec![bdf]);
        let pinner = Pinner::new(Arc::clone(&memory), Arc::clone(&iommu) as Arc<dyn DmaMapper>, config).unwrap();
        for region in staying.iter().chain([&moving]) {
            pinner.add_region(RamRegion::from_vm_memory(Arc::clone(region)).unwrap()).unwrap();
        }
        let tables = Tables::new(&memory);
        pinner.activate(tables.now().0.dtt().root(), 4).unwrap();
        Self {
            memory,
            moving: Moving { moves: AtomicU64::new(0), others: AtomicU64::new(0), now: Mutex::new(moving) },
            iommu,
            pinner,
            tables,
            slots: Default::default(),
            served: Default::default(),
            bells,
            pause: Pause::default(),
            resets: AtomicU64::new(0),
            tally: Tally::default(),
            clock: SystemClock,
            seed,
            bdf,
            over: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        }
    }

    pub(crate) fn slots(&self) -> NotifySlots<'_, AtomicU64> {
        NotifySlots::new(&self.slots)
    }

    /// Where a vCPU puts its batches.
    pub(crate) fn batch_place(vcpu: usize) -> Gpa {
        Gpa::new(BATCHES + vcpu as u64 * BATCH_BYTES)
    }

    /// Everybody but the workers ends.
    pub(crate) fn stop(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// The workers end, as no more requests come.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// A device tries pages that nothing may be mapped for.
    pub(crate) fn probe(&self, page: u64, why: &str) {
        let mut byte = [0];
        let result = self.iommu.read(iova(page), &mut byte);
        assert!(result.is_err(), "a device reached page {page:#x}, {why}");
        self.tally.add(Did::Probe, 1);
    }

    /// Nothing is mapped, and no page says it is.
    pub(crate) fn check_empty(&self) {
        assert_eq!(self.iommu.snapshot(), []);
        assert_eq!((self.pinner.pinned_pages(), self.pinner.mappings()), (0, 0));
    }

    /// No guest counts a page any more, and if so asked, none says PINNED.
    pub(crate) fn check_leaves(&self, none_pinned: bool) {
        let (dtt, arena) = self.tables.now();
        for page in 0..GFNS {
            let leaf = dtt.leaf_table(&*self.memory, arena, gfn(page)).unwrap().leaf(gfn(page)).load();
            assert_eq!(leaf.count(), 0, "page {page:#x}: {leaf:?}");
            assert!(!none_pinned || !leaf.contains(LeafEntry::PINNED), "page {page:#x} says PINNED and is not");
        }
    }

    /// The pages of RAM that stays that the table says are PINNED.
    pub(crate) fn pinned_in_table(&self) -> BTreeSet<u64> {
        let (dtt, arena) = self.tables.now();
        let leaf = |page| dtt.leaf_table(&*self.memory, arena, gfn(page)).unwrap().leaf(gfn(page));
        (0..GFNS).filter(|&page| stays(page) && leaf(page).is_pinned()).collect()
    }

    /// What must hold at the end, and then after some ticks, and after the last drain.
    pub(crate) fn check_at_rest(&self) {
        assert!(self.slots.iter().all(|slot| slot.load(Ordering::Acquire) == 0), "a slot was not answered");
        self.check_leaves(false);
        self.check_books();
        self.check_counters();
        for _ in 0..200 {
            let report = self.pinner.tick(None);
            self.tally.add(Did::TickedPage, report.unpinned_pages);
        }
        self.check_empty();
        self.check_leaves(true);
        // Nothing is idle at once.
        let word = RequestWord::page(gfn(20), self.bdf).unwrap();
        assert_eq!(self.pinner.pin(word, &mut Scratch::default(), &self.clock), PinResult::Pinned);
        self.tally.add(Did::Pinned, 1);
        self.check_books();
        self.pinner.deactivate(Drain::Deactivate).unwrap();
        self.check_empty();
        self.check_leaves(true);
        self.check_counters();
    }

    /// The IOMMU's mappings are the pin map's, and a page says PINNED if it is mapped.
    fn check_books(&self) {
        let extents: Vec<_> =
            self.pinner.extents().iter().map(|&Extent { first, pages }| (iova(first.raw()), pages * PAGE)).collect();
        assert_eq!(extents, self.iommu.snapshot());
        let mapped: BTreeSet<_> =
            extents.iter().flat_map(|&(iova, bytes)| iova / PAGE..(iova + bytes) / PAGE).collect();
        assert_eq!(self.pinner.mappings(), extents.len() as u64);
        assert_eq!(self.pinner.pinned_pages(), mapped.len() as u64);
        let (dtt, arena) = self.tables.now();
        for page in 0..GFNS {
            let leaf = dtt.leaf_table(&*self.memory, arena, gfn(page)).unwrap().leaf(gfn(page));
            // A guest that lies about its own page may have cleared what the host set.
            if !PRIVATE.contains(&page) {
                assert_eq!(leaf.is_pinned(), mapped.contains(&page), "page {page:#x}: PINNED, and mapped");
            }
        }
    }

    fn check_counters(&self) {
        let (counters, tally, calls) = (self.pinner.counters(), &self.tally, self.iommu.calls());
        tally.add(Did::Anomaly, counters.anomalies);
        assert_eq!((counters.anomalies, counters.unmap_failures), (0, 0));
        assert_eq!(counters.pages_pinned - counters.pages_unpinned, self.pinner.pinned_pages());
        assert_eq!((counters.map_calls, counters.unmap_calls), (calls.map, calls.unmap));
        assert_eq!(counters.pages_unpinned_idle, tally.of(Did::TickedPage));
        // Extents go whole, also those that a range has in part.
        assert!(counters.pages_unpinned_forced >= tally.of(Did::ForcedPage));
        assert_eq!(counters.requests_pinned, tally.of(Did::Pinned));
        assert_eq!(counters.requests_failed, tally.of(Did::Failed));
        assert_eq!(counters.requests_timed_out, tally.of(Did::TimedOut));
        assert_eq!(counters.requests_refused, tally.of(Did::Refused));
        // Each fault is accounted for.
        assert_eq!(self.iommu.fault_count(), tally.of(Did::Probe) + tally.of(Did::ExcusedFault));
    }
}
