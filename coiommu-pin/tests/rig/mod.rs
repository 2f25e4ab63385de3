//! A guest, a pinner and an IOMMU in software, with RAM that has a hole and ends in the middle of blocks.
#![allow(dead_code, unreachable_pub, reason = "a module of several tests, each of which uses its part")]

pub mod nothing;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coiommu_dtt::guest::{GuestDtt, TablePages, write_batch};
use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::{Bdf, Gfn, Gpa, Leaf, LeafEntry, Levels, RequestWord};
use coiommu_pin::pinner::{Clock, Drain, PinResult, Pinner, PinnerConfig};
use coiommu_pin::request::Scratch;
use coiommu_pin::{DmaMapper, Extent, Policy, RamRegion};
use coiommu_vfio::SoftIommu;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

pub const PAGE: u64 = 4096;
/// The guest's RAM, in gfns: a hole inside a block, ends inside blocks, blocks without any.
pub const RAM: [Range<u64>; 3] = [0..300, 310..1100, 1536..2100];
/// Gfns that tests ask for reach beyond RAM.
pub const GFNS: u64 = 2200;
/// Where the guest has its tables.
pub const TABLES: u64 = 1 << 30;
/// Pages for the tables, and for one batch after them.
const TABLE_PAGES: u64 = 12;
const BATCH_PAGES: u64 = 4;
const BATCH: u64 = TABLES + TABLE_PAGES * PAGE;
/// How many of them are one region. A table is lent out with all of its region, and Miri looks at each word of what is lent:
/// tests that take milliseconds would take minutes.
const REGION_PAGES: u64 = if cfg!(miri) { 2 } else { TABLE_PAGES + BATCH_PAGES };

pub type Space = Arc<GuestMemoryMmap>;

/// A clock that tests set. Its clones show the same time.
#[derive(Clone, Debug, Default)]
pub struct TestClock(Arc<Mutex<Duration>>);

impl TestClock {
    pub fn pass(&self, time: Duration) {
        *self.0.lock().unwrap() += time;
    }
}

impl Clock for TestClock {
    fn now(&self) -> Duration {
        *self.0.lock().unwrap()
    }
}

/// Table pages from [`TABLES`] up.
#[derive(Debug)]
pub struct Pages(pub AtomicU64);

impl TablePages for Pages {
    fn alloc(&self) -> Option<Gpa> {
        Some(Gpa::new(self.0.fetch_add(PAGE, Ordering::Relaxed)))
    }

    fn free(&self, _page: Gpa) {}
}

pub struct Rig {
    pub memory: Space,
    pub iommu: Arc<SoftIommu>,
    pub pinner: Pinner<Space>,
    pub guest: GuestDtt,
    pub pages: Pages,
    pub scratch: Scratch,
    pub clock: TestClock,
    pub ram: Vec<Arc<GuestRegionMmap>>,
    pub bdf: Bdf,
}

pub fn gfn(raw: u64) -> Gfn {
    Gfn::new(raw).unwrap()
}

/// RAM over a file of its own.
pub fn ram(gfns: &Range<u64>) -> Arc<GuestRegionMmap> {
    let file = tempfile::tempfile().unwrap();
    let bytes = (gfns.end - gfns.start) * PAGE;
    file.set_len(bytes + PAGE).unwrap();
    let place = FileOffset::new(file, PAGE);
    Arc::new(
        GuestRegionMmap::new(mapping(usize::try_from(bytes).unwrap(), place), GuestAddress(gfns.start * PAGE)).unwrap(),
    )
}

/// Memory for the guest's tables, and for a batch.
pub fn tables() -> impl Iterator<Item = Arc<GuestRegionMmap>> {
    let bytes = usize::try_from(REGION_PAGES * PAGE).unwrap();
    let regions = 0..(TABLE_PAGES + BATCH_PAGES) / REGION_PAGES;
    regions.map(move |n| {
        let start = GuestAddress(TABLES + n * REGION_PAGES * PAGE);
        Arc::new(GuestRegionMmap::from_range(start, bytes, None).unwrap())
    })
}

/// A file's memory.
#[cfg(not(miri))]
fn mapping(bytes: usize, place: FileOffset) -> MmapRegion {
    MmapRegion::from_file(place, bytes).unwrap()
}

/// Under Miri vm-memory does not map: it allocates, and not by pages. So this does, and never frees; the file is for the
/// region's identity.
#[cfg(miri)]
#[allow(unsafe_code, reason = "memory of one's own is handed in as a raw pointer")]
fn mapping(bytes: usize, place: FileOffset) -> MmapRegion {
    let layout = std::alloc::Layout::from_size_align(bytes, 4096).unwrap();
    // SAFETY: the size is not 0.
    let memory = unsafe { std::alloc::alloc_zeroed(layout) };
    let builder = vm_memory::mmap::MmapRegionBuilder::new(bytes).with_file_offset(place);
    // SAFETY: `bytes` bytes are there, and stay.
    let builder = unsafe { builder.with_raw_mmap_pointer(memory) };
    builder.build().unwrap()
}

pub fn is_ram(page: u64) -> bool {
    RAM.iter().any(|ram| ram.contains(&page))
}

impl Rig {
    pub fn new(policy: &str) -> Self {
        Self::with_iommu(policy, SoftIommu::new())
    }

    pub fn with_iommu(policy: &str, iommu: SoftIommu) -> Self {
        let policy: Policy = policy.parse().unwrap();
        let ram: Vec<_> = RAM.iter().map(ram).collect();
        let regions = ram.iter().cloned().chain(tables()).collect();
        let memory = Arc::new(GuestMemoryMmap::from_arc_regions(regions).unwrap());
        let iommu = Arc::new(iommu);
        let bdf = Bdf::new(0x18).unwrap();
        let config = PinnerConfig::new(policy, vec![Bdf::new(0x20).unwrap(), bdf]);
        let pinner = Pinner::new(Arc::clone(&memory), Arc::clone(&iommu) as Arc<dyn DmaMapper>, config).unwrap();
        for region in &ram {
            pinner.add_region(RamRegion::from_vm_memory(Arc::clone(region)).unwrap()).unwrap();
        }
        let pages = Pages(AtomicU64::new(TABLES));
        let guest = GuestDtt::new(&*memory, &pages, Levels::new(4).unwrap(), 8).unwrap();
        pinner.activate(guest.dtt().root(), 4).unwrap();
        // Tables everywhere, so that leaves can be looked at whether or not they were used.
        for page in (0..GFNS).step_by(512) {
            guest.leaf_table(&*memory, &pages, gfn(page)).unwrap();
        }
        Self { memory, iommu, pinner, guest, pages, scratch: Scratch::default(), clock: TestClock::default(), ram, bdf }
    }

    /// The leaves of all pages below [`GFNS`].
    pub fn leaves(&self) -> Vec<LeafEntry> {
        let mut leaves = Vec::new();
        for first in (0..GFNS).step_by(1024) {
            let table = self.guest.dtt().leaf_table(&*self.memory, gfn(first)).unwrap();
            leaves.extend(table.words().iter().map(|word| Leaf::new(word).load()));
        }
        leaves.truncate(usize::try_from(GFNS).unwrap());
        leaves
    }

    pub fn leaf(&self, page: u64) -> LeafEntry {
        self.guest.dtt().leaf_table(&*self.memory, gfn(page)).unwrap().leaf(gfn(page)).load()
    }

    /// Where the first region's pages are in this process.
    pub fn memory_at(&self, page: u64) -> *mut u8 {
        use vm_memory::{GuestMemoryRegion, MemoryRegionAddress};
        self.ram[0].get_host_address(MemoryRegionAddress(page * PAGE)).unwrap()
    }

    pub fn is_pinned(&self, page: u64) -> bool {
        self.leaf(page).contains(LeafEntry::PINNED)
    }

    /// The guest says PINNED where it is not.
    pub fn set_pinned(&self, page: u64) {
        self.guest.dtt().leaf_table(&*self.memory, gfn(page)).unwrap().leaf(gfn(page)).set_pinned();
    }

    /// A request as a guest sends it, served to its end.
    pub fn request(&mut self, pages: &[u64]) -> PinResult {
        let word = self.word(pages);
        self.pinner.pin(word, &mut self.scratch, &self.clock)
    }

    pub fn word(&self, pages: &[u64]) -> RequestWord {
        match *pages {
            [page] => RequestWord::page(gfn(page), self.bdf).unwrap(),
            _ => {
                let gfns: Vec<_> = pages.iter().map(|&page| gfn(page)).collect();
                write_batch(&*self.memory, Gpa::new(BATCH), self.bdf, &gfns).unwrap()
            }
        }
    }

    /// The guest maps pages for DMA, as a driver does; false if that failed, with nothing counted.
    pub fn map(&mut self, pages: &[u64]) -> bool {
        let needs_pin =
            |&&page: &&u64| self.guest.map(&*self.memory, &self.pages, gfn(page)).unwrap() == Mapped::NeedsPin;
        let missing: Vec<_> = pages.iter().filter(needs_pin).copied().collect();
        if !missing.is_empty() {
            self.request(&missing);
        }
        let pinned = missing.iter().all(|&page| self.is_pinned(page));
        if !pinned {
            self.unmap(pages);
        }
        pinned
    }

    pub fn unmap(&self, pages: &[u64]) {
        for &page in pages {
            self.guest.unmap(&*self.memory, gfn(page)).unwrap();
        }
    }

    pub fn remove(&self, region: usize) -> Result<(), coiommu_pin::region::RegionError> {
        let bytes = (RAM[region].end - RAM[region].start) * PAGE;
        self.pinner.remove_region(Gpa::new(RAM[region].start * PAGE), bytes)
    }

    pub fn add(&self, region: &Arc<GuestRegionMmap>) -> Result<(), coiommu_pin::region::RegionError> {
        self.pinner.add_region(RamRegion::from_vm_memory(Arc::clone(region)).unwrap())
    }

    /// Forced unpin to its end, with time passing while it is parked.
    pub fn force(&self, pages: &Range<u64>) -> (coiommu_pin::pinner::UnpinReport, Option<coiommu_pin::pinner::Hold>) {
        use coiommu_pin::pinner::UnpinStep;
        let mut unpin =
            self.pinner.begin_unpin(Gpa::new(pages.start * PAGE), (pages.end - pages.start) * PAGE, &self.clock);
        for _ in 0..10_000 {
            unpin = match self.pinner.step_unpin(unpin, &self.clock) {
                UnpinStep::Done(report, hold) => return (report, hold),
                UnpinStep::More(unpin) => unpin,
                UnpinStep::Wait(unpin) => {
                    self.clock.pass(Duration::from_millis(100));
                    unpin
                }
            };
        }
        panic!("a forced unpin does not end");
    }

    /// What the IOMMU has, in gfns: start and pages.
    pub fn iommu_extents(&self) -> BTreeMap<u64, u64> {
        self.iommu.snapshot().into_iter().map(|(iova, bytes)| (iova / PAGE, bytes / PAGE)).collect()
    }

    /// What the pin map has.
    pub fn extents(&self) -> BTreeMap<u64, u64> {
        self.pinner.extents().into_iter().map(|Extent { first, pages }| (first.raw(), pages)).collect()
    }

    pub fn mapped_pages(&self) -> Vec<u64> {
        self.extents().iter().flat_map(|(&first, &pages)| first..first + pages).collect()
    }

    /// The invariants of the host's books, which hold whatever the guest and the mapper do.
    pub fn check_books(&self) {
        let extents = self.extents();
        assert_eq!(extents, self.iommu_extents(), "the IOMMU's mappings are exactly the pin map's");
        assert_eq!(self.pinner.mappings(), extents.len() as u64);
        assert_eq!(self.pinner.pinned_pages(), extents.values().sum::<u64>());
        for (&first, &pages) in &extents {
            let last = first + pages - 1;
            assert_eq!(first / 512, last / 512, "an extent lies in one block");
        }
        let counters = self.pinner.counters();
        assert_eq!(counters.pages_pinned - counters.pages_unpinned, self.pinner.pinned_pages());
        if let Some(quota) = self.pinner.policy().quota {
            assert!(self.pinner.pinned_pages() * PAGE <= quota);
        }
    }
}

pub fn drain(rig: &Rig) {
    rig.pinner.deactivate(Drain::Deactivate).unwrap();
}
