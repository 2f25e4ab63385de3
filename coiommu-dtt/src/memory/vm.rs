//! Tables in vm-memory's guest memory. The memory must stay mapped as long as its region lives, as it does for all backends
//! but that of vm-memory's feature `xen` with grants mapped on demand.
//!
//! Unsafe is needed here: vm-memory lends out one atomic at a time, bound to a slice on the stack, and checks bounds at
//! each. A leaf table is looked up once and then used 1024 times, so it is lent out as a slice of atomics.
#![allow(unsafe_code)]

use core::slice;
use core::sync::atomic::{AtomicU32, AtomicU64};

use vm_memory::{
    Address, AtomicInteger, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};

use super::{MemoryError, TableMemory};
use crate::geometry::Gpa;

/// The most words that are lent at once. Miri looks at each of them whenever they are handed on.
const LARGEST_PIECE: usize = if cfg!(miri) { 1 << 12 } else { usize::MAX / size_of::<AtomicU32>() };

impl<M: GuestMemoryBackend> TableMemory for M {
    type U32 = AtomicU32;
    type U64 = AtomicU64;

    fn words32(&self, at: Gpa, count: usize) -> Result<&[AtomicU32], MemoryError> {
        words(self, at, count)
    }

    fn piece32(&self, at: Gpa, count: usize) -> Result<(&[AtomicU32], usize), MemoryError> {
        const WORD: u64 = size_of::<AtomicU32>() as u64;
        let bytes = count.saturating_mul(size_of::<AtomicU32>());
        let absent = MemoryError::Absent { at, bytes };
        let (region, start) = self.to_region_addr(GuestAddress(at.raw())).ok_or(absent)?;
        // A region may begin anywhere, but words are aligned here as they are there, or it lends none.
        let (before, all) = (start.raw_value() / WORD, region.len() / WORD);
        let (before, all) = usize::try_from(before).ok().zip(usize::try_from(all).ok()).ok_or(absent)?;
        let fits = start.raw_value() % WORD == 0 && before.checked_add(count).is_some_and(|end| end <= all);
        if !fits || all > LARGEST_PIECE {
            // Whatever is wrong with that is said there.
            return Ok((words_in(region, start, count, at)?, 0));
        }
        Ok((words_in(region, MemoryRegionAddress(0), all, at)?, before))
    }

    fn words64(&self, at: Gpa, count: usize) -> Result<&[AtomicU64], MemoryError> {
        words(self, at, count)
    }

    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), MemoryError> {
        let bytes = into.len();
        self.read_slice(into, GuestAddress(at.raw())).map_err(|_| MemoryError::Absent { at, bytes })
    }

    fn write(&self, at: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        self.write_slice(from, GuestAddress(at.raw())).map_err(|_| MemoryError::Absent { at, bytes: from.len() })
    }
}

/// `count` atomics from `at` on, all in one region.
fn words<M: GuestMemoryBackend, A: AtomicInteger>(mem: &M, at: Gpa, count: usize) -> Result<&[A], MemoryError> {
    let absent = MemoryError::Absent { at, bytes: count.saturating_mul(size_of::<A>()) };
    let (region, start) = mem.to_region_addr(GuestAddress(at.raw())).ok_or(absent)?;
    words_in(region, start, count, at)
}

/// `count` atomics of a region, from `start` on; `at` is where they were asked for.
fn words_in<R: GuestMemoryRegion, A: AtomicInteger>(
    region: &R,
    start: MemoryRegionAddress,
    count: usize,
    at: Gpa,
) -> Result<&[A], MemoryError> {
    let bytes = count.saturating_mul(size_of::<A>());
    let absent = MemoryError::Absent { at, bytes };
    let memory = region.get_slice(start, bytes).map_err(|_| absent)?;
    if memory.len() != bytes {
        return Err(absent);
    }
    let first: *const A = memory.ptr_guard().as_ptr().cast();
    if !first.is_aligned() {
        return Err(MemoryError::Misaligned { at });
    }
    // SAFETY: vm-memory vouches that the `bytes` bytes at `first` are memory for as long as the region is borrowed, and so
    // for as long as what it is borrowed from (where a region stays mapped, see above); they are aligned for A and hold
    // `count` of them (both checked above). An AtomicInteger is an integer of std's atomics, for which every bit pattern is
    // valid, and which others may write while it is borrowed, as the guest does. No other kind of reference to guest memory
    // is made anywhere.
    Ok(unsafe { slice::from_raw_parts(first, count) })
}
