//! `cargo xtask miri`: the tests of the libraries under Miri, which sees what is undefined, or races.

use std::process::ExitCode;

use anyhow::ensure;
use clap::builder::PossibleValuesParser;

use crate::{nightly, step};

/// Run the libraries' tests under Miri, with few cases of each property
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The crates [default: all that have tests for it]
    #[arg(value_name = "CRATE", value_parser = PossibleValuesParser::new(CRATES.map(|tests| tests.name)))]
    crates: Vec<String>,
    /// A small set, for a gate: one case of each property, and not all targets
    #[arg(long)]
    quick: bool,
}

/// What of a crate runs under Miri.
#[derive(Clone, Copy)]
struct Tests {
    name: &'static str,
    /// The targets of the small set.
    quick: &'static str,
    /// All targets. Not here: what measures, what needs the system's I/O, the stress tests, which are for real processors.
    full: &'static str,
    /// How many cases of each property.
    cases: u32,
}

const CRATES: [Tests; 4] = [
    Tests { name: "coiommu-dtt", quick: "--lib --test tables", full: "--lib --test tables", cases: 8 },
    Tests {
        name: "coiommu-pci",
        quick: "--lib --test registers",
        full: "--lib --test config --test registers",
        cases: 8,
    },
    Tests {
        name: "coiommu-pin",
        quick: "--lib --test meetings",
        full: "--lib --test pinner --test meetings --test workers --test model --test faults",
        cases: 2,
    },
    Tests {
        name: "coiommu-vfio",
        quick: "--lib --test soft",
        full: "--lib --test soft --test contract --test model",
        cases: 2,
    },
];

/// Strict provenance: no address from nowhere. Not symbolic alignment: vm-memory looks at an address to see whether it is
/// aligned, which that check does not believe. Files are made, for the identity of RAM; the memory in the place of their
/// mappings is never freed.
const FLAGS: &str = "-Zmiri-strict-provenance -Zmiri-disable-isolation -Zmiri-ignore-leaks";

/// Runs the tests asked for. The exit code is 1 if some failed.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    nightly::install(&["miri", "rust-src"])?;
    let wanted = |name: &str| args.crates.is_empty() || args.crates.iter().any(|asked| asked == name);
    let crates: Vec<_> = CRATES.into_iter().filter(|tests| wanted(tests.name)).collect();
    let ok = step::run_all(
        &crates,
        |tests| tests.name.to_owned(),
        |Tests { name, quick, full, cases }| if args.quick { test(name, quick, 1) } else { test(name, full, cases) },
    );
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn test(name: &str, targets: &str, cases: u32) -> anyhow::Result<()> {
    let line = format!("cargo miri test -p {name} {targets} --locked --target-dir target/miri --no-fail-fast");
    ensure!(count(&line)? > 0, "{name} has no test to run");
    let shown = format!("MIRIFLAGS='{FLAGS}' PROPTEST_CASES={cases} {line}");
    step::finish(nightly::command(&line).env("MIRIFLAGS", FLAGS).env("PROPTEST_CASES", cases.to_string()), &shown)
}

/// How many tests a command would run that are not ignored.
fn count(line: &str) -> anyhow::Result<usize> {
    let list = |more: &str| -> anyhow::Result<usize> {
        let line = format!("{line} -- --list {more}");
        let output = nightly::command(&line).env("MIRIFLAGS", FLAGS).output()?;
        ensure!(output.status.success(), "`{line}`: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).lines().filter(|line| line.ends_with(": test")).count())
    };
    Ok(list("")? - list("--ignored")?)
}
