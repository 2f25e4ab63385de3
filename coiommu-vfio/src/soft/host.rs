//! The memory behind a mapping: the one room of this crate that touches memory it does not own.

// Guest memory is raw memory that others change at any time; only pointers can say that.
#![allow(unsafe_code)]

use std::ptr::NonNull;

use vm_memory::VolatileSlice;

/// Memory that devices may reach.
///
/// The value is the permission: one exists only while the contract of `DmaMapper::map` holds for its memory. The table
/// drops it when the mapping goes, and whatever was made from it borrows it, so no access outlives the mapping.
#[derive(Debug)]
pub(crate) struct Host {
    hva: NonNull<u8>,
    len: usize,
}

// SAFETY: a `Host` is an address and a length. The memory is not tied to a thread, and is only ever touched through
// volatile accesses, which expect others to touch it at the same time.
unsafe impl Send for Host {}
// SAFETY: as for `Send`; a shared `Host` gives nothing away but volatile slices and addresses.
unsafe impl Sync for Host {}

impl Host {
    /// # Safety
    ///
    /// Until the value is dropped, `[hva, hva + len)` is one mapping of this process, readable and writable, and
    /// nothing in it is borrowed as a Rust reference to anything but atomics.
    pub(crate) unsafe fn new(hva: NonNull<u8>, len: usize) -> Self {
        Self { hva, len }
    }

    /// In bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of byte `offset`, which is inside.
    pub(crate) fn address(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.len, "offset {offset:#x} in {:#x} bytes", self.len);
        // SAFETY: offset < len, and [hva, hva + len) is one mapping (contract of `new`).
        unsafe { self.hva.add(offset) }
    }

    /// The bytes from `offset` (which is inside) to the end, but `at_most` that many.
    pub(crate) fn bytes(&self, offset: usize, at_most: usize) -> VolatileSlice<'_> {
        let address = self.address(offset);
        let len = at_most.min(self.len - offset);
        // SAFETY: offset + len <= self.len, so the slice lies in [hva, hva + self.len), which is mapped and without Rust
        // references while `self` lives (contract of `new`); the slice borrows `self`.
        unsafe { VolatileSlice::new(address.as_ptr(), len) }
    }
}
