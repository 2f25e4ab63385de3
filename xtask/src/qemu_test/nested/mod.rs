//! `cargo xtask qemu-test nested`: devices passed through to guests of a stock QEMU, in a machine with an IOMMU.
//!
//! | file | what |
//! | --- | --- |
//! | [`bed`] | what the scenes have in common: the outer VM with its devices, and what is in it |
//! | [`devices`] | those devices, and whether they have done what they should |
//! | `outer.sh` | what the jobs of the outer VM have in common: it starts guests, and tells them what to do |
//! | `inner.sh` | the job of inner guests: they do what they are told |
//! | [`io`] | scene: all bytes are right, with every kind of interrupt and no fault |
//! | [`without_driver`] | scene: guests without the driver, and with others before it |
//! | [`pins`] | scene: what is pinned over time |
//! | [`lives`] | scenes: guests reboot, emulators and servers are ended |
//! | [`cost`] | scene: what a guest's start costs |
//! | [`plain`] | scene: devices given to a guest as QEMU does it by itself |

use std::process::ExitCode;

use clap::ValueEnum;

use super::driver;
use crate::step;
use crate::vm::{Choices, Claim, Tree, tools};

mod bed;
mod cost;
mod devices;
mod io;
mod lives;
mod pins;
mod plain;
mod without_driver;

use bed::Bed;

/// Pass devices through to guests of a stock QEMU, in a machine with an IOMMU
///
/// QEMU makes a machine in software (the outer VM) with an IOMMU, an nvme, two network cards and a USB controller, which
/// all have the kernel's VFIO for a driver. In it, QEMU 11.1 runs guests (the inner ones) that these devices belong to. What
/// this machine lacks comes from a tree of Debian packages, made once under target/vm: remove target/vm/trees for a newer
/// one.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask qemu-test nested                          what the gate runs: the first scenes
  cargo xtask qemu-test nested --all
  cargo xtask qemu-test nested --series 7.3 plain       one scene, with a newer kernel inside
  cargo xtask qemu-test nested --keep plain             and leave me a shell in the outer VM")]
pub(crate) struct Args {
    /// The scenes to play [default: those of the gate]
    scenes: Vec<Scene>,
    /// Play all scenes
    #[arg(long, conflicts_with = "scenes")]
    all: bool,
    #[command(flatten)]
    choices: Choices,
    /// The kernel of inner guests
    #[arg(long, value_name = "SERIES", default_value = "6.12")]
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(["6.12", "7.3"]))]
    series: String,
    /// Who runs the instructions of inner guests
    #[arg(long, default_value = "kvm")]
    inner_accel: InnerAccel,
    /// Leave the outer VM up when it has done its work, with a shell on this terminal
    #[arg(long)]
    keep: bool,
    /// How long a scene may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    time_limit: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum InnerAccel {
    /// Software in software: takes ten times as long
    Tcg,
    /// The outer VM's processor, which can do it even if it is software itself (AMD's SVM)
    Kvm,
}

/// In the order in which they are played.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Scene {
    /// All bytes are right, with every kind of interrupt and no fault; then one on purpose
    Io,
    /// Guests without CoIOMMU's driver, under each setting; and one whose disk has its driver before
    WithoutDriver,
    /// What is pinned over time, beside what QEMU alone pins; and what the kernel says of it
    Pins,
    /// The guest reboots, three times, under load
    Reboots,
    /// The emulator is killed under load, and started again for the same server
    Restart,
    /// The server is killed under load, and the next waits for the emulator
    Orphan,
    /// The server is asked to end under load
    Stop,
    /// Time and memory until the guest is up, under each setting and with QEMU alone
    Cost,
    /// The bed itself: devices given to a guest by QEMU alone, which pins all memory
    Plain,
}

impl Scene {
    /// What the gate plays.
    const GATE: [Self; 2] = [Self::Io, Self::WithoutDriver];

    fn play(self, bed: &Bed<'_>) -> anyhow::Result<()> {
        match self {
            Self::Io => io::run(bed),
            Self::WithoutDriver => without_driver::run(bed),
            Self::Pins => pins::run(bed),
            Self::Reboots => lives::reboots(bed),
            Self::Restart => lives::restart(bed),
            Self::Orphan => lives::orphan(bed),
            Self::Stop => lives::stop(bed),
            Self::Cost => cost::run(bed),
            Self::Plain => plain::run(bed),
        }
    }

    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    tools::require_for_trees()?;
    let claim = Claim::take()?;
    let tree = Tree::find()?;
    let modules =
        [driver::build_module(&tree, &args.series)?, driver::build_test_module(&tree, &args.series, "vectors.ko")?];
    let bed = Bed::new(args, &claim, &tree, &modules)?;
    let scenes = match (args.all, &args.scenes[..]) {
        (true, _) => Scene::value_variants().to_vec(),
        (false, []) => Scene::GATE.to_vec(),
        (false, scenes) => scenes.to_vec(),
    };
    let ok = step::run_all(&scenes, Scene::name, |scene| scene.play(&bed));
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
