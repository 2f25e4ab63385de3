//! How the pinner does beside a plain one and beside loops that do the least: medians, timed in turns in one process, so
//! that whatever else the machine does hits all alike.
//!
//! `cargo bench -p coiommu-pin --bench ratios -- [--json] [SCENE…]`; `cargo xtask bench-check` judges what it prints.

mod bed;

use std::process::ExitCode;

use bed::contest::{Contender, Scene};
use bed::scenes;

/// The median of one contender, for one unit of a scene.
#[derive(serde::Serialize)]
struct Figure {
    who: &'static str,
    nanos: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    calls: Option<(u64, u64)>,
}

/// What came of a scene.
#[derive(serde::Serialize)]
struct Result {
    scene: &'static str,
    what: &'static str,
    unit: &'static str,
    figures: Vec<Figure>,
}

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let words: Vec<_> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let (options, wanted): (Vec<&str>, Vec<&str>) = words.iter().map(String::as_str).partition(|w| w.starts_with('-'));
    let json = options == ["--json"];
    if !json && !options.is_empty() {
        eprintln!("options: --json; scenes: {}", scenes::ALL.map(|(name, _)| name).join(" "));
        return ExitCode::FAILURE;
    }
    let mut results = Vec::new();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|start| name.starts_with(start));
    for (name, make) in scenes::ALL.into_iter().filter(|(name, _)| is_wanted(name)) {
        match make() {
            Ok(mut scene) => results.push(time(name, &mut scene)),
            Err(error) => eprintln!("{name}: cannot be set up here: {error}"),
        }
        if let Some(result) = results.last().filter(|result| !json && result.scene == name) {
            print(result);
        }
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&results).expect("numbers and text"));
    }
    ExitCode::SUCCESS
}

/// The median time of each contender, taking turns.
fn time(name: &'static str, scene: &mut Scene) -> Result {
    let mut times = vec![Vec::with_capacity(scene.rounds); scene.contenders.len()];
    // A few rounds first, so that books exist and memory is touched.
    let warm_up = scene.rounds.div_ceil(10);
    for round in 0..warm_up + scene.rounds {
        // There and back, so that nobody always comes after the same one.
        let count = scene.contenders.len();
        for turn in 0..count {
            let at = if round % 2 == 0 { turn } else { count - 1 - turn };
            let ((_, contender), times) = (&mut scene.contenders[at], &mut times[at]);
            let took = contender.time();
            if round >= warm_up {
                times.push(took.as_secs_f64() * 1e9);
            }
        }
    }
    #[allow(clippy::cast_precision_loss, reason = "units are few")]
    let figure = |((who, contender), times): (&(&'static str, Box<dyn Contender>), Vec<f64>)| Figure {
        who,
        nanos: median(times) / scene.units as f64,
        calls: contender.calls(),
    };
    let figures = scene.contenders.iter().zip(times).map(figure).collect();
    Result { scene: name, what: scene.what, unit: scene.unit, figures }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn print(result: &Result) {
    println!("{} ({})", result.what, result.scene);
    let first = result.figures.first().map_or(0.0, |figure| figure.nanos);
    for Figure { who, nanos, calls } in &result.figures {
        print!("  {who:18} {nanos:10.2} ns a {}; the first takes {:6.2} of it", result.unit, first / nanos);
        println!("{}", calls.map_or(String::new(), |(map, unmap)| format!("; {map} map and {unmap} unmap calls")));
    }
}
