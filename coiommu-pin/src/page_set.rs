//! A set of the 512 pages of one block, as bits.

use std::ops::{BitAnd, BitOr, BitOrAssign, Not, Range, Sub, SubAssign};

/// How many pages a block has.
pub(crate) const BLOCK_PAGES: usize = 512;
pub(crate) const WORD_PAGES: usize = 64;
const WORDS: usize = BLOCK_PAGES / WORD_PAGES;

/// Pages of a block, by their index from 0 to 511. Ranges end at 512 at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageSet([u64; WORDS]);

impl PageSet {
    pub(crate) const EMPTY: Self = Self([0; WORDS]);
    pub(crate) const ALL: Self = Self([!0; WORDS]);

    pub(crate) fn range(pages: Range<usize>) -> Self {
        let mut set = Self::EMPTY;
        set.insert(pages);
        set
    }

    #[inline]
    pub(crate) fn insert(&mut self, pages: Range<usize>) {
        if pages.len() == 1 {
            return self.insert_page(pages.start);
        }
        let mut at = pages.start;
        while at < pages.end.min(BLOCK_PAGES) {
            let (word, bits, end) = word_of(at, pages.end);
            self.0[word] |= bits;
            at = end;
        }
    }

    #[inline]
    pub(crate) fn insert_page(&mut self, page: usize) {
        if let Some(word) = self.0.get_mut(page / WORD_PAGES) {
            *word |= 1 << (page % WORD_PAGES);
        }
    }

    #[inline]
    pub(crate) fn contains(&self, page: usize) -> bool {
        self.0.get(page / WORD_PAGES).is_some_and(|word| word >> (page % WORD_PAGES) & 1 == 1)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.iter().all(|&word| word == 0)
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The pages in ascending order.
    pub(crate) fn pages(self) -> impl Iterator<Item = usize> {
        let mut words = self.0;
        let mut at = 0;
        std::iter::from_fn(move || {
            while let Some(word) = words.get_mut(at) {
                if *word != 0 {
                    let bit = word.trailing_zeros() as usize;
                    *word &= *word - 1;
                    return Some(at * WORD_PAGES + bit);
                }
                at += 1;
            }
            None
        })
    }

    /// The first page of the set that is not below `from`.
    pub(crate) fn first_from(&self, from: usize) -> Option<usize> {
        let at = from / WORD_PAGES;
        let mut word = self.0.get(at)? & (!0 << (from % WORD_PAGES));
        for next in at + 1.. {
            if word != 0 {
                return Some((next - 1) * WORD_PAGES + word.trailing_zeros() as usize);
            }
            word = *self.0.get(next)?;
        }
        None
    }

    /// The first page that is not in the set and not below `from`; 512 if there is none.
    pub(crate) fn first_outside(&self, from: usize) -> usize {
        let mut clear = !0 << (from % WORD_PAGES);
        for (at, word) in self.0.iter().enumerate().skip(from / WORD_PAGES) {
            clear &= !word;
            if clear != 0 {
                return at * WORD_PAGES + clear.trailing_zeros() as usize;
            }
            clear = !0;
        }
        BLOCK_PAGES
    }

    /// Whether no page of a range is in the set.
    #[inline]
    pub(crate) fn has_none_of(&self, pages: Range<usize>) -> bool {
        if pages.len() == 1 {
            return !self.contains(pages.start);
        }
        let mut at = pages.start;
        while at < pages.end.min(BLOCK_PAGES) {
            let (word, bits, end) = word_of(at, pages.end);
            if self.0[word] & bits != 0 {
                return false;
            }
            at = end;
        }
        true
    }

    /// The first run of pages of a range that are not in the set.
    pub(crate) fn gap_in(&self, pages: Range<usize>) -> Option<Range<usize>> {
        let start = self.first_outside(pages.start);
        if start >= pages.end {
            return None;
        }
        Some(start..self.first_from(start).map_or(pages.end, |next| next.min(pages.end)))
    }

    /// The last page of the set.
    pub(crate) fn last(&self) -> Option<usize> {
        let (at, word) = self.0.iter().enumerate().rfind(|(_, word)| **word != 0)?;
        Some(at * WORD_PAGES + WORD_PAGES - 1 - word.leading_zeros() as usize)
    }

    /// The runs of adjacent pages, in ascending order.
    pub(crate) fn runs(self) -> impl Iterator<Item = Range<usize>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = self.first_from(from)?;
            from = self.first_outside(start);
            Some(start..from)
        })
    }

    /// The run of adjacent pages that `page`, a member, is in.
    pub(crate) fn run_around(self, page: usize) -> Range<usize> {
        let start = (!self & Self::range(0..page)).last().map_or(0, |last| last + 1);
        start..self.first_outside(page)
    }

    /// The pages whose next page is in the set, with page 511, whose next is in no block.
    pub(crate) fn one_down(self) -> Self {
        let mut words = self.0;
        let mut next = 1;
        for word in words.iter_mut().rev() {
            (*word, next) = (*word >> 1 | next << (WORD_PAGES - 1), *word & 1);
        }
        Self(words)
    }

    /// The 64 pages from `64 * word` on, as bits.
    pub(crate) fn word(&self, word: usize) -> u64 {
        self.0.get(word).copied().unwrap_or(0)
    }

    pub(crate) fn set_word(&mut self, word: usize, bits: u64) {
        if let Some(to) = self.0.get_mut(word) {
            *to = bits;
        }
    }

    fn zip(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        let mut words = self.0;
        for (word, other) in words.iter_mut().zip(other.0) {
            *word = f(*word, other);
        }
        Self(words)
    }
}

/// The word of a page below 512, the bits in it of the pages from that page to `end`, and the first page after them.
#[inline]
fn word_of(page: usize, end: usize) -> (usize, u64, usize) {
    let end = end.min(page - page % WORD_PAGES + WORD_PAGES);
    (page / WORD_PAGES, (!0 >> (WORD_PAGES - (end - page))) << (page % WORD_PAGES), end)
}

impl BitAnd for PageSet {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        self.zip(other, |a, b| a & b)
    }
}

impl BitOr for PageSet {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.zip(other, |a, b| a | b)
    }
}

impl BitOrAssign for PageSet {
    fn bitor_assign(&mut self, other: Self) {
        *self = *self | other;
    }
}

/// The pages that are not in the other set.
impl Sub for PageSet {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }
}

impl SubAssign for PageSet {
    fn sub_assign(&mut self, other: Self) {
        *self = *self - other;
    }
}

impl Not for PageSet {
    type Output = Self;

    fn not(self) -> Self {
        Self::ALL - self
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// The most pages of a set. Under Miri sets are small: what it checks here is arithmetic, and large ones take minutes.
    const MOST: usize = if cfg!(miri) { 12 } else { 600 };

    fn set_of(pages: &BTreeSet<usize>) -> PageSet {
        let mut set = PageSet::EMPTY;
        pages.iter().for_each(|&page| set.insert_page(page));
        set
    }

    #[test]
    fn a_set_of_nothing_is_empty() {
        assert!(PageSet::EMPTY.is_empty() && !PageSet::ALL.is_empty() && !PageSet::range(511..512).is_empty());
        assert_eq!((PageSet::EMPTY.word(0), PageSet::ALL.word(7), PageSet::range(64..66).word(1)), (0, !0, 3));
        assert_eq!(PageSet::EMPTY.one_down(), PageSet::range(511..512));
    }

    proptest! {
        /// Everything a set answers is what a plain set of numbers answers.
        #[test]
        fn a_page_set_is_a_set_of_pages(
            a in prop::collection::btree_set(0..BLOCK_PAGES, 0..MOST),
            b in prop::collection::btree_set(0..BLOCK_PAGES, 0..MOST),
            (low, high) in (0..=BLOCK_PAGES, 0..=BLOCK_PAGES).prop_map(|(a, b)| (a.min(b), a.max(b))),
        ) {
            let (set, other) = (set_of(&a), set_of(&b));
            let plain = |set: PageSet| set.pages().collect::<BTreeSet<_>>();
            prop_assert_eq!(plain(set), a.clone());
            prop_assert_eq!(set.len(), a.len() as u64);
            prop_assert_eq!(set.is_empty(), a.is_empty());
            prop_assert_eq!(plain(set & other), &a & &b);
            prop_assert_eq!(plain(set | other), &a | &b);
            prop_assert_eq!(plain(set - other), &a - &b);
            prop_assert_eq!(plain(!set), (0..BLOCK_PAGES).filter(|page| !a.contains(page)).collect());
            prop_assert_eq!(set.last(), a.last().copied());
            prop_assert_eq!(plain(set.one_down()), (0..BLOCK_PAGES).filter(|page| *page == 511 || a.contains(&(page + 1))).collect());
            prop_assert_eq!(set.first_outside(low), (low..BLOCK_PAGES).find(|page| !a.contains(page)).unwrap_or(BLOCK_PAGES));
            prop_assert_eq!(set.has_none_of(low..high), a.range(low..high).next().is_none());
            let gap = (low..high).find(|page| !a.contains(page));
            let gap = gap.map(|start| start..a.range(start..high).next().copied().unwrap_or(high));
            prop_assert_eq!(set.gap_in(low..high), gap);
            prop_assert_eq!(set.first_from(low), a.range(low..).next().copied());
            prop_assert_eq!(plain(PageSet::range(low..high)), (low..high).collect());
            prop_assert!((0..=BLOCK_PAGES).all(|page| set.contains(page) == a.contains(&page)));
            let (mut joined, mut by_words) = (set, PageSet::EMPTY);
            joined |= other;
            prop_assert_eq!(joined, set | other);
            (0..=WORDS).for_each(|word| by_words.set_word(word, set.word(word)));
            prop_assert_eq!(by_words, set);
            let runs: Vec<_> = set.runs().collect();
            prop_assert_eq!(runs.iter().cloned().flatten().collect::<BTreeSet<_>>(), a.clone());
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start));
            for run in runs {
                prop_assert!(run.clone().all(|page| set.run_around(page) == run));
            }
        }
    }
}
