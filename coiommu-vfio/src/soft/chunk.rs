//! The mappings of 512 pages in a row.

use std::ops::RangeInclusive;

use super::host::Host;

/// Pages in a chunk: as many as one table of an IOMMU has entries.
pub(crate) const PAGES: usize = 512;

const WORD: usize = u64::BITS as usize;

/// The mappings that lie within one chunk, by the page they begin at.
///
/// A bitmap says where mappings begin; the mappings themselves stand in a row, in that order, so that a chunk with few of
/// them is small. Page numbers count from the start of the chunk and are below [`PAGES`].
#[derive(Debug, Default)]
pub(crate) struct Chunk {
    heads: [u64; PAGES / WORD],
    hosts: Vec<Host>,
}

impl Chunk {
    pub(crate) fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    /// The mapping that begins at `page`.
    pub(crate) fn get(&self, page: usize) -> Option<&Host> {
        self.begins(page).then(|| &self.hosts[self.rank(page)])
    }

    /// The last mapping that begins at or before `page`, and where it begins.
    pub(crate) fn last_until(&self, page: usize) -> Option<(usize, &Host)> {
        let until = self.heads[page / WORD] & (u64::MAX >> (WORD - 1 - page % WORD));
        let head = match until.checked_ilog2() {
            Some(bit) => page / WORD * WORD + bit as usize,
            None => self.last_before_word(page / WORD)?,
        };
        Some((head, &self.hosts[self.rank(head)]))
    }

    /// The mappings that begin in `pages` and where they begin, ascending.
    pub(crate) fn within(&self, pages: RangeInclusive<usize>) -> impl Iterator<Item = (usize, &Host)> {
        let hosts = &self.hosts[self.rank(*pages.start())..];
        pages.filter(|&page| self.begins(page)).zip(hosts)
    }

    /// Enters a mapping that begins at `page`, where none does.
    pub(crate) fn insert(&mut self, page: usize, host: Host) {
        debug_assert!(!self.begins(page), "a mapping begins at page {page}");
        self.hosts.insert(self.rank(page), host);
        self.heads[page / WORD] |= 1 << (page % WORD);
    }

    /// Takes the mapping out that begins at `page`.
    pub(crate) fn remove(&mut self, page: usize) -> Option<Host> {
        if !self.begins(page) {
            return None;
        }
        self.heads[page / WORD] &= !(1 << (page % WORD));
        Some(self.hosts.remove(self.rank(page)))
    }

    /// Takes the mappings out that begin in `pages`.
    pub(crate) fn remove_within(&mut self, pages: RangeInclusive<usize>) -> impl Iterator<Item = Host> {
        let first = self.rank(*pages.start());
        let mut count = 0;
        for page in pages {
            count += usize::from(self.begins(page));
            self.heads[page / WORD] &= !(1 << (page % WORD));
        }
        self.hosts.drain(first..first + count)
    }

    fn begins(&self, page: usize) -> bool {
        self.heads[page / WORD] >> (page % WORD) & 1 != 0
    }

    /// How many mappings begin before `page`.
    fn rank(&self, page: usize) -> usize {
        let whole: u32 = self.heads[..page / WORD].iter().map(|word| word.count_ones()).sum();
        let part = self.heads[page / WORD] & ((1 << (page % WORD)) - 1);
        (whole + part.count_ones()) as usize
    }

    /// The last page below a word of the bitmap at which a mapping begins.
    fn last_before_word(&self, word: usize) -> Option<usize> {
        let (index, bits) = self.heads[..word].iter().enumerate().rfind(|(_, bits)| **bits != 0)?;
        Some(index * WORD + bits.ilog2() as usize)
    }
}
