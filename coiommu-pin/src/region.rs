//! Guest RAM that may be pinned: [`RamRegion`], and the table of those that are there.
//!
//! Unsafe is needed here: a region is a promise about memory, made once, on which every map call stands.
#![allow(unsafe_code)]

use std::any::Any;
use std::collections::BTreeMap;
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

/// The regions that are there, and what is remembered of those that went.
#[derive(Debug, Default)]
pub(crate) struct Regions {
    present: BTreeMap<u64, Arc<RamRegion>>,
    absent: Vec<AbsentRegion>,
}

/// RAM that went away.
#[derive(Debug)]
pub(crate) struct AbsentRegion {
    pub(crate) gfns: Range<u64>,
    pub(crate) identity: Option<FileIdentity>,
    /// What was mapped when it went, in gfns: the guest still sees PINNED there.
    pub(crate) extents: Vec<Range<u64>>,
    /// The region, as long as something of it may still be mapped.
    memory: Option<Arc<RamRegion>>,
}

/// How many places that were RAM once are known. A guest that moves RAM around makes new ones; the oldest are forgotten.
const MOST_ABSENT: usize = 1024;

impl Regions {
    /// The region that a page is in.
    pub(crate) fn find(&self, gfn: Gfn) -> Option<&Arc<RamRegion>> {
        let (_, region) = self.present.range(..=gfn.raw()).next_back()?;
        region.gfns().contains(&gfn.raw()).then_some(region)
    }

    /// Whether any page of a range is in a region.
    pub(crate) fn touches(&self, gfns: &Range<u64>) -> bool {
        self.present.range(..gfns.end).next_back().is_some_and(|(_, region)| region.gfns().end > gfns.start)
    }

    /// Whether a page was RAM once and may be again.
    pub(crate) fn is_absent(&self, gfn: Gfn) -> bool {
        self.absent.iter().any(|region| region.gfns.contains(&gfn.raw()))
    }

    pub(crate) fn any_absent(&self) -> bool {
        !self.absent.is_empty()
    }

    /// How many pages of a range were mapped when their RAM went, and will be again when it returns.
    pub(crate) fn remembered(&self, gfns: &Range<u64>) -> u64 {
        let extents = self.absent.iter().flat_map(|absent| &absent.extents);
        extents.filter_map(|extent| intersection(extent, gfns)).map(|pages| pages.end - pages.start).sum()
    }

    /// All regions of which something may be mapped.
    pub(crate) fn memory(&self) -> impl Iterator<Item = &Arc<RamRegion>> {
        self.present.values().chain(self.absent.iter().filter_map(|absent| absent.memory.as_ref()))
    }

    /// Enters a region and gives what was remembered of its place, cut to it. What was remembered beyond stays.
    pub(crate) fn add(&mut self, region: Arc<RamRegion>) -> Vec<AbsentRegion> {
        let gfns = region.gfns();
        let mut returning = Vec::new();
        let mut staying = Vec::new();
        for absent in self.absent.drain(..) {
            let [before, inside, after] = absent.cut(&gfns);
            returning.extend(inside);
            staying.extend(before.into_iter().chain(after));
        }
        self.absent = staying;
        self.present.insert(gfns.start, region);
        returning
    }

    /// Takes out the region that is exactly there; its memory is kept until [`let_go`](Self::let_go). Gives what had to be
    /// forgotten for it.
    pub(crate) fn remove(&mut self, gfns: &Range<u64>) -> Option<Vec<Range<u64>>> {
        self.present.get(&gfns.start).filter(|region| region.gfns() == *gfns)?;
        let region = self.present.remove(&gfns.start)?;
        let oldest = self.absent.iter().position(|absent| absent.memory.is_none());
        let forgotten = match oldest {
            Some(oldest) if self.absent.len() >= MOST_ABSENT => self.absent.remove(oldest).extents,
            _ => Vec::new(),
        };
        let identity = region.file_identity();
        self.absent.push(AbsentRegion { gfns: gfns.clone(), identity, extents: Vec::new(), memory: Some(region) });
        Some(forgotten)
    }

    /// Remembers what was mapped in regions that went.
    pub(crate) fn remember(&mut self, extents: Vec<Range<u64>>) {
        for extent in extents {
            if let Some(absent) = self.absent.iter_mut().find(|absent| absent.gfns.contains(&extent.start)) {
                absent.extents.push(extent);
            }
        }
    }

    /// Nothing of the regions that went from a range is mapped any more: their memory may go.
    pub(crate) fn let_go(&mut self, gfns: &Range<u64>) {
        let inside = |absent: &&mut AbsentRegion| gfns.start <= absent.gfns.start && absent.gfns.end <= gfns.end;
        self.absent.iter_mut().filter(inside).for_each(|absent| absent.memory = None);
    }

    /// Forgets what was mapped anywhere, and gives it; the places stay known as RAM that may return.
    pub(crate) fn forget_extents(&mut self) -> Vec<Range<u64>> {
        self.absent.iter_mut().flat_map(|absent| absent.extents.drain(..)).collect()
    }
}

impl AbsentRegion {
    /// What of it lies before, in and after a range.
    fn cut(&self, at: &Range<u64>) -> [Option<Self>; 3] {
        [0..at.start, at.clone(), at.end..u64::MAX].map(|part| {
            let gfns = intersection(&self.gfns, &part)?;
            let extents = self.extents.iter().filter_map(|extent| intersection(extent, &gfns)).collect();
            Some(Self { gfns, identity: self.identity, extents, memory: self.memory.clone() })
        })
    }
}

/// What two ranges have in common, if anything.
pub(crate) fn intersection(a: &Range<u64>, b: &Range<u64>) -> Option<Range<u64>> {
    let common = a.start.max(b.start)..a.end.min(b.end);
    (!common.is_empty()).then_some(common)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(gfns: Range<u64>, origin: Option<u64>) -> Arc<RamRegion> {
        let file = origin.map(|origin| RamFile {
            file: Arc::new(File::open("/dev/null").unwrap()),
            device: 1,
            inode: 2,
            offset: origin + gfns.start * PAGE_SIZE,
        });
        let bytes = (gfns.end - gfns.start) * PAGE_SIZE;
        // SAFETY: nothing is ever mapped or read through these regions.
        let region =
            unsafe { RamRegion::new(Gpa::new(gfns.start * PAGE_SIZE), bytes, NonNull::dangling(), file, Arc::new(())) };
        Arc::new(region.unwrap())
    }

    #[test]
    fn a_place_in_a_file_is_the_same_only_with_the_same_origin() {
        let same = region(16..32, Some(0));
        assert_eq!(same.file_identity(), region(20..24, Some(0)).file_identity());
        assert_ne!(same.file_identity(), region(16..32, Some(PAGE_SIZE)).file_identity());
        assert_eq!(region(16..32, None).file_identity(), None);
    }

    #[test]
    fn a_region_is_found_by_its_pages_and_no_others() {
        let mut regions = Regions::default();
        regions.add(region(16..32, None));
        regions.add(region(64..65, None));
        let found = |gfn: u64| regions.find(Gfn::new(gfn).unwrap()).map(|region| region.gfns());
        for gfn in [0, 15, 32, 63, 65] {
            assert_eq!(found(gfn), None);
        }
        assert_eq!(found(16), Some(16..32));
        assert_eq!(found(31), Some(16..32));
        assert_eq!(found(64), Some(64..65));
        for (range, touches) in
            [(0..16, false), (0..17, true), (31..40, true), (32..64, false), (33..100, true), (65..70, false)]
        {
            assert_eq!(regions.touches(&range), touches, "{range:?}");
        }
    }

    #[test]
    fn what_went_is_remembered_and_comes_back_in_pieces() {
        let mut regions = Regions::default();
        regions.add(region(0..64, Some(0)));
        assert!(regions.remove(&(0..32)).is_none(), "no region ends there");
        assert!(regions.remove(&(0..64)).is_some());
        regions.remember(vec![4..6, 30..36, 40..41]);
        assert!(regions.is_absent(Gfn::new(63).unwrap()));
        let back = regions.add(region(0..32, Some(0)));
        assert_eq!(back.len(), 1);
        assert_eq!(back[0].extents, [4..6, 30..32]);
        assert!(!regions.is_absent(Gfn::new(31).unwrap()));
        let back = regions.add(region(32..33, None));
        assert_eq!(back[0].extents.first(), Some(&(32..33)));
        let back = regions.add(region(33..64, None));
        assert_eq!(back[0].extents, [33..36, 40..41]);
        assert!(!regions.any_absent());
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
