//! What the tables lie in: guest memory as aligned atomic words and copies.

use core::fmt::Debug;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::geometry::Gpa;

#[cfg(feature = "vm-memory")]
mod vm;

/// Guest memory that tables and requests can be read from, as one moment sees it.
///
/// With the feature `vm-memory`, everything that is [`vm_memory::GuestMemoryBackend`] is this. Model checkers bring an
/// arena with atomics of their own.
///
/// The words that are lent out are shared with the guest, which writes them at any time. So they are atomics, and no
/// other kind of reference is ever made.
pub trait TableMemory {
    /// A 32-bit word of this memory.
    type U32: Word32;
    /// A 64-bit word of this memory.
    type U64: Word64;

    /// `count` 32-bit words from `at` on.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] if `at` is not a multiple of 4, or if not all of the words lie in one piece of memory.
    fn words32(&self, at: Gpa, count: usize) -> Result<&[Self::U32], MemoryError>;

    /// The words of one piece of memory, as large as it comes, that has at least `count` of them from `at` on; and which of
    /// them is the one at `at`. For those that look up many places: most are in the piece that they know.
    ///
    /// # Errors
    ///
    /// As [`words32`](Self::words32).
    fn piece32(&self, at: Gpa, count: usize) -> Result<(&[Self::U32], usize), MemoryError> {
        Ok((self.words32(at, count)?, 0))
    }

    /// `count` 64-bit words from `at` on.
    ///
    /// # Errors
    ///
    /// [`MemoryError`] if `at` is not a multiple of 8, or if not all of the words lie in one piece of memory.
    fn words64(&self, at: Gpa, count: usize) -> Result<&[Self::U64], MemoryError>;

    /// Copies the bytes from `at` on; what a guest changes meanwhile may be seen half.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Absent`] if some of the bytes are not memory; `into` may be partly written.
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError>;

    /// Copies bytes to `at`.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Absent`] if some of the bytes are not memory; a part may have been written.
    fn write(&self, at: Gpa, from: &[u8]) -> Result<(), MemoryError>;
}

/// Why guest memory cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// There is no memory, or not in one piece.
    #[error("no guest memory of {bytes} bytes at {at}")]
    Absent {
        /// Where it was looked for.
        at: Gpa,
        /// How much.
        bytes: usize,
    },
    /// Words do not begin there.
    #[error("{at} is no place for a word")]
    Misaligned {
        /// Where one was looked for.
        at: Gpa,
    },
}

/// A 32-bit atomic that a [`TableMemory`] lends out. The methods are those of [`core::sync::atomic::AtomicU32`].
#[allow(missing_docs, reason = "they are those of the standard atomics")]
pub trait Word32: Debug + Sync {
    fn load(&self, order: Ordering) -> u32;
    fn fetch_or(&self, bits: u32, order: Ordering) -> u32;
    fn fetch_and(&self, bits: u32, order: Ordering) -> u32;
    /// # Errors
    ///
    /// The value now, if it is not `current`, or for no reason.
    fn compare_exchange_weak(&self, current: u32, new: u32, success: Ordering, failure: Ordering) -> Result<u32, u32>;
}

/// A 64-bit atomic that a [`TableMemory`] lends out. The methods are those of [`core::sync::atomic::AtomicU64`].
#[allow(missing_docs, reason = "they are those of the standard atomics")]
pub trait Word64: Debug + Sync {
    fn load(&self, order: Ordering) -> u64;
    fn store(&self, value: u64, order: Ordering);
    /// # Errors
    ///
    /// The value now, if it is not `current`.
    fn compare_exchange(&self, current: u64, new: u64, success: Ordering, failure: Ordering) -> Result<u64, u64>;
}

impl Word32 for AtomicU32 {
    #[inline]
    fn load(&self, order: Ordering) -> u32 {
        self.load(order)
    }

    #[inline]
    fn fetch_or(&self, bits: u32, order: Ordering) -> u32 {
        self.fetch_or(bits, order)
    }

    #[inline]
    fn fetch_and(&self, bits: u32, order: Ordering) -> u32 {
        self.fetch_and(bits, order)
    }

    #[inline]
    fn compare_exchange_weak(&self, current: u32, new: u32, success: Ordering, failure: Ordering) -> Result<u32, u32> {
        self.compare_exchange_weak(current, new, success, failure)
    }
}

impl Word64 for AtomicU64 {
    #[inline]
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    #[inline]
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }

    #[inline]
    fn compare_exchange(&self, current: u64, new: u64, success: Ordering, failure: Ordering) -> Result<u64, u64> {
        self.compare_exchange(current, new, success, failure)
    }
}
