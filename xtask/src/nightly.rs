//! The nightly toolchain for what stable cannot do, and its components.

use anyhow::Context as _;

use crate::step;

/// Pinned by its date, so that a new nightly surprises nobody.
pub(crate) const TOOLCHAIN: &str = "nightly-2026-10-01";

/// Installs the toolchain with a component, if they are not there.
pub(crate) fn install(component: &str) -> anyhow::Result<()> {
    let installed = step::output(&format!("rustup component list --installed --toolchain {TOOLCHAIN}"));
    // Of a toolchain that is not there, none are. Most have the host's name behind theirs.
    if installed.is_ok_and(|list| list.lines().any(|line| line.starts_with(component))) {
        return Ok(());
    }
    step::run(&format!(
        "rustup toolchain install {TOOLCHAIN} --profile minimal --component {component} --no-self-update"
    ))
    .context("this task needs rustup")
}
