//! The target `walk`: tables made of anything, walked by host and guest.
//!
//! An input is two bytes, which pieces of memory are there and whether the scribbler runs, then steps until it ends; all
//! numbers are little-endian. In quiet every walk is compared with one that is written down a second time ([`way`]), and
//! each step on a leaf with what it may change. With the scribbler, the same writes go on in a second thread throughout,
//! and what is left to say is: no panic, as many looks into memory as there are levels, and every leaf table lies in it.

use std::cell::Cell;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use arbitrary::Unstructured;
use coiommu_dtt::guest::{GuestDtt, GuestError, TablePages, write_batch};
use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::memory::{MemoryError, Word32};
use coiommu_dtt::walk::WalkError;
use coiommu_dtt::{Bdf, Dtt, Gfn, Gpa, Leaf, LeafEntry, LeafTable, Levels, Request, RequestWord, TableMemory};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::arena::host_address;
use crate::{Arena, Scribbler, Write, number};

/// Where memory can be, and how much: pages side by side, ends inside pages, the last page that an entry can name, and one
/// that none can.
pub const PLACES: [(u64, usize); 6] = [
    (0x1000, 0x3000),
    (0x4000, 0x1800),
    (0x10_0000, 0x800),
    (0x20_0000, 0x2000),
    (0x000f_ffff_ffff_f000, 0x1000),
    (1 << 52, 0x2000),
];

/// Pages that steps name by number: in memory, half in it, not in it.
pub const PAGES: [u64; 16] = [
    0x1000,
    0x2000,
    0x3000,
    0x4000,
    0x5000,
    0x6000,
    0x10_0000,
    0x20_0000,
    0x20_1000,
    0x000f_ffff_ffff_f000,
    1 << 52,
    (1 << 52) + 0x1000,
    0,
    0x7000,
    0x000f_ffff_ffff_e000,
    0xffff_ffff_ffff_f000,
];

const TABLE_BYTES: usize = 4096;
/// Bits 51:12 of a directory's entry.
const NEXT_TABLE: u64 = 0x000f_ffff_ffff_f000;
/// Bits that no step on a leaf may change.
const RESERVED: u32 = 0x3fff_0000;

/// What is made once.
struct Bench {
    arena: Arena,
    scribbler: Scribbler,
}

static BENCH: LazyLock<Mutex<Bench>> = LazyLock::new(|| {
    let arena = Arena::new(PLACES.map(|(gpa, bytes)| (gpa, bytes, None)));
    Mutex::new(Bench { arena, scribbler: Scribbler::default() })
});

/// Walks what an input describes.
///
/// # Panics
///
/// If something is wrong with a walk.
pub fn walk(input: &[u8]) {
    let bench = BENCH.lock().unwrap_or_else(PoisonError::into_inner);
    let mut input = Unstructured::new(input);
    let pieces = number::<u8>(&mut input);
    let is_quiet = number::<u8>(&mut input) & 1 == 0;
    bench.arena.wipe();
    let memory = Arc::new(bench.arena.show(pieces.into()));
    let mut steps = Vec::new();
    while !input.is_empty() {
        steps.push(step(&mut input));
    }
    let writes = steps.iter().filter_map(|step| if let Step::Write(write) = step { Some(*write) } else { None });
    let _scribbling = (!is_quiet).then(|| bench.scribbler.start(&memory, writes.collect()));
    let walker = Walker { memory: &memory, lookups: Cell::new(0), is_quiet, spare: Cell::new(0) };
    for step in steps {
        walker.play(step);
    }
}

/// One thing that host or guest does.
enum Step {
    Write(Write),
    Activate { root: u64, levels: u64 },
    Host { root: u64, levels: u8, gfn: Gfn, deeds: u8 },
    Guest { root: u64, levels: u8, gfn: Gfn },
    Batch { at: u64, gfns: u16 },
    Word(u64),
}

fn step(input: &mut Unstructured<'_>) -> Step {
    let page = |input: &mut Unstructured<'_>| PAGES[usize::from(number::<u8>(input) % 16)];
    match number::<u8>(input) % 8 {
        0 => {
            let at = page(input) + u64::from(number::<u16>(input) % 512) * 8;
            Step::Write(Write::U64(at, page(input) | u64::from(number::<u8>(input))))
        }
        1 => Step::Write(Write::U64(page(input) + u64::from(number::<u16>(input)) % 4096, number(input))),
        2 => Step::Write(Write::U32(page(input) + u64::from(number::<u16>(input) % 1024) * 4, number(input))),
        3 | 4 => Step::Host { root: page(input), levels: number(input), gfn: gfn(input), deeds: number(input) },
        5 => Step::Guest { root: page(input), levels: number(input), gfn: gfn(input) },
        6 => Step::Activate { root: number(input), levels: number::<u8>(input).into() },
        _ if number::<u8>(input) & 1 == 0 => Step::Batch { at: number(input), gfns: number(input) },
        _ => Step::Word(number(input)),
    }
}

fn gfn(input: &mut Unstructured<'_>) -> Gfn {
    Gfn::containing(Gpa::new(number(input)))
}

struct Walker<'m> {
    memory: &'m GuestMemoryMmap,
    /// How many times tables were looked up.
    lookups: Cell<u32>,
    is_quiet: bool,
    /// Pages given to the guest for its tables.
    spare: Cell<u64>,
}

impl Walker<'_> {
    fn play(&self, step: Step) {
        match step {
            Step::Write(write) => write.to(self.memory),
            Step::Activate { root, levels } => self.activate(root, levels),
            Step::Host { root, levels, gfn, deeds } => self.host(root, levels, gfn, deeds),
            Step::Guest { root, levels, gfn } => self.guest(root, levels, gfn),
            Step::Batch { at, gfns } => self.batch(at, gfns),
            Step::Word(raw) => decode(raw),
        }
    }

    fn activate(&self, root: u64, levels: u64) {
        let is_table = root != 0 && root & !NEXT_TABLE == 0 && host_address(self.memory, root, TABLE_BYTES).is_some();
        assert_eq!(Dtt::new(self, Gpa::new(root), levels).is_ok(), is_table && (1..=5).contains(&levels));
    }

    fn host(&self, root: u64, levels: u8, gfn: Gfn, deeds: u8) {
        let Ok(dtt) = Dtt::new(self, Gpa::new(root), u64::from(levels % 8)) else { return };
        // There, to its neighbours of each level, which are found from what is remembered of the way, and back.
        let mut walker = coiommu_dtt::Walker::new(dtt, self);
        for step in [0, 1, 1 << 10, 1 << 11, 1 << 19, 1 << 28, 0] {
            let there = Gfn::new(gfn.raw() ^ step).unwrap_or(gfn);
            let found = self.bounded(|| walker.leaf_table(there));
            if self.is_quiet {
                self.compare(dtt, there, found);
            }
            if let Ok(table) = found {
                self.check_place(table);
            }
        }
        if let Ok(table) = self.bounded(|| dtt.leaf_table(self, gfn)) {
            self.check_place(table);
            self.work(table.leaf(gfn), deeds);
        }
    }

    /// What a walk found is what there is.
    fn compare(&self, dtt: Dtt, gfn: Gfn, found: Result<LeafTable<'_, impl Word32>, WalkError>) {
        let expected = way(self.memory, dtt.root().raw(), dtt.levels().get(), gfn);
        match (found, expected) {
            (Ok(table), Way::Leaf(gpa)) => {
                let there = host_address(self.memory, gpa, TABLE_BYTES);
                assert_eq!(Some(table.words().as_ptr().addr()), there, "the leaf table is at {gpa:#x}");
            }
            (Err(WalkError::Beyond { .. }), Way::Beyond) => {}
            (Err(WalkError::NotPresent { level, .. }), Way::Ends(at)) => assert_eq!(level, at),
            (Err(WalkError::Unreadable(MemoryError::Absent { at, .. })), Way::Absent(gpa)) => assert_eq!(at.raw(), gpa),
            (found, expected) => panic!("gfn {gfn}: {found:?}, but {expected:?}"),
        }
    }

    /// Runs a walk, which may look at no more tables than five.
    fn bounded<T>(&self, walk: impl FnOnce() -> T) -> T {
        self.lookups.set(0);
        let result = walk();
        assert!(self.lookups.get() <= 5, "{} tables were looked at", self.lookups.get());
        result
    }

    /// A leaf table that is lent out lies in memory.
    fn check_place(&self, table: LeafTable<'_, impl Word32>) {
        let start = table.words().as_ptr().addr();
        let is_there = |(gpa, bytes): (u64, usize)| {
            host_address(self.memory, gpa, bytes)
                .is_some_and(|host| host <= start && start + TABLE_BYTES <= host + bytes)
        };
        assert!(PLACES.into_iter().any(is_there), "a leaf table at {start:#x} is not in guest memory");
    }

    /// The host's steps on a leaf, some of them.
    fn work(&self, leaf: Leaf<'_, impl Word32>, deeds: u8) {
        let [pinned, accessed] = [LeafEntry::PINNED.bits(), LeafEntry::ACCESSED.bits()];
        for deed in (0..5).filter(|deed| deeds >> deed & 1 == 1) {
            let old = leaf.load();
            let expected = match deed {
                0 => (leaf.set_pinned(), old.bits() | pinned).1,
                1 => (leaf.clear_accessed(), old.bits() & !accessed).1,
                2 => match leaf.try_unpin() {
                    Ok(()) if old.is_idle() => old.bits() & !pinned,
                    Err(refusing) if refusing == old && !old.is_idle() => old.bits(),
                    result => {
                        assert!(!self.is_quiet, "{old:?} unpinned: {result:?}");
                        continue;
                    }
                },
                3 => (leaf.clear_pinned(), old.bits() & !pinned).1,
                _ => {
                    assert!(!self.is_quiet || leaf.is_pinned() == old.contains(LeafEntry::PINNED));
                    old.bits()
                }
            };
            assert!(!self.is_quiet || leaf.load().bits() == expected, "deed {deed} on {old:?}");
        }
    }

    fn guest(&self, root: u64, levels: u8, gfn: Gfn) {
        let Ok(levels) = Levels::new(u64::from(levels % 8)) else { return };
        let root = Root { walker: self, root: Cell::new(Some(root)) };
        let Ok(guest) = GuestDtt::new(self, &root, levels, 8) else { return };
        match self.bounded(|| guest.leaf_table(self, &root, gfn)) {
            Ok(table) => {
                self.check_place(table);
                self.count(table.leaf(gfn), guest.count_limit());
            }
            Err(GuestError::BadDirectory(raw)) => assert!(raw & 1 == 0 && raw != 0, "{raw:#x} is a table, or none yet"),
            Err(GuestError::Walk(WalkError::NotPresent { .. })) => panic!("the guest makes what is missing"),
            Err(_) => {}
        }
        // Each looks for itself: by the next step, its own count may have led the table elsewhere.
        let _ = self.bounded(|| guest.map(self, &root, gfn));
        let _ = self.bounded(|| guest.is_pinned(self, gfn));
        let _ = self.bounded(|| guest.unmap(self, gfn));
    }

    /// A guest's map and unmap of a page.
    fn count(&self, leaf: Leaf<'_, impl Word32>, limit: u32) {
        let old = leaf.load();
        let mapped = leaf.guest_map(limit);
        if !self.is_quiet {
            let _ = leaf.guest_unmap();
            return;
        }
        if let Ok(mapped) = mapped {
            assert_eq!(mapped == Mapped::Pinned, old.contains(LeafEntry::PINNED));
            assert_eq!(leaf.load().count(), old.count() + 1);
            leaf.guest_unmap().expect("it is counted");
            assert_eq!(leaf.load(), old | LeafEntry::ACCESSED);
        } else {
            assert!(old.count() >= limit && leaf.load() == old);
        }
        assert_eq!(leaf.load().bits() & RESERVED, old.bits() & RESERVED);
    }

    fn batch(&self, at: u64, gfns: u16) {
        let gfns: Vec<_> = (0..u64::from(gfns % 2048)).filter_map(Gfn::new).collect();
        if let Ok(word) = write_batch(self, Gpa::new(at), Bdf::new(8).expect("not 0"), &gfns) {
            assert!(is_memory(self.memory, at, 16 + 8 * gfns.len()), "written where nothing is");
            assert_eq!(word.raw(), at | 1 << 63);
        }
    }
}

/// A request word of any kind reads as something that writes the same word again, or as nothing.
fn decode(raw: u64) {
    let Some(word) = RequestWord::from_raw(raw) else {
        assert_eq!(raw, 0);
        return;
    };
    let again = match word.decode() {
        Ok(Request::Page { gfn, bdf }) => RequestWord::page(gfn, bdf),
        Ok(Request::Batch { header }) => RequestWord::batch(header),
        Err(_) => {
            assert_eq!(raw & 0xffff, 0, "a BDF is there");
            return;
        }
    };
    assert_eq!(again, Some(word));
}

fn is_memory(memory: &GuestMemoryMmap, at: u64, bytes: usize) -> bool {
    memory.read_slice(&mut vec![0; bytes], GuestAddress(at)).is_ok()
}

/// Memory for the code under test, which counts what it lends out.
impl TableMemory for Walker<'_> {
    type U32 = <GuestMemoryMmap as TableMemory>::U32;
    type U64 = <GuestMemoryMmap as TableMemory>::U64;

    fn words32(&self, at: Gpa, count: usize) -> Result<&[Self::U32], MemoryError> {
        self.lookups.set(self.lookups.get() + 1);
        self.memory.words32(at, count)
    }

    fn words64(&self, at: Gpa, count: usize) -> Result<&[Self::U64], MemoryError> {
        self.lookups.set(self.lookups.get() + 1);
        self.memory.words64(at, count)
    }

    fn piece32(&self, at: Gpa, count: usize) -> Result<(&[Self::U32], usize), MemoryError> {
        self.lookups.set(self.lookups.get() + 1);
        self.memory.piece32(at, count)
    }

    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        TableMemory::read(self.memory, at, into)
    }

    fn write(&self, at: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        TableMemory::write(self.memory, at, from)
    }
}

/// Gives the guest a root that an input has filled, then pages that nothing names, then none.
struct Root<'w, 'm> {
    walker: &'w Walker<'m>,
    root: Cell<Option<u64>>,
}

impl TablePages for Root<'_, '_> {
    fn alloc(&self) -> Option<Gpa> {
        const FIRST: u64 = 0x20_0000;
        self.root.take().map(Gpa::new).or_else(|| {
            let spare = self.walker.spare.get();
            self.walker.spare.set(spare + 1);
            (spare < 2).then(|| Gpa::new(FIRST + spare * 0x1000))
        })
    }

    fn free(&self, page: Gpa) {
        assert!(page.is_page_aligned());
    }
}

/// Where the way to a leaf leads.
#[derive(Debug)]
enum Way {
    Leaf(u64),
    /// The directory of this level has nothing.
    Ends(u8),
    /// No memory for the table that should be here.
    Absent(u64),
    Beyond,
}

/// The walk once more, by the contract's words: index at level 1 is `gfn & 0x3ff`, at level n
/// `(gfn >> (10 + 9*(n-2))) & 0x1ff`.
fn way(memory: &GuestMemoryMmap, root: u64, levels: u8, gfn: Gfn) -> Way {
    if gfn.raw() >> (10 + 9 * (levels - 1)) != 0 {
        return Way::Beyond;
    }
    let mut table = root;
    for level in (1..=levels).rev() {
        if host_address(memory, table, TABLE_BYTES).is_none() {
            return Way::Absent(table);
        }
        if level == 1 {
            break;
        }
        let index = (gfn.raw() >> (10 + 9 * (level - 2))) & 0x1ff;
        let entry = memory.load::<u64>(GuestAddress(table + 8 * index), Relaxed).unwrap_or(0);
        if entry & 1 == 0 {
            return Way::Ends(level);
        }
        table = entry & NEXT_TABLE;
    }
    Way::Leaf(table)
}
