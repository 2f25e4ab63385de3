//! Tables in vm-memory's guest memory. The memory must stay mapped as long as its region lives, as it does for all backends
//! but that of vm-memory's feature `xen` with grants mapped on demand.
//!
//! Unsafe is needed here: vm-memory lends out one atomic at a time, bound to a slice on the stack, and checks bounds at
//! each. A leaf table is looked up once and then used 1024 times, so it is lent out as a slice of atomics.
#![allow(unsafe_code)]

use core::slice;
use core::sync::atomic::{AtomicU32, AtomicU64};

use vm_memory::{Address, AtomicInteger, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{MemoryError, TableMemory};
use crate::geometry::Gpa;

impl<M: GuestMemoryBackend> TableMemory for M {
    type U32 = AtomicU32;
    type U64 = AtomicU64;

    fn words32(&self, at: Gpa, count: usize) -> Result<&[AtomicU32], MemoryError> {
        words(self, at, count)
    }

    fn piece32(&self, at: Gpa, count: usize) -> Result<(&[AtomicU32], usize), MemoryError> {
        const WORD: u64 = size_of::<AtomicU32>() as u64;
        // All of them must be there in any case.
        let wanted = self.words32(at, count)?;
        let piece = self.to_region_addr(GuestAddress(at.raw())).and_then(|(region, start)| {
            // Regions begin at a page, so at a word.
            let before = usize::try_from(start.raw_value() / WORD).ok()?;
            let all = usize::try_from(region.len() / WORD).ok()?;
            let first = at.raw().checked_sub(start.raw_value())?;
            Some((self.words32(Gpa::new(first), all).ok()?, before))
        });
        Ok(piece.unwrap_or((wanted, 0)))
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
    let bytes = count.saturating_mul(size_of::<A>());
    let absent = MemoryError::Absent { at, bytes };
    let (region, start) = mem.to_region_addr(GuestAddress(at.raw())).ok_or(absent)?;
    let memory = region.get_slice(start, bytes).map_err(|_| absent)?;
    if memory.len() != bytes {
        return Err(absent);
    }
    let first: *const A = memory.ptr_guard().as_ptr().cast();
    if !first.is_aligned() {
        return Err(MemoryError::Misaligned { at });
    }
    // SAFETY: vm-memory vouches that the `bytes` bytes at `first` are memory for as long as the region is borrowed, and
    // so for as long as `mem` is (where a region stays mapped, see above); they are aligned for A (above) and hold `count` of them. An AtomicInteger is an integer
    // of std's atomics, for which every bit pattern is valid, and which others may write while it is borrowed, as the
    // guest does. No other kind of reference to guest memory is made anywhere.
    Ok(unsafe { slice::from_raw_parts(first, count) })
}
