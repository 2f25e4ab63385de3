//! How the pinner does beside a plain one and beside loops that do the least: medians, timed in turns in one process, so
//! that whatever else the machine does hits all alike.
//!
//! `cargo bench -p coiommu-pin --bench ratios -- [--json] [SCENE…]`; `cargo xtask bench-check` judges what it prints.

mod bed;

use bed::scenes::{self, Scene};
use bed::stopwatch;

#[derive(serde::Serialize)]
struct Figure {
    scene: &'static str,
    what: &'static str,
    unit: &'static str,
    who: &'static str,
    nanos: f64,
}

fn main() {
    let words: Vec<_> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let (options, wanted): (Vec<_>, Vec<_>) = words.iter().partition(|word| word.starts_with("--"));
    let json = options.iter().any(|option| *option == "--json");
    let mut figures = Vec::new();
    for make in scenes::ALL {
        let mut scene = make();
        if !wanted.is_empty() && !wanted.iter().any(|wanted| scene.id.contains(wanted.as_str())) {
            continue;
        }
        let of_scene = time(&mut scene);
        if !json {
            print(&of_scene);
        }
        figures.extend(of_scene);
    }
    if json {
        println!("{}", serde_json::to_string_pretty(&figures).expect("numbers and text"));
    }
}

/// The median time of each contender, taking turns.
fn time(scene: &mut Scene) -> Vec<Figure> {
    let mut times = vec![Vec::with_capacity(scene.rounds); scene.contenders.len()];
    // A few rounds first, so that books exist and memory is touched.
    let warm_up = scene.rounds.div_ceil(10);
    for round in 0..warm_up + scene.rounds {
        for ((_, contender), times) in scene.contenders.iter_mut().zip(&mut times) {
            let took = stopwatch::time(&mut **contender);
            if round >= warm_up {
                times.push(took.as_secs_f64() * 1e9);
            }
        }
    }
    let figures = scene.contenders.iter().zip(times);
    figures.map(|((who, _), times)| figure(scene, who, median(times))).collect()
}

#[allow(clippy::cast_precision_loss, reason = "units are few")]
fn figure(scene: &Scene, who: &'static str, nanos: f64) -> Figure {
    Figure { scene: scene.id, what: scene.what, unit: scene.unit, who, nanos: nanos / scene.units as f64 }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn print(figures: &[Figure]) {
    let Some(ours) = figures.first() else { return };
    println!("{}", ours.what);
    for Figure { who, nanos, unit, .. } in figures {
        println!("  {who:20} {nanos:10.2} ns a {unit:6}  ours is {:6.2} of it", ours.nanos / nanos);
    }
}
