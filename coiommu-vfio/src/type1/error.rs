//! Why a container cannot be had, and what to do.

use std::fmt;
use std::io;

/// Why devices cannot be used through VFIO. Each says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// No device was named: a container without one maps nothing.
    #[error("no device: a container needs one at least")]
    NoDevices,
    /// The kernel has no VFIO.
    #[error("/dev/vfio/vfio is not there: load VFIO (modprobe vfio-pci vfio_iommu_type1)")]
    NoVfio,
    /// The kernel's VFIO has no type1.
    #[error("VFIO has no type1: load it (modprobe vfio_iommu_type1)")]
    NoType1,
    /// The file of a group is not there.
    #[error("{path}, the group of {device}, is not there: in a container, it has to be passed in with /dev/vfio/vfio")]
    NoNode {
        /// The device that was asked for.
        device: String,
        /// The file.
        path: String,
    },
    /// The kernel does not let the device have an address space of its own.
    #[error(
        "{device} may not be used: either the IOMMU does not remap interrupts, so that it could forge some (switch that on, or \
         accept it: allow_unsafe_interrupts of vfio_iommu_type1), or the firmware reserves memory for it (RMRR): dmesg says \
         which"
    )]
    Ineligible {
        /// The device that was asked for.
        device: String,
    },
    /// There is no such device.
    #[error("there is no PCI device {device}: `lspci -D` lists them as DOMAIN:BUS:DEVICE.FUNCTION")]
    NoDevice {
        /// Its address.
        device: String,
    },
    /// No IOMMU translates for the device.
    #[error(
        "{device} is behind no IOMMU: switch it on in the firmware (VT-d, AMD-Vi, SMMU), and in the kernel \
         (on Intel: intel_iommu=on)"
    )]
    NoIommu {
        /// Its address.
        device: String,
    },
    /// A driver of the host has the device.
    #[error(
        "{device} is driven by {}, not by vfio-pci: as root, unbind it, write vfio-pci to \
         /sys/bus/pci/devices/{device}/driver_override and {device} to /sys/bus/pci/drivers_probe",
        driver.as_deref().unwrap_or("nothing")
    )]
    NotBound {
        /// Its address.
        device: String,
        /// The driver, if there is one.
        driver: Option<String>,
    },
    /// Drivers of the host have other devices of the group, which the IOMMU cannot tell apart.
    #[error(
        "group {group} of {device} has devices that the host uses: bind them to vfio-pci as well, or unbind them: {}",
        obstacles_of(obstacles)
    )]
    NotViable {
        /// The device that was asked for.
        device: String,
        /// Its IOMMU group.
        group: u32,
        /// Those that are in the way.
        obstacles: Vec<Neighbour>,
    },
    /// Another process has the group.
    #[error("group {group} of {device} is in use {}", holders_of(holders, suspects))]
    Busy {
        /// The device that was asked for.
        device: String,
        /// Its IOMMU group.
        group: u32,
        /// Processes that have it open, as `PID (name)`, as far as we may see.
        holders: Vec<String>,
        /// Where there are none, those that have a device open, be it of this group or of another.
        suspects: Vec<String>,
    },
    /// The file may not be opened.
    #[error("{path} may not be opened: be root, or have its owner changed (chown) to who runs this")]
    Permission {
        /// Which.
        path: String,
    },
    /// The page of this machine or of its IOMMU is not the guest's.
    #[error(
        "mappings come in pages of {iommu:#x} bytes here, of the machine's {host:#x}: guests count pages of 0x1000"
    )]
    PageSize {
        /// The smallest page of the IOMMU, in bytes; 0: it does not tell.
        iommu: u64,
        /// The page of the machine, in bytes.
        host: u64,
    },
    /// The kernel's answer makes no sense.
    #[error("the kernel's description of the container is cut short")]
    BadInfo,
    /// Anything else.
    #[error("cannot {what}")]
    System {
        /// What failed.
        what: &'static str,
        /// How.
        #[source]
        source: io::Error,
    },
    /// Anything else that vfio-ioctls reports.
    #[error("cannot use {device}: {message} (dmesg may say why)")]
    Device {
        /// The device that was asked for.
        device: String,
        /// What it reports.
        message: String,
    },
}

/// A device, and the driver of the host that has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    /// Its address.
    pub device: String,
    /// Its driver.
    pub driver: String,
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.device, self.driver)
    }
}

struct List<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, item) in self.0.iter().enumerate() {
            write!(f, "{}{item}", if n > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

fn obstacles_of(obstacles: &[Neighbour]) -> String {
    if obstacles.is_empty() { "/sys does not tell which".to_owned() } else { List(obstacles).to_string() }
}

fn holders_of(holders: &[String], suspects: &[String]) -> String {
    match (holders, suspects) {
        ([], []) => "by another process: wait until it ends (as root, it is named)".to_owned(),
        ([], suspects) => {
            let them = List(suspects);
            format!("by a process that has a device of it open, of which these have some device: {them}")
        }
        (holders, _) => format!("by process {}: wait until it ends, or end it", List(holders)),
    }
}
