//! The machine: its devices, its kernel's log, its settings.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::thread;
use std::time::Duration;

/// Vendor and device of QEMU's edu.
pub(crate) const EDU: (&str, &str) = ("0x1234", "0x11e8");
/// Of its NVMe controller.
pub(crate) const NVME: (&str, &str) = ("0x1b36", "0x0010");
/// Of an xHCI.
pub(crate) const XHCI: (&str, &str) = ("0x1033", "0x0194");
/// Of two that share a group, behind a bridge: one that nobody needs, and one that the host drives.
pub(crate) const IDLE: (&str, &str) = ("0x1b36", "0x0005");
pub(crate) const DRIVEN: (&str, &str) = ("0x1af4", "0x1005");

/// The address of the device with this vendor and device number.
pub(crate) fn device((vendor, device): (&str, &str)) -> String {
    let devices = fs::read_dir("/sys/bus/pci/devices").expect("the system has PCI devices");
    let is = |path: &std::path::Path, file: &str, value: &str| {
        fs::read_to_string(path.join(file)).is_ok_and(|text| text.trim() == value)
    };
    let mut found = devices.flatten().filter(|entry| {
        let path = entry.path();
        is(&path, "vendor", vendor) && is(&path, "device", device)
    });
    let entry = found.next().unwrap_or_else(|| panic!("no device {vendor}:{device}"));
    entry.file_name().into_string().unwrap()
}

/// DMA faults in a range are to be expected, as whoever judges the kernel's log is told, until this is dropped.
#[must_use]
pub(crate) struct Announced {
    range: String,
}

pub(crate) fn announce_faults(iova: u64, bytes: u64) -> Announced {
    let range = format!("faults from {iova:#x} to {:#x}", iova + bytes - 1);
    log(&range);
    Announced { range }
}

impl Drop for Announced {
    fn drop(&mut self) {
        // The kernel tells of a fault when it comes to it.
        thread::sleep(Duration::from_secs(1));
        log(&format!("no more {}", self.range));
    }
}

/// Writes to the kernel's log.
fn log(text: &str) {
    let mut log = fs::OpenOptions::new().write(true).open("/dev/kmsg").expect("a log to write to");
    // One write is one record.
    log.write_all(format!("coiommu-test: {text}\n").as_bytes()).unwrap();
}

/// The kernel's log.
pub(crate) fn kernel_log() -> String {
    let mut log = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").unwrap();
    let (mut text, mut record) = (String::new(), [0; 8192]);
    loop {
        // Each read is a record, until there is none.
        match log.read(&mut record) {
            Ok(length) => text += &String::from_utf8_lossy(&record[..length]),
            // One was overwritten before it was read.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            Err(_none) => return text,
        }
    }
}

const ENTRY_LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/// Containers that are opened from now on have so many mappings, until this is dropped.
#[derive(Debug)]
pub(crate) struct EntryLimit(String);

impl EntryLimit {
    pub(crate) fn set(entries: u64) -> Self {
        let before = fs::read_to_string(ENTRY_LIMIT).expect("vfio_iommu_type1 is loaded");
        fs::write(ENTRY_LIMIT, entries.to_string()).unwrap();
        Self(before)
    }
}

impl Drop for EntryLimit {
    fn drop(&mut self) {
        fs::write(ENTRY_LIMIT, self.0.trim()).unwrap();
    }
}
