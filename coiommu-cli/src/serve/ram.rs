//! The guest's memory as the VMM tells of it: it comes and goes, in pieces of shared files.
//!
//! What is RAM comes with a file and may be written. Everything else that a VMM maps for its devices (ROM, registers of
//! other devices, firmware that is shadowed) is remembered, so that its unmap makes sense, and otherwise left alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Bound;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Weak};

use coiommu_dtt::{Gpa, PAGE_SIZE};
use coiommu_pin::region::RegionError;
use coiommu_pin::{Pinner, RamRegion};
use coiommu_vfio_user::{DmaFile, DmaFlags, DmaMap, DmaRange, DmaUnmap, Errno};
use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result as MemoryResult;
use vm_memory::mmap::MmapRegion;
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{
    Bytes as _, FileOffset, GuestAddress, GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryError,
    GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection, GuestUsize, MemoryRegionAddress,
    VolatileMemory as _,
};

use super::passthrough::memory::RamRanges;

/// Guest memory, of which each look takes a view.
pub(crate) type Space = GuestMemoryAtomic<GuestRegionCollection<Piece>>;

/// A file of guest memory, mapped into this process once, however many pieces of it are RAM at whatever places.
#[derive(Debug)]
struct Backing {
    /// What tells files apart.
    device: u64,
    inode: u64,
    memory: MmapRegion,
    file: Arc<File>,
}

/// A piece of a file that is RAM.
#[derive(Debug)]
pub(crate) struct Piece {
    at: GuestAddress,
    bytes: usize,
    backing: Arc<Backing>,
    /// Where it begins in the file, and so in the file's mapping.
    place: FileOffset,
    start: usize,
}

impl GuestMemoryRegion for Piece {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.bytes as GuestUsize
    }

    fn start_addr(&self) -> GuestAddress {
        self.at
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn file_offset(&self) -> Option<&FileOffset> {
        Some(&self.place)
    }

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> MemoryResult<VolatileSlice<'_, BS<'_, ()>>> {
        let beyond = || GuestMemoryError::InvalidBackendAddress;
        let offset = usize::try_from(offset.0).map_err(|_| beyond())?;
        // Within the piece, and so within the file's mapping.
        if offset.checked_add(count).is_none_or(|end| end > self.bytes) {
            return Err(beyond());
        }
        Ok(self.backing.memory.get_slice(self.start + offset, count)?)
    }

    fn get_host_address(&self, offset: MemoryRegionAddress) -> MemoryResult<*mut u8> {
        Ok(self.get_slice(offset, 1)?.ptr_guard_mut().as_ptr())
    }
}

impl GuestMemoryRegionBytes for Piece {}

/// Why a map of the VMM cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RamError {
    #[error("the VMM maps {0:#x}, where something is mapped")]
    Exists(u64),
    #[error("the VMM unmaps {0:#x}, where there is no mapping that begins and ends there")]
    Unknown(u64),
    #[error("the VMM has more than {MOST} mappings")]
    TooMany,
    #[error("RAM at {at:#x} begins at byte {offset:#x} of its file, which is within a page")]
    NotPages { at: u64, offset: u64 },
    #[error("RAM at {at:#x} ends at byte {end} of a file of {length}")]
    FileTooShort { at: u64, end: u64, length: u64 },
    #[error("the file of the RAM at {at:#x}: {source}")]
    File { at: u64, source: std::io::Error },
    #[error("RAM at {at:#x} cannot be mapped into this process: {message}")]
    Mmap { at: u64, message: String },
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error("the view of the guest's memory: {0}")]
    View(String),
}

impl RamError {
    /// What the VMM is told.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            Self::Exists(_) | Self::Region(RegionError::Overlaps { .. }) => Errno::EXIST,
            Self::Unknown(_) => Errno::NOENT,
            Self::TooMany => Errno::NOSPC,
            Self::Mmap { .. } => Errno::NOMEM,
            Self::Region(RegionError::Stuck { .. }) => Errno::BUSY,
            Self::NotPages { .. } | Self::FileTooShort { .. } | Self::File { .. } | Self::Region(_) | Self::View(_) => {
                Errno::INVAL
            }
        }
    }
}

/// What to do about memory that is not shared.
const SHARE: &str = "start QEMU with shared memory \
     (-object memory-backend-memfd,id=ram,size=SIZE,share=on -machine memory-backend=ram)";

/// A page, which a table has at its root.
const PAGE: usize = 4096;

/// More than any VMM has; each costs some memory here.
const MOST: usize = 16_384;

/// What the VMM has mapped, and which of it is RAM.
#[derive(Debug)]
pub(crate) struct Ram {
    /// Of the RAM alone. The pinner has it too.
    space: Space,
    /// By where they begin.
    maps: BTreeMap<u64, Map>,
    backings: Vec<Weak<Backing>>,
    said: Said,
}

/// A mapping of the VMM's.
#[derive(Debug)]
struct Map {
    range: DmaRange,
    is_ram: bool,
}

/// What is said once.
#[derive(Debug, Default)]
struct Said {
    is_not_shared: bool,
    is_not_seen: bool,
    may_shrink: bool,
}

impl Ram {
    pub(crate) fn new() -> Self {
        let space = GuestMemoryAtomic::new(GuestRegionCollection::new());
        Self { space, maps: BTreeMap::new(), backings: Vec::new(), said: Said::default() }
    }

    /// How much of it there is, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.maps.values().filter(|map| map.is_ram).fold(0, |sum: u64, map| sum.saturating_add(map.range.size()))
    }

    /// Where it is.
    pub(crate) fn ranges(&self) -> RamRanges {
        let ram = self.maps.values().filter(|map| map.is_ram);
        ram.map(|map| (map.range.start(), map.range.last())).collect()
    }

    pub(crate) fn space(&self) -> &Space {
        &self.space
    }

    /// The VMM maps something. When this returns, RAM may be pinned, and what was pinned of it before it went is again.
    pub(crate) fn map(&mut self, map: DmaMap, pinner: &Pinner<Space>) -> Result<(), RamError> {
        let range = map.range;
        if self.overlaps(range) {
            return Err(RamError::Exists(range.start()));
        }
        if self.maps.len() >= MOST {
            return Err(RamError::TooMany);
        }
        let may_be_ram = map.flags.contains(DmaFlags::READ | DmaFlags::WRITE);
        let file = map.file.filter(|_| may_be_ram);
        if let Some(file) = &file {
            self.say_if_it_may_shrink(file);
        } else if may_be_ram && range.start() == 0 {
            self.say_not_shared();
        }
        let is_ram = file.is_some();
        if let Some(file) = file {
            self.add(range, file, pinner)?;
        }
        self.maps.insert(range.start(), Map { range, is_ram });
        Ok(())
    }

    /// The VMM unmaps something. When this returns, no device reaches it.
    pub(crate) fn unmap(&mut self, unmap: DmaUnmap, pinner: &Pinner<Space>) -> Result<(), RamError> {
        let ranges: Vec<DmaRange> = match unmap {
            DmaUnmap::All => self.maps.values().map(|map| map.range).collect(),
            DmaUnmap::Range(range) => vec![range],
        };
        // What cannot go keeps nothing else from going.
        let unmapped: Vec<_> = ranges.into_iter().map(|range| self.unmap_one(range, pinner)).collect();
        unmapped.into_iter().collect()
    }

    fn unmap_one(&mut self, range: DmaRange, pinner: &Pinner<Space>) -> Result<(), RamError> {
        let map = self.maps.get(&range.start()).filter(|map| map.range == range);
        let map = map.ok_or(RamError::Unknown(range.start()))?;
        if map.is_ram {
            self.remove(range, pinner)?;
        }
        self.maps.remove(&range.start());
        Ok(())
    }

    fn overlaps(&self, range: DmaRange) -> bool {
        let below = self.maps.range((Bound::Unbounded, Bound::Included(range.last())));
        below.last().is_some_and(|(_, map)| map.range.last() >= range.start())
    }

    /// RAM comes: first its tables can be read, then its pages can be pinned.
    fn add(&mut self, range: DmaRange, file: DmaFile, pinner: &Pinner<Space>) -> Result<(), RamError> {
        let piece = Arc::new(self.piece(range, file)?);
        let region = RamRegion::from_vm_memory(Arc::clone(&piece))?;
        self.change_view(|view| view.insert_region(piece))?;
        pinner.add_region(region).inspect_err(|_refused| {
            // As it was before.
            let _view = self.change_view(|view| Ok(view.remove_region(GuestAddress(range.start()), range.size())?.0));
        })?;
        Ok(())
    }

    /// RAM goes: first nothing of it is pinned any more.
    fn remove(&self, range: DmaRange, pinner: &Pinner<Space>) -> Result<(), RamError> {
        pinner.remove_region(Gpa::new(range.start()), range.size())?;
        self.change_view(|view| Ok(view.remove_region(GuestAddress(range.start()), range.size())?.0))
    }

    fn change_view(
        &self,
        change: impl FnOnce(&GuestRegionCollection<Piece>) -> Result<GuestRegionCollection<Piece>, ViewError>,
    ) -> Result<(), RamError> {
        let failed = |error: &dyn std::fmt::Display| RamError::View(error.to_string());
        let guard = self.space.lock().map_err(|poisoned| failed(&poisoned))?;
        let changed = change(&self.space.memory()).map_err(|error| failed(&error))?;
        guard.replace(changed);
        Ok(())
    }

    fn piece(&mut self, range: DmaRange, file: DmaFile) -> Result<Piece, RamError> {
        let at = range.start();
        if !file.offset.is_multiple_of(PAGE_SIZE) {
            // No IOMMU maps it.
            return Err(RamError::NotPages { at, offset: file.offset });
        }
        let backing = self.backing(range, &file)?;
        let too_big = || RamError::Mmap { at, message: "it is more than there are addresses".to_owned() };
        Ok(Piece {
            at: GuestAddress(at),
            bytes: usize::try_from(range.size()).map_err(|_| too_big())?,
            place: FileOffset::from_arc(Arc::clone(&backing.file), file.offset),
            start: usize::try_from(file.offset).map_err(|_| too_big())?,
            backing,
        })
    }

    /// The mapping of a file, which may be there already.
    fn backing(&mut self, range: DmaRange, file: &DmaFile) -> Result<Arc<Backing>, RamError> {
        let at = range.start();
        let file_error = |source| RamError::File { at, source };
        let fd = File::from(file.fd.try_clone().map_err(file_error)?);
        let meta = fd.metadata().map_err(file_error)?;
        let length = meta.len();
        // The sum is not past what there can be: the request said so.
        let end = file.offset.saturating_add(range.size());
        if end > length {
            return Err(RamError::FileTooShort { at, end, length });
        }
        self.backings.retain(|backing| backing.strong_count() > 0);
        let same = |backing: &Arc<Backing>| {
            (backing.device, backing.inode) == (meta.dev(), meta.ino()) && backing.memory.size() as u64 >= end
        };
        if let Some(backing) = self.backings.iter().filter_map(Weak::upgrade).find(same) {
            return Ok(backing);
        }
        let file = Arc::new(fd);
        let whole = usize::try_from(length).unwrap_or(usize::MAX);
        let memory = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&file), 0), whole);
        let memory = memory.map_err(|error| RamError::Mmap { at, message: error.to_string() })?;
        let backing = Arc::new(Backing { device: meta.dev(), inode: meta.ino(), memory, file });
        self.backings.push(Arc::downgrade(&backing));
        Ok(backing)
    }

    /// Whether a page is RAM with nothing in it.
    pub(crate) fn is_empty_page(&self, at: Gpa) -> bool {
        let mut page = [0; PAGE];
        let read = self.space.memory().read_slice(&mut page, GuestAddress(at.raw()));
        read.is_ok() && page == [0; PAGE]
    }

    pub(crate) fn say_not_shared(&mut self) {
        if !std::mem::replace(&mut self.said.is_not_shared, true) {
            tracing::error!("the guest's memory comes without a file, so nothing of it can be pinned: {SHARE}");
        }
    }

    pub(crate) fn say_not_seen(&mut self) {
        if !std::mem::replace(&mut self.said.is_not_seen, true) {
            tracing::error!("the guest's table is empty as seen from here, so its memory is not shared: {SHARE}");
        }
    }

    fn say_if_it_may_shrink(&mut self, file: &DmaFile) {
        let is_sealed = fcntl_get_seals(file.fd.as_fd()).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if !is_sealed && !std::mem::replace(&mut self.said.may_shrink, true) {
            tracing::warn!(
                "the guest's memory is a file that can be cut off under this server, which would end it: use \
                 memory-backend-memfd, which seals it"
            );
        }
    }
}

type ViewError = vm_memory::GuestRegionCollectionError;

#[cfg(test)]
mod tests;
