//! `cargo xtask deny`: whether the crates that we depend on are those that we want, by `deny.toml`.

use std::process::ExitCode;

use clap::ValueEnum;

use crate::step;
use crate::tools::Tool;

/// Check licences, duplicates and origins of all dependencies
#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask deny               what the gate checks
  cargo xtask deny advisories    known vulnerabilities, from a database that is fetched")]
pub(crate) struct Args {
    /// What to check [default: licenses bans sources]
    checks: Vec<Check>,
}

/// As cargo-deny calls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Check {
    /// Each may be used as we use it
    Licenses,
    /// None is there twice, or where it should not be
    Bans,
    /// All are from the registry
    Sources,
    /// None has a known vulnerability; needs the network
    Advisories,
}

const CARGO_DENY: Tool = Tool { name: "cargo-deny", version: "0.20.2", options: "--no-default-features" };

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let asked = if args.checks.is_empty() { &[Check::Licenses, Check::Bans, Check::Sources] } else { &*args.checks };
    let names: Vec<_> = asked.iter().filter_map(Check::to_possible_value).collect();
    let names: Vec<_> = names.iter().map(|value| value.get_name()).collect();
    let program = CARGO_DENY.program()?;
    // Warnings are for people; what is wrong is an error.
    step::run(&format!("{} --locked check --hide-inclusion-graph {}", program.display(), names.join(" ")))?;
    Ok(ExitCode::SUCCESS)
}
