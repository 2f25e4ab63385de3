//! Requests for pins, from a guest that is not trusted: decoding, and reading batches piece by piece.
//!
//! A request is read once. Its header becomes a [`PinRequest`], which only decoding can make; its gfns are copied in
//! pieces of at most [`PIECE_PAGES`] into a [`Scratch`], and what the guest writes there later is not seen.

use std::time::Duration;

use coiommu_dtt::notify::{BatchHeader, NoEndpoint};
use coiommu_dtt::{Bdf, Gpa, MemoryError, Request, RequestWord, TableMemory};
use zerocopy::{FromZeros, IntoBytes};

/// The most pages of a batch that are served at once. Between pieces a worker looks at its other slots.
pub const PIECE_PAGES: usize = 4096;

/// A request that is being served: what is left of it.
#[derive(Debug)]
pub struct PinRequest {
    bdf: Bdf,
    rest: Rest,
    /// When it was taken from its slot.
    pub(crate) taken: Duration,
    /// Which activation it belongs to.
    pub(crate) activation: u64,
    /// Room is made once a request.
    pub(crate) made_room: bool,
    /// Whether to wait for RAM that went.
    pub(crate) waits: bool,
    /// A piece that was read and has to be served again once RAM is back.
    waiting: Vec<u64>,
    pub(crate) asked: u64,
    pub(crate) failed: u64,
}

#[derive(Debug)]
enum Rest {
    Page(u64),
    Batch { next: Gpa, pages: u64 },
    Nothing,
}

/// Why a request is not looked at. Its slot is answered all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
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
        Self {
            gfns: vec![0; PIECE_PAGES].into_boxed_slice(),
            len: 0,
        }
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
    /// Reads a request: its word, and the header if it is a batch.
    ///
    /// # Errors
    ///
    /// [`Refusal`], but for the endpoint, which the caller checks.
    pub(crate) fn decode<M: TableMemory + ?Sized>(
        word: RequestWord,
        mem: &M,
        taken: Duration,
        activation: u64,
    ) -> Result<Self, Refusal> {
        let (bdf, rest) = match word.decode()? {
            Request::Page { gfn, bdf } => (bdf, Rest::Page(gfn.raw())),
            Request::Batch { header } => decode_batch(header, mem)?,
        };
        Ok(Self {
            bdf,
            rest,
            taken,
            activation,
            made_room: false,
            waits: true,
            waiting: Vec::new(),
            asked: 0,
            failed: 0,
        })
    }

    /// The endpoint that will use the pages.
    #[must_use]
    pub const fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// Pages that are still to be read, as the guest says.
    #[must_use]
    pub const fn pages_left(&self) -> u64 {
        match self.rest {
            Rest::Page(_) => 1,
            Rest::Batch { pages, .. } => pages,
            Rest::Nothing => 0,
        }
    }

    /// Keeps the piece at hand for the next step. This allocates; it is rare, and at most once a second a vCPU.
    pub(crate) fn keep_piece(&mut self, scratch: &mut Scratch) {
        self.waiting.clear();
        self.waiting.extend_from_slice(scratch.piece());
    }

    /// Copies the next piece, or the one that was kept.
    ///
    /// # Errors
    ///
    /// [`MemoryError`]: some of it is not memory. It is still the next piece.
    pub(crate) fn read_piece<M: TableMemory + ?Sized>(
        &mut self,
        mem: &M,
        scratch: &mut Scratch,
    ) -> Result<(), MemoryError> {
        scratch.len = 0;
        if !self.waiting.is_empty() {
            scratch.len = self.waiting.len();
            scratch.piece().copy_from_slice(&self.waiting);
            self.waiting.clear();
            return Ok(());
        }
        match &mut self.rest {
            Rest::Nothing => {}
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
        Ok(())
    }
}

fn decode_batch<M: TableMemory + ?Sized>(header: Gpa, mem: &M) -> Result<(Bdf, Rest), Refusal> {
    let mut read = BatchHeader::new_zeroed();
    mem.read(header, read.as_mut_bytes())?;
    let bdf = Bdf::new(read.bdf.get()).ok_or(NoEndpoint)?;
    let pages = read.nr_pages.get();
    let first = header.checked_add(size_of::<BatchHeader>() as u64);
    let list = pages.checked_mul(size_of::<u64>() as u64);
    match (first, list) {
        (Some(next), Some(bytes)) if next.checked_add(bytes).is_some() => Ok((bdf, Rest::Batch { next, pages })),
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

    const RAM: usize = 1 << 20;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap()
    }

    fn decode(raw: u64, mem: &GuestMemoryMmap) -> Result<PinRequest, Refusal> {
        PinRequest::decode(RequestWord::from_raw(raw).unwrap(), mem, Duration::ZERO, 0)
    }

    fn drain(request: &mut PinRequest, mem: &GuestMemoryMmap) -> Vec<Vec<u64>> {
        let mut scratch = Scratch::default();
        let mut pieces = Vec::new();
        while request.pages_left() > 0 {
            request.read_piece(mem, &mut scratch).unwrap();
            pieces.push(scratch.piece().to_vec());
        }
        pieces
    }

    #[test]
    fn a_single_page_is_a_piece_of_one() {
        let mem = memory();
        let mut request = decode(0x1234_0010, &mem).unwrap();
        assert_eq!((request.bdf().raw(), request.pages_left()), (0x10, 1));
        assert_eq!(drain(&mut request, &mem), [[0x1234]]);
    }

    #[test]
    fn a_long_batch_comes_in_pieces() {
        let mem = memory();
        let gfns: Vec<_> = (0..10_000).map(|n| Gfn::new(n * 3).unwrap()).collect();
        let word = write_batch(&mem, Gpa::new(8), Bdf::new(7).unwrap(), &gfns).unwrap();
        let mut request = decode(word.raw(), &mem).unwrap();
        assert_eq!(request.bdf().raw(), 7);
        let pieces = drain(&mut request, &mem);
        assert_eq!(pieces.iter().map(Vec::len).collect::<Vec<_>>(), [4096, 4096, 1808]);
        assert_eq!(pieces.concat(), gfns.iter().map(|gfn| gfn.raw()).collect::<Vec<_>>());
    }

    #[test]
    fn a_batch_that_cannot_be_is_refused_before_it_is_read() {
        let mem = memory();
        let at = 0x1000_u64;
        let write = |bdf: u16, pages: u64| {
            mem.write_obj(bdf, GuestAddress(at)).unwrap();
            mem.write_obj(pages, GuestAddress(at + 8)).unwrap();
            decode(at | 1 << 63, &mem)
        };
        let header = Gpa::new(at);
        for pages in [u64::MAX, u64::MAX / 8, (u64::MAX - at - 16) / 8 + 1] {
            assert_eq!(write(1, pages).unwrap_err(), Refusal::TooLong { header, pages });
        }
        assert_eq!(write(0, 1).unwrap_err(), Refusal::NoEndpoint(NoEndpoint));
        assert_eq!(write(1, 0).unwrap().pages_left(), 0);
        let mut request = write(1, (u64::MAX - at - 16) / 8).unwrap();
        let mut scratch = Scratch::default();
        while request.read_piece(&mem, &mut scratch).is_ok() {}
        assert!(request.pages_left() > 1 << 60, "it ends where RAM ends");
        assert!(matches!(
            decode(1 << 63 | (RAM as u64 - 8), &mem),
            Err(Refusal::Unreadable(_))
        ));
        assert!(matches!(decode(u64::MAX, &mem), Err(Refusal::Unreadable(_))));
        assert_eq!(decode(0x5_0000, &mem).unwrap_err(), Refusal::NoEndpoint(NoEndpoint));
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
