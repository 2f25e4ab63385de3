//! Whether memory can be pinned: how much of it, and in how many mappings.

use coiommu_pin::Policy;
use coiommu_vfio::{DEFAULT_ENTRY_LIMIT, Limits};

use super::check::Check;
use super::system::System;
use crate::units::{bytes, grouped};

/// The largest piece that one mapping covers, in bytes.
const LARGEST: u64 = 2 << 20;
/// The smallest.
const PAGE: u64 = 0x1000;

/// The guest that is to be served.
pub(super) struct Guest<'a> {
    /// Its RAM in bytes.
    pub(super) ram: u64,
    pub(super) policy: &'a Policy,
}

/// `limits` are those of the containers that could be opened.
pub(super) fn checks(system: &System<'_>, guest: Option<&Guest<'_>>, limits: &[Limits]) -> Vec<Check> {
    let mappings = Mappings::find(system, limits);
    let mut checks = vec![memlock(system, guest), mappings.check(guest)];
    checks.extend(guest.map(|guest| pin_all(system, guest, &mappings)));
    checks
}

fn memlock(system: &System<'_>, guest: Option<&Guest<'_>>) -> Check {
    const NAME: &str = "memlock";
    const RAISE: &str = "raise it for who runs `coiommu serve` (LimitMEMLOCK= of a unit, memlock in \
                         /etc/security/limits.conf for logins)";
    let Some(room) = system.memlock.room() else {
        let why = if system.memlock.is_exempt { "this user may lock any amount (CAP_IPC_LOCK)" } else { "unlimited" };
        return Check::ok(NAME, why);
    };
    let may = format!("this process may lock {} (RLIMIT_MEMLOCK)", bytes(room));
    let Some(guest) = guest else {
        return Check::warning(NAME, format!("{may}: --memory tells whether that is enough"), RAISE);
    };
    let pinned = guest.policy.quota.map_or(guest.ram, |quota| quota.min(guest.ram));
    let seen = format!("{may}, and up to {} are pinned", bytes(pinned));
    if pinned <= room {
        Check::ok(NAME, seen)
    } else {
        Check::failed(NAME, seen, format!("{RAISE}, or set a lower quota (--policy quota=SIZE)"))
    }
}

/// How many mappings there are, and how that is known.
struct Mappings {
    /// `None`: they are not counted.
    left: Option<u64>,
    known: Known,
}

enum Known {
    /// From a container.
    Container,
    /// From the module that makes containers.
    Module,
    /// It is what a module has that nobody told otherwise.
    Assumed,
}

impl Mappings {
    fn find(system: &System<'_>, limits: &[Limits]) -> Self {
        if !limits.is_empty() {
            let left = limits.iter().filter_map(|limits| limits.mappings_left).min();
            return Self { left, known: Known::Container };
        }
        match system.type1_parameter("dma_entry_limit").and_then(|limit| limit.parse().ok()) {
            Some(limit) => Self { left: Some(limit), known: Known::Module },
            None => Self { left: Some(DEFAULT_ENTRY_LIMIT), known: Known::Assumed },
        }
    }

    fn check(&self, guest: Option<&Guest<'_>>) -> Check {
        const NAME: &str = "mappings";
        let Some(left) = self.left else { return Check::ok(NAME, "this kernel does not count them") };
        let source = match self.known {
            Known::Container => "dma_avail of a container",
            Known::Module => "dma_entry_limit of vfio_iommu_type1",
            Known::Assumed => {
                return Check::unknown(NAME, format!("vfio_iommu_type1 is not loaded; {} by default", grouped(left)));
            }
        };
        let has = format!("{} ({source})", grouped(left));
        let Some(guest) = guest else {
            let [large, small] = [LARGEST, PAGE].map(|piece| bytes(left.saturating_mul(piece)));
            return Check::ok(NAME, format!("{has}: {large} in pieces of 2 MiB, {small} page by page"));
        };
        let needed = guest.policy.mappings_needed(guest.ram);
        let seen = format!("{has}, and {} are needed at least", grouped(needed));
        if needed <= left {
            Check::ok(NAME, seen)
        } else {
            let remedy = "take a coarser extent (--policy extent=aligned=2m), or raise it for containers to come";
            Check::failed(NAME, seen, remedy).commands([raise_entry_limit(needed)])
        }
    }
}

fn raise_entry_limit(needed: u64) -> String {
    format!("echo {needed} > /sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
}

/// Whether all of the guest's RAM can be pinned: what a guest without the driver takes, be it only for its firmware.
fn pin_all(system: &System<'_>, guest: &Guest<'_>, mappings: &Mappings) -> Check {
    const NAME: &str = "pin-all";
    let pieces = guest.ram.div_ceil(LARGEST);
    let is_short = |has: Option<u64>, needed: u64| has.filter(|&has| has < needed);
    let against = [
        is_short(guest.policy.quota, guest.ram).map(|quota| format!("the quota is {}", bytes(quota))),
        is_short(system.memlock.room(), guest.ram).map(|room| format!("this process may lock {}", bytes(room))),
        is_short(available(system), guest.ram).map(|free| format!("the host has {} to spare", bytes(free))),
        is_short(mappings.left, pieces).map(|left| format!("there are {} mappings", grouped(left))),
    ];
    let against: Vec<_> = against.into_iter().flatten().collect();
    let all = format!("all RAM is {} in {} mappings of 2 MiB", bytes(guest.ram), grouped(pieces));
    if against.is_empty() {
        return Check::ok(NAME, all);
    }
    Check::warning(
        NAME,
        format!("{all}; against that: {}", against.join(", ")),
        "a guest whose driver is not active (its firmware, another system) cannot use its devices: have them wait for the \
         driver (`coiommu serve --without-driver hold`), or mend that",
    )
}

/// What memory the host can give, in bytes.
fn available(system: &System<'_>) -> Option<u64> {
    let text = system.text("proc/meminfo")?;
    let kib: u64 =
        text.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.strip_suffix("kB")?.trim().parse().ok())?;
    kib.checked_mul(1024)
}
