//! `coiommu doctor`: can this host pass devices through, and what is to be changed?
//!
//! | file | what it does |
//! | --- | --- |
//! | `mod.rs` | arguments, and the checks one after the other |
//! | `host.rs` | the host: its kernel, its IOMMU, its VFIO |
//! | `device.rs` | a device: its group, its driver, whether it can be opened |
//! | `memory.rs` | memory: how much can be pinned, in how many mappings |
//! | `qemu.rs` | QEMU |
//! | `system.rs` | where all of them look |
//! | `check.rs`, `report.rs` | what they say |

use std::collections::BTreeSet;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process;

use anyhow::Context as _;
use coiommu_pin::Policy;

mod check;
mod device;
mod host;
mod memory;
mod qemu;
mod report;
mod system;
#[cfg(test)]
mod tests;

use crate::host_bdf::HostBdf;
use crate::units::parse_memory;
use check::Check;
use memory::Guest;
use report::Report;
use system::System;

/// Tell whether this host can pass devices through, and what to change
///
/// Looks at the kernel, the IOMMU, VFIO, what may be pinned, and QEMU; with --host, at a device, its group and its driver,
/// and whether it can be opened. It changes nothing. But it opens the devices that are named, if they are bound to
/// vfio-pci, and closes them again, at which VFIO resets them; one that somebody uses is left alone. Run it as who will
/// run `coiommu serve`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  coiommu doctor
  coiommu doctor --host 0000:03:00.0 --memory 4g
  coiommu doctor --host 03:00.0 --host 03:00.1 --qemu /opt/qemu/bin/qemu-system-x86_64 --json

Exit codes: 0 all that has to be is there, warnings or not, 1 something is missing, 2 wrong arguments")]
pub struct Args {
    /// A PCI device of the host that is to be passed through (0000:03:00.0, or 03:00.0); may be given many times
    #[arg(long = "host", value_name = "BDF")]
    hosts: Vec<HostBdf>,

    /// The RAM of the guest, as in 4g: whether it can be pinned
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    memory: Option<u64>,

    /// How the guest will be served, as `coiommu serve` takes it: a quota and the extent count
    #[arg(long, value_name = "LIST", default_value_t, requires = "memory")]
    policy: Policy,

    /// The QEMU that will run the guest
    #[arg(long, value_name = "PROGRAM", default_value_os_t = PathBuf::from(qemu::default_program()))]
    qemu: PathBuf,

    /// Do not look at QEMU: the VMM is another one
    #[arg(long, conflicts_with = "qemu")]
    no_qemu: bool,

    /// Print JSON instead of lines
    #[arg(long)]
    json: bool,
}

/// Looks at the host, and exits with 1 if something is missing.
///
/// # Errors
///
/// The output cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut checks = examine(&System::this(), args);
    if !args.no_qemu {
        checks.push(qemu::check(&args.qemu));
    }
    let report = Report::new(checks);
    let in_colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let text = if args.json { report.json()? } else { report.text(in_colour) };
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads the output has seen enough; the exit code counts all the same.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written.context("cannot write the output")?,
    }
    if report.has_failed() {
        process::exit(1);
    }
    Ok(())
}

/// All checks of a system.
fn examine(system: &System<'_>, args: &Args) -> Vec<Check> {
    let mut checks = host::checks(system);
    if args.hosts.is_empty() {
        checks.push(host::bound_devices(system));
    }
    let mut limits = Vec::new();
    for address in args.hosts.iter().collect::<BTreeSet<_>>() {
        let examined = device::examine(system, address.as_str());
        checks.extend(examined.checks);
        limits.extend(examined.limits);
    }
    let guest = args.memory.map(|ram| Guest { ram, policy: &args.policy });
    checks.extend(memory::checks(system, guest.as_ref(), &limits));
    checks
}
