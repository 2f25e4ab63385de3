//! `cargo xtask tsan`: the stress test of `coiommu-pin` under ThreadSanitizer, std included.

use std::process::ExitCode;

use crate::{nightly, step};

/// Run the pinner's stress test under ThreadSanitizer; any report fails it
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long, in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// What a process exits with if ThreadSanitizer reported anything, whatever its tests say.
const REPORTED: u8 = 66;

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    nightly::install(&["rust-src"])?;
    let host = nightly::host()?;
    // std too: what it does to locks and channels is invisible to the sanitizer otherwise. A target that is named, so that
    // build scripts and macros, which run in the compiler, are built without.
    let line = format!(
        "cargo test -Zbuild-std --target {host} --target-dir target/tsan --locked \
         --package coiommu-pin --test stress -- --nocapture"
    );
    let mut command = nightly::command(&line);
    command
        .env("RUSTFLAGS", "-Zsanitizer=thread")
        // It would win.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("TSAN_OPTIONS", format!("halt_on_error=0:exitcode={REPORTED}:history_size=7"))
        .env("COIOMMU_STRESS_SECONDS", args.seconds.to_string());
    step::finish(&mut command, &format!("RUSTFLAGS=-Zsanitizer=thread {line}"))?;
    println!("tsan: {} s without a report", args.seconds);
    Ok(ExitCode::SUCCESS)
}
