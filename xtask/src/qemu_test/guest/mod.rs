//! `cargo xtask qemu-test guest`: the guest's driver on real kernels, with `coiommu serve` for a stock QEMU.
//!
//! | file | what |
//! | --- | --- |
//! | [`server`] | a `coiommu serve`, and what it says |
//! | [`bed`] | what the scenes have in common: a guest, its devices, its counters |
//! | [`view`] | a guest's table as the host reads it |
//! | [`files`] | scene: files and downloads have the right bytes |
//! | [`unpinning`] | scene: idle pages go, and never one that is mapped |
//! | [`lives`] | scenes: guests reboot, emulators and servers are killed |
//! | [`odd`] | scene: what the driver says of devices that are not as they should be |
//! | [`narrow`] | scene: an endpoint that reaches 4 GiB only |
//! | [`hostile`] | scene: a guest that means harm |
//! | [`cost`] | scene: what tracking costs, and how long requests wait |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::ValueEnum;

use super::driver;
use crate::step;
use crate::vm::tree::KERNELS;
use crate::vm::{Choices, Claim, Emulator, Tree, tools};

mod bed;
mod cost;
mod files;
mod hostile;
mod lives;
mod narrow;
mod odd;
mod server;
mod unpinning;
mod view;

use bed::Bed;

/// Run a Linux guest with CoIOMMU's driver in a stock QEMU, the device served by `coiommu serve`
///
/// The driver is built for Linux 6.1, 6.12 and 7.3, and runs on the last two, with an nvme and an e1000e as endpoints. What
/// this machine lacks (a QEMU that speaks vfio-user, headers, a compiler) comes from a tree of Debian packages, made once under
/// target/vm: remove target/vm/trees for a newer one.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask qemu-test guest                               what the gate runs: the first scenes
  cargo xtask qemu-test guest --all
  cargo xtask qemu-test guest --series 7.3 --keep files     and leave me a shell in the guest")]
pub(crate) struct Args {
    /// The scenes to play [default: those of the gate]
    scenes: Vec<Scene>,
    /// Play all scenes
    #[arg(long, conflicts_with = "scenes")]
    all: bool,
    #[command(flatten)]
    choices: Choices,
    /// Only with this kernel: 6.12 or 7.3
    #[arg(long, value_name = "SERIES", value_parser = clap::builder::PossibleValuesParser::new(BOOTED))]
    series: Option<String>,
    /// Leave a guest up when it has done its work, with a shell on this terminal
    #[arg(long)]
    keep: bool,
    /// How long a guest may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    time_limit: u64,
}

/// The kernels that are booted, of those that the driver is built for.
const BOOTED: [&str; 2] = ["6.12", "7.3"];

/// In the order in which they are played.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Scene {
    /// Files and downloads have the right bytes, and the counters of both sides agree
    Files,
    /// The guest is stopped 200 times under load, idle pages go, memory is taken by force
    Unpinning,
    /// The guest reboots, three times
    Reboots,
    /// The emulator is killed and started again, for the same server
    Restart,
    /// The server is killed under load
    Orphan,
    /// No device, another revision, no endpoints, endpoints that have drivers
    Odd,
    /// An endpoint that reaches 4 GiB only
    Narrow,
    /// Random bytes are written to the device for a minute
    Hostile,
    /// What tracking costs, and how long requests wait
    Cost,
}

impl Scene {
    /// What the gate plays.
    const GATE: [Self; 2] = [Self::Files, Self::Unpinning];

    fn play(self, bed: &Bed<'_>) -> anyhow::Result<()> {
        match self {
            Self::Files => files::run(bed),
            Self::Unpinning => unpinning::run(bed),
            Self::Reboots => lives::reboots(bed),
            Self::Restart => lives::restart(bed),
            Self::Orphan => lives::orphan(bed),
            Self::Odd => odd::run(bed),
            Self::Narrow => narrow::run(bed),
            Self::Hostile => hostile::run(bed),
            Self::Cost => cost::run(bed),
        }
    }

    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    tools::require_for_trees()?;
    let claim = Claim::take()?;
    let emulator = Emulator::with_vfio_user(&args.choices.qemu)?;
    let tree = Tree::find()?;
    driver::check(&tree)?;
    let modules = KERNELS.iter().map(|series| Ok((*series, driver::build_module(&tree, series)?)));
    let modules = modules.collect::<anyhow::Result<BTreeMap<_, _>>>()?;
    let program = build_program()?;
    let scenes = match (args.all, &args.scenes[..]) {
        (true, _) => Scene::value_variants().to_vec(),
        (false, []) => Scene::GATE.to_vec(),
        (false, scenes) => scenes.to_vec(),
    };
    let is_wanted = |series: &&str| args.series.as_ref().is_none_or(|only| only == series);
    let all: Vec<_> = BOOTED
        .into_iter()
        .filter(is_wanted)
        .flat_map(|series| scenes.iter().map(move |scene| (series, *scene)))
        .collect();
    let name = |(series, scene): (&str, Scene)| format!("{} on Linux {series}", scene.name());
    let ok = step::run_all(&all, name, |(series, scene)| {
        let kernel = driver::kernel(&tree, series)?;
        let (claim, emulator, tree) = (&claim, &emulator, &tree);
        scene.play(&Bed { args, claim, emulator, tree, kernel, module: &modules[series], program: &program })
    });
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn build_program() -> anyhow::Result<PathBuf> {
    step::run("cargo build --release --locked -p coiommu-cli")?;
    Ok(Path::new("target/release/coiommu").canonicalize()?)
}
