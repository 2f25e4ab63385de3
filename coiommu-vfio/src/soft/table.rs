//! The mapping table: which IOVAs lead where. The checks that need no more than the table are here.

use std::collections::BTreeMap;
use std::collections::hash_map::Entry;
use std::ops::RangeInclusive;

use rustc_hash::FxHashMap;

use super::chunk::{Chunk, PAGES};
use super::host::Host;

/// The bits of a page number that count within a chunk.
const PAGE_IN_CHUNK: u64 = PAGES as u64 - 1;

/// A range of addresses that is not empty and does not wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    first: u64,
    last: u64,
}

impl Span {
    /// Every address.
    pub(crate) const ALL: Self = Self { first: 0, last: u64::MAX };

    /// `None`: empty or wrapping.
    pub(crate) fn new(start: u64, len: u64) -> Option<Self> {
        let last = start.checked_add(len.checked_sub(1)?)?;
        Some(Self { first: start, last })
    }

    /// `None`: empty, wrapping, or not whole pages of `page_size` bytes (a power of two).
    pub(crate) fn of_pages(start: u64, len: u64, page_size: u64) -> Option<Self> {
        let misaligned = (start | len) & (page_size - 1) != 0;
        if misaligned { None } else { Self::new(start, len) }
    }

    /// The first byte.
    pub(crate) fn first(self) -> u64 {
        self.first
    }

    /// The last byte.
    pub(crate) fn last(self) -> u64 {
        self.last
    }

    /// In bytes. Not to be asked of [`Span::ALL`], whose length no u64 holds.
    fn len(self) -> u64 {
        self.last - self.first + 1
    }

    /// What both have in common.
    fn and(self, other: Self) -> Option<Self> {
        let (first, last) = (self.first.max(other.first), self.last.min(other.last));
        (first <= last).then_some(Self { first, last })
    }
}

/// A range that would leave a piece of a mapping behind.
#[derive(Debug)]
pub(crate) struct Cut;

/// A mapping: where it begins, and what is there.
type Mapping<'a> = (u64, &'a Host);

/// The mappings and what limits them. They never overlap, and each goes whole, as it came.
///
/// IOVAs are cut into chunks of [`PAGES`] pages. A mapping within a chunk is in that chunk, found by hash: these are the
/// many (the extents of a pin map are of that kind), and they must be fast. One that reaches across is `wide`: these are
/// few, and a chunk a 2 MiB of them would be a waste.
#[derive(Debug)]
pub(crate) struct Table {
    chunks: FxHashMap<u64, Chunk>,
    wide: BTreeMap<u64, Host>,
    page_shift: u32,
    len: u64,
    bytes: u64,
    /// How many mappings there may be; `None`: any number.
    pub(crate) entry_limit: Option<u64>,
    /// How many bytes may be mapped; `None`: any number.
    pub(crate) pinned_limit: Option<u64>,
}

impl Table {
    /// An empty table for mappings made of pages of `1 << page_shift` bytes.
    pub(crate) fn new(page_shift: u32, entry_limit: Option<u64>, pinned_limit: Option<u64>) -> Self {
        Self {
            chunks: FxHashMap::default(),
            wide: BTreeMap::new(),
            page_shift,
            len: 0,
            bytes: 0,
            entry_limit,
            pinned_limit,
        }
    }

    /// How many mappings there are.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Bytes mapped, a page that is mapped twice counted twice (as the kernel does against RLIMIT_MEMLOCK).
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Mappings that can be made yet. A limit may lie below what there is.
    pub(crate) fn entries_left(&self) -> Option<u64> {
        self.entry_limit.map(|limit| limit.saturating_sub(self.len))
    }

    /// Bytes that can be mapped yet.
    pub(crate) fn bytes_left(&self) -> Option<u64> {
        self.pinned_limit.map(|limit| limit.saturating_sub(self.bytes))
    }

    /// The mapping that `iova` is in, and how far in.
    pub(crate) fn find(&self, iova: u64) -> Option<(&Host, usize)> {
        let (start, host) = self.mapping_at(iova)?;
        // Below the mapping's length, which is a usize.
        Some((host, usize::try_from(iova - start).ok()?))
    }

    /// Whether anything in `span` is mapped.
    pub(crate) fn overlaps(&self, span: Span) -> bool {
        let reaches_in = |mapping| span_of(mapping).last >= span.first;
        self.last_wide(span.last).is_some_and(reaches_in)
            || self.chunks_in(span).any(|number| {
                let last = span.last.min(self.span_of_chunk(number).last);
                self.last_in_chunk(last).is_some_and(reaches_in)
            })
    }

    /// Enters a mapping of `span`, which [overlaps](Table::overlaps) none.
    pub(crate) fn insert(&mut self, span: Span, host: Host) {
        self.len += 1;
        self.bytes += span.len();
        let number = self.chunk_of(span.first);
        if number == self.chunk_of(span.last) {
            let page = self.page_of(span.first);
            self.chunks.entry(number).or_default().insert(page, host);
        } else {
            self.wide.insert(span.first, host);
        }
    }

    /// Takes the mappings in `span` out and returns how many bytes they had.
    pub(crate) fn remove(&mut self, span: Span) -> Result<u64, Cut> {
        if self.remove_one(span) {
            self.len -= 1;
            self.bytes -= span.len();
            return Ok(span.len());
        }
        if self.cuts(span) {
            return Err(Cut);
        }
        let (count, bytes) = self.remove_all(span);
        self.len -= count;
        self.bytes -= bytes;
        Ok(bytes)
    }

    /// Bytes of `span` that are mapped.
    pub(crate) fn bytes_in(&self, span: Span) -> u64 {
        // Of the mappings that begin before `span`, only the one at its first byte can reach in.
        let first = self.mapping_at(span.first).map_or(span.first, |(start, _)| start);
        self.within(Span { first, ..span }).filter_map(|mapping| span_of(mapping).and(span)).map(Span::len).sum()
    }

    /// The mappings that begin in `span`, in no order.
    pub(crate) fn within(&self, span: Span) -> impl Iterator<Item = Mapping<'_>> {
        let narrow = self.chunks_in(span).filter_map(|number| Some((number, self.chunks.get(&number)?))).flat_map(
            move |(number, chunk)| {
                chunk.within(self.pages_in(number, span)).map(move |(page, host)| (self.iova_of(number, page), host))
            },
        );
        narrow.chain(self.wide.range(span.first..=span.last).map(|(&start, host)| (start, host)))
    }

    /// Takes out the one mapping that is exactly `span`: by far the most frequent removal. False: there is no such one, or
    /// it is wide.
    fn remove_one(&mut self, span: Span) -> bool {
        let page = self.page_of(span.first);
        let Entry::Occupied(mut entry) = self.chunks.entry(self.chunk_of(span.first)) else {
            return false;
        };
        let chunk = entry.get_mut();
        if chunk.get(page).is_none_or(|host| host.len() as u64 != span.len()) {
            return false;
        }
        chunk.remove(page);
        if chunk.is_empty() {
            entry.remove();
        }
        true
    }

    /// The kernel's test: the mappings at either end do not reach out.
    fn cuts(&self, span: Span) -> bool {
        self.mapping_at(span.first).is_some_and(|(start, _)| start < span.first)
            || self.mapping_at(span.last).is_some_and(|mapping| span_of(mapping).last > span.last)
    }

    /// Takes out the mappings that begin in `span` and returns how many they were and their bytes.
    fn remove_all(&mut self, span: Span) -> (u64, u64) {
        let mut count = 0;
        let mut bytes = 0;
        let mut gone = |host: Host| {
            count += 1;
            bytes += host.len() as u64;
        };
        for number in self.chunks_in(span).collect::<Vec<_>>() {
            let pages = self.pages_in(number, span);
            let Entry::Occupied(mut entry) = self.chunks.entry(number) else {
                continue;
            };
            entry.get_mut().remove_within(pages).for_each(&mut gone);
            if entry.get().is_empty() {
                entry.remove();
            }
        }
        self.wide.extract_if(span.first..=span.last, |_, _| true).for_each(|(_, host)| gone(host));
        (count, bytes)
    }

    fn mapping_at(&self, iova: u64) -> Option<Mapping<'_>> {
        let reaches = |mapping: &Mapping<'_>| span_of(*mapping).last >= iova;
        self.last_in_chunk(iova).filter(reaches).or_else(|| self.last_wide(iova).filter(reaches))
    }

    /// The last mapping within the chunk of `iova` that begins at or before `iova`.
    fn last_in_chunk(&self, iova: u64) -> Option<Mapping<'_>> {
        let number = self.chunk_of(iova);
        let (page, host) = self.chunks.get(&number)?.last_until(self.page_of(iova))?;
        Some((self.iova_of(number, page), host))
    }

    /// The last wide mapping that begins at or before `iova`.
    fn last_wide(&self, iova: u64) -> Option<Mapping<'_>> {
        self.wide.range(..=iova).next_back().map(|(&start, host)| (start, host))
    }

    /// The chunks that `span` touches, at least those that exist: by number where they are few, else all are looked at.
    fn chunks_in(&self, span: Span) -> impl Iterator<Item = u64> {
        let numbers = self.chunk_of(span.first)..=self.chunk_of(span.last);
        let few = numbers.end() - numbers.start() <= self.chunks.len() as u64;
        let by_number = few.then(|| numbers.clone());
        let all = (!few).then(|| self.chunks.keys().copied().filter(move |number| numbers.contains(number)));
        by_number.into_iter().flatten().chain(all.into_iter().flatten())
    }

    /// The pages of a chunk that are in `span`, which touches the chunk.
    fn pages_in(&self, number: u64, span: Span) -> RangeInclusive<usize> {
        let chunk = self.span_of_chunk(number);
        self.page_of(span.first.max(chunk.first))..=self.page_of(span.last.min(chunk.last))
    }

    fn chunk_of(&self, iova: u64) -> u64 {
        iova >> self.page_shift >> PAGES.ilog2()
    }

    /// The page that holds `iova`, counted from the start of its chunk.
    fn page_of(&self, iova: u64) -> usize {
        ((iova >> self.page_shift) & PAGE_IN_CHUNK) as usize
    }

    /// The first byte of a page of a chunk.
    fn iova_of(&self, number: u64, page: usize) -> u64 {
        ((number << PAGES.ilog2()) | page as u64) << self.page_shift
    }

    fn span_of_chunk(&self, number: u64) -> Span {
        let offset_bits = (1 << self.page_shift) - 1;
        Span { first: self.iova_of(number, 0), last: self.iova_of(number, PAGES - 1) | offset_bits }
    }
}

/// The IOVAs of a mapping, which is never empty and never wraps: it was entered by its span.
fn span_of((first, host): Mapping<'_>) -> Span {
    Span { first, last: first + (host.len() as u64 - 1) }
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use super::*;

    #[test]
    fn what_is_empty_takes_no_room() {
        let mut table = Table::new(12, None, None);
        let span = |page: u64, pages: u64| Span::of_pages(page << 12, pages << 12, 0x1000).unwrap();
        for page in [0, 1, 5_000, 1_000_000, 1_000_001] {
            #[allow(unsafe_code, reason = "a host address without memory, which is never used")]
            // SAFETY: the test touches no memory.
            table.insert(span(page, 1), unsafe { Host::new(NonNull::dangling(), 0x1000) });
        }
        assert_eq!(table.chunks.len(), 3);
        assert_eq!(table.remove(span(5_000, 1)).unwrap(), 0x1000);
        assert_eq!(table.chunks.len(), 2, "removed one by one");
        assert_eq!(table.remove(span(0, 2_000_000)).unwrap(), 0x4000);
        assert_eq!(table.chunks.len(), 0, "removed together");
    }
}
