//! What a pin map needs of an IOMMU: [`DmaMapper`].
//!
//! Unsafe is needed here only to declare it: a map call is a promise about memory.
#![allow(unsafe_code)]

use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

/// Maps pieces of guest memory for the endpoints of one guest, at IOVAs that the caller chooses.
///
/// The trait protects one invariant: **what a device can reach is exactly what `map` was called for and `unmap` was
/// not**. So `map` returns only when the device can reach the whole range, and `unmap` only when it can reach none of
/// it any more, with the memory unpinned. The rules are those of VFIO's type1 container, which other backends can keep
/// as well:
///
/// * A mapping is made by one `map` call and goes whole or not at all.
/// * A `map` that overlaps a mapping fails with [`MapError::Exists`] and changes nothing.
/// * One `unmap` call may cover many mappings and the holes between them. It returns the bytes that were mapped: 0 is
///   success. A range that would cut a mapping in two fails with [`MapError::Invalid`].
/// * A call that fails has changed nothing.
///
/// Calls come from many threads, from one process (VFIO accounts pinned memory to the address space that mapped it).
/// The module `contract` (feature `test-util`) checks all of this on an implementation.
pub trait DmaMapper: Debug + Send + Sync {
    /// Makes `[iova, iova + len)` reach `backing`, for reading and writing.
    ///
    /// `iova` and `len` are in bytes, multiples of the smallest page size of [`DmaMapper::limits`].
    ///
    /// # Errors
    ///
    /// [`MapError`]; nothing was mapped.
    ///
    /// # Safety
    ///
    /// From this call until an [`unmap`](DmaMapper::unmap) that covers the range has returned `Ok`, or the mapper is
    /// gone, devices read and write the memory at any time, on behalf of a guest that is not trusted:
    ///
    /// * `[backing.hva, backing.hva + len)` stays one mapping of this process, readable and writable;
    /// * nothing in it is borrowed as a Rust reference to anything but atomics.
    unsafe fn map(&self, iova: u64, backing: Backing<'_>, len: u64) -> Result<(), MapError>;

    /// Takes all mappings in `[iova, iova + len)` away and returns how many bytes they had.
    ///
    /// # Errors
    ///
    /// [`MapError::Invalid`] if the range cuts a mapping in two or is not made of pages; nothing was unmapped.
    fn unmap(&self, iova: u64, len: u64) -> Result<u64, MapError>;

    /// What this mapper can map, as it stands now.
    fn limits(&self) -> Limits;
}

/// The memory behind a mapping.
#[derive(Clone, Copy, Debug)]
pub struct Backing<'a> {
    /// Where this process has the memory mapped.
    pub hva: NonNull<u8>,
    /// The file that holds the memory, where there is one; some mappers (iommufd) can pin straight from it.
    pub file: Option<FileBacking<'a>>,
}

/// A place in a file that holds guest memory.
#[derive(Clone, Copy, Debug)]
pub struct FileBacking<'a> {
    /// The file, a memfd most of the time.
    pub fd: BorrowedFd<'a>,
    /// Byte offset of the memory in the file.
    pub offset: u64,
}

/// What a mapper can map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The page sizes of the IOMMU: bit n set means that pages of 2^n bytes exist. Mappings are multiples of the smallest.
    pub page_sizes: u64,
    /// The IOVAs that can be mapped, in bytes, ascending.
    pub iova_ranges: Vec<RangeInclusive<u64>>,
    /// How many mappings can be made yet; `None`: no limit but memory.
    pub mappings_left: Option<u64>,
}

/// Why a mapping or unmapping did not take place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Something in the range is mapped already (EEXIST).
    #[error("the range overlaps a mapping")]
    Exists,
    /// The mapper's mappings are used up (ENOSPC).
    #[error("no mappings left")]
    NoEntries,
    /// The memory that may be pinned is used up, or there is none (ENOMEM).
    #[error("no memory left to pin")]
    NoMemory,
    /// Not pages, empty, wrapping, outside the IOVA ranges, or cutting a mapping in two (EINVAL).
    #[error("not a range that can be mapped or unmapped")]
    Invalid,
    /// The backing memory is not there (EFAULT).
    #[error("bad backing address")]
    Fault,
    /// Anything else, with the errno.
    #[error("the mapper failed with errno {0}")]
    Other(i32),
}

/// What there is no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shortage {
    /// The mapper has no entries left, however few pages each has.
    Mappings,
    /// So many pages may not be pinned, in however few mappings.
    Pages,
}

impl MapError {
    /// Whether freeing some mappings or pages can make the same call succeed.
    #[must_use]
    pub fn is_shortage(self) -> bool {
        self.shortage().is_some()
    }

    /// What it is that some has to be freed of.
    pub(crate) fn shortage(self) -> Option<Shortage> {
        match self {
            Self::NoEntries => Some(Shortage::Mappings),
            Self::NoMemory => Some(Shortage::Pages),
            _ => None,
        }
    }
}
