//! What the benches stand on: a guest's memory with its table, and the three that are timed on it.
//!
//! | file | what is there |
//! | --- | --- |
//! | `mod.rs` | [`Bed`]: sparse guest memory, a table whose pages are there before anything is timed, requests |
//! | `nothing.rs` | a mapper that does nothing, of the tests' rig |
//! | `uring.rs` | a mapper that really pins, through io_uring |
//! | `ours.rs` | the pinner of this crate, called as a worker calls it |
//! | `rival.rs` | a plain pinner, page by page |
//! | `floor.rs` | loops that do the one thing that cannot be left out |
//! | `contest.rs` | scenes and contenders, and the time that a contender takes |
//! | `scenes.rs`, `pins.rs`, `ticks.rs`, `team.rs`, `drain.rs` | what is timed: each scene puts its contenders through the same work |
#![allow(dead_code, reason = "a module of several benches, each of which uses its part")]

pub(crate) mod contest;
mod drain;
mod floor;
#[path = "../../tests/rig/nothing.rs"]
mod nothing;
pub(crate) mod ours;
mod pins;
mod rival;
pub(crate) mod scenes;
mod team;
mod ticks;
mod uring;

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};

use coiommu_dtt::guest::{GuestDtt, TablePages, write_batch};
use coiommu_dtt::{Bdf, Gfn, Gpa, LeafEntry, LeafTable, Levels, PAGE_SIZE, RequestWord};
use coiommu_pin::Backing;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

pub(crate) type Space = Arc<GuestMemoryMmap>;

/// The pages of a block of the pin map: 2 MiB.
pub(crate) const BLOCK: u64 = 512;
/// Entries of a leaf table.
const LEAVES: u64 = 1024;
/// Where the guest keeps its table and its batches, out of the way of the RAM that devices use.
const DESK: u64 = 1 << 40;

/// A guest: RAM that costs nothing until it is touched, and a table for all of it, or for a part.
pub(crate) struct Bed {
    pub(crate) memory: Space,
    pub(crate) ram: Arc<GuestRegionMmap>,
    pub(crate) guest: GuestDtt,
    pub(crate) bdf: Bdf,
    desk: Desk,
}

/// Hands out the guest's own pages.
#[derive(Debug)]
struct Desk(AtomicU64);

impl Desk {
    fn take(&self, bytes: u64) -> Gpa {
        Gpa::new(self.0.fetch_add(bytes.next_multiple_of(PAGE_SIZE), Relaxed))
    }
}

impl TablePages for Desk {
    fn alloc(&self) -> Option<Gpa> {
        Some(self.take(PAGE_SIZE))
    }

    fn free(&self, _page: Gpa) {}
}

/// A batch in guest memory, and its pages.
pub(crate) struct Batch {
    pub(crate) word: RequestWord,
    pub(crate) gfns: Vec<u64>,
}

pub(crate) fn gfn(raw: u64) -> Gfn {
    Gfn::new(raw).expect("beds are smaller than an address space")
}

impl Bed {
    /// A guest with RAM of so many bytes from 0 up, and no tables but the root. It lives as long as the bench.
    pub(crate) fn new(ram_bytes: u64) -> &'static Self {
        let region = |at: u64, bytes: u64| {
            let bytes = usize::try_from(bytes).expect("64-bit machines only");
            Arc::new(GuestRegionMmap::from_range(GuestAddress(at), bytes, None).expect("sparse memory"))
        };
        let ram = region(0, ram_bytes);
        let regions = vec![Arc::clone(&ram), region(DESK, 512 << 20)];
        let memory = Arc::new(GuestMemoryMmap::from_arc_regions(regions).expect("two regions that do not touch"));
        let desk = Desk(AtomicU64::new(DESK));
        let guest = GuestDtt::new(&*memory, &desk, Levels::new(4).expect("1 to 5"), 8).expect("a root");
        let bdf = Bdf::new(0x18).expect("not 0");
        Box::leak(Box::new(Self { memory, ram, guest, bdf, desk }))
    }

    /// Makes the tables of these pages, and touches every word of them.
    pub(crate) fn with_tables(&'static self, gfns: Range<u64>) -> &'static Self {
        for first in (gfns.start / LEAVES * LEAVES..gfns.end).step_by(1024) {
            self.guest.leaf_table(&*self.memory, &self.desk, gfn(first)).expect("room for tables");
            self.table(first).words().iter().for_each(|word| word.store(0, Relaxed));
        }
        self
    }

    fn table(&self, page: u64) -> LeafTable<'_, AtomicU32> {
        self.guest.dtt().leaf_table(&*self.memory, gfn(page)).expect("a table that was made before")
    }

    /// The leaf of a page.
    pub(crate) fn leaf(&self, page: u64) -> &AtomicU32 {
        &self.table(page).words()[gfn(page).leaf_index()]
    }

    /// Writes one word into the leaves of all these pages.
    pub(crate) fn fill(&self, pages: impl Iterator<Item = u64>, entry: u32) {
        pages.for_each(|page| self.leaf(page).store(entry, Relaxed));
    }

    /// Panics unless the leaves of these pages say what they should.
    pub(crate) fn check(&self, pages: impl IntoIterator<Item = u64>, entry: u32) {
        pages.into_iter().for_each(|page| assert_eq!(self.leaf(page).load(Relaxed), entry, "leaf of gfn {page:#x}"));
    }

    /// Writes a batch into guest memory.
    pub(crate) fn batch(&self, gfns: Vec<u64>) -> Batch {
        let at = self.desk.take(PAGE_SIZE + 8 * gfns.len() as u64);
        let list: Vec<_> = gfns.iter().map(|&page| gfn(page)).collect();
        let word = write_batch(&*self.memory, at, self.bdf, &list).expect("room for batches");
        Batch { word, gfns }
    }

    /// Where a page is in this process, looked up as a VMM does.
    pub(crate) fn backing(&self, page: u64) -> Backing<'static> {
        let memory: &GuestMemoryMmap = &self.memory;
        let hva = memory.get_host_address(GuestAddress(page * PAGE_SIZE)).expect("RAM");
        Backing { hva: NonNull::new(hva).expect("mapped memory"), file: None }
    }

    /// Brings the memory of these pages into being, so that whoever pins it need not.
    pub(crate) fn touch(&self, gfns: &[u64]) {
        for &page in gfns {
            self.memory.write_obj(1_u8, GuestAddress(page * PAGE_SIZE)).expect("RAM");
        }
    }

    /// Clears the leaves of a batch.
    pub(crate) fn clear(&self, batch: &Batch) {
        batch.gfns.iter().for_each(|&page| self.leaf(page).store(0, Relaxed));
    }
}

pub(crate) const PINNED: u32 = LeafEntry::PINNED.bits();
/// A page that is pinned and mapped once by its guest, not accessed since it was aged.
pub(crate) const BUSY: u32 = PINNED | 1;
