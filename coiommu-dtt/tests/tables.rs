//! Tables in real guest memory, built by the guest's side and walked by the host's.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use coiommu_dtt::guest::{GuestDtt, GuestError, TablePages, write_batch};
use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::notify::BatchHeader;
use coiommu_dtt::walk::{DttError, WalkError};
use coiommu_dtt::{Bdf, Dtt, Gfn, Gpa, Levels, MemoryError, Request, TableMemory, Walker};
use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use zerocopy::FromBytes;

/// How much a test of many does.
const MANY: u64 = if cfg!(miri) { 16 } else { 2048 };
const RAM: u64 = 8 << 20;
const RAM_BYTES: usize = 8 << 20;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap()
}

fn gfn(raw: u64) -> Gfn {
    Gfn::new(raw).unwrap()
}

/// Pages from 1 MiB up, one after the other.
#[derive(Debug)]
struct Bump(AtomicU64);

impl Bump {
    fn new() -> Self {
        Self(AtomicU64::new(1 << 20))
    }

    fn used(&self) -> u64 {
        (self.0.load(Ordering::Relaxed) - (1 << 20)) / 4096
    }
}

impl TablePages for Bump {
    fn alloc(&self) -> Option<Gpa> {
        let page = self.0.fetch_add(4096, Ordering::Relaxed);
        (page < RAM).then_some(Gpa::new(page))
    }

    fn free(&self, _page: Gpa) {}
}

#[test]
fn a_directory_is_laid_out_as_the_contract_says() {
    let (mem, pages) = (memory(), Bump::new());
    let guest = GuestDtt::new(&mem, &pages, Levels::new(3).unwrap(), 2).unwrap();
    let page = gfn((5 << 19) | (7 << 10) | 9);
    assert_eq!(guest.map(&mem, &pages, page), Ok(Mapped::NeedsPin));
    let word = |at: u64| mem.words64(Gpa::new(at), 1).unwrap()[0].load(Ordering::Relaxed);
    let [root, middle, leaf] = [0x10_0000, 0x10_1000, 0x10_2000];
    assert_eq!(guest.dtt().root(), Gpa::new(root));
    assert_eq!(word(root + 5 * 8), middle | 1);
    assert_eq!(word(middle + 7 * 8), leaf | 1);
    assert_eq!(mem.words32(Gpa::new(leaf + 9 * 4), 1).unwrap()[0].load(Ordering::Relaxed), 0x4000_0001);
    assert_eq!(pages.used(), 3);
}

#[test]
fn a_walk_ignores_the_bits_that_mean_nothing_and_stops_at_those_that_do() {
    let (mem, pages) = (memory(), Bump::new());
    let guest = GuestDtt::new(&mem, &pages, Levels::new(2).unwrap(), 1).unwrap();
    let page = gfn(1024 * 3);
    let (dtt, entry) = (guest.dtt(), &mem.words64(guest.dtt().root(), 512).unwrap()[3]);
    assert_eq!(dtt.leaf_table(&mem, page).unwrap_err(), WalkError::NotPresent { gfn: page, level: 2 });
    // Every ignored bit set: the same table.
    entry.store(0xfff0_0000_0000_0ffe | 0x20_0001, Ordering::Relaxed);
    dtt.leaf_table(&mem, page).unwrap().leaf(page).set_pinned();
    assert_eq!(mem.words32(Gpa::new(0x20_0000), 1).unwrap()[0].load(Ordering::Relaxed), 1 << 31);
    // Not present, whatever else is there.
    entry.store(0x20_0000, Ordering::Relaxed);
    assert!(matches!(dtt.leaf_table(&mem, page), Err(WalkError::NotPresent { .. })));
    // Where there is no RAM, partly or at all.
    for table in [RAM, 0x000f_ffff_ffff_f000] {
        entry.store(table | 1, Ordering::Relaxed);
        assert!(matches!(dtt.leaf_table(&mem, page), Err(WalkError::Unreadable(MemoryError::Absent { .. }))));
    }
    let far = gfn(1 << 19);
    assert_eq!(dtt.leaf_table(&mem, far).unwrap_err(), WalkError::Beyond { gfn: far, levels: dtt.levels() });
}

#[test]
fn a_table_that_points_to_itself_is_walked_once_a_level() {
    let mem = memory();
    let root = Gpa::new(0x1000);
    let dtt = Dtt::new(&mem, root, 5).unwrap();
    for word in mem.words64(root, 512).unwrap() {
        word.store(root.raw() | 1, Ordering::Relaxed);
    }
    let leaf = dtt.leaf_table(&mem, gfn(0x3ff_ffff_ffff)).unwrap().leaf(gfn(0x3ff_ffff_ffff));
    assert_eq!(leaf.load().bits(), 0, "the root's upper half words as leaves");
}

#[test]
fn a_root_that_cannot_be_one_is_refused() {
    let mem = memory();
    for bad in [0, 0x1001, 0x1800, 1 << 52, u64::MAX] {
        assert_eq!(Dtt::new(&mem, Gpa::new(bad), 4), Err(DttError::Root(Gpa::new(bad))));
    }
    assert!(matches!(Dtt::new(&mem, Gpa::new(RAM), 4), Err(DttError::Absent(_))));
    assert!(matches!(Dtt::new(&mem, Gpa::new(0x1000), 6), Err(DttError::Levels(_))));
}

#[test]
fn words_outside_ram_or_off_their_place_are_refused() {
    let mem = memory();
    assert!(matches!(mem.words32(Gpa::new(RAM - 4), 2), Err(MemoryError::Absent { .. })));
    assert!(matches!(mem.words32(Gpa::new(2), 1), Err(MemoryError::Misaligned { .. })));
    assert!(matches!(mem.words64(Gpa::new(4), 1), Err(MemoryError::Misaligned { .. })));
    assert!(matches!(mem.words64(Gpa::new(0), usize::MAX), Err(MemoryError::Absent { .. })));
    assert!(matches!(mem.read(Gpa::new(RAM - 1), &mut [0; 2]), Err(MemoryError::Absent { .. })));
}

#[test]
fn counts_stop_short_of_wrapping_in_both_directions() {
    let (mem, pages) = (memory(), Bump::new());
    // Miri counts slowly.
    let cpus = if cfg!(miri) { 0xffff - 30 } else { 1024 };
    let guest = GuestDtt::new(&mem, &pages, Levels::new(4).unwrap(), cpus).unwrap();
    let page = gfn(77);
    let limit = 0xffff - cpus;
    for _ in 0..limit {
        assert_eq!(guest.map(&mem, &pages, page), Ok(Mapped::NeedsPin));
    }
    assert!(matches!(guest.map(&mem, &pages, page), Err(GuestError::CountLimit(_))));
    for _ in 0..limit {
        guest.unmap(&mem, page).unwrap();
    }
    assert!(matches!(guest.unmap(&mem, page), Err(GuestError::NotMapped(_))));
    assert!(matches!(guest.unmap(&mem, gfn(1 << 20)), Err(GuestError::Walk(WalkError::NotPresent { .. }))));
}

#[test]
fn a_table_without_pages_left_says_so() {
    let mem = memory();
    let pages = Bump(AtomicU64::new(RAM - 4096));
    let guest = GuestDtt::new(&mem, &pages, Levels::new(4).unwrap(), 1).unwrap();
    assert_eq!(guest.map(&mem, &pages, gfn(1)), Err(GuestError::NoTablePage));
}

/// Another CPU, which enters its table just before ours, and writes again just after.
struct Rival<'m> {
    entry: &'m AtomicU64,
}

impl TablePages for Rival<'_> {
    fn alloc(&self) -> Option<Gpa> {
        self.entry.store(0x20_0001, Ordering::Relaxed);
        Some(Gpa::new(0x30_0000))
    }

    fn free(&self, page: Gpa) {
        assert_eq!(page, Gpa::new(0x30_0000));
        self.entry.store(2, Ordering::Relaxed);
    }
}

#[test]
fn a_table_that_another_cpu_entered_is_read_once() {
    let (mem, pages) = (memory(), Bump::new());
    let guest = GuestDtt::new(&mem, &pages, Levels::new(2).unwrap(), 2).unwrap();
    let entry = &mem.words64(guest.dtt().root(), 1).unwrap()[0];
    let table = guest.leaf_table(&mem, &Rival { entry }, gfn(1)).unwrap();
    let theirs = &mem.words32(Gpa::new(0x20_0000), 1).unwrap()[0];
    assert!(std::ptr::eq(&raw const table.words()[0], theirs));
}

#[test]
fn many_cpus_that_map_at_once_share_one_table() {
    let (mem, pages) = (memory(), Bump::new());
    let guest = GuestDtt::new(&mem, &pages, Levels::new(5).unwrap(), 4).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for n in 0..MANY {
                    let _ = guest.map(&mem, &pages, gfn(n * 61)).unwrap();
                }
            });
        }
    });
    for n in 0..MANY {
        assert_eq!(guest.dtt().leaf_table(&mem, gfn(n * 61)).unwrap().leaf(gfn(n * 61)).load().count(), 4);
    }
}

/// Memory in two pieces, so that tables are in one or the other.
fn memory_in_two() -> GuestMemoryMmap {
    let half = GuestAddress(RAM / 2);
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM_BYTES / 2), (half, RAM_BYTES / 2)]).unwrap()
}

/// Pages from everywhere in [`RAM`] by turns.
struct Scattered(AtomicU64);

impl TablePages for Scattered {
    fn alloc(&self) -> Option<Gpa> {
        let n = self.0.fetch_add(1, Ordering::Relaxed);
        (n < 2000).then_some(Gpa::new((1 + n * 1021 % 2047) << 12))
    }

    fn free(&self, _page: Gpa) {}
}

#[test]
fn a_guest_knows_its_limit_and_sees_what_is_pinned() {
    let (mem, pages) = (memory(), Bump::new());
    let guest = GuestDtt::new(&mem, &pages, Levels::new(2).unwrap(), 15).unwrap();
    assert_eq!(guest.count_limit(), 0xfff0);
    let page = gfn(1);
    assert_eq!(guest.map(&mem, &pages, page), Ok(Mapped::NeedsPin));
    assert_eq!(guest.is_pinned(&mem, page), Ok(false));
    guest.dtt().leaf_table(&mem, page).unwrap().leaf(page).set_pinned();
    assert_eq!(guest.is_pinned(&mem, page), Ok(true));
    let never = gfn(1024);
    assert_eq!(guest.is_pinned(&mem, never), Err(WalkError::NotPresent { gfn: never, level: 2 }));
}

#[test]
fn errors_name_the_place_and_its_size() {
    let mem = memory();
    let absent = Dtt::new(&mem, Gpa::new(RAM), 1).unwrap_err();
    assert_eq!(absent.to_string(), "the root table cannot be read: no guest memory of 4096 bytes at 0x800000");
    let at = Gpa::new(RAM - 8);
    let bytes = 16 + 2 * 8;
    assert_eq!(
        write_batch(&mem, Gpa::new(RAM), Bdf::new(1).unwrap(), &[gfn(1)]),
        Err(MemoryError::Absent { at: Gpa::new(RAM), bytes: 16 })
    );
    assert_eq!(mem.read(at, &mut [0; 32]), Err(MemoryError::Absent { at, bytes }));
    // An address that fits into no request, in memory that is everywhere.
    let everywhere = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(1 << 63), 4096)]).unwrap();
    let at = Gpa::new(1 << 63);
    let refused = write_batch(&everywhere, at, Bdf::new(1).unwrap(), &[gfn(1), gfn(2)]);
    assert_eq!(refused, Err(MemoryError::Absent { at, bytes }));
}

proptest! {
    /// A walker finds the very tables that walks anew find, whatever it remembers.
    #[test]
    fn a_walker_goes_where_a_walk_goes(
        levels in 1_u64..=5,
        raws in prop::collection::vec(prop_oneof![
            4 => (0_u64..4, 0_u64..3, 0_u64..1024).prop_map(|(far, near, page)| far << 19 | near << 10 | page),
            1 => any::<u64>().prop_map(|raw| raw >> 18),
        ], 1..30),
        made in prop::collection::vec(any::<bool>(), 30),
    ) {
        let (mem, pages) = (memory_in_two(), Scattered(AtomicU64::new(0)));
        let guest = GuestDtt::new(&mem, &pages, Levels::new(levels).unwrap(), 1).unwrap();
        for (&raw, made) in raws.iter().zip(made) {
            if made {
                let _ = guest.leaf_table(&mem, &pages, gfn(raw));
            }
        }
        let mut walker = Walker::new(guest.dtt(), &mem);
        for &raw in raws.iter().chain(raws.iter().rev()) {
            let (fresh, found) = (guest.dtt().leaf_table(&mem, gfn(raw)), walker.leaf_table(gfn(raw)));
            match (fresh, found) {
                (Ok(fresh), Ok(found)) => prop_assert!(std::ptr::eq(fresh.words(), found.words()), "{raw:#x}"),
                (fresh, found) => prop_assert_eq!(fresh.unwrap_err(), found.unwrap_err()),
            }
        }
    }

    /// What a guest maps is what a host finds, and nothing else; and the tables are as many as the pages need.
    #[test]
    fn a_host_finds_what_a_guest_mapped(
        levels in 1_u64..=5,
        raws in prop::collection::btree_set(prop_oneof![0_u64..3000, any::<u64>().prop_map(|raw| raw >> 18)], 1..40),
    ) {
        let (mem, pages) = (memory(), Bump::new());
        let levels = Levels::new(levels).unwrap();
        let guest = GuestDtt::new(&mem, &pages, levels, 1).unwrap();
        let mut mapped = BTreeSet::new();
        for page in raws.iter().map(|&raw| gfn(raw)) {
            match guest.map(&mem, &pages, page) {
                Ok(found) => {
                    prop_assert_eq!(found, Mapped::NeedsPin);
                    prop_assert!(levels.cover(page));
                    mapped.insert(page);
                }
                Err(error) => {
                    prop_assert!(!levels.cover(page));
                    prop_assert_eq!(error, GuestError::Walk(WalkError::Beyond { gfn: page, levels }));
                }
            }
        }
        let leaves: BTreeSet<_> = mapped.iter().map(|page| page.raw() >> 10).collect();
        let tables = |bits: u32| leaves.iter().map(|leaf| leaf >> bits).collect::<BTreeSet<_>>().len();
        let expected: usize = (0..u32::from(levels.get()) - 1).map(|n| tables(9 * n)).sum();
        prop_assert_eq!(pages.used(), expected as u64 + 1);
        for &leaf in &leaves {
            let table = guest.dtt().leaf_table(&mem, gfn(leaf << 10)).unwrap();
            for (n, page) in (leaf << 10..(leaf + 1) << 10).enumerate() {
                let counted = u32::from(mapped.contains(&gfn(page)));
                prop_assert_eq!(table.words()[n].load(Ordering::Relaxed) & 0xffff, counted);
            }
        }
    }

    #[test]
    fn a_batch_is_written_as_the_contract_says(raws in prop::collection::vec(0..=Gfn::MAX.raw(), 0..300)) {
        let mem = memory();
        let gfns: Vec<_> = raws.iter().map(|&raw| gfn(raw)).collect();
        let at = Gpa::new(0x3008);
        let word = write_batch(&mem, at, Bdf::new(0x18).unwrap(), &gfns).unwrap();
        prop_assert_eq!(word.decode(), Ok(Request::Batch { header: at }));
        let mut bytes = vec![0; 16 + 8 * raws.len()];
        mem.read(at, &mut bytes).unwrap();
        let (header, list) = BatchHeader::ref_from_prefix(&bytes).unwrap();
        prop_assert_eq!(header.bdf.get(), 0x18);
        prop_assert_eq!(header.nr_pages.get(), raws.len() as u64);
        let listed: Vec<_> = list.chunks(8).map(|gfn| u64::from_le_bytes(gfn.try_into().unwrap())).collect();
        prop_assert_eq!(listed, raws);
    }
}
