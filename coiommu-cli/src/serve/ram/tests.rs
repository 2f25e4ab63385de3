//! RAM against a plain model: a list of what is mapped, and for each page whether it was pinned when its RAM went.
//!
//! All that is RAM is pinned after each step, and then a device in software reads and writes it: so what is seen is at
//! once what the [`Space`] shows, which regions the pinner has, and what is behind them.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use coiommu_dtt::guest::{GuestDtt, TablePages, write_batch};
use coiommu_dtt::{Bdf, Gfn, Levels};
use coiommu_pin::request::Scratch;
use coiommu_pin::{DmaMapper, PinnerConfig, Policy, SystemClock};
use coiommu_vfio::SoftIommu;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes as _, GuestMemoryBackend as _, GuestMemoryMmap, GuestRegionMmap};

use super::*;

/// The guest's pages that are looked at: on both sides of a border of the pinner's blocks.
const FIRST: u64 = 0x3f8;
const PAGES: u64 = 24;
/// Pages of the files that RAM is made of.
const FILES: [u64; 3] = [16, 16, 5];
/// Where the tables are, in a file of their own that is always there.
const TABLES: u64 = 64 * PAGE_SIZE;
const BATCH: Gpa = Gpa::new(PAGE_SIZE);

/// A place in a file, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    file: usize,
    page: u64,
}

/// What is behind a map.
#[derive(Clone, Copy, Debug)]
enum Behind {
    Nothing,
    /// Without the write flag.
    Rom(Place),
    Ram(Place),
    /// That begins so many bytes after a page does.
    Within(Place, u64),
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Map {
        page: u64,
        pages: u64,
        behind: Behind,
    },
    /// What is mapped, if so much is: the nth.
    Unmap(usize),
    /// A range, be it mapped or not.
    UnmapRange {
        page: u64,
        pages: u64,
    },
    UnmapAll,
}

fn places() -> impl Strategy<Value = Place> {
    (0..FILES.len(), 0_u64..18).prop_map(|(file, page)| Place { file, page })
}

fn steps() -> impl Strategy<Value = Step> {
    let behind = prop_oneof![
        1 => Just(Behind::Nothing),
        1 => places().prop_map(Behind::Rom),
        1 => (places(), 1..PAGE_SIZE).prop_map(|(place, bytes)| Behind::Within(place, bytes)),
        8 => places().prop_map(Behind::Ram),
        // As where it was, so often enough that RAM comes back.
        8 => (0..2_usize).prop_map(|file| Behind::Ram(Place { file, page: u64::MAX })),
    ];
    let range = (0..PAGES).prop_flat_map(|page| (Just(page), 1..=(PAGES - page).min(9)));
    prop_oneof![
        10 => (range.clone(), behind).prop_map(|((page, pages), behind)| {
            // At the place in its file that goes with its address.
            let behind = match behind {
                Behind::Ram(Place { file, page: u64::MAX }) => Behind::Ram(Place { file, page: page % 16 }),
                other => other,
            };
            Step::Map { page, pages, behind }
        }),
        6 => (0..8_usize).prop_map(Step::Unmap),
        2 => range.prop_map(|(page, pages)| Step::UnmapRange { page, pages }),
        1 => Just(Step::UnmapAll),
    ]
}

/// What should be.
#[derive(Debug, Default)]
struct Model {
    /// By their first page: how many pages, and where the RAM is, if it is RAM.
    maps: BTreeMap<u64, (u64, Option<Place>)>,
    /// Pages that were pinned when their RAM went, and what that was.
    gone: BTreeMap<u64, Place>,
    /// Pages that are pinned.
    pinned: BTreeSet<u64>,
}

impl Model {
    /// The RAM there is, page by page.
    fn ram(&self) -> BTreeMap<u64, Place> {
        let ram = self.maps.iter().filter_map(|(&first, &(pages, place))| Some((first, pages, place?)));
        ram.flat_map(|(first, pages, Place { file, page })| {
            (0..pages).map(move |n| (first + n, Place { file, page: page + n }))
        })
        .collect()
    }

    fn map(&mut self, first: u64, pages: u64, behind: Behind) -> Result<(), Errno> {
        if self.maps.iter().any(|(&other, (length, _))| first < other + length && other < first + pages) {
            return Err(Errno::EXIST);
        }
        let place = match behind {
            Behind::Nothing | Behind::Rom(_) => None,
            Behind::Ram(place) if place.page + pages <= FILES[place.file] => Some(place),
            Behind::Ram(_) | Behind::Within(..) => return Err(Errno::INVAL),
        };
        self.maps.insert(first, (pages, place));
        for n in 0..pages {
            let Some(Place { file, page }) = place else { break };
            if self.gone.remove(&(first + n)) == Some(Place { file, page: page + n }) {
                self.pinned.insert(first + n);
            }
        }
        Ok(())
    }

    fn unmap(&mut self, first: u64, pages: u64) -> Result<(), Errno> {
        let ram = self.ram();
        self.maps.get(&first).filter(|(length, _)| *length == pages).ok_or(Errno::NOENT)?;
        self.maps.remove(&first);
        for page in first..first + pages {
            if self.pinned.remove(&page) {
                self.gone.insert(page, ram[&page]);
            }
        }
        Ok(())
    }
}

/// Pages of tables, one after the other.
struct Tables(AtomicU64);

impl TablePages for Tables {
    fn alloc(&self) -> Option<Gpa> {
        Some(Gpa::new(self.0.fetch_add(PAGE_SIZE, Relaxed)))
    }

    fn free(&self, _page: Gpa) {}
}

/// The code, and what it works on.
struct Rig {
    ram: Ram,
    pinner: Pinner<Space>,
    iommu: Arc<SoftIommu>,
    files: Vec<File>,
    tables: File,
    /// The guest's own view of its tables.
    guest: GuestMemoryMmap,
    table: GuestDtt,
    endpoint: Bdf,
    scratch: Scratch,
    stamp: u64,
}

fn memory_file(bytes: u64) -> File {
    let file = memfd_create("ram-test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, bytes).unwrap();
    file.into()
}

fn dma_map(gpa: u64, bytes: u64, flags: DmaFlags, file: Option<(&File, u64)>) -> DmaMap {
    let file = file.map(|(file, offset)| DmaFile { fd: file.try_clone().unwrap().into(), offset });
    DmaMap { range: DmaRange::new(gpa, bytes).unwrap(), flags, file }
}

const fn gpa_of(page: u64) -> u64 {
    (FIRST + page) * PAGE_SIZE
}

fn gfns() -> Vec<Gfn> {
    (0..PAGES).map(|page| Gfn::containing(Gpa::new(gpa_of(page)))).collect()
}

impl Rig {
    fn new(policy: Policy) -> Self {
        let files: Vec<_> = FILES.iter().map(|pages| memory_file(pages * PAGE_SIZE)).collect();
        for (number, (file, pages)) in files.iter().zip(FILES).enumerate() {
            (0..pages)
                .for_each(|page| file.write_all_at(&mark(Place { file: number, page }), page * PAGE_SIZE).unwrap());
        }
        let tables = memory_file(TABLES);
        let place = FileOffset::new(tables.try_clone().unwrap(), 0);
        let bytes = usize::try_from(TABLES).unwrap();
        let guest = GuestRegionMmap::from_range(GuestAddress(0), bytes, Some(place)).unwrap();
        let guest = GuestMemoryMmap::from_regions(vec![guest]).unwrap();
        let pages = Tables(AtomicU64::new(8 * PAGE_SIZE));
        let table = GuestDtt::new(&guest, &pages, Levels::new(4).unwrap(), 1).unwrap();
        for gfn in gfns() {
            let _needs_pin = table.map(&guest, &pages, gfn).unwrap();
        }
        let (mut ram, iommu) = (Ram::new(), Arc::new(SoftIommu::new()));
        let endpoint = Bdf::new(3 << 3).unwrap();
        let mapper = Arc::clone(&iommu) as Arc<dyn DmaMapper>;
        let pinner = Pinner::new(ram.space().clone(), mapper, PinnerConfig::new(policy, vec![endpoint])).unwrap();
        ram.map(dma_map(0, TABLES, DmaFlags::all(), Some((&tables, 0))), &pinner).unwrap();
        pinner.activate(table.dtt().root(), 4).unwrap();
        Self { ram, pinner, iommu, files, tables, guest, table, endpoint, scratch: Scratch::default(), stamp: 0 }
    }

    /// Does a step to both, and compares what came of it.
    fn step(&mut self, step: Step, model: &mut Model) -> Result<(), TestCaseError> {
        let (came, expected) = match step {
            Step::Map { page, pages, behind } => {
                let read_write = DmaFlags::READ | DmaFlags::WRITE;
                let (flags, place) = match behind {
                    Behind::Nothing => (read_write, None),
                    Behind::Rom(place) => (DmaFlags::READ, Some((place, 0))),
                    Behind::Ram(place) => (read_write, Some((place, 0))),
                    Behind::Within(place, bytes) => (read_write, Some((place, bytes))),
                };
                let file = place.map(|(place, bytes)| (&self.files[place.file], place.page * PAGE_SIZE + bytes));
                let map = dma_map(gpa_of(page), pages * PAGE_SIZE, flags, file);
                (self.ram.map(map, &self.pinner), model.map(page, pages, behind))
            }
            Step::Unmap(n) => {
                let Some((&page, &(pages, _))) = model.maps.iter().nth(n) else { return Ok(()) };
                (self.unmap(page, pages), model.unmap(page, pages))
            }
            Step::UnmapRange { page, pages } => (self.unmap(page, pages), model.unmap(page, pages)),
            Step::UnmapAll => {
                let maps: Vec<_> = model.maps.iter().map(|(&page, &(pages, _))| (page, pages)).collect();
                let expected = maps.into_iter().try_for_each(|(page, pages)| model.unmap(page, pages));
                let came = self.ram.unmap(DmaUnmap::All, &self.pinner);
                prop_assert_eq!((self.ram.bytes(), self.backings()), (0, 0));
                self.ram.map(dma_map(0, TABLES, DmaFlags::all(), Some((&self.tables, 0))), &self.pinner).unwrap();
                (came, expected)
            }
        };
        prop_assert_eq!(came.map_err(|error| error.errno()), expected);
        Ok(())
    }

    fn unmap(&mut self, page: u64, pages: u64) -> Result<(), RamError> {
        let range = DmaRange::new(gpa_of(page), pages * PAGE_SIZE).unwrap();
        self.ram.unmap(DmaUnmap::Range(range), &self.pinner)
    }

    /// How many files are mapped.
    fn backings(&self) -> usize {
        self.ram.backings.iter().filter(|backing| backing.strong_count() > 0).count()
    }

    /// Asks for all pages.
    fn pin(&mut self) {
        let request = write_batch(&self.guest, BATCH, self.endpoint, &gfns()).unwrap();
        let _not_all_are_ram = self.pinner.pin(request, &mut self.scratch, &SystemClock);
    }

    /// Sees what is where, from all sides.
    fn check(&mut self, model: &Model) -> Result<(), TestCaseError> {
        let ram = model.ram();
        let files: BTreeSet<_> = ram.values().map(|place| place.file).collect();
        prop_assert_eq!(self.backings(), files.len() + 1, "each file is mapped once, and the tables' file is");
        prop_assert_eq!(self.ram.bytes(), TABLES + ram.len() as u64 * PAGE_SIZE);
        let pinned: BTreeSet<_> = self
            .pinner
            .extents()
            .iter()
            .flat_map(|extent| (0..extent.pages).map(|n| extent.first.raw() + n - FIRST))
            .collect();
        prop_assert_eq!(&pinned, &model.pinned);
        for page in 0..PAGES {
            let (gpa, mut seen) = (gpa_of(page), [0; 8]);
            let by_device = self.iommu.read(gpa, &mut seen).is_ok().then_some(seen);
            let is_pinned = model.pinned.contains(&page);
            prop_assert_eq!(by_device, ram.get(&page).filter(|_| is_pinned).map(|&place| mark(place)), "page {}", page);
            let view = self.ram.space().memory();
            let by_host = view.read_slice(&mut seen, GuestAddress(gpa)).is_ok().then_some(seen);
            prop_assert_eq!(by_host, ram.get(&page).map(|&place| mark(place)), "page {}", page);
            let gfn = Gfn::containing(Gpa::new(gpa));
            if ram.contains_key(&page) {
                prop_assert_eq!(self.table.is_pinned(&self.guest, gfn).unwrap(), is_pinned, "page {}", page);
            }
        }
        self.check_views(model)
    }

    /// Sees that what one side writes, the others read; and that a piece ends where it ends.
    fn check_views(&mut self, model: &Model) -> Result<(), TestCaseError> {
        let ram = model.ram();
        let view = self.ram.space().memory();
        for (&page, place) in &ram {
            let last = GuestAddress(gpa_of(page) + PAGE_SIZE - 8);
            self.stamp += 1;
            view.write_obj(self.stamp, last).unwrap();
            let mut stamp = [0; 8];
            self.files[place.file].read_exact_at(&mut stamp, (place.page + 1) * PAGE_SIZE - 8).unwrap();
            prop_assert_eq!(u64::from_le_bytes(stamp), self.stamp);
            if model.pinned.contains(&page) {
                self.stamp += 1;
                self.iommu.write(last.0, &self.stamp.to_le_bytes()).unwrap();
                prop_assert_eq!(view.read_obj::<u64>(last).unwrap(), self.stamp);
            }
            let over = view.read_obj::<u64>(GuestAddress(gpa_of(page + 1) - 4));
            prop_assert_eq!(over.is_ok(), ram.contains_key(&(page + 1)), "over the end of page {}", page);
        }
        for piece in view.iter() {
            let slice = |offset: u64, count| piece.get_slice(MemoryRegionAddress(offset), count).is_ok();
            let all = [(0, piece.bytes), (piece.len(), 0), (0, piece.bytes + 1), (piece.len() - 4, 8), (u64::MAX, 2)];
            prop_assert_eq!(all.map(|(offset, count)| slice(offset, count)), [true, true, false, false, false]);
        }
        Ok(())
    }
}

/// What a page of a file begins with.
fn mark(Place { file, page }: Place) -> [u8; 8] {
    (((file as u64 + 1) << 32) | (page + 1)).to_le_bytes()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    #[test]
    fn ram_is_where_the_vmm_says(
        steps in proptest::collection::vec(steps(), 1..40),
        extent in prop_oneof![Just("page"), Just("run"), Just("aligned=64k")],
    ) {
        let (mut rig, mut model) = (Rig::new(format!("extent={extent}").parse().unwrap()), Model::default());
        for step in steps {
            rig.step(step, &mut model)?;
            rig.check(&model)?;
            rig.pin();
            model.pinned = model.ram().into_keys().collect();
            rig.check(&model)?;
        }
        prop_assert_eq!(rig.pinner.counters().anomalies, 0);
    }
}

#[test]
fn there_is_an_end_to_what_can_be_mapped() {
    let mut rig = Rig::new(Policy::default());
    let map = |n: u64| dma_map(1 << 40 | n << 12, PAGE_SIZE, DmaFlags::empty(), None);
    for n in 1..MOST as u64 {
        rig.ram.map(map(n), &rig.pinner).unwrap();
    }
    let refused = rig.ram.map(map(0), &rig.pinner).unwrap_err();
    assert_eq!(refused.errno(), Errno::NOSPC);
    rig.ram.unmap(DmaUnmap::Range(map(1).range), &rig.pinner).unwrap();
    rig.ram.map(map(0), &rig.pinner).unwrap();
}

#[test]
fn ram_that_stays_in_the_iommu_stays() {
    let mut rig = Rig::new(Policy::default());
    let mut model = Model::default();
    let place = Place { file: 0, page: 0 };
    rig.step(Step::Map { page: 0, pages: 4, behind: Behind::Ram(place) }, &mut model).unwrap();
    rig.pin();
    rig.iommu.fail_next_unmaps(u64::MAX, coiommu_pin::MapError::Fault);
    let range = DmaRange::new(gpa_of(0), 4 * PAGE_SIZE).unwrap();
    let stuck = rig.ram.unmap(DmaUnmap::Range(range), &rig.pinner).unwrap_err();
    assert_eq!(stuck.errno(), Errno::BUSY);
    // A device still reaches it, so it is still mapped here.
    let mut seen = [0; 8];
    rig.iommu.read(gpa_of(0), &mut seen).unwrap();
    assert_eq!((seen, rig.backings()), (mark(place), 2));
    rig.iommu.inject(|_| None);
}

#[test]
fn what_cannot_go_keeps_nothing_else() {
    let mut rig = Rig::new(Policy::default());
    let mut model = Model::default();
    for page in [0, 1, 2] {
        let behind = Behind::Ram(Place { file: 0, page });
        rig.step(Step::Map { page, pages: 1, behind }, &mut model).unwrap();
    }
    // Two of them are not the pinner's any more, which fails each in a way of its own.
    for page in [0, 2] {
        rig.pinner.remove_region(Gpa::new(gpa_of(page)), PAGE_SIZE).unwrap();
    }
    let failed = rig.ram.unmap(DmaUnmap::All, &rig.pinner).unwrap_err();
    assert!(matches!(failed, RamError::Region(RegionError::Unknown { gpa, .. }) if gpa.raw() == gpa_of(0)), "{failed}");
    assert_eq!(rig.ram.bytes(), 2 * PAGE_SIZE, "the tables have gone, and what is in the middle");
}
