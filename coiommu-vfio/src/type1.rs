//! The kernel's VFIO container, type1, as a mapper.
//!
//! | file | what |
//! | --- | --- |
//! | [`device`] | [`Device`]: its registers, bus mastering, reset |
//! | [`region`] | [`Region`], and [`Area`], what of one another process may map |
//! | [`interrupts`] | [`Interrupts`]: which eventfds the device signals |
//! | [`needs`] | [`Needs`]: whether a guest can be served at all |
//! | [`error`] | [`OpenError`]: why devices cannot be used, and what to do |
//! | [`sysfs`] | before any is opened: a device's group, who else is in it, what drives them |
//! | `config` | where a device's capabilities are in its config space |
//! | `info` | what the kernel says of a container and of a device |
//! | `sys` | the ioctls: the only unsafe code |
//!
//! The devices, their groups and the container are opened by vfio-ioctls, none of whose types are in the interface: it
//! changes them often.
//!
//! Unsafe is needed here for the trait: what its caller promises is passed on to the kernel.

#![allow(unsafe_code)]

pub mod device;
pub mod error;
pub mod interrupts;
pub mod needs;
pub mod region;
pub mod sysfs;

mod config;
mod info;
mod sys;

use std::collections::BTreeSet;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use coiommu_pin::{Backing, DmaMapper, Limits, MapError};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};
use vmm_sys_util::errno::Error as Errno;

pub use device::Device;
pub use error::OpenError;
pub use interrupts::{Action, InterruptError, InterruptInfo, Interrupts};
pub use needs::{Memlock, Needs, NeedsError};
pub use region::{Area, Region};
pub use sysfs::{Neighbour, PciDevice};

/// Where /sys and /proc are.
const ROOT: &str = "/";

/// What guests count their DMA in, in bytes.
const GUEST_PAGE: u64 = 0x1000;

/// A container of one or more groups, as a mapper.
///
/// It is for one pinner alone: dropping it unmaps everything.
#[derive(Debug)]
pub struct Type1 {
    container: OwnedFd,
    /// As they were at the start, for when the kernel does not answer any more.
    limits: Limits,
    /// The last one of a group takes the group out of the container.
    devices: Vec<Arc<Device>>,
}

impl Type1 {
    /// Opens PCI devices by their addresses (`0000:03:00.0`), in one container.
    ///
    /// # Errors
    ///
    /// [`OpenError`], which says what to do.
    pub fn open<A: AsRef<str>>(addresses: impl IntoIterator<Item = A>) -> Result<Self, OpenError> {
        let addresses: BTreeSet<String> = addresses.into_iter().map(|address| address.as_ref().to_owned()).collect();
        let find = |address: &String| {
            let device = PciDevice::find(Path::new(ROOT), address)?;
            let group = device.group()?;
            device.check_driver().map(|()| (device, group))
        };
        // Before the container, as more helpful: without a device that is bound to VFIO, the rest says little.
        let found = addresses.iter().map(find).collect::<Result<Vec<_>, _>>()?;
        if found.is_empty() {
            return Err(OpenError::NoDevices);
        }
        let container = Arc::new(VfioContainer::new(None).map_err(of_container)?);
        let open = |(address, (found, group)): (String, (PciDevice, u32))| {
            let device = VfioDevice::new(found.path(), container.clone(), false);
            let device = device.map_err(|error| of_device(&found, group, &error))?;
            Device::new(address, device).map(Arc::new).map_err(|source| system("ask a device what it has", source))
        };
        let devices = addresses.into_iter().zip(found).map(open).collect::<Result<Vec<_>, _>>()?;
        let fd = sys::duplicate(&*container).map_err(|source| system("open the container a second time", source))?;
        let mut made = Self::from_container(fd.into())?;
        made.devices = devices;
        Ok(made)
    }

    /// A container that somebody else has opened, with its groups in it, for this mapper alone.
    ///
    /// # Errors
    ///
    /// [`OpenError`]: it has no group yet, or its pages are not the guest's.
    pub fn from_container(container: OwnedFd) -> Result<Self, OpenError> {
        let limits = limits(container.as_fd())?;
        let (iommu, host) = (limits.page_sizes & limits.page_sizes.wrapping_neg(), rustix::param::page_size() as u64);
        if iommu != GUEST_PAGE || host != GUEST_PAGE {
            return Err(OpenError::PageSize { iommu, host });
        }
        Ok(Self { container, limits, devices: Vec::new() })
    }

    /// The devices, in the order of their addresses; none of a container that somebody else has opened.
    #[must_use]
    pub fn devices(&self) -> &[Arc<Device>] {
        &self.devices
    }

    /// Whether it, and this process, can do what a guest will need; the soft limit of locked memory is raised for it.
    ///
    /// # Errors
    ///
    /// [`NeedsError`], which says what to do.
    pub fn prepare(&self, needs: &Needs) -> Result<(), NeedsError> {
        needs.check_limits(&self.limits())?;
        needs.allow_pinning()
    }

    /// Unmaps everything, and returns how many bytes were mapped.
    ///
    /// # Errors
    ///
    /// [`MapError`], none of which is to be expected.
    pub fn unmap_all(&self) -> Result<u64, MapError> {
        match sys::unmap(self.container.as_fd(), &sys::Unmap::All).map_err(of_errno) {
            // Linux before 5.12 has no such flag, and no other reason to say so.
            Err(MapError::Invalid) => self.unmap_ranges(),
            unmapped => unmapped,
        }
    }

    /// All that can be mapped, range by range; what cannot be unmapped does not keep the rest.
    fn unmap_ranges(&self) -> Result<u64, MapError> {
        let pieces = self.limits.iova_ranges.iter().flat_map(pieces);
        let unmapped: Vec<_> = pieces.map(|(iova, bytes)| self.unmap(iova, bytes)).collect();
        unmapped.into_iter().sum()
    }
}

impl DmaMapper for Type1 {
    unsafe fn map(&self, iova: u64, backing: Backing<'_>, len: u64) -> Result<(), MapError> {
        let vaddr = backing.hva.addr().get() as u64;
        // SAFETY: the caller's promise.
        unsafe { sys::map(self.container.as_fd(), iova, vaddr, len) }.map_err(of_errno)
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<u64, MapError> {
        sys::unmap(self.container.as_fd(), &sys::Unmap::Range { iova, size: len }).map_err(of_errno)
    }

    fn limits(&self) -> Limits {
        // Only a container that has lost its groups does not answer.
        limits(self.container.as_fd()).unwrap_or_else(|_gone| self.limits.clone())
    }
}

/// Nothing stays mapped, whoever else has the container or a device open; and before, no device does DMA.
impl Drop for Type1 {
    fn drop(&mut self) {
        for device in &self.devices {
            // A device that is gone does no DMA.
            let _off = device.set_bus_master(false);
        }
        if let Err(error) = self.unmap_all() {
            // A container that has lost its groups has lost their mappings.
            log::error!("cannot unmap what is mapped through a container that is given up: {error}");
        }
    }
}

/// Pieces of a range, as address and length, that no mapping crosses: one, unless its length has no room in 64 bits.
fn pieces(range: &RangeInclusive<u64>) -> impl Iterator<Item = (u64, u64)> {
    const HALF: u64 = 1 << 63;
    let (start, last) = (*range.start(), *range.end());
    match (last - start).checked_add(1) {
        Some(bytes) => [Some((start, bytes)), None],
        None => [Some((0, HALF)), Some((HALF, HALF))],
    }
    .into_iter()
    .flatten()
}

fn limits(container: BorrowedFd<'_>) -> Result<Limits, OpenError> {
    let info = sys::info(container).map_err(|errno| system("ask the container for its limits", errno.into()))?;
    info::limits(&info).ok_or(OpenError::BadInfo)
}

fn of_errno(errno: Errno) -> MapError {
    use rustix::io::Errno as E;
    match E::from_raw_os_error(errno.errno()) {
        E::EXIST => MapError::Exists,
        E::NOSPC => MapError::NoEntries,
        E::NOMEM => MapError::NoMemory,
        E::INVAL => MapError::Invalid,
        E::FAULT => MapError::Fault,
        other => MapError::Other(other.raw_os_error()),
    }
}

fn system(what: &'static str, source: io::Error) -> OpenError {
    OpenError::System { what, source }
}

fn of_container(error: VfioError) -> OpenError {
    match error {
        VfioError::OpenContainer(error) => match error.kind() {
            io::ErrorKind::PermissionDenied => OpenError::Permission { path: "/dev/vfio/vfio".to_owned() },
            io::ErrorKind::NotFound => OpenError::NoVfio,
            // A file that is there for a module that is not.
            _ if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => OpenError::NoVfio,
            _ => system("open /dev/vfio/vfio", error),
        },
        VfioError::VfioExtension => OpenError::NoType1,
        other => system("make a container", io::Error::other(other)),
    }
}

fn of_device(found: &PciDevice, group: u32, error: &VfioError) -> OpenError {
    let device = found.address().to_owned();
    let path = format!("/dev/vfio/{group}");
    match error {
        VfioError::OpenGroup(error, _) if error.kind() == io::ErrorKind::PermissionDenied => {
            OpenError::Permission { path }
        }
        VfioError::OpenGroup(error, _) if error.kind() == io::ErrorKind::ResourceBusy => {
            let holders = sysfs::holders(Path::new(ROOT), Path::new(&path));
            let suspects = if holders.is_empty() { sysfs::suspects(Path::new(ROOT)) } else { Vec::new() };
            OpenError::Busy { device, group, holders, suspects }
        }
        VfioError::GroupViable => {
            let obstacles = found.neighbours().into_iter().filter(Neighbour::is_in_the_way).collect();
            OpenError::NotViable { device, group, obstacles }
        }
        VfioError::OpenGroup(error, _) if error.kind() == io::ErrorKind::NotFound => OpenError::NoNode { device, path },
        VfioError::ContainerSetIOMMU(error) if error.errno() == rustix::io::Errno::PERM.raw_os_error() => {
            OpenError::Ineligible { device }
        }
        // What it shows has its cause in it.
        other => OpenError::Device { device, message: other.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_mapping_crosses_a_piece() {
        let pieces = |range| pieces(&range).collect::<Vec<_>>();
        assert_eq!(pieces(0..=0xfedf_ffff), [(0, 0xfee0_0000)]);
        assert_eq!(pieces(0xfef0_0000..=u64::MAX), [(0xfef0_0000, u64::MAX - 0xfef0_0000 + 1)]);
        assert_eq!(pieces(0..=u64::MAX), [(0, 1 << 63), (1 << 63, 1 << 63)]);
    }
}
