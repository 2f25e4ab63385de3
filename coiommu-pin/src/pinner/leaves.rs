//! The leaves of a block: looked at, and changed, together.

use coiommu_dtt::memory::Word32;
use coiommu_dtt::walk::WalkError;
use coiommu_dtt::{Dtt, Leaf, LeafEntry, LeafTable, TableMemory};

use crate::page_set::{BLOCK_PAGES, PageSet, WORD_PAGES};
use crate::pin_map::{Block, BlockNo};

/// The words of a block's leaves, in the order of its pages.
pub(super) type Words<'m, W> = &'m [W; BLOCK_PAGES];

/// The words of a block's leaves: a half of their table, so there are always some.
#[inline]
pub(super) fn words_of<W: Word32>(table: LeafTable<'_, W>, no: BlockNo) -> Option<Words<'_, W>> {
    table.words().get(no.gfn(0).leaf_index()..)?.first_chunk()
}

/// The leaves of one block. Used under its lock.
pub(super) enum Leaves<'m, W> {
    Words(Words<'m, W>),
    /// The guest has no table there, so nobody uses the pages.
    Freed,
    /// The table's RAM is away: anybody may use them.
    Unreadable,
}

/// The pages of a block by what their leaves say.
#[derive(Debug)]
pub(super) struct Look {
    /// Count 0.
    pub(super) uncounted: PageSet,
    pub(super) accessed: PageSet,
    /// How many leaves were looked at.
    pub(super) leaves: u64,
}

impl<'m, W: Word32> Leaves<'m, W> {
    pub(super) fn find<M: TableMemory<U32 = W> + ?Sized>(no: BlockNo, dtt: Dtt, mem: &'m M) -> Self {
        match dtt.leaf_table(mem, no.gfn(0)) {
            Ok(table) => words_of(table, no).map_or(Self::Unreadable, Self::Words),
            Err(WalkError::NotPresent { .. } | WalkError::Beyond { .. }) => Self::Freed,
            Err(WalkError::Unreadable(_)) => Self::Unreadable,
        }
    }

    /// Whether their table cannot be read, as its RAM is away.
    pub(super) const fn are_away(&self) -> bool {
        matches!(self, Self::Unreadable)
    }

    /// The leaves of some pages with their pages' indexes, if there is a table.
    fn of(&self, pages: PageSet) -> impl Iterator<Item = (usize, Leaf<'m, W>)> {
        let words = match self {
            Self::Words(words) => Some(*words),
            Self::Freed | Self::Unreadable => None,
        };
        pages.pages().filter_map(move |page| Some((page, Leaf::new(words?.get(page)?))))
    }

    /// Reads the leaves of some pages; of 64 at a time, if one of them is asked for.
    pub(super) fn look(&self, pages: PageSet) -> Look {
        let mut look = Look { uncounted: PageSet::ALL, accessed: PageSet::EMPTY, leaves: 0 };
        let Self::Words(words) = self else { return look };
        for (at, words) in words.chunks_exact(WORD_PAGES).enumerate() {
            if pages.word(at) == 0 {
                continue;
            }
            let mut entries = [LeafEntry::empty(); WORD_PAGES];
            for (entry, word) in entries.iter_mut().zip(words) {
                *entry = Leaf::new(word).load();
            }
            look.uncounted.set_word(at, bits(&entries, |entry| entry.count() == 0));
            look.accessed.set_word(at, bits(&entries, |entry| entry.contains(LeafEntry::ACCESSED)));
            look.leaves += u64::from(pages.word(at).count_ones());
        }
        look
    }

    /// Swaps PINNED away on each page of some extents; if one refuses, it is set again on the others of its extent. The pages
    /// of the extents from which it is gone. With `clear_first`, ACCESSED does not count.
    pub(super) fn swap_away(&self, block: &Block, extents: PageSet, clear_first: bool) -> PageSet {
        let mut refused = PageSet::EMPTY;
        for (page, leaf) in self.of(extents) {
            if !swap(leaf, clear_first) {
                refused.insert_page(page);
            }
        }
        if refused.is_empty() {
            return extents;
        }
        let busy = block.extents_touching(refused);
        self.set_pinned(busy - refused);
        extents - busy
    }

    pub(super) fn set_pinned(&self, pages: PageSet) {
        self.of(pages).for_each(|(_, leaf)| leaf.set_pinned());
    }

    pub(super) fn clear_pinned(&self, pages: PageSet) {
        self.of(pages).for_each(|(_, leaf)| leaf.clear_pinned());
    }

    pub(super) fn clear_accessed(&self, pages: PageSet) {
        self.of(pages).for_each(|(_, leaf)| leaf.clear_accessed());
    }
}

/// Swaps PINNED away on one page; false if it refuses.
fn swap<W: Word32>(leaf: Leaf<'_, W>, clear_first: bool) -> bool {
    if clear_first {
        leaf.clear_accessed();
    }
    match leaf.try_unpin() {
        // Mapped and unmapped in between: only a count may refuse.
        Err(entry) if clear_first && entry.count() == 0 => {
            leaf.clear_accessed();
            leaf.try_unpin().is_ok()
        }
        result => result.is_ok(),
    }
}

/// The entries that something is true of, as bits. Mostly it is true of all or of none, which takes no look at each by
/// itself.
fn bits(entries: &[LeafEntry; WORD_PAGES], is: impl Fn(LeafEntry) -> bool) -> u64 {
    match entries.iter().map(|&entry| u32::from(is(entry))).sum::<u32>() {
        0 => 0,
        64 => !0,
        _ => entries.iter().enumerate().fold(0, |bits, (at, &entry)| bits | u64::from(is(entry)) << at),
    }
}
