//! Running a model, and saying what was run.

use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

/// Runs a model to its end, and prints a line that `cargo xtask loom` looks for. With `preemptions`, only interleavings
/// in which at most so many times a thread is stopped that could have gone on; `None` is all of them.
#[track_caller]
pub fn check(preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    // LOOM_MAX_PREEMPTIONS is for whoever looks closer.
    builder.preemption_bound = builder.preemption_bound.or(preemptions);
    builder.max_branches = 100_000;
    let bound = builder.preemption_bound.map_or_else(|| "all".to_owned(), |most| format!("at most {most} preemptions"));
    let at = Location::caller();
    let runs = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    let counted = Arc::clone(&runs);
    builder.check(move || {
        counted.fetch_add(1, Relaxed);
        model();
    });
    let (runs, took) = (runs.load(Relaxed), started.elapsed());
    println!("loom: {}:{}: {runs} interleavings ({bound}), {:.1} s", at.file(), at.line(), took.as_secs_f32());
}
