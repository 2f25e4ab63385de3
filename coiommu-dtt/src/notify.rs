//! Requests: the words in which a guest asks for pins, and the slots that it puts them into.
//!
//! A slot is one u64 a vCPU in shared memory. A guest puts a request in, rings its doorbell, and spins until the slot
//! reads 0:
//!
//! | who | step | order, and what it pairs with |
//! | --- | --- | --- |
//! | guest | [`post`](NotifySlots::post): 0 to request | release: the batch is written before the request is seen |
//! | host | [`take`](NotifySlots::take): reads the request | acquire, with the guest's release |
//! | host | [`answer`](NotifySlots::answer): the request it took, to 0 | release: every PINNED bit is set before the answer is seen |
//! | guest | [`is_answered`](NotifySlots::is_answered): reads 0 | acquire, with the host's release |

use core::num::NonZeroU64;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use zerocopy::little_endian::{U16, U64};

use crate::bdf::Bdf;
use crate::geometry::{Gfn, Gpa};
use crate::memory::Word64;

/// A slot's word that asks for something: anything but 0, as a guest wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestWord(NonZeroU64);

/// What a request word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Pin one page.
    Page {
        /// The page.
        gfn: Gfn,
        /// The endpoint that will use it.
        bdf: Bdf,
    },
    /// Pin the pages of a list in guest memory.
    Batch {
        /// Where the list's [`BatchHeader`] is.
        header: Gpa,
    },
}

/// A request for BDF 0, which no endpoint has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the request names no endpoint (BDF 0)")]
pub struct NoEndpoint;

impl RequestWord {
    const BATCH: u64 = 1 << 63;
    const GFN_SHIFT: u32 = 16;

    /// What a slot holds; `None` for 0, which is nothing.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Option<Self> {
        match NonZeroU64::new(raw) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    /// The word as it stands in a slot.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0.get()
    }

    /// Guest: asks for one page; `None` if the gfn does not fit (47 bits).
    #[must_use]
    pub fn page(gfn: Gfn, bdf: Bdf) -> Option<Self> {
        let shifted = gfn.raw().checked_mul(1 << Self::GFN_SHIFT)?;
        if shifted & Self::BATCH == 0 { Self::from_raw(shifted | u64::from(bdf.raw())) } else { None }
    }

    /// Guest: asks for the pages of the list at `header`; `None` if the address does not fit (63 bits).
    #[must_use]
    pub const fn batch(header: Gpa) -> Option<Self> {
        if header.raw() & Self::BATCH == 0 { Self::from_raw(header.raw() | Self::BATCH) } else { None }
    }

    /// Host: what is asked.
    ///
    /// # Errors
    ///
    /// [`NoEndpoint`] for a single page of BDF 0.
    pub fn decode(self) -> Result<Request, NoEndpoint> {
        let raw = self.raw();
        if raw & Self::BATCH != 0 {
            return Ok(Request::Batch { header: Gpa::new(raw & !Self::BATCH) });
        }
        let [low, high, ..] = raw.to_le_bytes();
        let bdf = Bdf::new(u16::from_le_bytes([low, high])).ok_or(NoEndpoint)?;
        // 47 bits are always a gfn.
        let gfn = Gfn::new(raw >> Self::GFN_SHIFT).ok_or(NoEndpoint)?;
        Ok(Request::Page { gfn, bdf })
    }
}

/// What a batch begins with in guest memory; `nr_pages` gfns, each a little-endian u64, follow.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::Immutable,
    zerocopy::KnownLayout,
    zerocopy::Unaligned,
)]
#[repr(C)]
pub struct BatchHeader {
    /// The endpoint that will use the pages.
    pub bdf: U16,
    /// Nothing.
    pub pad: [U16; 3],
    /// How many gfns follow, as the guest says.
    pub nr_pages: U64,
}

/// The notify map: a slot for each vCPU, shared with the guest. Copies are of the same slots.
#[derive(Debug)]
pub struct NotifySlots<'a, W> {
    slots: &'a [W],
}

impl<W> Clone for NotifySlots<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for NotifySlots<'_, W> {}

/// A vCPU that has no slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("vcpu {vcpu} has no slot: there are {slots}")]
pub struct NoSlot {
    /// The vCPU asked for.
    pub vcpu: usize,
    /// How many slots there are.
    pub slots: usize,
}

/// What became of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a slot that holds another request by now has to be served again"]
pub enum Answered {
    /// The slot is 0.
    Yes,
    /// The guest put another request in meanwhile; it is still there.
    Replaced,
}

impl<'a, W: Word64> NotifySlots<'a, W> {
    /// One slot a word; the words lie in memory that the guest shares.
    pub const fn new(slots: &'a [W]) -> Self {
        Self { slots }
    }

    /// How many vCPUs have one.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Host: the request in a slot, read once; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`NoSlot`].
    pub fn take(&self, vcpu: usize) -> Result<Option<RequestWord>, NoSlot> {
        Ok(RequestWord::from_raw(self.slot(vcpu)?.load(Acquire)))
    }

    /// Host: answers the request that was taken from a slot, and only that one.
    ///
    /// # Errors
    ///
    /// [`NoSlot`].
    pub fn answer(&self, vcpu: usize, taken: RequestWord) -> Result<Answered, NoSlot> {
        match self.slot(vcpu)?.compare_exchange(taken.raw(), 0, Release, Relaxed) {
            // A guest that wrote 0 itself waits for nothing.
            Ok(_) | Err(0) => Ok(Answered::Yes),
            Err(_) => Ok(Answered::Replaced),
        }
    }

    /// Guest: puts a request into its slot, before it rings its doorbell.
    ///
    /// # Errors
    ///
    /// [`NoSlot`].
    pub fn post(&self, vcpu: usize, request: RequestWord) -> Result<(), NoSlot> {
        self.slot(vcpu)?.store(request.raw(), Release);
        Ok(())
    }

    /// Guest: whether its request was answered.
    ///
    /// # Errors
    ///
    /// [`NoSlot`].
    pub fn is_answered(&self, vcpu: usize) -> Result<bool, NoSlot> {
        Ok(self.slot(vcpu)?.load(Acquire) == 0)
    }

    fn slot(&self, vcpu: usize) -> Result<&'a W, NoSlot> {
        self.slots.get(vcpu).ok_or(NoSlot { vcpu, slots: self.slots.len() })
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use core::sync::atomic::AtomicU64;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_word_decodes_to_what_it_was_made_of(raw: u64) {
            let Some(word) = RequestWord::from_raw(raw) else { return Ok(()) };
            match word.decode() {
                Ok(Request::Page { gfn, bdf }) => prop_assert_eq!(RequestWord::page(gfn, bdf), Some(word)),
                Ok(Request::Batch { header }) => prop_assert_eq!(RequestWord::batch(header), Some(word)),
                Err(NoEndpoint) => prop_assert_eq!(raw & 0xffff, 0),
            }
        }

        #[test]
        fn a_page_that_does_not_fit_is_no_word(gfn in 0..=Gfn::MAX.raw(), bdf in 1..=u16::MAX) {
            let (gfn, bdf) = (Gfn::new(gfn).unwrap(), Bdf::new(bdf).unwrap());
            prop_assert_eq!(RequestWord::page(gfn, bdf).is_some(), gfn.raw() < 1 << 47);
        }
    }

    #[test]
    fn an_answer_takes_only_the_request_it_is_for() {
        let words = [AtomicU64::new(0), AtomicU64::new(0)];
        let slots = NotifySlots::new(&words);
        assert_eq!((slots.len(), slots.is_empty(), NotifySlots::<AtomicU64>::new(&[]).is_empty()), (2, false, true));
        let [first, second] = [0x7_0010, 0x8_0010].map(|raw| RequestWord::from_raw(raw).unwrap());
        assert_eq!(slots.take(1), Ok(None));
        slots.post(1, first).unwrap();
        assert_eq!(slots.is_answered(1), Ok(false));
        assert_eq!(slots.take(1), Ok(Some(first)));
        slots.post(1, second).unwrap();
        assert_eq!(slots.answer(1, first), Ok(Answered::Replaced));
        assert_eq!(slots.take(1), Ok(Some(second)));
        assert_eq!(slots.answer(1, second), Ok(Answered::Yes));
        assert_eq!(slots.is_answered(1), Ok(true));
        assert_eq!(slots.answer(1, second), Ok(Answered::Yes), "a slot that is 0 already waits for nothing");
        assert_eq!(slots.take(2), Err(NoSlot { vcpu: 2, slots: 2 }));
    }

    #[test]
    fn a_batch_header_is_sixteen_bytes_without_holes() {
        assert_eq!(size_of::<BatchHeader>(), 16);
    }
}
