//! A device that is used through a container.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::panic::{self, AssertUnwindSafe};

use vfio_ioctls::VfioDevice;

use super::sys;

/// The region of config space among a PCI device's regions; BAR n is region n.
pub const CONFIG: u32 = 7;

/// BARs, the ROM, config space, VGA.
const REGIONS: usize = 9;

/// The command register in config space, and its bit for bus mastering.
const COMMAND: (u64, u16) = (4, 1 << 2);

/// An open PCI device: its regions, and what it may do.
///
/// Who holds it holds its group, and so the container, open; when the last one lets go of it, the kernel resets it.
pub struct Device {
    address: String,
    regions: [Region; REGIONS],
    /// The device again, as a file: its regions are read and written at offsets of it. Before `inner`, as fields are dropped
    /// in this order: that one takes the group out of the container, which fails while a device is open.
    file: File,
    _inner: Inner,
}

/// What takes the group out of the container when it is dropped.
struct Inner(Option<VfioDevice>);

impl Drop for Inner {
    fn drop(&mut self) {
        let device = self.0.take();
        // It looks the group up in sysfs, and panics if the device was taken out of the system in between.
        if panic::catch_unwind(AssertUnwindSafe(|| drop(device))).is_err() {
            log::error!("a device went away as it was closed: its group stays in use until this process ends");
        }
    }
}

/// A region of a device, in the file of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// Its length in bytes; 0: there is none.
    pub size: u64,
}

impl Device {
    pub(super) fn new(address: String, inner: VfioDevice) -> io::Result<Self> {
        let mut regions = [Region::default(); REGIONS];
        for (region, index) in regions.iter_mut().zip(0..) {
            *region = Region { offset: inner.get_region_offset(index), size: inner.get_region_size(index) };
        }
        Ok(Self { address, regions, file: sys::duplicate(&inner)?, _inner: Inner(Some(inner)) })
    }

    /// Its address, `DOMAIN:BUS:DEVICE.FUNCTION`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where a region is. One that the device has not is empty.
    #[must_use]
    pub fn region(&self, index: u32) -> Region {
        usize::try_from(index).ok().and_then(|index| self.regions.get(index)).copied().unwrap_or_default()
    }

    /// Reads registers. An aligned access of 1, 2 or 4 bytes is one access of the device; one of 8 may be two.
    ///
    /// # Errors
    ///
    /// The region is shorter, or cannot be read.
    pub fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, self.place(region, offset, data.len())?)
    }

    /// Writes registers, as [`read`](Self::read) reads them.
    ///
    /// # Errors
    ///
    /// The region is shorter, or cannot be written.
    pub fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.place(region, offset, data.len())?)
    }

    fn place(&self, region: u32, offset: u64, length: usize) -> io::Result<u64> {
        let Region { offset: start, size } = self.region(region);
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| end > size) {
            let message = format!("{length} bytes at {offset:#x} are not in region {region} of {size:#x} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        Ok(start + offset)
    }

    /// Lets the device do DMA, or stops it: before anything is drained, it has to be off.
    ///
    /// # Errors
    ///
    /// Those of config space, none of which is to be expected.
    pub fn set_bus_master(&self, on: bool) -> io::Result<()> {
        let (at, bit) = COMMAND;
        let mut command = [0; 2];
        self.read(CONFIG, at, &mut command)?;
        let command = u16::from_le_bytes(command);
        let command = if on { command | bit } else { command & !bit };
        self.write(CONFIG, at, &command.to_le_bytes())
    }

    /// Resets the device.
    ///
    /// # Errors
    ///
    /// It cannot be reset on its own (EINVAL), or the reset failed.
    pub fn reset(&self) -> io::Result<()> {
        sys::reset(self.as_fd())
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("address", &self.address).field("fd", &self.file.as_raw_fd()).finish()
    }
}
