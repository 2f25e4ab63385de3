//! The host, whatever is passed through: its kernel, its IOMMU, its VFIO.

use std::fs;

use coiommu_vfio::type1::{OpenError, PciDevice, sysfs};
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;

use super::check::Check;
use super::system::System;
use crate::units::grouped;

/// What guests count their DMA in, in bytes.
const GUEST_PAGE: u64 = 0x1000;

pub(super) fn checks(system: &System<'_>) -> Vec<Check> {
    vec![kernel(system), page_size(system), iommu(system), interrupts(system), vfio(system)]
}

fn kernel(system: &System<'_>) -> Check {
    const NAME: &str = "kernel";
    let Some(release) = system.text("proc/sys/kernel/osrelease") else {
        return Check::unknown(NAME, "/proc/sys/kernel/osrelease cannot be read");
    };
    let seen = format!("Linux {release}");
    match version(&release) {
        None => Check::unknown(NAME, format!("{seen}, whichever that is")),
        Some(version) if version < (5, 12) => Check::warning(
            NAME,
            format!("{seen}: it cannot unmap everything in one call, and was never tried"),
            "take 5.12 or newer, best 6.5",
        ),
        Some(version) if version < (6, 5) => Check::warning(
            NAME,
            format!("{seen}: to add an MSI-X vector, it switches those off for a moment that are in use"),
            "take 6.5 or newer, if a guest loses interrupts as its driver starts",
        ),
        Some(_) => Check::ok(NAME, seen),
    }
}

/// Of `6.12.95+deb13-amd64`, as of anything that begins with two numbers.
pub(super) fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn page_size(system: &System<'_>) -> Check {
    const NAME: &str = "page-size";
    let seen = format!("{} bytes", grouped(system.page_size));
    if system.page_size == GUEST_PAGE {
        Check::ok(NAME, seen)
    } else {
        let remedy = "take a kernel with pages of 4,096 bytes: that is what guests count their DMA in";
        Check::failed(NAME, seen, remedy)
    }
}

fn iommu(system: &System<'_>) -> Check {
    const NAME: &str = "iommu";
    let groups = sysfs::groups(system.root);
    if groups > 0 {
        let units = system.names("sys/class/iommu");
        let units = if units.is_empty() { "on".to_owned() } else { units.join(", ") };
        return Check::ok(NAME, format!("{units}; groups of devices: {groups}"));
    }
    let tables = system.names("sys/firmware/acpi/tables");
    let has_table = |name: &str| tables.iter().any(|table| table == name);
    let options = system.text("proc/cmdline").unwrap_or_default();
    let switched_off = options.split_whitespace().find(|option| OFF.contains(option));
    let seen =
        |table: &str| format!("there is one (the firmware's table {table} tells), and the kernel does not use it");
    match switched_off {
        Some(option) => Check::failed(
            NAME,
            format!("the kernel was told not to use one: {option}"),
            format!("remove {option} from the kernel's command line, and boot again"),
        ),
        None if has_table("DMAR") => {
            Check::failed(NAME, seen("DMAR"), "add intel_iommu=on to the kernel's command line, and boot again")
        }
        None if has_table("IVRS") => {
            Check::failed(NAME, seen("IVRS"), "look for AMD-Vi in dmesg: the kernel says why it does not use it")
        }
        None if is_virtual(system) => Check::failed(
            NAME,
            "none, in this virtual machine",
            "give the machine one (QEMU: -machine q35,kernel-irqchip=split -device intel-iommu,intremap=on, and \
             intel_iommu=on on the kernel's command line)",
        ),
        None => Check::failed(NAME, "none", "switch it on in the firmware: VT-d, AMD-Vi, SMMU"),
    }
}

/// With these on its command line, a kernel uses no IOMMU.
const OFF: [&str; 3] = ["iommu=off", "intel_iommu=off", "amd_iommu=off"];

fn is_virtual(system: &System<'_>) -> bool {
    let processors = system.text("proc/cpuinfo").unwrap_or_default();
    let flags = processors.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"))
}

/// Whether a device can only raise the interrupts that are its own.
fn interrupts(system: &System<'_>) -> Check {
    const NAME: &str = "interrupts";
    if sysfs::groups(system.root) == 0 {
        return Check::unknown(NAME, "no IOMMU is on that could remap them");
    }
    let interrupts = system.text("proc/interrupts").unwrap_or_default();
    let has = |chip: &str| interrupts.split_whitespace().any(|word| word.starts_with(chip));
    if has("IR-") {
        return Check::ok(NAME, "remapped");
    }
    if !has("IO-APIC") && !has("PCI-MSI") {
        return Check::unknown(NAME, "this kernel does not tell whether they are remapped");
    }
    if system.type1_parameter("allow_unsafe_interrupts").as_deref() == Some("Y") {
        return Check::warning(
            NAME,
            "not remapped, and that is accepted (allow_unsafe_interrupts): a guest can have its device forge some",
            "switch interrupt remapping on in the firmware, or trust the guests",
        );
    }
    Check::failed(
        NAME,
        "not remapped: VFIO takes no device, as it could forge some",
        "switch interrupt remapping on in the firmware, and remove intremap=off from the kernel's command line; or, if the \
         guests are trusted, accept it",
    )
    .commands(["echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts".to_owned()])
}

fn vfio(system: &System<'_>) -> Check {
    const NAME: &str = "vfio";
    const CONTAINER: &str = "dev/vfio/vfio";
    // Drivers for one kind of device (mlx5_vfio_pci) come with the core alone.
    let pci = ["vfio_pci", "vfio_pci_core"].iter().any(|name| system.has_module(name));
    let modules = [("vfio-pci", pci), ("vfio_iommu_type1", system.has_module("vfio_iommu_type1"))];
    let missing: Vec<_> = modules.iter().filter(|(_, is_there)| !is_there).map(|(name, _)| *name).collect();
    if !missing.is_empty() {
        let seen = format!("not loaded: {}", missing.join(", "));
        return Check::failed(NAME, seen, "load it; a kernel that has no such modules was built without VFIO")
            .commands([format!("modprobe -a {}", missing.join(" "))]);
    }
    match accessat(CWD, system.path(CONTAINER), Access::READ_OK | Access::WRITE_OK, AtFlags::EACCESS) {
        Ok(()) => Check::ok(NAME, "loaded, and /dev/vfio/vfio may be opened"),
        Err(Errno::NOENT) => Check::refused(NAME, &OpenError::NoVfio)
            .remedy("in a container, it has to be passed in; elsewhere, udev or devtmpfs makes it"),
        Err(Errno::ACCESS) => Check::refused(NAME, &OpenError::Permission { path: format!("/{CONTAINER}") })
            .remedy("let everybody open it, as kernels do; it gives nobody a device")
            .commands([format!("chmod 666 /{CONTAINER}")]),
        Err(errno) => Check::failed(NAME, format!("/{CONTAINER}: {errno}"), "dmesg may say why"),
    }
}

/// How many devices are named.
const NAMED: usize = 16;

/// Which devices could be passed through as things are.
pub(super) fn bound_devices(system: &System<'_>) -> Check {
    let bound = PciDevice::all(system.root).into_iter().filter(PciDevice::is_bound);
    let shown: Vec<_> = bound.map(|device| shown(&device)).collect();
    let seen = match shown.len() {
        0 => "none is bound to vfio-pci: --host BDF tells how".to_owned(),
        count @ ..=NAMED => format!("{count} bound to vfio-pci: {}", shown.join(", ")),
        count => format!("{count} bound to vfio-pci: {}, and more", shown[..NAMED].join(", ")),
    };
    Check::ok("devices", seen)
}

fn shown(device: &PciDevice) -> String {
    let group = device.group().map_or_else(|_no_iommu| "no group".to_owned(), |group| format!("group {group}"));
    format!("{} ({}, {group})", device.address(), identity(device))
}

/// Who made it, and what: as `lspci -n` shows it.
pub(super) fn identity(device: &PciDevice) -> String {
    let number = |file: &str| {
        let text = fs::read_to_string(device.path().join(file)).unwrap_or_default();
        text.trim().trim_start_matches("0x").to_owned()
    };
    format!("{}:{}", number("vendor"), number("device"))
}
