//! Why a container cannot be had, and what to do.

use std::fmt;
use std::io;

use super::sysfs::Neighbour;

/// Why devices cannot be used through VFIO. Each says what is the matter, and most say what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// No device was named: a container without one maps nothing.
    NoDevices,
    /// The kernel has no VFIO.
    NoVfio,
    /// The kernel's VFIO has no type1.
    NoType1,
    /// The file of a group is not there.
    NoNode {
        /// The device that was asked for.
        device: String,
        /// The file.
        path: String,
    },
    /// The kernel does not let the device have an address space of its own.
    Ineligible {
        /// The device that was asked for.
        device: String,
    },
    /// There is no such device.
    NoDevice {
        /// Its address.
        device: String,
    },
    /// No IOMMU translates for the device.
    NoIommu {
        /// Its address.
        device: String,
    },
    /// A driver of the host has the device.
    NotBound {
        /// Its address.
        device: String,
        /// The driver, if there is one.
        driver: Option<String>,
    },
    /// Drivers of the host have other devices of the group, which the IOMMU cannot tell apart.
    NotViable {
        /// The device that was asked for.
        device: String,
        /// Its IOMMU group.
        group: u32,
        /// Those that are in the way.
        obstacles: Vec<Neighbour>,
    },
    /// Another process has the group.
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
    Permission {
        /// Which.
        path: String,
    },
    /// The page of this machine or of its IOMMU is not the guest's.
    PageSize {
        /// The smallest page of the IOMMU, in bytes; 0: it does not tell.
        iommu: u64,
        /// The page of the machine, in bytes.
        host: u64,
    },
    /// The kernel's answer makes no sense.
    BadInfo,
    /// Anything else.
    System {
        /// What failed.
        what: &'static str,
        /// How.
        #[source]
        source: io::Error,
    },
    /// Anything else that vfio-ioctls reports.
    Device {
        /// The device that was asked for.
        device: String,
        /// What it reports.
        message: String,
    },
}

impl OpenError {
    /// What is the matter, without what to do about it.
    #[must_use]
    pub fn cause(&self) -> String {
        match self {
            Self::NoDevices => "no device: a container needs one at least".to_owned(),
            Self::NoVfio => "/dev/vfio/vfio is not there".to_owned(),
            Self::NoType1 => "VFIO has no type1".to_owned(),
            Self::NoNode { device, path } => format!("{path}, the group of {device}, is not there"),
            Self::Ineligible { device } => format!("{device} may not be used"),
            Self::NoDevice { device } => format!("there is no PCI device {device}"),
            Self::NoIommu { device } => format!("{device} is behind no IOMMU"),
            Self::NotBound { device, driver } => {
                format!("{device} is driven by {}, not by vfio-pci", driver.as_deref().unwrap_or("nothing"))
            }
            Self::NotViable { device, group, obstacles } => {
                format!("group {group} of {device} has devices that the host uses: {}", obstacles_of(obstacles))
            }
            Self::Busy { device, group, holders, suspects } => {
                format!("group {group} of {device} is in use {}", holders_of(holders, suspects))
            }
            Self::Permission { path } => format!("{path} may not be opened"),
            Self::PageSize { iommu, host } => format!(
                "mappings come in pages of {iommu:#x} bytes here, of the machine's {host:#x}: guests count pages of 0x1000"
            ),
            Self::BadInfo => "the kernel's description of the container is cut short".to_owned(),
            Self::System { what, .. } => format!("cannot {what}"),
            Self::Device { device, message } => format!("cannot use {device}: {message}"),
        }
    }

    /// What to do about it; `None`: we do not know.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        let remedy = match self {
            Self::NoVfio => "load VFIO (modprobe -a vfio-pci vfio_iommu_type1)",
            Self::NoType1 => "load it (modprobe vfio_iommu_type1)",
            Self::NoNode { .. } => "in a container, it has to be passed in with /dev/vfio/vfio",
            Self::Ineligible { .. } => {
                "either the IOMMU does not remap interrupts, so that it could forge some (switch that on, or accept it: \
                 allow_unsafe_interrupts of vfio_iommu_type1), or the firmware reserves memory for it (RMRR): dmesg says which"
            }
            Self::NoDevice { .. } => "`lspci -D` lists them as DOMAIN:BUS:DEVICE.FUNCTION",
            Self::NoIommu { .. } => {
                "switch it on in the firmware (VT-d, AMD-Vi, SMMU), and in the kernel (on Intel: intel_iommu=on)"
            }
            Self::NotBound { device, .. } => {
                return Some(format!(
                    "as root, unbind it, write vfio-pci to /sys/bus/pci/devices/{device}/driver_override and {device} to \
                     /sys/bus/pci/drivers_probe"
                ));
            }
            Self::NotViable { .. } => "bind them to vfio-pci as well, or unbind them",
            Self::Busy { holders, suspects, .. } => match (&holders[..], &suspects[..]) {
                ([], []) => "wait until it ends (as root, it is named)",
                ([], _) => "wait until it ends",
                (_, _) => "wait until it ends, or end it",
            },
            Self::Permission { .. } => "be root, or have its owner changed (chown) to who runs this",
            Self::Device { .. } => "dmesg may say why",
            Self::NoDevices | Self::PageSize { .. } | Self::BadInfo | Self::System { .. } => return None,
        };
        Some(remedy.to_owned())
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause())?;
        self.remedy().map_or(Ok(()), |remedy| write!(f, ": {remedy}"))
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
        ([], []) => "by another process".to_owned(),
        ([], suspects) => {
            let them = List(suspects);
            format!("by a process that has a device of it open, of which these have some device: {them}")
        }
        (holders, _) => format!("by process {}", List(holders)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy(holders: &[&str], suspects: &[&str]) -> OpenError {
        let [holders, suspects] =
            [holders, suspects].map(|processes| processes.iter().map(|&process| process.to_owned()).collect());
        OpenError::Busy { device: "0000:03:00.0".into(), group: 7, holders, suspects }
    }

    #[test]
    fn what_is_the_matter_comes_before_what_to_do() {
        let error = OpenError::NotBound { device: "0000:03:00.0".into(), driver: Some("nvme".into()) };
        assert_eq!(error.cause(), "0000:03:00.0 is driven by nvme, not by vfio-pci");
        assert!(error.remedy().is_some_and(|remedy| remedy.starts_with("as root, unbind it")), "{error}");
        assert_eq!(error.to_string(), format!("{}: {}", error.cause(), error.remedy().unwrap()));
        assert_eq!(OpenError::BadInfo.to_string(), "the kernel's description of the container is cut short");
    }

    #[test]
    fn who_is_in_the_way_is_named_as_far_as_it_is_known() {
        let neighbour = |device: &str, driver: &str| Neighbour { device: device.into(), driver: Some(driver.into()) };
        let obstacles = vec![neighbour("0000:03:00.1", "snd_hda_intel"), neighbour("0000:03:00.2", "xhci_hcd")];
        let error = OpenError::NotViable { device: "0000:03:00.0".into(), group: 7, obstacles };
        let named = "group 7 of 0000:03:00.0 has devices that the host uses: 0000:03:00.1 (snd_hda_intel), \
                     0000:03:00.2 (xhci_hcd)";
        assert_eq!(error.cause(), named);
        let shown =
            [busy(&["8 (qemu)"], &[]), busy(&[], &["8 (qemu)", "9 (vmm)"]), busy(&[], &[])].map(|e| e.to_string());
        let wanted = [
            "by process 8 (qemu): wait until it ends, or end it",
            "by a process that has a device of it open, of which these have some device: 8 (qemu), 9 (vmm): wait until it \
             ends",
            "by another process: wait until it ends (as root, it is named)",
        ];
        assert_eq!(shown, wanted.map(|text| format!("group 7 of 0000:03:00.0 is in use {text}")));
    }
}
