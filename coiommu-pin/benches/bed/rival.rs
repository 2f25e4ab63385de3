//! A pinner as one writes it at first, page by page, for comparison: one lock for everything, a walk that remembers the
//! leaf table of the page before, a map call and a place in a queue for each page; to unpin, a lock and one
//! compare-and-swap for each page of the queue.
//!
//! It is given its due. It has no map of what is pinned, no quota, no regions that come and go and no clock, takes its
//! lock once for all of a batch, and copies a batch with one read into memory that it keeps.
//!
//! Unsafe is needed here to call a mapper.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{AcqRel, Relaxed};
use std::sync::{Arc, Mutex};

use coiommu_dtt::notify::BatchHeader;
use coiommu_dtt::{LeafTable, PAGE_SIZE, Request, RequestWord, TableMemory};
use coiommu_pin::DmaMapper;
use zerocopy::{FromZeros, IntoBytes};

use super::{Bed, PINNED, gfn};

pub(crate) struct Rival<'m> {
    bed: &'m Bed,
    mapper: Arc<dyn DmaMapper>,
    state: Mutex<State<'m>>,
}

#[derive(Default)]
struct State<'m> {
    /// The leaf table that was walked to last, and the number of its first page by 1024.
    last: Option<(u64, LeafTable<'m, AtomicU32>)>,
    queue: VecDeque<u64>,
    list: Vec<u64>,
}

impl<'m> State<'m> {
    fn leaf(&mut self, bed: &'m Bed, page: u64) -> &'m AtomicU32 {
        let table = match self.last {
            Some((of, table)) if of == page >> 10 => table,
            _ => {
                let table = bed.guest.dtt().leaf_table(&*bed.memory, gfn(page)).expect("a table");
                self.last = Some((page >> 10, table));
                table
            }
        };
        &table.words()[gfn(page).leaf_index()]
    }

    fn pin(&mut self, bed: &'m Bed, mapper: &dyn DmaMapper, page: u64) {
        let leaf = self.leaf(bed, page);
        if leaf.load(Relaxed) & PINNED != 0 {
            return;
        }
        let backing = bed.backing(page);
        // SAFETY: the bed's memory stays mapped for as long as the process lives, and nobody borrows it.
        unsafe { mapper.map(page * PAGE_SIZE, backing, PAGE_SIZE) }.expect("a mapper that maps");
        leaf.fetch_or(PINNED, AcqRel);
        self.queue.push_back(page);
    }
}

impl<'m> Rival<'m> {
    pub(crate) fn new(bed: &'m Bed, mapper: Arc<dyn DmaMapper>) -> Self {
        Self { bed, mapper, state: Mutex::default() }
    }

    /// Serves a request to its end.
    pub(crate) fn pin(&self, word: RequestWord) {
        let state = &mut *self.state.lock().expect("no panic before");
        match word.decode().expect("an endpoint") {
            Request::Page { gfn, .. } => state.pin(self.bed, &*self.mapper, gfn.raw()),
            Request::Batch { header } => {
                let mut read = BatchHeader::new_zeroed();
                self.bed.memory.read(header, read.as_mut_bytes()).expect("a header");
                let mut list = std::mem::take(&mut state.list);
                list.resize(usize::try_from(read.nr_pages.get()).expect("a short list"), 0);
                let first = header.checked_add(size_of::<BatchHeader>() as u64).expect("an address");
                self.bed.memory.read(first, list.as_mut_bytes()).expect("a list");
                for &page in &list {
                    state.pin(self.bed, &*self.mapper, page);
                }
                state.list = list;
            }
        }
    }

    /// Goes through the queue once: pages that nobody uses are unpinned, the others go to its end.
    pub(crate) fn scan(&self) {
        for _ in 0..self.pinned_pages() {
            let state = &mut *self.state.lock().expect("no panic before");
            let Some(page) = state.queue.pop_front() else { return };
            match state.leaf(self.bed, page).compare_exchange(PINNED, 0, AcqRel, Relaxed) {
                Ok(_) => {
                    self.mapper.unmap(page * PAGE_SIZE, PAGE_SIZE).expect("a mapper that unmaps");
                }
                Err(_) => state.queue.push_back(page),
            }
        }
    }

    /// Unmaps everything; its leaves are the caller's to clear.
    pub(crate) fn empty(&self) {
        let queue = &mut self.state.lock().expect("no panic before").queue;
        for page in queue.drain(..) {
            self.mapper.unmap(page * PAGE_SIZE, PAGE_SIZE).expect("a mapper that unmaps");
        }
    }

    pub(crate) fn pinned_pages(&self) -> usize {
        self.state.lock().expect("no panic before").queue.len()
    }
}
