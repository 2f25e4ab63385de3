//! Guest RAM that may be pinned: [`RamRegion`].
//!
//! Unsafe is needed here: a region is a promise about memory, made once, on which every map call stands.
#![allow(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::Arc;

use coiommu_dtt::{Gfn, Gpa, PAGE_SIZE};
use vm_memory::{Address, GuestMemoryRegion};

use crate::mapper::{Backing, FileBacking};

/// A piece of guest RAM, present and writable, with the memory of this process that is behind it.
///
/// It keeps its memory alive: the pinner drops it only when nothing of it is mapped any more.
pub struct RamRegion {
    first: Gfn,
    pages: u64,
    hva: NonNull<u8>,
    file: Option<RamFile>,
    /// What keeps the memory mapped into this process.
    owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: `hva` is an address that is handed on to mappers, never used through this type; the rest is Send and Sync.
unsafe impl Send for RamRegion {}
// SAFETY: as above.
unsafe impl Sync for RamRegion {}

/// The file that a region's memory lies in. Two are the same place if device, inode and offset are.
#[derive(Clone, Debug)]
pub struct RamFile {
    file: Arc<File>,
    device: u64,
    inode: u64,
    offset: u64,
}

/// Why a region cannot come or go.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// Not whole pages, empty, or beyond the address space.
    #[error("RAM of {bytes:#x} bytes at {gpa} is not made of pages")]
    NotPages {
        /// Where it begins.
        gpa: Gpa,
        /// Its size.
        bytes: u64,
    },
    /// There is RAM already.
    #[error("RAM of {bytes:#x} bytes at {gpa} overlaps RAM that is there")]
    Overlaps {
        /// Where it begins.
        gpa: Gpa,
        /// Its size.
        bytes: u64,
    },
    /// The IOMMU cannot map such addresses.
    #[error("RAM of {bytes:#x} bytes at {gpa} is outside what the IOMMU can map")]
    OutsideIommu {
        /// Where it begins.
        gpa: Gpa,
        /// Its size.
        bytes: u64,
    },
    /// No region begins and ends there.
    #[error("there is no region of {bytes:#x} bytes at {gpa}")]
    Unknown {
        /// Where it was to begin.
        gpa: Gpa,
        /// What its size was to be.
        bytes: u64,
    },
    /// Some of it cannot be taken out of the IOMMU. Its memory is kept and must not be used for anything else.
    #[error("{pages} pages of the RAM at {gpa} are still mapped for the devices: the IOMMU refused to unmap them")]
    Stuck {
        /// Where the region begins.
        gpa: Gpa,
        /// How many pages stay.
        pages: u64,
    },
    /// The memory behind a region has no address in this process.
    #[error("the RAM at {gpa} has no host address")]
    NoHostAddress {
        /// Where the region begins.
        gpa: Gpa,
    },
    /// The file behind a region cannot be looked at.
    #[error("the file behind the RAM at {gpa}: {error}")]
    File {
        /// Where the region begins.
        gpa: Gpa,
        /// What the system said.
        error: io::Error,
    },
}

impl RamFile {
    /// The place `offset` bytes into a file.
    ///
    /// # Errors
    ///
    /// What the system says when asked which file it is.
    pub fn new(file: Arc<File>, offset: u64) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { file, device: meta.dev(), inode: meta.ino(), offset })
    }

    /// The file and the offset that guest address 0 would have in it: equal for all pages of one region, and for the same
    /// memory at the same place.
    fn identity(&self, first: Gfn) -> FileIdentity {
        FileIdentity { device: self.device, inode: self.inode, origin: self.offset.wrapping_sub(first.gpa().raw()) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileIdentity {
    device: u64,
    inode: u64,
    origin: u64,
}

impl RamRegion {
    /// RAM of `bytes` bytes at `gpa`, behind which is the memory at `hva`, kept by `owner`.
    ///
    /// # Errors
    ///
    /// [`RegionError::NotPages`].
    ///
    /// # Safety
    ///
    /// As long as `owner` lives, `[hva, hva + bytes)` is one mapping of this process, readable and writable, and nothing
    /// in it is borrowed as a Rust reference to anything but atomics. Devices will read and write it, for a guest that is
    /// not trusted.
    pub unsafe fn new(
        gpa: Gpa,
        bytes: u64,
        hva: NonNull<u8>,
        file: Option<RamFile>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, RegionError> {
        let end = gpa.raw().checked_add(bytes);
        let pages = gpa.is_page_aligned() && bytes.is_multiple_of(PAGE_SIZE) && bytes != 0;
        if !pages || end.is_none() {
            return Err(RegionError::NotPages { gpa, bytes });
        }
        Ok(Self { first: Gfn::containing(gpa), pages: bytes / PAGE_SIZE, hva, file, owner })
    }

    /// A region of vm-memory. It must be writable: the trait does not tell, and devices fault, or this process does, where
    /// it is not. With vm-memory's feature `xen`, its memory must be mapped for good, not on demand.
    ///
    /// # Errors
    ///
    /// [`RegionError::NotPages`], [`RegionError::NoHostAddress`] or [`RegionError::File`].
    pub fn from_vm_memory<R>(region: Arc<R>) -> Result<Self, RegionError>
    where
        R: GuestMemoryRegion + Send + Sync + 'static,
    {
        let gpa = Gpa::new(region.start_addr().raw_value());
        let slice = region.as_volatile_slice().map_err(|_| RegionError::NoHostAddress { gpa })?;
        let bytes = slice.len() as u64;
        let hva = NonNull::new(slice.ptr_guard_mut().as_ptr()).ok_or(RegionError::NoHostAddress { gpa })?;
        let file = region
            .file_offset()
            .map(|at| RamFile::new(Arc::clone(at.arc()), at.start()))
            .transpose()
            .map_err(|error| RegionError::File { gpa, error })?;
        // SAFETY: vm-memory keeps the region's memory mapped as long as the region lives, which the Arc makes sure of, and
        // lends out no references to it but atomics and volatile slices. Memory that is not writable, and grants of the
        // feature xen, which the caller was told to keep away, are not made unsound by an access: that ends in a signal.
        unsafe { Self::new(gpa, bytes, hva, file, Arc::clone(&region) as Arc<dyn Any + Send + Sync>) }
    }

    /// Where the region begins.
    #[must_use]
    pub fn gpa(&self) -> Gpa {
        self.first.gpa()
    }

    /// The region's size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// The gfns of the region.
    pub(crate) fn gfns(&self) -> Range<u64> {
        self.first.raw()..self.first.raw() + self.pages
    }

    pub(crate) fn file_identity(&self) -> Option<FileIdentity> {
        self.file.as_ref().map(|file| file.identity(self.first))
    }

    /// What is behind the pages from `gfn`, one of the region's, on.
    pub(crate) fn backing(&self, gfn: Gfn) -> Option<Backing<'_>> {
        let offset = gfn.raw().checked_sub(self.first.raw()).filter(|&page| page < self.pages)? * PAGE_SIZE;
        // SAFETY: the offset is inside the region, which is one mapping (`new`).
        let hva = unsafe { self.hva.add(usize::try_from(offset).ok()?) };
        let file = self
            .file
            .as_ref()
            .map(|file| FileBacking { fd: file.file.as_fd(), offset: file.offset.wrapping_add(offset) });
        Some(Backing { hva, file })
    }

    /// Gives the memory up without ever freeing it: a device may still reach it.
    pub(crate) fn leak(&self) {
        std::mem::forget(Arc::clone(&self.owner));
    }
}

impl fmt::Debug for RamRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamRegion")
            .field("gpa", &format_args!("{}", self.gpa()))
            .field("bytes", &format_args!("{:#x}", self.bytes()))
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

/// A region over no memory, for tests that map nothing.
#[cfg(test)]
pub(crate) fn test_region(gfns: Range<u64>, origin: Option<u64>) -> RamRegion {
    let file = origin.map(|origin| RamFile {
        file: Arc::new(File::open("/dev/null").unwrap()),
        device: 1,
        inode: 2,
        offset: origin + gfns.start * PAGE_SIZE,
    });
    let bytes = (gfns.end - gfns.start) * PAGE_SIZE;
    let gpa = Gpa::new(gfns.start * PAGE_SIZE);
    // SAFETY: nothing is ever mapped or read through these regions.
    unsafe { RamRegion::new(gpa, bytes, NonNull::dangling(), file, Arc::new(())) }.unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_in_a_file_is_the_same_only_with_the_same_origin() {
        let same = test_region(16..32, Some(0));
        assert_eq!(same.file_identity(), test_region(20..24, Some(0)).file_identity());
        assert_ne!(same.file_identity(), test_region(16..32, Some(PAGE_SIZE)).file_identity());
        assert_eq!(test_region(16..32, None).file_identity(), None);
    }

    #[test]
    fn behind_each_page_is_its_own_memory_and_its_own_part_of_the_file() {
        let memory = Box::leak(vec![0_u8; 16 << 12].into_boxed_slice());
        let file = test_region(16..32, Some(PAGE_SIZE)).file;
        // SAFETY: the memory is never freed, and nothing else uses it.
        let region =
            unsafe { RamRegion::new(Gpa::new(16 << 12), 16 << 12, NonNull::from(memory).cast(), file, Arc::new(())) };
        let region = region.unwrap();
        let backing = |gfn| region.backing(Gfn::new(gfn).unwrap());
        let start = backing(16).unwrap().hva;
        for gfn in 16..32 {
            let backing = backing(gfn).unwrap();
            assert_eq!((backing.hva.addr().get() - start.addr().get()) as u64, (gfn - 16) * PAGE_SIZE);
            assert_eq!(backing.file.unwrap().offset, PAGE_SIZE + gfn * PAGE_SIZE);
        }
        assert!(backing(15).is_none() && backing(32).is_none());
    }

    #[test]
    fn memory_that_is_not_pages_is_no_region() {
        for (gpa, bytes) in [(1, 4096), (0, 1), (0, 0), (4096, 100), (u64::MAX - 4095, 8192)] {
            // SAFETY: refused, so never used.
            let region = unsafe { RamRegion::new(Gpa::new(gpa), bytes, NonNull::dangling(), None, Arc::new(())) };
            assert!(matches!(region, Err(RegionError::NotPages { .. })), "{gpa:#x} {bytes:#x}");
        }
    }
}
