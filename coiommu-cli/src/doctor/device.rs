//! A device that is to be passed through.

use std::fs;

use coiommu_vfio::Limits;
use coiommu_vfio::type1::{Neighbour, OpenError, PciDevice};

use super::check::{Check, Verdict};
use super::host::identity;
use super::system::System;

/// What is said of a device.
pub(super) struct Examined {
    pub(super) checks: Vec<Check>,
    /// Of its container, if it could be opened.
    pub(super) limits: Option<Limits>,
}

impl Examined {
    fn only(check: Check) -> Self {
        Self { checks: vec![check], limits: None }
    }
}

/// Looks at a device as far as it makes sense: one that is a bridge, or behind no IOMMU, cannot be bound to vfio-pci.
pub(super) fn examine(system: &System<'_>, address: &str) -> Examined {
    let mut examined = match PciDevice::find(system.root, address) {
        Err(error) => Examined::only(Check::refused("device", &error)),
        Ok(device) => match (kind(&device), device.group()) {
            (bridge, _) if bridge.verdict == Verdict::Failed => Examined::only(bridge),
            (kind, Err(error)) => Examined { checks: vec![kind, Check::refused("group", &error)], limits: None },
            (kind, Ok(number)) => {
                let mut checks = vec![kind, group(system, &device, number), driver(system, &device)];
                let (open, limits) = open(system, &device, &checks);
                checks.push(open);
                Examined { checks, limits }
            }
        },
    };
    for check in &mut examined.checks {
        check.device = Some(address.to_owned());
    }
    examined
}

/// Whether it is a device that can be passed through at all.
fn kind(device: &PciDevice) -> Check {
    const NAME: &str = "device";
    let class = fs::read_to_string(device.path().join("class")).unwrap_or_default();
    let class = class.trim();
    let seen = format!("{}, class {class}", identity(device));
    // Of PCI buses and of CardBus.
    if ["0x0604", "0x0607"].iter().any(|bridge| class.starts_with(bridge)) {
        return Check::failed(NAME, format!("{seen}: a bridge"), "name a device behind it");
    }
    Check::ok(NAME, seen)
}

/// Its group, and who else is in it.
fn group(system: &System<'_>, device: &PciDevice, group: u32) -> Check {
    const NAME: &str = "group";
    let neighbours = device.neighbours();
    let with = match &neighbours[..] {
        [] => "alone".to_owned(),
        others => format!("with {}", list(others)),
    };
    let obstacles: Vec<_> = neighbours.into_iter().filter(Neighbour::is_in_the_way).collect();
    if !obstacles.is_empty() {
        let commands = obstacles.iter().flat_map(|other| bind(system, &other.device, other.driver.is_some()));
        return Check::failed(
            NAME,
            format!("{group}, {with}; of these, the host uses {}", list(&obstacles)),
            "they cannot be kept apart: move the device to another slot, or bind them to vfio-pci as well; then the host \
             has them no more",
        )
        .commands(commands);
    }
    let kept = kept_by_firmware(system, group);
    if !kept.is_empty() {
        return Check::warning(
            NAME,
            format!("{group}, {with}; the firmware keeps memory for it (RMRR): {}", kept.join(", ")),
            "if it cannot be opened, that is why: look for a setting of the firmware, or take another device",
        );
    }
    Check::ok(NAME, format!("{group}, {with}"))
}

fn list(neighbours: &[Neighbour]) -> String {
    neighbours.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Ranges that have to stay mapped as they are, whoever has the device.
fn kept_by_firmware(system: &System<'_>, group: u32) -> Vec<String> {
    let regions = system.text(&format!("sys/kernel/iommu_groups/{group}/reserved_regions")).unwrap_or_default();
    let range = |line: &str| match line.split_whitespace().collect::<Vec<_>>()[..] {
        [first, last, "direct"] => Some(format!("{first} to {last}")),
        _ => None,
    };
    regions.lines().filter_map(range).collect()
}

fn driver(system: &System<'_>, device: &PciDevice) -> Check {
    const NAME: &str = "driver";
    match device.check_driver() {
        Ok(()) => Check::ok(NAME, device.driver().unwrap_or_default()),
        Err(error) => {
            let driver = device.driver();
            let remedy = if driver.is_some() {
                "give it to vfio-pci; then the host has it no more, nor what is on it"
            } else {
                "give it to vfio-pci"
            };
            Check::refused(NAME, &error).remedy(remedy).commands(bind(system, device.address(), driver.is_some()))
        }
    }
}

/// How a device is given to vfio-pci.
fn bind(system: &System<'_>, address: &str, has_driver: bool) -> Vec<String> {
    let folder = format!("/sys/bus/pci/devices/{address}");
    let load = (!system.has_module("vfio_pci")).then(|| "modprobe vfio-pci".to_owned());
    let unbind = has_driver.then(|| format!("echo {address} > {folder}/driver/unbind"));
    let steps = [
        load,
        Some(format!("echo vfio-pci > {folder}/driver_override")),
        unbind,
        Some(format!("echo {address} > /sys/bus/pci/drivers_probe")),
    ];
    steps.into_iter().flatten().collect()
}

/// Opens it and closes it again, if nothing is known that is against it.
fn open(system: &System<'_>, device: &PciDevice, before: &[Check]) -> (Check, Option<Limits>) {
    const NAME: &str = "open";
    if let Some(failed) = before.iter().find(|check| check.verdict == Verdict::Failed) {
        return (Check::unknown(NAME, format!("not tried, as {} has failed", failed.name)), None);
    }
    match (system.open)(device.address()) {
        Ok(limits) => (Check::ok(NAME, "opened, and closed again"), Some(limits)),
        Err(OpenError::Permission { path }) => (not_permitted(system, path), None),
        Err(error) => (Check::refused(NAME, &error), None),
    }
}

fn not_permitted(system: &System<'_>, path: String) -> Check {
    let chown = format!("chown {} {path}", system.user);
    let remedy = "be root, or have it given to this user, until the device is bound anew (a rule of udev does it for good: \
                  SUBSYSTEM==\"vfio\", OWNER=\"USER\")";
    Check::refused("open", &OpenError::Permission { path }).remedy(remedy).commands([chown])
}
