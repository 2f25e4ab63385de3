//! Guest memory for models: tables whose words are loom's where the model looks, and std's elsewhere.
//!
//! The host looks at 64 leaves at a time. Were all of them loom's, it would explore little else.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use coiommu_dtt::geometry::{DIRECTORY_ENTRIES, LEAF_ENTRIES, PAGE_SIZE};
use coiommu_dtt::guest::TablePages;
use coiommu_dtt::memory::{Word32, Word64};
use coiommu_dtt::{Gpa, MemoryError, TableMemory};
use loom::sync::atomic as modelled;

use crate::watched::Watched;

/// A word of a table; `live` if the model looks at it.
#[derive(Debug)]
pub struct Word<L, P> {
    live: Option<Box<Live<L>>>,
    plain: P,
}

#[derive(Debug)]
struct Live<L> {
    word: L,
    /// Of the page that the word is in: each access of the word is a use of it.
    page: Arc<Watched>,
}

pub type Leaf32 = Word<modelled::AtomicU32, AtomicU32>;
pub type Entry64 = Word<modelled::AtomicU64, AtomicU64>;

impl<L: Default, P: Default> Word<L, P> {
    fn new(is_live: bool, page: &Arc<Watched>) -> Self {
        let live = is_live.then(|| Box::new(Live { word: L::default(), page: Arc::clone(page) }));
        Self { live, plain: P::default() }
    }
}

/// Calls a method of whichever atomic a word is.
macro_rules! on {
    ($word:expr, $($call:tt)+) => {
        match &$word.live {
            Some(live) => {
                let result = live.word.$($call)+;
                live.page.used();
                result
            }
            None => $word.plain.$($call)+,
        }
    };
}

impl Word32 for Leaf32 {
    fn load(&self, order: Ordering) -> u32 {
        on!(self, load(order))
    }

    fn fetch_or(&self, bits: u32, order: Ordering) -> u32 {
        on!(self, fetch_or(bits, order))
    }

    fn fetch_and(&self, bits: u32, order: Ordering) -> u32 {
        on!(self, fetch_and(bits, order))
    }

    fn compare_exchange_weak(&self, current: u32, new: u32, success: Ordering, failure: Ordering) -> Result<u32, u32> {
        on!(self, compare_exchange_weak(current, new, success, failure))
    }
}

impl Word64 for Entry64 {
    fn load(&self, order: Ordering) -> u64 {
        on!(self, load(order))
    }

    fn store(&self, value: u64, order: Ordering) {
        on!(self, store(value, order));
    }

    fn compare_exchange(&self, current: u64, new: u64, success: Ordering, failure: Ordering) -> Result<u64, u64> {
        on!(self, compare_exchange(current, new, success, failure))
    }
}

/// A page that can be a directory or a leaf table: one page of memory, with two faces here.
#[derive(Debug)]
struct TablePage {
    leaves: Vec<Leaf32>,
    entries: Vec<Entry64>,
    page: Arc<Watched>,
}

/// Pages for tables from [`Arena::TABLES`] up, and bytes for batches from [`Arena::BYTES`] up.
#[derive(Debug)]
pub struct Arena {
    tables: Vec<TablePage>,
    handed_out: AtomicUsize,
    bytes: Mutex<BTreeMap<u64, u8>>,
}

impl Arena {
    pub const TABLES: u64 = 0x1000;
    pub const BYTES: u64 = 0x10_0000;

    /// So many pages for tables, all zeros. Live are the first entry of each directory and the leaves with these indexes.
    pub fn new(tables: usize, live_leaves: &[usize]) -> Self {
        let table = |_| {
            let page = Arc::new(Watched::default());
            let leaves = (0..LEAF_ENTRIES).map(|index| Word::new(live_leaves.contains(&index), &page)).collect();
            let entries = (0..DIRECTORY_ENTRIES).map(|index| Word::new(index == 0, &page)).collect();
            TablePage { leaves, entries, page }
        };
        Self { tables: (0..tables).map(table).collect(), handed_out: AtomicUsize::new(0), bytes: Mutex::default() }
    }

    /// The guest makes other use of the page of a table.
    pub fn take_table(&self, at: Gpa) {
        self.table(at, PAGE_SIZE).expect("there is one").page.taken();
    }

    fn table(&self, at: Gpa, bytes: u64) -> Result<&TablePage, MemoryError> {
        let absent = MemoryError::Absent { at, bytes: usize::try_from(bytes).unwrap_or(usize::MAX) };
        let offset = at.raw().checked_sub(Self::TABLES).filter(|_| at.is_page_aligned() && bytes <= PAGE_SIZE);
        let index = offset.and_then(|offset| usize::try_from(offset / PAGE_SIZE).ok()).ok_or(absent)?;
        self.tables.get(index).ok_or(absent)
    }
}

impl TableMemory for Arena {
    type U32 = Leaf32;
    type U64 = Entry64;

    fn words32(&self, at: Gpa, count: usize) -> Result<&[Leaf32], MemoryError> {
        Ok(&self.table(at, count as u64 * 4)?.leaves[..count])
    }

    fn words64(&self, at: Gpa, count: usize) -> Result<&[Entry64], MemoryError> {
        Ok(&self.table(at, count as u64 * 8)?.entries[..count])
    }

    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        let bytes = self.bytes.lock().unwrap();
        let absent = MemoryError::Absent { at, bytes: into.len() };
        for (address, byte) in (at.raw()..).zip(into) {
            *byte = *bytes.get(&address).ok_or(absent)?;
        }
        Ok(())
    }

    fn write(&self, at: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        self.bytes.lock().unwrap().extend((at.raw()..).zip(from.iter().copied()));
        Ok(())
    }
}

/// Pages are zeroed when they are handed out, and handed out once.
impl TablePages for Arena {
    fn alloc(&self) -> Option<Gpa> {
        let index = self.handed_out.fetch_add(1, Ordering::Relaxed);
        self.tables.get(index)?.page.taken();
        Some(Gpa::new(Self::TABLES + index as u64 * PAGE_SIZE))
    }

    fn free(&self, page: Gpa) {
        self.take_table(page);
    }
}
