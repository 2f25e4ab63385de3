//! Loops that do the one thing that nobody can leave out.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, Release};

use super::{Bed, LEAVES, PINNED};

/// All leaf tables of the first pages, one after the other: the floor does not walk.
pub(crate) struct FlatTable<'m>(Vec<&'m [AtomicU32; 1024]>);

impl<'m> FlatTable<'m> {
    pub(crate) fn new(bed: &'m Bed, pages: u64) -> Self {
        Self((0..pages).step_by(1024).map(|first| bed.table(first).words()).collect())
    }

    /// To pin: load each gfn, set PINNED in its leaf.
    #[inline(never)]
    pub(crate) fn set_pinned(&self, gfns: &[u64]) {
        for &page in gfns {
            let table = self.0[usize::try_from(page / LEAVES).unwrap_or(usize::MAX)];
            table[usize::try_from(page % LEAVES).unwrap_or(usize::MAX)].fetch_or(PINNED, Release);
        }
    }

    /// To scan: load every leaf. The sum keeps the loads from being left out.
    #[inline(never)]
    pub(crate) fn load_all(&self) -> u32 {
        self.words().fold(0, |sum, word| sum.wrapping_add(word.load(Relaxed)))
    }

    /// To unpin: clear PINNED in every leaf.
    #[inline(never)]
    pub(crate) fn clear_all(&self) {
        self.words().for_each(|word| {
            word.fetch_and(!PINNED, Relaxed);
        });
    }

    fn words(&self) -> impl Iterator<Item = &'m AtomicU32> {
        self.0.iter().flat_map(|table| table.iter())
    }
}
