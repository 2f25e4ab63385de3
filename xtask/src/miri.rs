//! `cargo xtask miri`: the tests of the libraries under Miri, which sees what is undefined, or races.

use std::process::ExitCode;

use anyhow::ensure;
use clap::builder::PossibleValuesParser;

use crate::{nightly, step};

/// Run the libraries' tests under Miri, with few cases of each property
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The crates [default: all that have tests for it]
    #[arg(value_name = "CRATE", value_parser = PossibleValuesParser::new(CRATES.map(|(name, _)| name)))]
    crates: Vec<String>,
    /// A small set, for a gate: one case of each property
    #[arg(long)]
    quick: bool,
}

/// The crates, and those of their targets that are run.
const CRATES: [(&str, &str); 3] = [
    ("coiommu-dtt", "--lib --test tables"),
    ("coiommu-pin", "--lib --test pinner"),
    ("coiommu-vfio", "--lib --test soft"),
];

/// Strict provenance: no address from nowhere. Not symbolic alignment: vm-memory looks at an address to see whether it is
/// aligned, which that check does not believe. Files are made, for the identity of RAM; the memory in the place of their
/// mappings is never freed.
const FLAGS: &str = "-Zmiri-strict-provenance -Zmiri-disable-isolation -Zmiri-ignore-leaks";

/// Runs the tests asked for. The exit code is 1 if some failed.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    nightly::install(&["miri", "rust-src"])?;
    let wanted = |name: &str| args.crates.is_empty() || args.crates.iter().any(|asked| asked == name);
    let crates: Vec<_> = CRATES.into_iter().filter(|(name, _)| wanted(name)).collect();
    let cases = if args.quick { 1 } else { 8 };
    let ok = step::run_all(&crates, |(name, _)| name.to_owned(), |(name, targets)| test(name, targets, cases));
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn test(name: &str, targets: &str, cases: u32) -> anyhow::Result<()> {
    let line = format!("cargo miri test -p {name} {targets} --locked --target-dir target/miri --no-fail-fast");
    ensure!(tests(&line)? > 0, "{name} has no test to run");
    let shown = format!("MIRIFLAGS='{FLAGS}' PROPTEST_CASES={cases} {line}");
    step::finish(nightly::command(&line).env("MIRIFLAGS", FLAGS).env("PROPTEST_CASES", cases.to_string()), &shown)
}

/// How many tests a command would run that are not ignored.
fn tests(line: &str) -> anyhow::Result<usize> {
    let list = |more: &str| -> anyhow::Result<usize> {
        let line = format!("{line} -- --list {more}");
        let output = nightly::command(&line).env("MIRIFLAGS", FLAGS).output()?;
        ensure!(output.status.success(), "`{line}`: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.ends_with(": test")).count())
    };
    Ok(list("")? - list("--ignored")?)
}
