//! What a server tells of its device.

use std::os::fd::OwnedFd;

use bitflags::bitflags;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE, VFIO_IRQ_INFO_NORESIZE,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};

/// The indexes that every PCI device has.
pub mod pci {
    use vfio_bindings::bindings::vfio;

    /// The region of the first BAR; BAR n is region n.
    pub const BAR0_REGION: u32 = vfio::VFIO_PCI_BAR0_REGION_INDEX;
    /// The region of the expansion ROM.
    pub const ROM_REGION: u32 = vfio::VFIO_PCI_ROM_REGION_INDEX;
    /// The region of config space.
    pub const CONFIG_REGION: u32 = vfio::VFIO_PCI_CONFIG_REGION_INDEX;
    /// The region of legacy VGA.
    pub const VGA_REGION: u32 = vfio::VFIO_PCI_VGA_REGION_INDEX;
    /// How many regions there are, whether they are of any size or not.
    pub const REGIONS: u32 = vfio::VFIO_PCI_NUM_REGIONS;

    /// The interrupt pin.
    pub const INTX_IRQ: u32 = vfio::VFIO_PCI_INTX_IRQ_INDEX;
    /// MSI.
    pub const MSI_IRQ: u32 = vfio::VFIO_PCI_MSI_IRQ_INDEX;
    /// MSI-X.
    pub const MSIX_IRQ: u32 = vfio::VFIO_PCI_MSIX_IRQ_INDEX;
    /// That the device has failed.
    pub const ERR_IRQ: u32 = vfio::VFIO_PCI_ERR_IRQ_INDEX;
    /// That the server wants the device back.
    pub const REQ_IRQ: u32 = vfio::VFIO_PCI_REQ_IRQ_INDEX;
    /// How many kinds of interrupts there are, whether there is one of the kind or not.
    pub const IRQS: u32 = vfio::VFIO_PCI_NUM_IRQS;
}

/// What a device is. The protocol has PCI devices only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Whether it can be reset.
    pub resettable: bool,
    /// How many regions it has. QEMU takes 100 at most.
    pub regions: u32,
    /// How many kinds of interrupts it has. QEMU takes 50 at most.
    pub irqs: u32,
}

impl DeviceInfo {
    /// A device with the regions and kinds of interrupts that PCI has.
    #[must_use]
    pub const fn pci(resettable: bool) -> Self {
        Self { resettable, regions: pci::REGIONS, irqs: pci::IRQS }
    }
}

bitflags! {
    /// What a client can do with a region.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct RegionFlags: u32 {
        /// Read it.
        const READ = VFIO_REGION_INFO_FLAG_READ;
        /// Write it.
        const WRITE = VFIO_REGION_INFO_FLAG_WRITE;
    }
}

/// What a region is.
#[derive(Debug, Default)]
pub struct RegionInfo {
    /// What a client can do with it.
    pub flags: RegionFlags,
    /// Its length in bytes; 0: there is none of this index.
    pub size: u64,
    /// What of it the client can map. Left out where the client says that it takes no file descriptors.
    pub mapping: Option<Mapping>,
}

impl RegionInfo {
    /// A region that is read and written by messages.
    #[must_use]
    pub const fn trapped(size: u64) -> Self {
        Self { flags: RegionFlags::READ.union(RegionFlags::WRITE), size, mapping: None }
    }

    /// A region that the client can map.
    #[must_use]
    pub const fn mapped(size: u64, mapping: Mapping) -> Self {
        Self { flags: RegionFlags::READ.union(RegionFlags::WRITE), size, mapping: Some(mapping) }
    }
}

/// What of a region a client can map, and from where.
///
/// QEMU maps it for writing whatever the region's flags say: let it map only what the guest may write. Memory that is mapped
/// must not shrink: seal it.
#[derive(Debug)]
pub struct Mapping {
    /// The file to map; a duplicate, as it is closed when it is sent.
    pub fd: OwnedFd,
    /// Where the region begins in the file.
    pub offset: u64,
    /// The parts of the region that can be mapped; `None`: all of it. If the list is empty nothing can, and the region is as
    /// one without a mapping.
    pub areas: Option<Vec<Area>>,
}

impl Mapping {
    /// All of a region, which begins at this offset of the file.
    #[must_use]
    pub const fn whole(fd: OwnedFd, offset: u64) -> Self {
        Self { fd, offset, areas: None }
    }

    /// Parts of a region, which begins at this offset of the file.
    #[must_use]
    pub const fn sparse(fd: OwnedFd, offset: u64, areas: Vec<Area>) -> Self {
        Self { fd, offset, areas: Some(areas) }
    }
}

/// A part of a region that can be mapped: whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Where it is in the region, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub size: u64,
}

/// Eventfds that writes to a region signal, if the client can arrange that, in place of messages.
#[derive(Debug, Default)]
pub struct IoEventFds {
    /// Which writes.
    pub events: Vec<IoEventFd>,
    /// The eventfds; duplicates, as they are closed when they are sent.
    pub fds: Vec<OwnedFd>,
}

/// Writes to a place in a region that signal an eventfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoEventFd {
    /// The place, in bytes from the region's beginning.
    pub offset: u64,
    /// Writes of so many bytes; 0: of any length.
    pub size: u64,
    /// Writes of this value; `None`: of any.
    pub value: Option<u64>,
    /// The eventfd, as its place in [`IoEventFds::fds`].
    pub fd: u32,
}

bitflags! {
    /// What a client can do with interrupts of a kind.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct IrqFlags: u32 {
        /// Have them signalled by an eventfd.
        const EVENTFD = VFIO_IRQ_INFO_EVENTFD;
        /// Mask and unmask them.
        const MASKABLE = VFIO_IRQ_INFO_MASKABLE;
        /// They are masked once they are triggered, until the client unmasks them.
        const AUTOMASKED = VFIO_IRQ_INFO_AUTOMASKED;
        /// They are set up together: for more than were, all are disabled first.
        const NORESIZE = VFIO_IRQ_INFO_NORESIZE;
    }
}

/// What interrupts of a kind there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// What a client can do with them.
    pub flags: IrqFlags,
    /// How many there are.
    pub count: u32,
}
