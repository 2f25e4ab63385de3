//! What a system tells of its PCI devices before any is opened: the IOMMU group of one, who else is in it, what drives
//! them, and who has a group open.
//!
//! [`Type1::open`](super::Type1::open) asks all of this itself. It is for who wants to know beforehand, without opening
//! anything: a tool that looks a host over, a VMM that lets a person choose.
//!
//! ```no_run
//! use std::path::Path;
//! use coiommu_vfio::type1::sysfs::PciDevice;
//!
//! let device = PciDevice::find(Path::new("/"), "0000:03:00.0")?;
//! println!("group {}, driven by {:?}", device.group()?, device.driver());
//! for neighbour in device.neighbours().iter().filter(|neighbour| neighbour.is_in_the_way()) {
//!     println!("the host has to let go of {neighbour}");
//! }
//! device.check_driver()?;
//! # Ok::<(), coiommu_vfio::type1::OpenError>(())
//! ```
//!
//! `root` is the folder that `sys` and `proc` are in: `/`, but for tests.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::error::OpenError;

/// Where the kernel shows its PCI devices, below the root.
const PCI_DEVICES: &str = "sys/bus/pci/devices";

/// A PCI device of the system, not opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciDevice {
    path: PathBuf,
    address: String,
}

impl PciDevice {
    /// Finds a device by its address, `DOMAIN:BUS:DEVICE.FUNCTION`.
    ///
    /// # Errors
    ///
    /// [`OpenError::NoDevice`].
    pub fn find(root: &Path, address: &str) -> Result<Self, OpenError> {
        let path = root.join(PCI_DEVICES).join(address);
        // A path that leads elsewhere is no address.
        let is_inside = !address.contains('/') && path.file_name() == Some(OsStr::new(address));
        if !is_inside || !path.is_dir() {
            return Err(OpenError::NoDevice { device: address.to_owned() });
        }
        Ok(Self { path, address: address.to_owned() })
    }

    /// All of them, in the order of their addresses.
    #[must_use]
    pub fn all(root: &Path) -> Vec<Self> {
        let entries = fs::read_dir(root.join(PCI_DEVICES)).into_iter().flatten().flatten();
        let mut addresses: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        addresses.sort();
        addresses.into_iter().filter_map(|address| Self::find(root, &address).ok()).collect()
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its folder, in which the kernel shows it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of its IOMMU group, as in `/dev/vfio/NUMBER`.
    ///
    /// # Errors
    ///
    /// [`OpenError::NoIommu`].
    pub fn group(&self) -> Result<u32, OpenError> {
        let group = self.path.join("iommu_group");
        let number = name_of(&group).filter(|_| !is_made_up(&group)).and_then(|name| name.parse().ok());
        number.ok_or_else(|| OpenError::NoIommu { device: self.address.clone() })
    }

    /// The driver that has it.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        name_of(&self.path.join("driver"))
    }

    /// Whether its driver is one of VFIO's.
    #[must_use]
    pub fn is_bound(&self) -> bool {
        self.driver().as_deref().is_some_and(is_vfio)
    }

    /// As [`is_bound`](Self::is_bound).
    ///
    /// # Errors
    ///
    /// [`OpenError::NotBound`].
    pub fn check_driver(&self) -> Result<(), OpenError> {
        if self.is_bound() {
            return Ok(());
        }
        Err(OpenError::NotBound { device: self.address.clone(), driver: self.driver() })
    }

    /// The others of its group, which the IOMMU cannot tell from it, in the order of their addresses.
    #[must_use]
    pub fn neighbours(&self) -> Vec<Neighbour> {
        let entries = fs::read_dir(self.path.join("iommu_group/devices")).into_iter().flatten().flatten();
        let neighbour = |entry: fs::DirEntry| {
            let device = entry.file_name().to_string_lossy().into_owned();
            Neighbour { device, driver: name_of(&entry.path().join("driver")) }
        };
        let mut neighbours: Vec<_> = entries.map(neighbour).filter(|other| other.device != self.address).collect();
        neighbours.sort();
        neighbours
    }
}

/// Another device of a device's group, and the driver that has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    /// Its address.
    pub device: String,
    /// Its driver, if it has one.
    pub driver: Option<String>,
}

impl Neighbour {
    /// Whether the group cannot be used because of it: a driver of the host has it, and not one that shares.
    #[must_use]
    pub fn is_in_the_way(&self) -> bool {
        self.driver.as_deref().is_some_and(|driver| !is_harmless(driver))
    }
}

impl fmt::Display for Neighbour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.device, self.driver.as_deref().unwrap_or("no driver"))
    }
}

/// How many groups of devices IOMMUs translate for.
#[must_use]
pub fn groups(root: &Path) -> usize {
    let entries = fs::read_dir(root.join("sys/kernel/iommu_groups")).into_iter().flatten().flatten();
    entries.filter(|group| !is_made_up(&group.path())).count()
}

/// Processes that have a file open, as `PID (name)`: as far as we may see.
#[must_use]
pub fn holders(root: &Path, file: &Path) -> Vec<String> {
    let entries = fs::read_dir(root.join("proc")).into_iter().flatten().flatten();
    let holds = |process: &Path| {
        let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        files.into_iter().any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == file))
    };
    let holder = |entry: fs::DirEntry| {
        let number: u32 = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        holds(&entry.path()).then(|| format!("{number} ({})", name.trim_end()))
    };
    entries.filter_map(holder).collect()
}

/// How /proc shows an open device of VFIO, whichever it is.
const ANY_DEVICE: &str = "anon_inode:[vfio-device]";

/// Processes that have some device open, and with it the device's group: /proc does not tell which.
pub(super) fn suspects(root: &Path) -> Vec<String> {
    holders(root, Path::new(ANY_DEVICE))
}

/// Whether VFIO made a group up, for a device without an IOMMU (enable_unsafe_noiommu_mode): it maps nothing.
fn is_made_up(group: &Path) -> bool {
    fs::read_to_string(group.join("name")).is_ok_and(|name| name.trim() == "vfio-noiommu")
}

/// The last part of what a link leads to.
fn name_of(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_string_lossy().into_owned())
}

/// vfio-pci, and the drivers for one kind of device that are built on it (mlx5_vfio_pci).
fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

/// Those that the kernel lets stay in a group which is used through VFIO.
fn is_harmless(driver: &str) -> bool {
    is_vfio(driver) || matches!(driver, "pci-stub" | "pcieport" | "shpchp")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A system with these devices, each in a group and with a driver.
    fn system(devices: &[(&str, Option<u32>, Option<&str>)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (device, group, driver) in devices {
            let path = root.path().join(PCI_DEVICES).join(device);
            fs::create_dir_all(&path).unwrap();
            if let Some(group) = group {
                let group = root.path().join("sys/kernel/iommu_groups").join(group.to_string());
                fs::create_dir_all(group.join("devices")).unwrap();
                symlink(&group, path.join("iommu_group")).unwrap();
                symlink(&path, group.join("devices").join(device)).unwrap();
            }
            if let Some(driver) = driver {
                symlink(root.path().join("sys/bus/pci/drivers").join(driver), path.join("driver")).unwrap();
            }
        }
        root
    }

    #[test]
    fn a_device_can_be_used_or_the_reason_is_told() {
        let system = system(&[
            ("0000:00:04.0", Some(7), Some("vfio-pci")),
            ("0000:00:04.1", Some(7), Some("nvme")),
            ("0000:00:05.0", None, None),
            ("0000:00:06.0", Some(8), None),
            ("0000:00:07.0", Some(9), Some("vfio-pci")),
        ]);
        fs::write(system.path().join("sys/kernel/iommu_groups/9/name"), "vfio-noiommu\n").unwrap();
        let group_of = |address: &str| {
            let device = PciDevice::find(system.path(), address)?;
            let group = device.group()?;
            device.check_driver().map(|()| group)
        };
        assert_eq!(group_of("0000:00:04.0").unwrap(), 7);
        let starts = |address: &str, text: &str| {
            let why = group_of(address).unwrap_err().to_string();
            assert!(why.starts_with(text), "{why}");
        };
        starts("0000:00:09.0", "there is no PCI device 0000:00:09.0");
        starts("../drivers", "there is no PCI device ../drivers");
        starts("..", "there is no PCI device ..");
        starts("", "there is no PCI device ");
        starts("0000:00:05.0", "0000:00:05.0 is behind no IOMMU");
        starts("0000:00:04.1", "0000:00:04.1 is driven by nvme");
        starts("0000:00:06.0", "0000:00:06.0 is driven by nothing");
        starts("0000:00:07.0", "0000:00:07.0 is behind no IOMMU");

        let all = PciDevice::all(system.path());
        let addresses: Vec<_> = all.iter().map(PciDevice::address).collect();
        assert_eq!(addresses, ["0000:00:04.0", "0000:00:04.1", "0000:00:05.0", "0000:00:06.0", "0000:00:07.0"]);
        assert_eq!(groups(system.path()), 2, "one is made up");
    }

    #[test]
    fn those_are_in_the_way_that_do_not_share() {
        let system = system(&[
            ("0000:00:01.0", Some(7), Some("pcieport")),
            ("0000:01:00.0", Some(7), Some("vfio-pci")),
            ("0000:01:00.1", Some(7), Some("snd_hda_intel")),
            ("0000:01:00.2", Some(7), None),
            ("0000:01:00.3", Some(7), Some("mlx5_vfio_pci")),
            ("0000:02:00.0", Some(8), Some("nvme")),
        ]);
        let neighbours = PciDevice::find(system.path(), "0000:01:00.0").unwrap().neighbours();
        let shown: Vec<_> =
            neighbours.iter().map(|neighbour| (neighbour.to_string(), neighbour.is_in_the_way())).collect();
        let wanted = [
            ("0000:00:01.0 (pcieport)", false),
            ("0000:01:00.1 (snd_hda_intel)", true),
            ("0000:01:00.2 (no driver)", false),
            ("0000:01:00.3 (mlx5_vfio_pci)", false),
        ];
        assert_eq!(shown, wanted.map(|(neighbour, is_in_the_way)| (neighbour.to_owned(), is_in_the_way)));
    }

    #[test]
    fn holders_are_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let ours = holders(Path::new("/"), file.path());
        assert_eq!(ours.len(), 1);
        assert!(ours[0].starts_with(&format!("{} (", std::process::id())), "{ours:?}");
        assert_eq!(holders(Path::new("/"), Path::new("/no/such/file")), [""; 0]);
    }

    #[test]
    fn who_has_a_device_open_may_have_its_group() {
        let root = tempfile::tempdir().unwrap();
        for (process, file) in [("7", "/dev/null"), ("8", ANY_DEVICE)] {
            let process = root.path().join("proc").join(process);
            let files = process.join("fd");
            fs::create_dir_all(&files).unwrap();
            symlink(file, files.join("3")).unwrap();
            fs::write(process.join("comm"), "qemu\n").unwrap();
        }
        assert_eq!(holders(root.path(), Path::new("/dev/vfio/7")), [""; 0]);
        assert_eq!(suspects(root.path()), ["8 (qemu)"]);
        assert_eq!(holders(root.path(), Path::new("/dev/null")), ["7 (qemu)"]);
    }
}
