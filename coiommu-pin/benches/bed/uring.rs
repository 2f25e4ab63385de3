//! A mapper that really pins: each mapping is a registered buffer of an io_uring, whose pages the kernel pins for as long
//! as it is registered, as VFIO does, and with the same code. No device is needed.
//!
//! Unsafe is needed here: a registered buffer is a promise about memory, as a map call is.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard};

use coiommu_dtt::PAGE_SIZE;
use coiommu_pin::{Backing, DmaMapper, Limits, MapError};
use io_uring::IoUring;

use super::pins::PinsBatches;
use super::{Batch, Bed};

/// See the module.
pub(crate) struct Registered {
    ring: IoUring,
    mappings: Mutex<Mappings>,
}

/// What is registered, and where.
struct Mappings {
    /// By IOVA: length, and the slot of the ring's table.
    used: BTreeMap<u64, (u64, u32)>,
    free: Vec<u32>,
}

impl Registered {
    /// A ring with room for so many mappings. Where the kernel has no io_uring for us, its error.
    pub(crate) fn new(slots: u32) -> io::Result<Self> {
        let ring = IoUring::new(1)?;
        ring.submitter().register_buffers_sparse(slots)?;
        let mappings = Mappings { used: BTreeMap::new(), free: (0..slots).rev().collect() };
        Ok(Self { ring, mappings: Mutex::new(mappings) })
    }

    fn mappings(&self) -> MutexGuard<'_, Mappings> {
        self.mappings.lock().expect("no panic before")
    }

    /// Puts memory into a slot, or takes it out if there is none of it.
    ///
    /// # Safety
    ///
    /// As for [`DmaMapper::map`].
    unsafe fn set(&self, slot: u32, start: *mut u8, bytes: usize) -> Result<(), MapError> {
        let buffer = libc::iovec { iov_base: start.cast(), iov_len: bytes };
        // SAFETY: the caller vouches for the memory.
        let done = unsafe { self.ring.submitter().register_buffers_update(slot, &[buffer], None) };
        match done.map_err(|error| error.raw_os_error()) {
            Ok(_) => Ok(()),
            Err(Some(libc::ENOMEM)) => Err(MapError::NoMemory),
            Err(Some(libc::EFAULT)) => Err(MapError::Fault),
            Err(errno) => Err(MapError::Other(errno.unwrap_or_default())),
        }
    }
}

impl DmaMapper for Registered {
    unsafe fn map(&self, iova: u64, backing: Backing<'_>, len: u64) -> Result<(), MapError> {
        let mut mappings = self.mappings();
        let bytes = usize::try_from(len).map_err(|_| MapError::Invalid)?;
        if mappings.used.range(..iova + len).next_back().is_some_and(|(&at, &(length, _))| at + length > iova) {
            return Err(MapError::Exists);
        }
        let slot = mappings.free.pop().ok_or(MapError::NoEntries)?;
        // SAFETY: the caller vouches for the memory.
        let result = unsafe { self.set(slot, backing.hva.as_ptr(), bytes) };
        match result {
            Ok(()) => drop(mappings.used.insert(iova, (len, slot))),
            Err(_) => mappings.free.push(slot),
        }
        result
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<u64, MapError> {
        let mut mappings = self.mappings();
        let mut bytes = 0;
        while let Some((&at, &(length, slot))) = mappings.used.range(iova..iova + len).next() {
            if at + length > iova + len {
                return Err(MapError::Invalid);
            }
            // SAFETY: no memory goes into the slot.
            unsafe { self.set(slot, ptr::null_mut(), 0) }?;
            mappings.used.remove(&at);
            mappings.free.push(slot);
            bytes += length;
        }
        Ok(bytes)
    }

    fn limits(&self) -> Limits {
        super::nothing::limits()
    }
}

/// Nothing but the calls: one for each batch, which is a run.
pub(crate) struct Calls {
    bed: &'static Bed,
    mapper: Arc<dyn DmaMapper>,
    mapped: Vec<(u64, u64)>,
}

impl Calls {
    pub(crate) fn new(bed: &'static Bed, mapper: Arc<dyn DmaMapper>) -> Self {
        Self { bed, mapper, mapped: Vec::new() }
    }

    fn range(batch: &Batch) -> (u64, u64) {
        (batch.gfns[0] * PAGE_SIZE, batch.gfns.len() as u64 * PAGE_SIZE)
    }
}

impl PinsBatches for Calls {
    fn pin(&mut self, batch: &Batch) {
        let (iova, len) = Self::range(batch);
        // SAFETY: the bed's memory stays mapped for as long as the process lives, and nobody borrows it.
        unsafe { self.mapper.map(iova, self.bed.backing(batch.gfns[0]), len) }.expect("a mapper that maps");
        self.mapped.push((iova, len));
    }

    fn empty(&mut self) {
        for (iova, len) in self.mapped.drain(..) {
            self.mapper.unmap(iova, len).expect("a mapper that unmaps");
        }
    }

    fn pinned(&self) -> Option<u64> {
        None
    }

    fn sets_leaves(&self) -> bool {
        false
    }
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered").finish_non_exhaustive()
    }
}
