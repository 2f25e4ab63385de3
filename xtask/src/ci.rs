//! `cargo xtask ci`: everything that must hold before a merge.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;

use crate::{loom, step};

/// Run every check, cheapest first, and name those that failed
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The steps to run [default: all]
    steps: Vec<Step>,
    /// Leave the test step out (for a caller that has run it)
    #[arg(long, conflicts_with = "steps")]
    skip_tests: bool,
    /// List the steps, in the order they run
    #[arg(long)]
    list: bool,
}

/// In the order they run, whatever order they are asked for in: cheapest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Step {
    /// Formatting
    Fmt,
    /// Members inherit version, edition, rust-version, license and lints; licence texts are there
    Hygiene,
    /// coiommu-dtt builds without std
    #[value(name = "no_std")]
    NoStd,
    /// Licences, duplicates and origins of all dependencies
    Deny,
    /// No warning from clippy
    Clippy,
    /// The test command in README.md
    Test,
    /// Everything builds with the toolchain that rust-version names
    Msrv,
    /// No warning from rustdoc
    Doc,
    /// The libraries can be packaged, each built from its package
    Package,
    /// The package that users unpack is made, not optimised, and is what it should be
    Dist,
    /// All models, in the model checker
    Loom,
    /// The unsafe code and what uses it, in Miri: few cases of each property
    Miri,
    /// Each fuzz target for half a minute, from its corpus
    Fuzz,
    /// The hardware tests, on a real kernel's VFIO in a virtual machine
    #[value(name = "qemu-vfio")]
    QemuVfio,
    /// Guests with the driver, in a stock QEMU, the device served by coiommu serve
    #[value(name = "qemu-guest")]
    QemuGuest,
    /// The pinner is as fast, beside others, as it should be on a busy machine
    Bench,
}

/// Runs the steps asked for. The exit code is 1 if one failed.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.list {
        for value in Step::value_variants().iter().filter_map(Step::to_possible_value) {
            println!("{:9} {}", value.get_name(), value.get_help().cloned().unwrap_or_default());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let ok = step::run_all(&selection(&args.steps, args.skip_tests), Step::name, Step::run);
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What to run, in order and once each; nothing asked for is everything.
fn selection(asked: &[Step], skip_tests: bool) -> Vec<Step> {
    let asked = if asked.is_empty() { Step::value_variants() } else { asked };
    let mut steps: Vec<_> = asked.iter().copied().filter(|step| !(skip_tests && *step == Step::Test)).collect();
    steps.sort();
    steps.dedup();
    steps
}

impl Step {
    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Fmt => step::run("cargo fmt --all --check"),
            Self::Hygiene => hygiene(),
            Self::NoStd => no_std(),
            Self::Deny => step::run("cargo xtask deny"),
            Self::Clippy => clippy(),
            Self::Test => test(),
            Self::Msrv => msrv(),
            Self::Doc => doc(),
            Self::Package => package(),
            Self::Dist => step::run("cargo xtask dist --quick"),
            Self::Loom => step::run("cargo xtask loom"),
            Self::Miri => step::run("cargo xtask miri --quick"),
            Self::Fuzz => step::run("cargo xtask fuzz --all --seconds 30"),
            Self::QemuVfio => step::run("cargo xtask qemu-test vfio"),
            Self::QemuGuest => step::run("cargo xtask qemu-test guest"),
            Self::Bench => step::run("cargo xtask bench-check"),
        }
    }
}

fn hygiene() -> anyhow::Result<()> {
    let mut complaints = Vec::new();
    for licence in ["LICENSE-APACHE", "LICENSE-BSD-3-Clause"] {
        if !Path::new(licence).is_file() {
            complaints.push(format!("{licence} is missing"));
        }
    }
    for member in members()? {
        let path = member["manifest_path"].as_str().context("a member without a manifest path")?;
        let manifest = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
        complaints.extend(not_inherited(&manifest).map(|key| format!("{path}: {key} is not inherited")));
    }
    ensure!(complaints.is_empty(), "\n  {}", complaints.join("\n  "));
    Ok(())
}

/// What a manifest should inherit from the workspace and does not. Cargo reports values, not where they come from, so
/// this reads lines; it knows the one form that we write.
fn not_inherited(manifest: &str) -> impl Iterator<Item = &'static str> {
    let mut section = "";
    let mut lines = Vec::new();
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line;
        } else {
            lines.push((section, line));
        }
    }
    [
        ("version", "[package]", "version.workspace = true"),
        ("edition", "[package]", "edition.workspace = true"),
        ("rust-version", "[package]", "rust-version.workspace = true"),
        ("license", "[package]", "license.workspace = true"),
        ("lints", "[lints]", "workspace = true"),
    ]
    .into_iter()
    .filter(move |(_, section, line)| !lines.contains(&(*section, *line)))
    .map(|(key, ..)| key)
}

fn no_std() -> anyhow::Result<()> {
    const TARGET: &str = "x86_64-unknown-none";
    // Not asked of rustup: the target may be there without it.
    let libdir = step::output(&format!("rustc --print target-libdir --target {TARGET}"))?;
    if !Path::new(libdir.trim()).is_dir() {
        step::run(&format!("rustup target add {TARGET}"))?;
    }
    step::run(&format!("cargo build -p coiommu-dtt --no-default-features --locked --target {TARGET}"))
}

fn clippy() -> anyhow::Result<()> {
    step::run("cargo clippy --workspace --all-targets --all-features --locked -- -D warnings")?;
    // What only a build for the model checker has.
    loom::clippy()
}

fn test() -> anyhow::Result<()> {
    let readme = fs::read_to_string("README.md").context("cannot read README.md")?;
    let commands = readme_tests(&readme).context("README.md has no ```sh block after a line `<!-- ci: test -->`")?;
    step::finish(Command::new("bash").args(["-euo", "pipefail", "-c", commands]), commands)
}

/// The commands by which the README says the workspace is tested; `.ci/run` looks for them in the same place.
fn readme_tests(readme: &str) -> Option<&str> {
    let (_, after) = readme.split_once("<!-- ci: test -->\n")?;
    let (commands, _) = after.trim_start().strip_prefix("```sh\n")?.split_once("\n```")?;
    Some(commands.trim()).filter(|commands| !commands.is_empty())
}

fn msrv() -> anyhow::Result<()> {
    let toolchain = oldest_release(env!("CARGO_PKG_RUST_VERSION"));
    let installed = step::output("rustup toolchain list").context("this step needs rustup")?;
    if !installed.lines().any(|line| line.starts_with(&format!("{toolchain}-"))) {
        step::run(&format!("rustup toolchain install {toolchain} --profile minimal --no-self-update"))?;
    }
    // `cargo +VERSION` works only where `cargo` is rustup's.
    step::run(&format!("rustup run {toolchain} cargo check --workspace --all-targets --all-features --locked"))
}

/// The oldest release that a rust-version admits; rustup reads `1.95` as the newest 1.95.
fn oldest_release(rust_version: &str) -> String {
    match rust_version.matches('.').count() {
        0 => format!("{rust_version}.0.0"),
        1 => format!("{rust_version}.0"),
        _ => rust_version.to_owned(),
    }
}

fn doc() -> anyhow::Result<()> {
    let line = "cargo doc --workspace --no-deps --all-features --locked";
    step::finish(step::command(line).env("RUSTDOCFLAGS", "-D warnings"), &format!("RUSTDOCFLAGS='-D warnings' {line}"))
}

fn package() -> anyhow::Result<()> {
    let members = members()?;
    let names: Vec<_> = members.iter().filter(|member| is_library(member)).filter_map(|m| m["name"].as_str()).collect();
    if names.is_empty() {
        bail!("no library to package");
    }
    forget_packages(&names)?;
    // One call: a library that is not published yet is found only beside those that need it.
    let mut line = format!("cargo package --locked --target-dir {PACKAGES} -p {}", names.join(" -p "));
    if std::env::var_os("CI").is_none_or(|ci| ci.is_empty()) {
        line += " --allow-dirty";
    }
    step::run(&line)
}

/// Where packages are made and built.
const PACKAGES: &str = "target/packages";

/// Removes what an earlier run unpacked and built of our libraries. Cargo keeps both by version, as if they had been
/// published, and would build a library against the old sources of the one below it.
fn forget_packages(names: &[&str]) -> anyhow::Result<()> {
    if Path::new(PACKAGES).exists() {
        fs::remove_dir_all(PACKAGES).with_context(|| format!("cannot remove {PACKAGES}"))?;
    }
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(std::env::home_dir()?.join(".cargo"))).context("no home directory")?;
    // Packages of no published registry are in folders without a host in their name.
    for registry in folders(&home.join("registry/src")).filter(|folder| file_name(folder).starts_with('-')) {
        for package in folders(&registry) {
            let name = file_name(&package);
            if names.iter().any(|library| name.strip_prefix(library).is_some_and(|rest| rest.starts_with('-'))) {
                fs::remove_dir_all(&package).with_context(|| format!("cannot remove {}", package.display()))?;
            }
        }
    }
    Ok(())
}

/// The folders in a folder; none if it is not there.
fn folders(folder: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| path.is_dir())
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// Has a library and may be published.
fn is_library(member: &Value) -> bool {
    let has_lib = member["targets"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|target| target["kind"].as_array().into_iter().flatten().any(|kind| kind == "lib"));
    // Null is anywhere, an empty list nowhere.
    has_lib && member["publish"].as_array().is_none_or(|registries| !registries.is_empty())
}

/// The members of the workspace, as `cargo metadata` describes them.
fn members() -> anyhow::Result<Vec<Value>> {
    let text = step::output("cargo metadata --no-deps --format-version 1")?;
    let mut metadata: Value = serde_json::from_str(&text).context("cannot read what cargo metadata says")?;
    match metadata["packages"].take() {
        Value::Array(packages) if !packages.is_empty() => Ok(packages),
        _ => bail!("cargo metadata lists no packages"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use serde_json::json;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(words: &[&str]) -> Result<Vec<Step>, clap::Error> {
        let Cli { args } = Cli::try_parse_from([&["ci"], words].concat())?;
        Ok(selection(&args.steps, args.skip_tests))
    }

    #[test]
    fn all_steps_unless_some_are_asked_for() {
        assert_eq!(parse(&[]).unwrap(), Step::value_variants());
        assert_eq!(parse(&["doc", "no_std", "fmt", "doc"]).unwrap(), [Step::Fmt, Step::NoStd, Step::Doc]);
    }

    #[test]
    fn skip_tests_leaves_out_that_step_only() {
        let steps = parse(&["--skip-tests"]).unwrap();
        assert!(!steps.contains(&Step::Test));
        assert_eq!(steps.len() + 1, Step::value_variants().len());
        assert!(parse(&["--skip-tests", "test"]).is_err());
    }

    #[test]
    fn unknown_step_is_an_error_that_names_the_valid_ones() {
        let error = parse(&["fmt", "lint"]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(text.contains("lint"), "{text}");
        for step in Step::value_variants() {
            assert!(text.contains(&step.name()), "{text}");
        }
    }

    #[test]
    fn inheritance_counts_only_in_its_section() {
        let package = "version.workspace = true\nedition.workspace = true\nrust-version.workspace = true\n";
        let whole = format!("[package]\n{package}license.workspace = true\n\n[lints]\nworkspace = true\n");
        assert_eq!(not_inherited(&whole).count(), 0);

        let own_licence = whole.replace("license.workspace = true", "license = \"MIT\"");
        assert_eq!(not_inherited(&own_licence).collect::<Vec<_>>(), ["license"]);

        let astray = whole.replace("[lints]", "[dependencies.log]");
        assert_eq!(not_inherited(&astray).collect::<Vec<_>>(), ["lints"]);
        assert_eq!(not_inherited("").count(), 5);
    }

    #[test]
    fn readme_tests_are_the_block_after_the_mark() {
        let readme =
            "```sh\nmake\n```\n<!-- ci: test -->\n\n```sh\ncargo test\ncargo xtask ci\n```\n```sh\nrm x\n```\n";
        assert_eq!(readme_tests(readme), Some("cargo test\ncargo xtask ci"));
        for without in [
            "",
            "```sh\ncargo test\n```\n",
            "<!-- ci: test -->\nRun this:\n```sh\ncargo test\n```\n",
            "<!-- ci: test -->\n```text\ncargo test\n```\n",
            "<!-- ci: test -->\n```sh\ncargo test\n",
            "<!-- ci: test -->\n```sh\n\n```\n",
        ] {
            assert_eq!(readme_tests(without), None, "{without:?}");
        }
    }

    #[test]
    fn rust_version_means_its_first_release() {
        assert_eq!(oldest_release("1.95"), "1.95.0");
        assert_eq!(oldest_release("1.95.1"), "1.95.1");
    }

    #[test]
    fn libraries_are_members_with_a_lib_that_may_be_published() {
        let member = |kind: &str, publish: Value| json!({ "targets": [{ "kind": [kind] }], "publish": publish });
        assert!(is_library(&member("lib", Value::Null)));
        assert!(is_library(&member("lib", json!(["crates-io"]))));
        assert!(!is_library(&member("lib", json!([]))));
        assert!(!is_library(&member("bin", Value::Null)));
    }
}
