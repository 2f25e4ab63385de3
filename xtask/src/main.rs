//! No shell scripts: write a task. One file a task, run as `cargo xtask TASK`.

mod bench_check;
mod ci;
mod deny;
mod dist;
mod files;
mod fuzz;
mod loom;
mod miri;
mod nightly;
mod paths;
mod qemu_test;
mod record_trace;
mod step;
mod tools;
mod tsan;
mod vm;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;

/// Builds and tests this workspace
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    after_help = "Examples:
  cargo xtask ci                everything that must hold before a merge
  cargo xtask ci fmt clippy     two steps of it
  cargo xtask ci --list         the steps, in the order they run
  cargo xtask deny              licences, duplicates and origins of all dependencies
  cargo xtask loom              the models of tests/loom, in the model checker
  cargo xtask loom forced::     those with that in their name
  cargo xtask miri --quick      the tests that Miri can run, few cases of each
  cargo xtask tsan              the pinner's stress test under ThreadSanitizer
  cargo xtask fuzz --all        each fuzz target for a minute
  cargo xtask bench-check       how fast the pinner is beside others
  cargo xtask qemu-test vfio    coiommu-vfio on a real kernel's VFIO, in a virtual machine
  cargo xtask dist              the package that users unpack"
)]
enum Task {
    Ci(ci::Args),
    Deny(deny::Args),
    Loom(loom::Args),
    Fuzz(fuzz::Args),
    Tsan(tsan::Args),
    BenchCheck(bench_check::Args),
    Miri(miri::Args),
    QemuTest(qemu_test::Args),
    RecordTrace(record_trace::Args),
    Dist(dist::Args),
}

fn main() -> anyhow::Result<ExitCode> {
    let task = Task::parse();
    // Cargo sets it when it runs us; the compile-time value would be wrong in a target directory that two clones share.
    let xtask = std::env::var("CARGO_MANIFEST_DIR").context("run me as `cargo xtask`")?;
    let root = Path::new(&xtask).parent().context("xtask has no parent folder")?;
    std::env::set_current_dir(root).with_context(|| format!("cannot enter {}", root.display()))?;
    match task {
        Task::Ci(args) => ci::run(&args),
        Task::Deny(args) => deny::run(&args),
        Task::Loom(args) => loom::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Tsan(args) => tsan::run(&args),
        Task::BenchCheck(args) => bench_check::run(&args),
        Task::Miri(args) => miri::run(&args),
        Task::QemuTest(args) => qemu_test::run(&args),
        Task::RecordTrace(args) => record_trace::run(&args),
        Task::Dist(args) => dist::run(&args),
    }
}
