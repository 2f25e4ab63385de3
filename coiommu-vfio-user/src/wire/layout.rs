//! The structures of the protocol, as they are on the wire. Those that VFIO has too are laid out as its own.

use vfio_bindings::bindings::vfio as kernel;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The type of a message, in a header's flags.
pub(super) const TYPE: u32 = 0xf;
/// A message of this type is a command.
pub(super) const COMMAND: u32 = 0;
/// A message of this type answers one.
pub(super) const REPLY: u32 = 1;
/// A command that is not to be answered.
pub(super) const NO_REPLY: u32 = 1 << 4;
/// A reply that says only why there is no answer.
pub(super) const ERROR: u32 = 1 << 5;

/// The numbers of commands. Last come those that go the other way, or need what is never offered here.
pub(super) mod command {
    pub(crate) const VERSION: u16 = 1;
    pub(crate) const DMA_MAP: u16 = 2;
    pub(crate) const DMA_UNMAP: u16 = 3;
    pub(crate) const DEVICE_GET_INFO: u16 = 4;
    pub(crate) const DEVICE_GET_REGION_INFO: u16 = 5;
    pub(crate) const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    pub(crate) const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub(crate) const DEVICE_SET_IRQS: u16 = 8;
    pub(crate) const REGION_READ: u16 = 9;
    pub(crate) const REGION_WRITE: u16 = 10;
    pub(crate) const DEVICE_RESET: u16 = 13;

    pub(crate) const DMA_READ: u16 = 11;
    pub(crate) const DMA_WRITE: u16 = 12;
    /// Dirty pages, in older versions of the protocol.
    pub(crate) const DIRTY_PAGES: u16 = 14;
    pub(crate) const REGION_WRITE_MULTI: u16 = 15;
    pub(crate) const DEVICE_FEATURE: u16 = 16;
    pub(crate) const MIG_DATA_READ: u16 = 17;
    pub(crate) const MIG_DATA_WRITE: u16 = 18;
}

/// What every message begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) id: u16,
    pub(super) command: u16,
    /// Of the whole message, this included.
    pub(super) size: u32,
    pub(super) flags: u32,
    /// In error replies.
    pub(super) error: u32,
}

/// What a VERSION begins with; capabilities as JSON follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Version {
    pub(super) major: u16,
    pub(super) minor: u16,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DmaMap {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    /// In the file that comes with it.
    pub(super) offset: u64,
    pub(super) address: u64,
    pub(super) size: u64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DmaUnmap {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) address: u64,
    pub(super) size: u64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct DeviceInfo {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) regions: u32,
    pub(super) irqs: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RegionInfo {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) index: u32,
    pub(super) cap_offset: u32,
    pub(super) size: u64,
    pub(super) offset: u64,
}

/// The capability that lists areas to map; the areas follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SparseMmap {
    pub(super) id: u16,
    pub(super) version: u16,
    /// Where the next capability is; 0: there is none.
    pub(super) next: u32,
    pub(super) areas: u32,
    pub(super) reserved: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SparseArea {
    pub(super) offset: u64,
    pub(super) size: u64,
}

/// What is asked, and what a reply begins with; sub-regions follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RegionIoFds {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) index: u32,
    pub(super) count: u32,
}

/// A sub-region with an ioeventfd.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IoEventFd {
    pub(super) offset: u64,
    pub(super) size: u64,
    pub(super) fd_index: u32,
    /// 0: an ioeventfd.
    pub(super) kind: u32,
    /// Of KVM's ioeventfds.
    pub(super) flags: u32,
    pub(super) padding: u32,
    pub(super) datamatch: u64,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IrqInfo {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) index: u32,
    pub(super) count: u32,
}

/// What a SET_IRQS begins with; a byte an interrupt may follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct IrqSet {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) index: u32,
    pub(super) start: u32,
    pub(super) count: u32,
}

/// A region read or write, and what their replies begin with; data may follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RegionAccess {
    pub(super) offset: u64,
    pub(super) region: u32,
    pub(super) count: u32,
}

/// Their length is a field of many structures.
pub(super) const fn length<T>() -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "structures have some dozens of bytes")]
    let length = size_of::<T>() as u32;
    length
}

// As the specification says, and as the kernel has them.
const _: () = assert!(size_of::<Header>() == 16);
const _: () = assert!(size_of::<DmaMap>() == size_of::<kernel::vfio_iommu_type1_dma_map>());
const _: () = assert!(size_of::<DmaUnmap>() == 24);
const _: () = assert!(size_of::<DeviceInfo>() == 16);
const _: () = assert!(size_of::<RegionInfo>() == size_of::<kernel::vfio_region_info>());
const _: () = assert!(size_of::<SparseMmap>() == 16);
const _: () = assert!(size_of::<SparseArea>() == size_of::<kernel::vfio_region_sparse_mmap_area>());
const _: () = assert!(size_of::<IoEventFd>() == 40);
const _: () = assert!(size_of::<IrqInfo>() == size_of::<kernel::vfio_irq_info>());
const _: () = assert!(size_of::<IrqSet>() == 20);
const _: () = assert!(size_of::<RegionAccess>() == 16);
