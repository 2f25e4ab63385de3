//! The one nightly toolchain that tasks use where stable Rust has no way.

use std::process::Command;

use anyhow::Context as _;

use crate::step;

/// Pinned, so that what passes today passes tomorrow. Newer is not always better: see that `cargo xtask miri` and
/// `cargo xtask fuzz --all` still work before you change it.
const TOOLCHAIN: &str = "nightly-2026-10-01";

/// Sees to it that the toolchain is there, with these components of rustup.
pub(crate) fn install(components: &[&str]) -> anyhow::Result<()> {
    let installed = step::output("rustup toolchain list").context("this task needs rustup")?;
    let is_there = installed.lines().any(|line| line.starts_with(TOOLCHAIN)) && {
        let listed = step::output(&format!("rustup component list --installed --toolchain {TOOLCHAIN}"))?;
        components.iter().all(|component| listed.lines().any(|line| line.starts_with(component)))
    };
    if is_there {
        return Ok(());
    }
    let components: String = components.iter().map(|component| format!(" -c {component}")).collect();
    step::run(&format!("rustup toolchain install {TOOLCHAIN} --profile minimal --no-self-update{components}"))
}

/// A command of the toolchain, from a line cut at spaces.
pub(crate) fn command(line: &str) -> Command {
    let mut command = step::command(&format!("rustup run {TOOLCHAIN} {line}"));
    // Cargo sets these for what it runs, us; they are of another toolchain.
    for inherited in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(inherited);
    }
    command
}

/// The host that the toolchain builds for.
pub(crate) fn host() -> anyhow::Result<String> {
    let output = command("rustc -vV").output().context("cannot ask rustc for its host")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc does not tell its host")
}
