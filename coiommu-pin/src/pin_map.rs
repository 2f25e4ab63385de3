//! The pin map: which pages are mapped for the devices, and in which extents. Host memory only; nothing a guest writes
//! gets in here.
//!
//! Guest memory is cut into blocks of 512 pages. Each region of RAM has [`Books`] of its blocks, made eight at a time when
//! a page in them is first asked for or to be unpinned on demand, and gone with the region; a block that two regions share
//! has a part in the books of each. A block's lock protects its [`Block`], and with it every change of the mappings of its pages and every PINNED
//! bit the host sets or clears there. With it may be taken: the list of holds, whatever the mapper locks. Nobody waits for
//! the guest, for a park to end or for another block while holding one.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use coiommu_dtt::Gfn;

use crate::page_set::{BLOCK_PAGES, PageSet};
use crate::sync::{Mutex, OnceLock};

/// Blocks that are made at once.
const CHUNK_BLOCKS: usize = 8;

/// A block of guest memory, by the gfn it begins at: a multiple of 512.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BlockNo(u64);

impl BlockNo {
    pub(crate) const fn of(gfn: Gfn) -> Self {
        Self(gfn.raw() / BLOCK_PAGES as u64)
    }

    /// The page with this index, 0 to 511.
    pub(crate) fn gfn(self, page: usize) -> Gfn {
        // A block number is that of a gfn, so all its pages are gfns.
        Gfn::new(self.start() + page as u64).unwrap_or(Gfn::MAX)
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
    pub(crate) fn index(gfn: u64) -> usize {
        usize::try_from(gfn % BLOCK_PAGES as u64).unwrap_or(0)
    }

    const fn start(self) -> u64 {
        self.0 * BLOCK_PAGES as u64
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
#[repr(C)]
pub(crate) struct Block {
    /// The round in which something was last mapped or unmapped here, or was about to go. First, as the lock is: they
    /// share a cache line.
    changed: u32,
    /// Something here was mapped while all was kept.
    kept: bool,
    mapped: PageSet,
    /// The first pages of extents.
    heads: PageSet,
}

impl Block {
    pub(crate) const fn mapped(&self) -> &PageSet {
        &self.mapped
    }

    pub(crate) const fn changed(&self) -> u32 {
        self.changed
    }

    /// It is not to rest for now: something of it may go the next time.
    pub(crate) const fn keep_looking(&mut self, round: u32) {
        self.changed = round;
    }

    /// The extents in ascending order.
    pub(crate) fn extents(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        // The last page of an extent is mapped, and the next page is not, or begins another.
        let last_pages = self.mapped & (self.heads | !self.mapped).one_down();
        self.heads.pages().zip(last_pages.pages()).map(|(head, last)| head..last + 1)
    }

    /// Whether something is left here of a time when all was kept, or may be.
    pub(crate) const fn is_kept(&self) -> bool {
        self.kept
    }

    /// Enters an extent that was mapped; `kept`: while all is kept.
    pub(crate) fn enter(&mut self, extent: Range<usize>, round: u32, kept: bool) {
        self.kept |= kept;
        self.heads.insert_page(extent.start);
        self.mapped.insert(extent);
        self.changed = round;
    }

    /// Takes out whole extents that were unmapped; how many they were.
    pub(crate) fn remove(&mut self, pages: PageSet, round: u32) -> u64 {
        let extents = (self.heads & pages).len();
        self.heads -= pages;
        self.mapped -= pages;
        self.kept &= !self.mapped.is_empty();
        self.changed = round;
        extents
    }

    /// All pages of the extents that have a page in the set.
    pub(crate) fn extents_touching(&self, pages: PageSet) -> PageSet {
        let pages = self.mapped & pages;
        if pages.is_empty() || self.heads == self.mapped {
            // Every extent is a page.
            return pages;
        }
        let mut all = PageSet::EMPTY;
        for extent in self.extents() {
            if pages.first_from(extent.start).is_some_and(|page| page < extent.end) {
                all.insert(extent);
            }
        }
        all
    }
}

/// The books of one region: its blocks, each under its lock.
#[derive(Debug)]
pub(crate) struct Books {
    gfns: Range<u64>,
    /// From the region's first block on.
    chunks: Box<[OnceLock<Chunk>]>,
}

/// Eight blocks, or as many as are left, made at once.
type Chunk = Box<[Mutex<Block>]>;

/// One block of a region, on a visit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot<'a> {
    pub(crate) no: BlockNo,
    /// The first page that the region has of it.
    pub(crate) first: u64,
    pub(crate) block: &'a Mutex<Block>,
}

impl Books {
    /// For a region of these pages; no block is made yet.
    pub(crate) fn new(gfns: Range<u64>) -> Self {
        let blocks = gfns.end.div_ceil(BLOCK_PAGES as u64) - gfns.start / BLOCK_PAGES as u64;
        let chunks = (0..blocks.div_ceil(CHUNK_BLOCKS as u64)).map(|_| OnceLock::new()).collect();
        Self { gfns, chunks }
    }

    #[cfg(test)]
    pub(crate) fn gfns(&self) -> Range<u64> {
        self.gfns.clone()
    }

    /// The block of a page of the region, made if need be.
    pub(crate) fn block(&self, gfn: u64) -> Option<&Mutex<Block>> {
        let (chunk, at) = self.place(gfn)?;
        self.chunks.get(chunk)?.get_or_init(|| self.new_chunk(chunk)).get(at)
    }

    /// Visits the blocks that were made and have a page at or after `from`, in ascending order.
    pub(crate) fn visit<B>(&self, from: u64, visit: impl FnMut(Spot<'_>) -> ControlFlow<B>) -> ControlFlow<B> {
        self.visit_chunks(from..u64::MAX, |_, chunk| chunk.get(), visit)
    }

    /// Visits all blocks that have a page in a range; those that were not made are made.
    pub(crate) fn visit_all<B>(
        &self,
        gfns: Range<u64>,
        visit: impl FnMut(Spot<'_>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        self.visit_chunks(gfns, |number, chunk| Some(chunk.get_or_init(|| self.new_chunk(number))), visit)
    }

    fn visit_chunks<'a, B>(
        &'a self,
        gfns: Range<u64>,
        get: impl Fn(usize, &'a OnceLock<Chunk>) -> Option<&'a Chunk>,
        mut visit: impl FnMut(Spot<'a>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let Some((first_chunk, mut at)) = self.place(gfns.start.max(self.gfns.start)) else {
            return ControlFlow::Continue(());
        };
        let no = |index: usize| BlockNo(self.first_block() + index as u64);
        for (number, chunk) in self.chunks.iter().enumerate().skip(first_chunk) {
            if no(number * CHUNK_BLOCKS + at).start() >= gfns.end {
                break;
            }
            let blocks = get(number, chunk).and_then(|chunk| chunk.get(at..)).unwrap_or_default();
            for (block, index) in blocks.iter().zip(number * CHUNK_BLOCKS + at..) {
                let first = no(index).start().max(self.gfns.start);
                if first >= gfns.end {
                    break;
                }
                visit(Spot { no: no(index), first, block })?;
            }
            at = 0;
        }
        ControlFlow::Continue(())
    }

    /// In which chunk the block of a page is, and where in it.
    fn place(&self, gfn: u64) -> Option<(usize, usize)> {
        let block = self.gfns.contains(&gfn).then(|| gfn / BLOCK_PAGES as u64 - self.first_block())?;
        let block = usize::try_from(block).ok()?;
        Some((block / CHUNK_BLOCKS, block % CHUNK_BLOCKS))
    }

    const fn first_block(&self) -> u64 {
        self.gfns.start / BLOCK_PAGES as u64
    }

    /// The last chunk may be shorter.
    fn new_chunk(&self, chunk: usize) -> Chunk {
        let blocks = self.gfns.end.div_ceil(BLOCK_PAGES as u64) - self.first_block();
        let left = usize::try_from(blocks).map_or(CHUNK_BLOCKS, |blocks| blocks - chunk * CHUNK_BLOCKS);
        (0..left.min(CHUNK_BLOCKS)).map(|_| Mutex::default()).collect()
    }

    /// Bytes that the books take.
    pub(crate) fn overhead(&self) -> u64 {
        let made = self.chunks.iter().filter_map(OnceLock::get);
        let blocks: u64 = made.map(|chunk| size_of_val(&**chunk) as u64 + ALLOCATOR_BYTES).sum();
        size_of_val(&*self.chunks) as u64 + blocks
    }
}

/// What an allocator adds to a chunk.
const ALLOCATOR_BYTES: u64 = 32;

// The books cost under 0.01 % of the memory they describe.
const _: () = {
    let chunk = size_of::<OnceLock<Chunk>>() + CHUNK_BLOCKS * size_of::<Mutex<Block>>();
    assert!((chunk as u64 + ALLOCATOR_BYTES) * 10_000 < (CHUNK_BLOCKS * BLOCK_PAGES) as u64 * 4096);
};

/// Visits the blocks with a page at or after `from`, region by region in ascending order, each region's as `visit_books`
/// does. `next_books` gives the first books with a page at or after a gfn: they are asked for one at a time, so that no lock
/// of the table of regions is held while blocks are.
pub(crate) fn visit<B>(
    from: u64,
    next_books: impl Fn(u64) -> Option<Arc<Books>>,
    mut visit_books: impl FnMut(&Books, u64) -> ControlFlow<B>,
) -> ControlFlow<B> {
    let mut at = from;
    while let Some(books) = next_books(at) {
        visit_books(&books, at)?;
        at = books.gfns.end;
    }
    ControlFlow::Continue(())
}

/// How much is mapped in all. Relaxed throughout: the numbers speak of nothing but themselves. They wrap: a worker adds
/// what it mapped after others may have taken some of it away.
#[derive(Debug, Default)]
pub(crate) struct Totals {
    /// Pages mapped or, under a quota, reserved for a map call that is under way.
    pages: AtomicU64,
    mappings: AtomicU64,
}

impl Totals {
    pub(crate) fn pages(&self) -> u64 {
        not_below_zero(self.pages.load(Relaxed))
    }

    pub(crate) fn mappings(&self) -> u64 {
        not_below_zero(self.mappings.load(Relaxed))
    }

    /// Sets pages aside for a map call, if that stays within `quota` pages.
    pub(crate) fn reserve(&self, pages: u64, quota: u64) -> bool {
        let within = |now: u64| not_below_zero(now).checked_add(pages).filter(|&sum| sum <= quota);
        self.pages.fetch_update(Relaxed, Relaxed, within).is_ok()
    }

    pub(crate) fn add(&self, pages: u64, mappings: u64) {
        self.pages.fetch_add(pages, Relaxed);
        self.mappings.fetch_add(mappings, Relaxed);
    }

    pub(crate) fn remove(&self, pages: u64, mappings: u64) {
        self.pages.fetch_sub(pages, Relaxed);
        self.mappings.fetch_sub(mappings, Relaxed);
    }
}

/// A number that more was taken from than was added, for a moment, is 0.
fn not_below_zero(wrapped: u64) -> u64 {
    u64::try_from(wrapped.cast_signed()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_end_at_the_next_head_or_gap() {
        let mut block = Block::default();
        for extent in [3..5, 5..6, 8..64, 64..130, 511..512] {
            block.enter(extent, 7, false);
        }
        assert_eq!(block.extents().collect::<Vec<_>>(), [3..5, 5..6, 8..64, 64..130, 511..512]);
        assert_eq!((block.mapped().len(), block.changed()), (126, 7));
        let touching = block.extents_touching(PageSet::range(5..9));
        assert_eq!(touching, PageSet::range(5..6) | PageSet::range(8..64));
        assert_eq!(block.remove(touching, 9), 2);
        assert_eq!(block.extents().collect::<Vec<_>>(), [3..5, 64..130, 511..512]);
        assert_eq!((block.mapped().len(), block.changed()), (69, 9));
    }

    #[test]
    fn a_reservation_stays_within_the_quota_and_never_wraps() {
        let totals = Totals::default();
        assert!(totals.reserve(10, 10));
        assert!(!totals.reserve(1, 10));
        assert!(!totals.reserve(u64::MAX, u64::MAX));
        totals.remove(4, 0);
        assert!(totals.reserve(4, 10));
        totals.remove(12, 1);
        assert_eq!((totals.pages(), totals.mappings()), (0, 0), "somebody is about to add them");
        totals.add(7, 1);
        assert_eq!((totals.pages(), totals.mappings()), (5, 0));
    }

    #[test]
    fn blocks_are_visited_in_order_from_anywhere() {
        let all =
            [Arc::new(Books::new(100..9000)), Arc::new(Books::new(9000..9001)), Arc::new(Books::new(20_000..90_000))];
        for gfn in [100, 8999, 9000, 50_000] {
            all.iter().find_map(|books| books.block(gfn)).unwrap();
        }
        let from = |from: u64| {
            let mut seen = Vec::new();
            let next = |gfn| all.iter().find(|books| books.gfns().end > gfn).cloned();
            let mut see = |spot: Spot<'_>| {
                seen.push((spot.no.0, spot.first));
                ControlFlow::<()>::Continue(())
            };
            assert!(visit(from, next, |books, from| books.visit(from, &mut see)).is_continue());
            seen
        };
        let first = |no: u64| (no, (no * 512).max(100));
        let last: Vec<_> = (95..103).map(|no| (no, no * 512)).collect();
        let everything: Vec<_> = (0..8).chain(16..18).map(first).chain([(17, 9000)]).chain(last.clone()).collect();
        assert_eq!(from(0), everything);
        assert_eq!(from(100), everything);
        assert_eq!(from(3000), everything[5..]);
        assert_eq!(from(8703), everything[8..]);
        assert_eq!(from(8704), everything[9..]);
        assert_eq!(from(9000), everything[10..]);
        assert_eq!(from(9001), last);
        assert_eq!(from(90_000), []);
    }

    #[test]
    fn blocks_that_were_not_made_are_visited_if_all_are_asked_for() {
        let books = Books::new(1000..9000);
        let mut firsts = Vec::new();
        let stopped = books.visit_all(2000..5000, |spot| {
            firsts.push(spot.first);
            if spot.first > 4000 { ControlFlow::Break(spot.no) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(firsts, [1536, 2048, 2560, 3072, 3584, 4096]);
        assert_eq!(stopped.break_value(), Some(BlockNo(8)));
        let mut made = 0;
        assert!(
            books
                .visit(0, |_| {
                    made += 1;
                    ControlFlow::<()>::Continue(())
                })
                .is_continue()
        );
        assert_eq!(made, 8, "one chunk");
        let mut last = None;
        let visit = |spot: Spot<'_>| {
            last = Some(spot.first);
            ControlFlow::<()>::Continue(())
        };
        assert!(books.visit_all(1000..5121, visit).is_continue());
        assert_eq!(last, Some(5120));
        let books = Books::new(1000..20_000);
        let empty = books.overhead();
        assert!(books.visit_all(1000..3000, |_| ControlFlow::<()>::Continue(())).is_continue());
        let one = books.overhead() - empty;
        assert_eq!(one, (8 * size_of::<Mutex<Block>>()) as u64 + ALLOCATOR_BYTES, "one chunk was made, and no more");
        assert!(books.visit_all(9000..9001, |_| ControlFlow::<()>::Continue(())).is_continue());
        assert_eq!(books.overhead(), empty + 2 * one);
        assert_eq!(empty, 5 * size_of::<OnceLock<Chunk>>() as u64);
    }

    #[test]
    fn a_region_has_books_of_its_own_pages_only() {
        let books = Books::new(1000..1600);
        assert!(books.block(999).is_none() && books.block(1600).is_none());
        let made: Vec<_> = [1000, 1023, 1024, 1599].map(|gfn| std::ptr::from_ref(books.block(gfn).unwrap())).into();
        assert_eq!(made[0], made[1]);
        assert_ne!(made[1], made[2]);
        assert_ne!(made[2], made[3]);
    }

    #[test]
    fn a_block_knows_its_pages() {
        let block = BlockNo::of(Gfn::new(513).unwrap());
        assert_eq!(block.gfns(), 512..1024);
        assert_eq!(block.gfn(3).raw(), 515);
        assert_eq!(BlockNo::index(515), 3);
        assert_eq!(block.pages_in(&(0..514)), PageSet::range(0..2));
        assert_eq!(block.pages_in(&(1000..u64::MAX)), PageSet::range(488..512));
        assert_eq!(block.pages_in(&(0..512)), PageSet::EMPTY);
    }
}
