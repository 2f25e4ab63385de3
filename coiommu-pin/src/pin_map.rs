//! The pin map: which pages are mapped for the devices, and in which extents. Host memory only; nothing a guest writes
//! gets in here.
//!
//! Guest memory is cut into blocks of 512 pages, eight blocks to a chunk. A chunk is made when a page of RAM in it is
//! first asked for, and stays. A block's lock protects its [`Block`], and with it every change of the mappings of its
//! pages and every PINNED bit the host sets or clears there. With it may be taken: the table of regions (to read), the
//! list of holds, whatever the mapper locks. Nobody waits for the guest, for a park to end or for another block while
//! holding one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use coiommu_dtt::Gfn;

use crate::page_set::{BLOCK_PAGES, PageSet};
use crate::sync::{Mutex, MutexGuard, RwLock};

/// Blocks of a chunk.
const CHUNK_BLOCKS: usize = 8;

/// A block of guest memory, by the gfn it begins at: a multiple of 512.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BlockNo(u64);

impl BlockNo {
    pub(crate) const FIRST: Self = Self(0);

    pub(crate) const fn of(gfn: Gfn) -> Self {
        Self(gfn.raw() / BLOCK_PAGES as u64)
    }

    /// The page with this index, 0 to 511.
    pub(crate) fn gfn(self, page: usize) -> Gfn {
        // A block number is that of a gfn, so all its pages are gfns.
        Gfn::new(self.start() + page as u64).unwrap_or(Gfn::MAX)
    }

    /// The block that follows; `None` after the last.
    pub(crate) fn next(self) -> Option<Self> {
        Gfn::new(self.gfns().end).map(Self::of)
    }

    /// The gfns of the block.
    pub(crate) const fn gfns(self) -> Range<u64> {
        self.start()..self.start() + BLOCK_PAGES as u64
    }

    /// The pages of the block that are in a range of gfns.
    pub(crate) fn pages_in(self, gfns: &Range<u64>) -> PageSet {
        let index =
            |gfn: u64| usize::try_from(gfn.saturating_sub(self.start())).map_or(BLOCK_PAGES, |n| n.min(BLOCK_PAGES));
        PageSet::range(index(gfns.start)..index(gfns.end))
    }

    /// The index of a gfn in its block.
    pub(crate) fn index(gfn: Gfn) -> usize {
        usize::try_from(gfn.raw() % BLOCK_PAGES as u64).unwrap_or(0)
    }

    const fn start(self) -> u64 {
        self.0 * BLOCK_PAGES as u64
    }

    const fn chunk(self) -> u64 {
        self.0 / CHUNK_BLOCKS as u64
    }
}

/// Adjacent pages that one map call mapped, and that go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Extent {
    /// The first page.
    pub first: Gfn,
    /// How many pages.
    pub pages: u64,
}

/// The books of one block.
#[derive(Debug, Default)]
pub(crate) struct Block {
    mapped: PageSet,
    /// The first pages of extents.
    heads: PageSet,
    /// The round in which something was last mapped or unmapped here.
    changed: u32,
}

impl Block {
    pub(crate) const fn mapped(&self) -> PageSet {
        self.mapped
    }

    pub(crate) const fn changed(&self) -> u32 {
        self.changed
    }

    /// The extents in ascending order.
    pub(crate) fn extents(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (mapped, heads) = (self.mapped, self.heads);
        heads.pages().map(move |head| extent_at(mapped, heads, head))
    }

    /// All pages of the extents that have a page in the set.
    pub(crate) fn extents_touching(&self, pages: PageSet) -> PageSet {
        let mut all = PageSet::EMPTY;
        for extent in self.extents() {
            if !(PageSet::range(extent.clone()) & pages).is_empty() {
                all.insert(extent);
            }
        }
        all
    }
}

fn extent_at(mapped: PageSet, heads: PageSet, head: usize) -> Range<usize> {
    let next = heads.first_from(head + 1).unwrap_or(BLOCK_PAGES);
    let gap = (!mapped).first_from(head).unwrap_or(BLOCK_PAGES);
    head..next.min(gap)
}

/// Eight blocks, made together.
#[derive(Debug, Default)]
pub(crate) struct Chunk {
    blocks: [Mutex<Block>; CHUNK_BLOCKS],
}

impl Chunk {
    pub(crate) fn lock(&self, block: BlockNo) -> MutexGuard<'_, Block> {
        self.block(block).lock()
    }

    pub(crate) fn try_lock(&self, block: BlockNo) -> Option<MutexGuard<'_, Block>> {
        self.block(block).try_lock()
    }

    fn block(&self, block: BlockNo) -> &Mutex<Block> {
        // Three bits, whatever the number: an index of the array.
        &self.blocks[usize::from(block.0.to_le_bytes()[0]) % CHUNK_BLOCKS]
    }
}

/// What all blocks have mapped, and where they are.
#[derive(Debug, Default)]
pub(crate) struct PinMap {
    /// By chunk number. Held only to look up or to enter, never with anything else.
    chunks: RwLock<BTreeMap<u64, Arc<Chunk>>>,
    /// Pages mapped, or reserved for a map call that is under way.
    pages: AtomicU64,
    mappings: AtomicU64,
}

impl PinMap {
    /// The chunk of a block, if anything in it was ever asked for.
    pub(crate) fn chunk(&self, block: BlockNo) -> Option<Arc<Chunk>> {
        self.chunks.read().get(&block.chunk()).cloned()
    }

    /// The chunk of a block, made if need be. Only for blocks that have RAM, so that guests cannot make the books grow.
    pub(crate) fn chunk_or_new(&self, block: BlockNo) -> Arc<Chunk> {
        self.chunk(block).unwrap_or_else(|| Arc::clone(self.chunks.write().entry(block.chunk()).or_default()))
    }

    /// The first block at or after `from` that has books, with its chunk.
    pub(crate) fn next(&self, from: BlockNo) -> Option<(BlockNo, Arc<Chunk>)> {
        let chunks = self.chunks.read();
        let (&number, chunk) = chunks.range(from.chunk()..).next()?;
        let first = BlockNo(number * CHUNK_BLOCKS as u64);
        Some((first.max(from), Arc::clone(chunk)))
    }

    /// All blocks from `from` on that have books, each with its chunk.
    pub(crate) fn blocks(&self, from: BlockNo) -> impl Iterator<Item = (BlockNo, Arc<Chunk>)> {
        let mut at = self.next(from);
        std::iter::from_fn(move || {
            let (block, chunk) = at.take()?;
            at = match block.next() {
                Some(following) if following.chunk() == block.chunk() => Some((following, Arc::clone(&chunk))),
                Some(following) => self.next(following),
                None => None,
            };
            Some((block, chunk))
        })
    }

    /// Pages mapped now.
    pub(crate) fn pages(&self) -> u64 {
        self.pages.load(Relaxed)
    }

    /// Extents mapped now.
    pub(crate) fn mappings(&self) -> u64 {
        self.mappings.load(Relaxed)
    }

    /// Sets pages aside for a map call, if that stays within `quota` pages. Relaxed: the number is all there is to it.
    pub(crate) fn reserve(&self, pages: u64, quota: u64) -> bool {
        let within = |now: u64| now.checked_add(pages).filter(|&sum| sum <= quota);
        self.pages.fetch_update(Relaxed, Relaxed, within).is_ok()
    }

    /// Gives back what was set aside for a map call that failed.
    pub(crate) fn release(&self, pages: u64) {
        self.pages.fetch_sub(pages, Relaxed);
    }

    /// Enters an extent that was mapped and reserved.
    pub(crate) fn enter(&self, block: &mut Block, extent: Range<usize>, round: u32) {
        block.heads.insert_page(extent.start);
        block.mapped.insert(extent);
        block.changed = round;
        self.mappings.fetch_add(1, Relaxed);
    }

    /// Takes out whole extents that were unmapped; how many they were.
    pub(crate) fn remove(&self, block: &mut Block, pages: PageSet, round: u32) -> u64 {
        let extents = (block.heads & pages).len();
        self.mappings.fetch_sub(extents, Relaxed);
        self.pages.fetch_sub((block.mapped & pages).len(), Relaxed);
        block.heads -= pages;
        block.mapped -= pages;
        block.changed = round;
        extents
    }

    /// Bytes that the books take: chunks and their places in the index.
    pub(crate) fn overhead(&self) -> u64 {
        self.chunks.read().len() as u64 * CHUNK_BYTES
    }
}

/// What a chunk costs: itself, the counts of its Arc, its place in the index (a key and a pointer, in nodes that are half
/// full at worst), and what an allocator adds.
const CHUNK_BYTES: u64 = (size_of::<Chunk>() + 2 * size_of::<usize>() + 2 * 2 * size_of::<u64>() + 32) as u64;

// The books cost under 0.01 % of the memory they describe.
const _: () = assert!(CHUNK_BYTES * 10_000 < CHUNK_BLOCKS as u64 * BLOCK_PAGES as u64 * 4096);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_end_at_the_next_head_or_gap() {
        let map = PinMap::default();
        let mut block = Block::default();
        for extent in [3..5, 5..6, 8..64, 64..130, 511..512] {
            assert!(map.reserve(extent.len() as u64, u64::MAX));
            map.enter(&mut block, extent, 7);
        }
        assert_eq!(block.extents().collect::<Vec<_>>(), [3..5, 5..6, 8..64, 64..130, 511..512]);
        assert_eq!((map.pages(), map.mappings(), block.changed()), (126, 5, 7));
        let touching = block.extents_touching(PageSet::range(5..9));
        assert_eq!(touching, PageSet::range(5..6) | PageSet::range(8..64));
        assert_eq!(map.remove(&mut block, touching, 9), 2);
        assert_eq!(block.extents().collect::<Vec<_>>(), [3..5, 64..130, 511..512]);
        assert_eq!((map.pages(), map.mappings(), block.changed()), (69, 3, 9));
    }

    #[test]
    fn a_reservation_stays_within_the_quota_and_never_wraps() {
        let map = PinMap::default();
        assert!(map.reserve(10, 10));
        assert!(!map.reserve(1, 10));
        assert!(!map.reserve(u64::MAX, u64::MAX));
        map.release(4);
        assert!(map.reserve(4, 10));
    }

    #[test]
    fn blocks_are_visited_in_order_from_anywhere() {
        let map = PinMap::default();
        let block = |n: u64| BlockNo(n);
        for n in [3, 100, 7] {
            map.chunk_or_new(block(n));
        }
        let from = |n: u64| map.blocks(block(n)).map(|(no, _)| no.0).collect::<Vec<_>>();
        assert_eq!(from(0), (0..8).chain(96..104).collect::<Vec<_>>());
        assert_eq!(from(6), (6..8).chain(96..104).collect::<Vec<_>>());
        assert_eq!(from(8), (96..104).collect::<Vec<_>>());
        assert_eq!(from(104), Vec::<u64>::new());
    }

    #[test]
    fn a_block_knows_its_pages() {
        let block = BlockNo::of(Gfn::new(513).unwrap());
        assert_eq!(block.gfns(), 512..1024);
        assert_eq!(block.gfn(3).raw(), 515);
        assert_eq!(BlockNo::index(Gfn::new(515).unwrap()), 3);
        assert_eq!(block.pages_in(&(0..514)), PageSet::range(0..2));
        assert_eq!(block.pages_in(&(1000..u64::MAX)), PageSet::range(488..512));
        assert_eq!(block.pages_in(&(0..512)), PageSet::EMPTY);
    }
}
