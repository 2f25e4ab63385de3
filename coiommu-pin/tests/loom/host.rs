//! A host with one guest: pinner, IOMMU, tables, RAM; and what the guest's driver does.
//!
//! Unsafe is needed to promise that there is memory behind the RAM, which nobody touches.
#![allow(unsafe_code)]

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use coiommu_dtt::geometry::PAGE_SHIFT;
use coiommu_dtt::guest::{GuestDtt, write_batch};
use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::{Bdf, Gfn, Gpa, Levels, PAGE_SIZE, RequestWord};
use coiommu_pin::pinner::{Clock, ForcedUnpin, Hold, PinResult, Pinner, PinnerConfig, UnpinReport, UnpinStep};
use coiommu_pin::request::Scratch;
use coiommu_pin::worker::Service;
use coiommu_pin::{DmaMapper, RamFile, RamRegion, TableSpace};
use loom::thread;

use crate::arena::Arena;
use crate::iommu::Iommu;
use crate::slot::Word;

/// The pages of a region, at most.
const RAM_PAGES: usize = 16;

static MEMORY: [AtomicU8; RAM_PAGES << PAGE_SHIFT] = [const { AtomicU8::new(0) }; RAM_PAGES << PAGE_SHIFT];

static FILE: LazyLock<RamFile> =
    LazyLock::new(|| RamFile::new(Arc::new(tempfile::tempfile().unwrap()), 1 << 32).unwrap());

/// The guest's.
pub const VCPUS: usize = 2;

/// Loom has no time: the clock stands still, and all waiting is yielding.
pub const NOW: Duration = Duration::ZERO;

#[derive(Debug)]
pub struct Space(Arc<Arena>);

impl TableSpace for Space {
    type Memory = Arena;
    type View = Arc<Arena>;

    fn view(&self) -> Arc<Arena> {
        Arc::clone(&self.0)
    }
}

pub struct Host {
    pub service: Arc<Service<Space, Vec<Word>>>,
    pub iommu: Arc<Iommu>,
    pub memory: Arc<Arena>,
    pub guest: GuestDtt,
    live: Vec<u64>,
    bdf: Bdf,
}

/// RAM at these gfns; the same memory again each time it is asked for.
pub fn ram(gfns: &Range<u64>) -> RamRegion {
    region(gfns, Some(FILE.clone()))
}

/// RAM that is no memory that was ever there before.
pub fn other_ram(gfns: &Range<u64>) -> RamRegion {
    region(gfns, None)
}

fn region(gfns: &Range<u64>, file: Option<RamFile>) -> RamRegion {
    let pages = gfns.end - gfns.start;
    assert!(pages <= RAM_PAGES as u64);
    let hva = NonNull::from(&MEMORY).cast();
    // SAFETY: the static is one piece of memory for as long as the process lives, nobody makes a reference to it but to
    // atomics, and it has so many pages.
    unsafe { RamRegion::new(Gpa::new(gfns.start * PAGE_SIZE), pages * PAGE_SIZE, hva, file, Arc::new(())) }.unwrap()
}

fn gfn(raw: u64) -> Gfn {
    Gfn::new(raw).unwrap()
}

impl Host {
    /// With a table of one level, so pages below gfn 1024, in two blocks; no RAM yet. The model looks at the `live` pages.
    pub fn new(policy: &str, live: &[u64]) -> Self {
        Self::with_tables(policy, live, 1)
    }

    /// With a table of so many levels, and one page more for each than they need.
    pub fn with_tables(policy: &str, live: &[u64], levels: u8) -> Self {
        let indexes: Vec<_> = live.iter().map(|&page| gfn(page).leaf_index()).collect();
        let memory = Arc::new(Arena::new(usize::from(levels) + 1, &indexes));
        let iommu = Arc::new(Iommu::new(live));
        let bdf = Bdf::new(0x10).unwrap();
        let config = PinnerConfig::new(policy.parse().unwrap(), vec![bdf]);
        let mapper = Arc::clone(&iommu) as Arc<dyn DmaMapper>;
        let pinner = Pinner::new(Space(Arc::clone(&memory)), mapper, config).unwrap();
        let guest = GuestDtt::new(&*memory, &*memory, Levels::new(levels.into()).unwrap(), 4).unwrap();
        pinner.activate(guest.dtt().root(), levels.into()).unwrap();
        let service = Arc::new(Service::new(pinner, (0..VCPUS).map(|_| Word::default()).collect()).unwrap());
        Self { service, iommu, memory, guest, live: live.to_vec(), bdf }
    }

    pub fn pinner(&self) -> &Pinner<Space> {
        self.service.pinner()
    }

    pub fn with_ram(self, gfns: Range<u64>) -> Self {
        self.pinner().add_region(ram(&gfns)).unwrap();
        self
    }

    /// With pages that were pinned by one request, each live, unused since, and aged.
    pub fn with_idle(self, pages: Range<u64>) -> Self {
        let all: Vec<_> = pages.clone().collect();
        assert!(self.map(&all));
        self.unmap(&all);
        for page in all {
            self.guest.dtt().leaf_table(&*self.memory, gfn(page)).unwrap().leaf(gfn(page)).clear_accessed();
        }
        self
    }

    /// The guest maps pages for a device, as a driver does: it counts them, and asks for those that are not pinned, in one
    /// request. False, with nothing counted, if that fails.
    pub fn map(&self, pages: &[u64]) -> bool {
        self.map_by(pages, |missing| _ = self.ask(missing, &NOW))
    }

    /// The same, asking in this way.
    pub fn map_by(&self, pages: &[u64], ask: impl FnOnce(&[u64])) -> bool {
        let needs_pin =
            |&page: &u64| self.guest.map(&*self.memory, &*self.memory, gfn(page)).unwrap() == Mapped::NeedsPin;
        let missing: Vec<_> = pages.iter().copied().filter(needs_pin).collect();
        if !missing.is_empty() {
            ask(&missing);
        }
        let all_pinned = missing.iter().all(|&page| self.is_pinned(page));
        if !all_pinned {
            self.unmap(pages);
        }
        all_pinned
    }

    /// The guest asks for pages; its own thread serves it, as it does nothing else meanwhile.
    pub fn ask(&self, pages: &[u64], clock: &dyn Clock) -> PinResult {
        self.pinner().pin(self.word(pages), &mut Scratch::default(), clock)
    }

    /// What asks for pages.
    pub fn word(&self, pages: &[u64]) -> RequestWord {
        match *pages {
            [page] => RequestWord::page(gfn(page), self.bdf).unwrap(),
            _ => {
                let gfns: Vec<_> = pages.iter().map(|&page| gfn(page)).collect();
                // A place for each first page: no two guests ask for the same at once.
                write_batch(&*self.memory, Gpa::new(Arena::BYTES + pages[0] * PAGE_SIZE), self.bdf, &gfns).unwrap()
            }
        }
    }

    pub fn unmap(&self, pages: &[u64]) {
        for &page in pages {
            self.guest.unmap(&*self.memory, gfn(page)).unwrap();
        }
    }

    /// Maps pages, has a device use each, unmaps them. Whether they could be mapped.
    pub fn dma(&self, pages: &[u64]) -> bool {
        let mapped = self.map(pages);
        if mapped {
            pages.iter().for_each(|&page| self.iommu.access(page));
            self.unmap(pages);
        }
        mapped
    }

    pub fn is_pinned(&self, page: u64) -> bool {
        self.guest.is_pinned(&*self.memory, gfn(page)).unwrap()
    }

    /// A forced unpin to its end.
    pub fn force(&self, gfns: Range<u64>) -> (UnpinReport, Option<Hold>) {
        self.force_or(gfns, |unpin| unpin)
    }

    /// A forced unpin to its end, with nobody about for whom it should wait.
    pub fn force_at_once(&self, gfns: Range<u64>) -> (UnpinReport, Option<Hold>) {
        self.force_or(gfns, |unpin| panic!("for whom does it wait? {unpin:?}"))
    }

    fn force_or(&self, gfns: Range<u64>, wait: fn(ForcedUnpin) -> ForcedUnpin) -> (UnpinReport, Option<Hold>) {
        let bytes = (gfns.end - gfns.start) * PAGE_SIZE;
        let mut unpin = self.pinner().begin_unpin(Gpa::new(gfns.start * PAGE_SIZE), bytes, &NOW);
        loop {
            unpin = match self.pinner().step_unpin(unpin, &NOW) {
                UnpinStep::Done(report, hold) => return (report, hold),
                UnpinStep::More(unpin) => unpin,
                UnpinStep::Wait(unpin) => wait(unpin),
            };
            thread::yield_now();
        }
    }

    pub fn remove(&self, gfns: &Range<u64>) {
        self.pinner().remove_region(Gpa::new(gfns.start * PAGE_SIZE), (gfns.end - gfns.start) * PAGE_SIZE).unwrap();
    }

    /// What holds when all RAM is there and nobody is at work.
    pub fn check_at_rest(&self) {
        for &page in self.live.iter().filter(|&&page| self.has_table(page) && self.is_pinned(page)) {
            self.iommu.access(page);
        }
        let extents = self.pinner().extents().into_iter();
        let extents: Vec<_> = extents.map(|extent| extent.first.raw()..extent.first.raw() + extent.pages).collect();
        assert_eq!(extents, self.iommu.mappings(), "the IOMMU has what the books have");
        assert_eq!(self.pinner().mappings(), extents.len() as u64);
        assert_eq!(self.pinner().counters().anomalies, 0);
        assert_eq!(self.service.failure(), None);
    }

    fn has_table(&self, page: u64) -> bool {
        self.guest.dtt().leaf_table(&*self.memory, gfn(page)).is_ok()
    }
}

/// Runs the works, each in a thread of its own, the last in this one, and then looks at what is left.
pub fn together<const N: usize>(host: Host, works: [fn(&Host); N]) {
    let host = Arc::new(host);
    let (mine, theirs) = works.split_last().unwrap();
    let threads: Vec<_> = theirs
        .iter()
        .map(|&work| {
            let host = Arc::clone(&host);
            thread::spawn(move || work(&host))
        })
        .collect();
    mine(&host);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    host.check_at_rest();
}
