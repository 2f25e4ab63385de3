//! A device that is used through a container.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::io::Errno;
use vfio_ioctls::VfioDevice;

use super::config::{self, Config};
use super::region::{self, Area, Region};
use super::{info, sys};

/// The region of config space among a PCI device's regions; BAR n is region n.
pub const CONFIG: u32 = 7;

/// BARs, the ROM, config space, VGA.
const REGIONS: u32 = 9;

/// The command register in config space, and its bit for bus mastering.
const COMMAND: (u64, u16) = (4, 1 << 2);

/// An open PCI device: its regions, and what it may do.
///
/// Who holds it holds its group, and so the container, open; when the last one lets go of it, the kernel resets it.
pub struct Device {
    address: String,
    regions: Vec<Region>,
    /// What may be mapped of each region.
    areas: Vec<Vec<Area>>,
    is_resettable: bool,
    /// Where MSI's message control is in config space.
    msi_control: Option<u64>,
    /// What was written there last.
    msi_written: AtomicU8,
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

impl Device {
    pub(super) fn new(address: String, inner: VfioDevice) -> io::Result<Self> {
        let file = sys::duplicate(&inner)?;
        let is_resettable = info::is_resettable(&sys::device_info(file.as_fd())?).ok_or_else(cut_short)?;
        let regions = (0..REGIONS).map(|index| region_of(file.as_fd(), index)).collect::<io::Result<Vec<_>>>()?;
        let (regions, allowed): (Vec<_>, Vec<_>) = regions.into_iter().unzip();
        let mut device = Self {
            address,
            regions,
            areas: Vec::new(),
            is_resettable,
            msi_control: None,
            msi_written: AtomicU8::new(0),
            file,
            _inner: Inner(Some(inner)),
        };
        let mut bytes = [0; config::LENGTH];
        device.read(CONFIG, 0, &mut bytes)?;
        let config = Config(&bytes);
        device.msi_control = config.msi_control();
        device.areas = device.without_msix(&allowed, config);
        Ok(device)
    }

    /// What may be mapped of each region where so much is allowed: nothing that has a part of the tables of MSI-X, which a
    /// guest must not reach.
    fn without_msix(&self, allowed: &[Vec<Area>], config: Config<'_>) -> Vec<Vec<Area>> {
        let tables = config.msix_tables();
        let mappable = |((region, allowed), index): ((&Region, &Vec<Area>), u32)| {
            let here = tables.iter().flatten().filter(|(bar, _)| *bar == index);
            let bytes: Vec<_> = here.map(|(_, bytes)| bytes.clone()).collect();
            region::mappable(region.size, allowed, &bytes, rustix::param::page_size() as u64)
        };
        self.regions.iter().zip(allowed).zip(0..).map(mappable).collect()
    }

    /// Its address, `DOMAIN:BUS:DEVICE.FUNCTION`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where a region is, and how it can be used. One that the device has not is empty.
    #[must_use]
    pub fn region(&self, index: u32) -> Region {
        usize::try_from(index).ok().and_then(|index| self.regions.get(index)).copied().unwrap_or_default()
    }

    /// What another process may map of a region, for its guest to use: whole pages, ascending, none of them with a part of the
    /// MSI-X table or of its pending bits. Empty where there are none, and for a region that is no BAR.
    #[must_use]
    pub fn mappable(&self, index: u32) -> &[Area] {
        usize::try_from(index).ok().and_then(|index| self.areas.get(index)).map_or(&[], Vec::as_slice)
    }

    /// The device for another process, to map regions of: a region begins in it where [`Region::offset`] says.
    ///
    /// While somebody has it open, the device stays in its group and container, and what is mapped there stays mapped.
    ///
    /// # Errors
    ///
    /// This process has too many files open.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// Reads registers. An aligned access of 1, 2 or 4 bytes is one access of the device; one of 8 may be two.
    ///
    /// # Errors
    ///
    /// All with an errno. EINVAL: they are not in the region, or it cannot be read; EIO: the device does not answer, as while
    /// its memory is switched off in config space.
    pub fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(data, self.place(region, offset, data.len())?).map_err(with_errno)
    }

    /// Writes registers, as [`read`](Self::read) reads them.
    ///
    /// # Errors
    ///
    /// Those of [`read`](Self::read).
    pub fn write(&self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, self.place(region, offset, data.len())?).map_err(with_errno)?;
        if region == CONFIG {
            self.note_msi(offset, data);
        }
        Ok(())
    }

    fn place(&self, region: u32, offset: u64, length: usize) -> io::Result<u64> {
        let Region { offset: start, size, .. } = self.region(region);
        let end = offset.checked_add(length as u64).filter(|&end| end <= size);
        let place = end.and_then(|_inside| start.checked_add(offset));
        place.ok_or_else(|| Errno::INVAL.into())
    }

    /// Remembers how many messages a guest wants, as VFIO does not: it cuts the field down to what MSI was enabled with the
    /// last time, and before the first time to one message.
    fn note_msi(&self, offset: u64, data: &[u8]) {
        let byte = self.msi_control.and_then(|at| usize::try_from(at.checked_sub(offset)?).ok());
        if let Some(&control) = byte.and_then(|byte| data.get(byte)) {
            self.msi_written.store(control, Ordering::Relaxed);
        }
    }

    /// How many messages a guest has asked for in the capability for MSI, at most 32; 1 until it did.
    pub(super) fn msi_messages(&self) -> u32 {
        const MOST: u8 = 5;
        1 << (self.msi_written.load(Ordering::Relaxed) >> 4 & 7).min(MOST)
    }

    /// Lets the device do DMA, or stops it: before anything is drained, it has to be off.
    ///
    /// # Errors
    ///
    /// Those of config space, none of which is to be expected.
    pub fn set_bus_master(&self, on: bool) -> io::Result<()> {
        let (at, bit) = COMMAND;
        let command = self.command()?;
        let command = if on { command | bit } else { command & !bit };
        self.write(CONFIG, at, &command.to_le_bytes())
    }

    /// Whether the device may do DMA, as the device itself says.
    ///
    /// # Errors
    ///
    /// Those of config space, none of which is to be expected.
    pub fn is_bus_master(&self) -> io::Result<bool> {
        let (_, bit) = COMMAND;
        Ok(self.command()? & bit != 0)
    }

    fn command(&self) -> io::Result<u16> {
        let mut command = [0; 2];
        self.read(CONFIG, COMMAND.0, &mut command)?;
        Ok(u16::from_le_bytes(command))
    }

    /// Whether it can be reset on its own.
    #[must_use]
    pub fn is_resettable(&self) -> bool {
        self.is_resettable
    }

    /// Resets the device.
    ///
    /// # Errors
    ///
    /// It cannot be reset on its own (EINVAL), or the reset failed.
    pub fn reset(&self) -> io::Result<()> {
        sys::reset(self.as_fd())?;
        self.msi_written.store(0, Ordering::Relaxed);
        Ok(())
    }
}

/// A region, and what the kernel would have mapped of it. One that the device has not is empty.
fn region_of(device: BorrowedFd<'_>, index: u32) -> io::Result<(Region, Vec<Area>)> {
    match sys::region_info(device, index) {
        Ok(answer) => info::region(&answer).ok_or_else(cut_short),
        Err(error) if error.errno() == Errno::INVAL.raw_os_error() => Ok(Default::default()),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's description of the device is cut short")
}

/// A device that ends in the middle of a region has no errno for it.
fn with_errno(error: io::Error) -> io::Error {
    if error.raw_os_error().is_some() { error } else { Errno::IO.into() }
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
