//! Programs that tasks run and that come as crates: pinned, and installed where this workspace builds.

use std::path::{Path, PathBuf};

use anyhow::ensure;

use crate::step;

/// Where they are.
const TOOLS: &str = "target/tools";

/// The program of a crate.
#[derive(Clone, Copy)]
pub(crate) struct Tool {
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    /// What else `cargo install` is told.
    pub(crate) options: &'static str,
}

impl Tool {
    /// Where it is, installed if it is not, or not at this version.
    pub(crate) fn program(self) -> anyhow::Result<PathBuf> {
        let Self { name, version, options } = self;
        let program = Path::new(TOOLS).join("bin").join(name);
        let line = format!("{} --version", program.display());
        let is_there = program.exists() && step::output(&line)?.split_whitespace().any(|word| word == version);
        if !is_there {
            let line = format!("cargo install {name} --version ={version} --locked --root {TOOLS} {options}");
            let mut command = step::command(&line);
            // Its own folder for builds: ours may be shared, and is not to be cleaned for it.
            command.env("CARGO_TARGET_DIR", format!("{TOOLS}/build"));
            // They run for seconds: to make them fast takes minutes.
            command.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0").env("CARGO_PROFILE_RELEASE_LTO", "off");
            command.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
            step::finish(&mut command, line.trim_end())?;
        }
        ensure!(program.exists(), "{name} is installed, but not as {}", program.display());
        Ok(program)
    }
}
