//! Requests for pins, from a guest that is not trusted: decoding, and reading batches piece by piece.
//!
//! A request is read once. Its header becomes a [`PinRequest`], which only decoding can make; its gfns are copied in
//! pieces of at most [`PIECE_PAGES`] into a [`Scratch`], and what the guest writes there later is not seen.

use std::time::Duration;

use coiommu_dtt::notify::{BatchHeader, NoEndpoint};
use coiommu_dtt::{Bdf, Gpa, MemoryError, Request, RequestWord, TableMemory};
use zerocopy::{FromZeros, IntoBytes};

use crate::mapper::Shortage;

/// The most pages of a batch that are served at once. Between pieces a worker looks at its other slots.
pub const PIECE_PAGES: usize = 4096;

/// A request that is being served: what is left of it.
#[derive(Debug)]
#[must_use = "a request that is dropped is a slot that is never answered"]
pub struct PinRequest {
    word: RequestWord,
    /// For whom; `None` as long as that is not read.
    endpoint: Option<Bdf>,
    rest: Rest,
    /// When it was taken from its slot.
    pub(crate) taken: Duration,
    /// Which activation it belongs to.
    pub(crate) activation: u64,
    pub(crate) room: Rooms,
    /// Whether to wait for RAM that went.
    pub(crate) waits: bool,
    /// What was read of a piece and is yet to be served.
    kept: Vec<u64>,
    pub(crate) asked: u64,
    pub(crate) failed: u64,
}

/// Whether room can be made where there is none for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MakeRoom {
    Can,
    /// It was, for the piece at hand. Once: a guest that does not count its pages would have them taken for it for ever.
    Made,
    /// There was less to be had than was needed: no other piece tries again.
    NoMore,
}

/// The same, for each of what there may be no room for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rooms {
    mappings: MakeRoom,
    pages: MakeRoom,
}

impl Rooms {
    pub(crate) fn can(&self, shortage: Shortage) -> bool {
        let room = match shortage {
            Shortage::Mappings => self.mappings,
            Shortage::Pages => self.pages,
        };
        room == MakeRoom::Can
    }

    /// Room was made, or some of it.
    pub(crate) fn made(&mut self, shortage: Shortage, is_enough: bool) {
        let room = match shortage {
            Shortage::Mappings => &mut self.mappings,
            Shortage::Pages => &mut self.pages,
        };
        *room = if is_enough { MakeRoom::Made } else { MakeRoom::NoMore };
    }

    fn begin_piece(&mut self) {
        for room in [&mut self.mappings, &mut self.pages] {
            if *room == MakeRoom::Made {
                *room = MakeRoom::Can;
            }
        }
    }
}

#[derive(Debug)]
enum Rest {
    Page(u64),
    Header(Gpa),
    Batch { next: Gpa, pages: u64 },
    Nothing,
}

/// Why a request is not looked at. Its slot is answered all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// There is no table: before ACTIVATE, after DEACTIVATE, or the table is another by now.
    #[error("not active")]
    NotActive,
    /// It names no endpoint.
    #[error(transparent)]
    NoEndpoint(#[from] NoEndpoint),
    /// It names an endpoint that is none of the guest's.
    #[error("{0} is not an endpoint of this guest")]
    UnknownEndpoint(Bdf),
    /// The batch is not in memory.
    #[error("the batch cannot be read: {0}")]
    Unreadable(#[from] MemoryError),
    /// The batch would go beyond the address space.
    #[error("a batch of {pages} pages at {header} cannot be")]
    TooLong {
        /// Where the batch begins.
        header: Gpa,
        /// How many pages it claims.
        pages: u64,
    },
}

/// Room for one piece of a batch. Made once a worker and used for every request, so that serving one allocates nothing.
#[derive(Debug)]
pub struct Scratch {
    gfns: Box<[u64]>,
    len: usize,
}

impl Default for Scratch {
    fn default() -> Self {
        Self { gfns: vec![0; PIECE_PAGES].into_boxed_slice(), len: 0 }
    }
}

impl Scratch {
    /// The piece at hand; nothing between two steps.
    pub(crate) fn piece(&mut self) -> &mut [u64] {
        self.gfns.get_mut(..self.len).unwrap_or_default()
    }

    /// Puts what is left of the piece in order: ascending, each gfn once.
    pub(crate) fn sort(&mut self) {
        let piece = self.piece();
        if piece.is_sorted_by(|a, b| a < b) {
            return;
        }
        piece.sort_unstable();
        let mut len = usize::from(!piece.is_empty());
        for at in 1..piece.len() {
            if piece[at] != piece[len - 1] {
                piece[len] = piece[at];
                len += 1;
            }
        }
        self.len = len;
    }
}

impl PinRequest {
    /// Reads a request's word; a batch's header is read when it is served, as its RAM may be away for a moment.
    ///
    /// # Errors
    ///
    /// [`Refusal::NoEndpoint`] or [`Refusal::UnknownEndpoint`].
    pub(crate) fn decode(
        word: RequestWord,
        taken: Duration,
        activation: u64,
        endpoints: &[Bdf],
    ) -> Result<Self, Refusal> {
        let (endpoint, rest) = match word.decode()? {
            Request::Batch { header } => (None, Rest::Header(header)),
            Request::Page { gfn, bdf } => {
                check_endpoint(bdf, endpoints)?;
                (Some(bdf), Rest::Page(gfn.raw()))
            }
        };
        let room = Rooms { mappings: MakeRoom::Can, pages: MakeRoom::Can };
        let (waits, kept) = (true, Vec::new());
        Ok(Self { word, endpoint, rest, taken, activation, room, waits, kept, asked: 0, failed: 0 })
    }

    /// What the slot held: what its answer replaces by 0.
    #[must_use]
    pub const fn word(&self) -> RequestWord {
        self.word
    }

    /// The endpoint that it is for, once that was read.
    pub(crate) const fn endpoint(&self) -> Option<Bdf> {
        self.endpoint
    }

    /// Whether everything was read and served.
    pub(crate) const fn is_served(&self) -> bool {
        matches!(self.rest, Rest::Nothing) && self.kept.is_empty()
    }

    /// Keeps the gfns of the piece at hand from index `from` on for the next step. This allocates; it happens only when
    /// RAM is away, when there is no room, or when map calls are so slow that a step's time is over.
    pub(crate) fn keep_piece(&mut self, scratch: &mut Scratch, from: usize) {
        self.kept.clear();
        self.kept.extend_from_slice(scratch.piece().get(from..).unwrap_or_default());
    }

    /// Copies the next piece, or what was kept of one, and puts it in order.
    ///
    /// # Errors
    ///
    /// [`Refusal`]; if it is [`Refusal::Unreadable`], the same is still to be read.
    pub(crate) fn read_piece<M: TableMemory + ?Sized>(
        &mut self,
        mem: &M,
        endpoints: &[Bdf],
        scratch: &mut Scratch,
    ) -> Result<(), Refusal> {
        scratch.len = 0;
        if !self.kept.is_empty() {
            scratch.len = self.kept.len();
            scratch.piece().copy_from_slice(&self.kept);
            self.kept.clear();
            return Ok(());
        }
        self.room.begin_piece();
        if let Rest::Header(header) = self.rest {
            let (endpoint, rest) = read_header(header, mem, endpoints)?;
            (self.endpoint, self.rest) = (Some(endpoint), rest);
        }
        match &mut self.rest {
            Rest::Nothing | Rest::Header(_) => {}
            Rest::Page(gfn) => {
                scratch.gfns[..1].copy_from_slice(&[*gfn]);
                scratch.len = 1;
                self.rest = Rest::Nothing;
            }
            Rest::Batch { next, pages } => {
                let len = usize::try_from(*pages).map_or(PIECE_PAGES, |pages| pages.min(PIECE_PAGES));
                let piece = scratch.gfns.get_mut(..len).unwrap_or_default();
                mem.read(*next, piece.as_mut_bytes())?;
                scratch.len = len;
                *pages -= len as u64;
                // The whole batch was checked to lie in the address space.
                *next = next.checked_add(size_of_val(piece) as u64).unwrap_or(*next);
                if *pages == 0 {
                    self.rest = Rest::Nothing;
                }
            }
        }
        scratch.sort();
        Ok(())
    }
}

/// Checks that a request is for one of the guest's endpoints, which are sorted.
fn check_endpoint(bdf: Bdf, endpoints: &[Bdf]) -> Result<(), Refusal> {
    endpoints.binary_search(&bdf).map(|_| ()).map_err(|_| Refusal::UnknownEndpoint(bdf))
}

fn read_header<M: TableMemory + ?Sized>(header: Gpa, mem: &M, endpoints: &[Bdf]) -> Result<(Bdf, Rest), Refusal> {
    let mut read = BatchHeader::new_zeroed();
    mem.read(header, read.as_mut_bytes())?;
    let endpoint = Bdf::new(read.bdf.get()).ok_or(NoEndpoint)?;
    check_endpoint(endpoint, endpoints)?;
    let pages = read.nr_pages.get();
    let first = header.checked_add(size_of::<BatchHeader>() as u64);
    let list = pages.checked_mul(size_of::<u64>() as u64);
    match (first, list) {
        (Some(next), Some(bytes)) if next.checked_add(bytes).is_some() => Ok((endpoint, Rest::Batch { next, pages })),
        _ => Err(Refusal::TooLong { header, pages }),
    }
}

#[cfg(test)]
mod tests {
    use coiommu_dtt::Gfn;
    use coiommu_dtt::guest::write_batch;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    const RAM: usize = 1 << 17;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap()
    }

    fn bdf(raw: u16) -> Bdf {
        Bdf::new(raw).unwrap()
    }

    fn decode(raw: u64) -> Result<PinRequest, Refusal> {
        PinRequest::decode(RequestWord::from_raw(raw).unwrap(), Duration::ZERO, 0, &[bdf(7), bdf(0x10)])
    }

    /// All pieces, and why it ended.
    fn pieces(request: &mut PinRequest, mem: &GuestMemoryMmap) -> (Vec<Vec<u64>>, Option<Refusal>) {
        let mut scratch = Scratch::default();
        let mut pieces = Vec::new();
        while !request.is_served() {
            if let Err(refusal) = request.read_piece(mem, &[bdf(7), bdf(0x10)], &mut scratch) {
                return (pieces, Some(refusal));
            }
            pieces.push(scratch.piece().to_vec());
        }
        (pieces, None)
    }

    #[test]
    fn a_single_page_is_a_piece_of_one() {
        let mut request = decode(0x1234_0010).unwrap();
        assert_eq!(request.word().raw(), 0x1234_0010);
        assert_eq!(pieces(&mut request, &memory()), (vec![vec![0x1234]], None));
        assert_eq!(decode(0x5_0000).unwrap_err(), Refusal::NoEndpoint(NoEndpoint));
        assert_eq!(decode(0x5_0011).unwrap_err(), Refusal::UnknownEndpoint(bdf(0x11)));
    }

    #[test]
    fn a_long_batch_comes_in_pieces() {
        let mem = memory();
        let gfns: Vec<_> = (0..10_000).map(|n| Gfn::new(n * 3).unwrap()).collect();
        let word = write_batch(&mem, Gpa::new(8), bdf(7), &gfns).unwrap();
        let (pieces, end) = pieces(&mut decode(word.raw()).unwrap(), &mem);
        assert_eq!(end, None);
        assert_eq!(pieces.iter().map(Vec::len).collect::<Vec<_>>(), [4096, 4096, 1808]);
        assert_eq!(pieces.concat(), gfns.iter().map(|gfn| gfn.raw()).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_kept_of_a_piece_comes_before_the_next() {
        let mem = memory();
        let gfns: Vec<_> = (0..5000).map(|n| Gfn::new(n).unwrap()).collect();
        let word = write_batch(&mem, Gpa::new(8), bdf(7), &gfns).unwrap();
        let mut request = decode(word.raw()).unwrap();
        let mut scratch = Scratch::default();
        request.read_piece(&mem, &[bdf(7)], &mut scratch).unwrap();
        request.keep_piece(&mut scratch, 4000);
        let (pieces, _) = pieces(&mut request, &mem);
        assert_eq!(pieces, [(4000..4096).collect::<Vec<_>>(), (4096..5000).collect()]);
    }

    #[test]
    fn a_batch_that_cannot_be_is_refused_before_its_list_is_read() {
        let mem = memory();
        let at = 0x1000_u64;
        let serve = |bdf: u16, pages: u64| {
            mem.write_obj(bdf, GuestAddress(at)).unwrap();
            mem.write_obj(pages, GuestAddress(at + 8)).unwrap();
            pieces(&mut decode(at | 1 << 63).unwrap(), &mem)
        };
        let header = Gpa::new(at);
        for pages in [u64::MAX, u64::MAX / 8, (u64::MAX - at - 16) / 8 + 1] {
            assert_eq!(serve(7, pages), (vec![], Some(Refusal::TooLong { header, pages })));
        }
        assert_eq!(serve(0, 1).1, Some(Refusal::NoEndpoint(NoEndpoint)));
        assert_eq!(serve(8, 1).1, Some(Refusal::UnknownEndpoint(bdf(8))));
        assert_eq!(serve(7, 0), (vec![vec![]], None));
        let last = RAM as u64 - 16;
        mem.write_obj(7_u16, GuestAddress(last)).unwrap();
        assert_eq!(pieces(&mut decode(last | 1 << 63).unwrap(), &mem), (vec![vec![]], None), "nothing, where RAM ends");
        // As long as an address space: it ends where RAM ends.
        let (pieces_read, end) = serve(7, (u64::MAX - at - 16) / 8);
        assert!(matches!(end, Some(Refusal::Unreadable(_))));
        assert!(pieces_read.len() <= RAM / 8 / PIECE_PAGES);
        for header in [RAM as u64 - 8, u64::MAX >> 1] {
            let (none, end) = pieces(&mut decode(1 << 63 | header).unwrap(), &mem);
            assert!(none.is_empty() && matches!(end, Some(Refusal::Unreadable(_))));
        }
    }

    proptest! {
        #[test]
        fn a_sorted_piece_is_a_set(mut gfns in prop::collection::vec(0_u64..50, 0..100)) {
            let mut scratch = Scratch::default();
            scratch.gfns[..gfns.len()].copy_from_slice(&gfns);
            scratch.len = gfns.len();
            scratch.sort();
            gfns.sort_unstable();
            gfns.dedup();
            prop_assert_eq!(scratch.piece().to_vec(), gfns);
        }
    }
}
