//! What the system knows of a device before it is opened: its IOMMU group, who else is in it, and what drives them.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::{Neighbour, OpenError};

/// Where the kernel shows its devices.
pub(super) const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// A device that can be opened.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) path: PathBuf,
    pub(super) group: u32,
}

/// Finds a device by its address, and what keeps it from being opened.
pub(super) fn find(devices: &Path, address: &str) -> Result<Found, OpenError> {
    let device = || address.to_owned();
    let path = devices.join(address);
    // A path that leads elsewhere is no address.
    if address.contains('/') || !path.is_dir() {
        return Err(OpenError::NoDevice { device: device() });
    }
    // A group that VFIO made up for a device without an IOMMU (enable_unsafe_noiommu_mode) has a name, and maps nothing.
    let is_made_up = fs::read_to_string(path.join("iommu_group/name")).is_ok_and(|name| name.trim() == "vfio-noiommu");
    let group = name_of(&path.join("iommu_group")).filter(|_| !is_made_up).and_then(|name| name.parse().ok());
    let group = group.ok_or_else(|| OpenError::NoIommu { device: device() })?;
    let driver = driver(&path);
    if !driver.as_deref().is_some_and(is_vfio) {
        return Err(OpenError::NotBound { device: device(), driver });
    }
    Ok(Found { path, group })
}

/// Those in a device's group that are driven by drivers which do not share: while one is, the group cannot be used.
pub(super) fn obstacles(device: &Path) -> Vec<Neighbour> {
    let entries = fs::read_dir(device.join("iommu_group/devices")).into_iter().flatten().flatten();
    let neighbour = |entry: fs::DirEntry| {
        let driver = driver(&entry.path()).filter(|driver| !is_harmless(driver))?;
        Some(Neighbour { device: entry.file_name().to_string_lossy().into_owned(), driver })
    };
    let mut neighbours: Vec<_> = entries.filter_map(neighbour).collect();
    neighbours.sort();
    neighbours
}

/// How /proc shows an open device of VFIO, whichever it is.
const ANY_DEVICE: &str = "anon_inode:[vfio-device]";

/// Processes that have some device open, and with it the device's group: /proc does not tell which.
pub(super) fn suspects(processes: &Path) -> Vec<String> {
    holders(processes, Path::new(ANY_DEVICE))
}

/// Processes that have a file open, as `PID (name)`: as far as we may see.
pub(super) fn holders(processes: &Path, file: &Path) -> Vec<String> {
    let entries = fs::read_dir(processes).into_iter().flatten().flatten();
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

fn driver(device: &Path) -> Option<String> {
    name_of(&device.join("driver"))
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
            let path = root.path().join("devices").join(device);
            fs::create_dir_all(&path).unwrap();
            if let Some(group) = group {
                let group = root.path().join("iommu_groups").join(group.to_string());
                fs::create_dir_all(group.join("devices")).unwrap();
                symlink(&group, path.join("iommu_group")).unwrap();
                symlink(&path, group.join("devices").join(device)).unwrap();
            }
            if let Some(driver) = driver {
                symlink(root.path().join("drivers").join(driver), path.join("driver")).unwrap();
            }
        }
        root
    }

    #[test]
    fn a_device_is_found_or_the_reason_why_not() {
        let system = system(&[
            ("0000:00:04.0", Some(7), Some("vfio-pci")),
            ("0000:00:04.1", Some(7), Some("nvme")),
            ("0000:00:05.0", None, None),
            ("0000:00:06.0", Some(8), None),
            ("0000:00:07.0", Some(9), Some("vfio-pci")),
        ]);
        fs::write(system.path().join("iommu_groups/9/name"), "vfio-noiommu\n").unwrap();
        let devices = system.path().join("devices");
        let found = find(&devices, "0000:00:04.0").unwrap();
        assert_eq!((found.group, found.path), (7, devices.join("0000:00:04.0")));
        let starts = |address: &str, text: &str| {
            let why = find(&devices, address).unwrap_err().to_string();
            assert!(why.starts_with(text), "{why}");
        };
        starts("0000:00:09.0", "there is no PCI device 0000:00:09.0");
        starts("../drivers", "there is no PCI device ../drivers");
        starts("0000:00:05.0", "0000:00:05.0 is behind no IOMMU");
        starts("0000:00:04.1", "0000:00:04.1 is driven by nvme");
        starts("0000:00:06.0", "0000:00:06.0 is driven by nothing");
        starts("0000:00:07.0", "0000:00:07.0 is behind no IOMMU");
    }

    #[test]
    fn obstacles_are_those_that_do_not_share() {
        let system = system(&[
            ("0000:00:01.0", Some(7), Some("pcieport")),
            ("0000:01:00.0", Some(7), Some("vfio-pci")),
            ("0000:01:00.1", Some(7), Some("snd_hda_intel")),
            ("0000:01:00.2", Some(7), None),
            ("0000:01:00.3", Some(7), Some("mlx5_vfio_pci")),
        ]);
        let neighbour = Neighbour { device: "0000:01:00.1".into(), driver: "snd_hda_intel".into() };
        assert_eq!(obstacles(&system.path().join("devices/0000:01:00.0")), [neighbour]);
    }

    #[test]
    fn holders_are_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let ours = holders(Path::new("/proc"), file.path());
        assert_eq!(ours.len(), 1);
        assert!(ours[0].starts_with(&format!("{} (", std::process::id())), "{ours:?}");
        assert_eq!(holders(Path::new("/proc"), Path::new("/no/such/file")), [""; 0]);
    }

    #[test]
    fn who_has_a_device_open_may_have_its_group() {
        let processes = tempfile::tempdir().unwrap();
        for (process, file) in [("7", "/dev/null"), ("8", ANY_DEVICE)] {
            let files = processes.path().join(process).join("fd");
            fs::create_dir_all(&files).unwrap();
            symlink(file, files.join("3")).unwrap();
            fs::write(processes.path().join(process).join("comm"), "qemu\n").unwrap();
        }
        assert_eq!(holders(processes.path(), Path::new("/dev/vfio/7")), [""; 0]);
        assert_eq!(suspects(processes.path()), ["8 (qemu)"]);
        assert_eq!(holders(processes.path(), Path::new("/dev/null")), ["7 (qemu)"]);
    }
}
