//! `cargo xtask loom`: the model checker, on the production code.

use std::process::{Command, ExitCode};

use anyhow::ensure;

use crate::step;

/// Explore the models of tests/loom: every interleaving of each, or those with so many preemptions as it names
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only models with this in their name
    model: Option<String>,
}

/// The crates that have models.
const CRATES: [&str; 2] = ["coiommu-dtt", "coiommu-pin"];

/// Apart from other builds, which would otherwise be made anew after each change of the flags.
const TARGET: &str = "target/loom";

/// Runs the models, each in a process of its own: one that fails may take its process along. The exit code is 1 if one
/// failed.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut models = Vec::new();
    for package in CRATES {
        let names = names(&listed(package)?);
        // A build without the flag has none.
        ensure!(!names.is_empty(), "{package} has no models: was it built with `--cfg loom`?");
        models.extend(names.into_iter().map(|name| (package, name)));
    }
    if let Some(wanted) = &args.model {
        models.retain(|(_, name)| name.contains(wanted));
        ensure!(!models.is_empty(), "no model has {wanted:?} in its name");
    }
    let ids: Vec<_> = (0..models.len()).collect();
    let ok = step::run_all(&ids, |id| models[id].1.clone(), |id| explore(models[id].0, &models[id].1));
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn line(package: &str, rest: &str) -> String {
    format!("cargo test --quiet --profile loom --locked -p {package} --test loom --target-dir {TARGET} -- {rest}")
}

fn command(line: &str) -> Command {
    let mut command = step::command(line);
    // Whatever flags there are, the models need this one.
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    command.env("RUSTFLAGS", format!("{flags} --cfg loom").trim()).env_remove("CARGO_ENCODED_RUSTFLAGS");
    command
}

/// Clippy on the models, and on what only a build for the model checker has.
pub(crate) fn clippy() -> anyhow::Result<()> {
    let packages = CRATES.join(" -p ");
    let line =
        format!("cargo clippy --profile loom --locked -p {packages} --tests --target-dir {TARGET} -- -D warnings");
    step::finish(&mut command(&line), &format!("RUSTFLAGS='--cfg loom' {line}"))
}

fn listed(package: &str) -> anyhow::Result<String> {
    let line = line(package, "--list");
    eprintln!("$ RUSTFLAGS='--cfg loom' {line}");
    step::output_of(&mut command(&line), &line)
}

/// The models among what a test program lists.
fn names(list: &str) -> Vec<String> {
    list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

fn explore(package: &str, model: &str) -> anyhow::Result<()> {
    let line = line(package, &format!("--exact {model} --nocapture"));
    let output = step::output_of(&mut command(&line), &line)?;
    let explored: Vec<_> = explored(&output).collect();
    explored.iter().for_each(|what| eprintln!("{what}"));
    // A test that explores nothing is no model.
    ensure!(!explored.is_empty(), "{model} explored nothing");
    Ok(())
}

/// What was explored, as `tests/loom/check.rs` says it.
fn explored(output: &str) -> impl Iterator<Item = &str> {
    output.lines().filter_map(|line| line.split_once("loom: ").map(|(_, what)| what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_the_tests_of_a_list() {
        let list = "leaf::one: test\nnotify::two: test\nroom::three: benchmark\n\n2 tests, 1 benchmark\n";
        assert_eq!(names(list), ["leaf::one", "notify::two"]);
        assert!(names("\n0 tests, 0 benchmarks\n").is_empty());
    }

    #[test]
    fn what_was_explored_is_found_beside_what_the_test_program_says() {
        // Without a terminal, the dots of a quiet run come on the same line.
        let output = "\nrunning 1 test\nloom: leaf.rs:9: 35 interleavings (all), 0.0 s\n.loom: x\ntest result: ok.\n";
        assert_eq!(explored(output).collect::<Vec<_>>(), ["leaf.rs:9: 35 interleavings (all), 0.0 s", "x"]);
        assert_eq!(explored("test result: ok. 0 passed").count(), 0);
    }
}
