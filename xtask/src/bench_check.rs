//! `cargo xtask bench-check`: whether the pinner is as fast, beside others, as it should be.

use std::process::{ExitCode, Stdio};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use self::Bound::{AtLeast, AtMost};
use crate::step;

/// Time the pinner beside a plain one and bare loops, and judge the ratios
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print the ratios as JSON
    #[arg(long)]
    json: bool,
}

/// What is timed; it prints medians that were taken in turns in one process, so that ratios of them mean something.
const RATIOS: &str = "cargo bench -p coiommu-pin --bench ratios --locked -- --json";

/// A ratio of two medians of a scene, and what it should be.
#[derive(Debug)]
struct Goal {
    scene: &'static str,
    /// Whose time is divided by whose.
    ratio: (&'static str, &'static str),
    wanted: Bound,
    /// The same with a margin that a busy machine does not cross: beyond it, the check fails.
    allowed: Bound,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

const GOALS: [Goal; 10] = [
    Goal { scene: "pin-consecutive", ratio: ("ours", "floor"), wanted: AtMost(2.0), allowed: AtMost(3.0) },
    Goal { scene: "pin-scattered", ratio: ("ours", "rival"), wanted: AtMost(0.6), allowed: AtMost(0.85) },
    Goal { scene: "scan-busy", ratio: ("rival", "ours"), wanted: AtLeast(20.0), allowed: AtLeast(10.0) },
    Goal { scene: "unpin-idle", ratio: ("ours", "rival"), wanted: AtMost(0.5), allowed: AtMost(0.75) },
    Goal { scene: "uring-pin", ratio: ("rival", "ours"), wanted: AtLeast(8.0), allowed: AtLeast(4.0) },
    Goal { scene: "uring-unpin", ratio: ("rival", "ours"), wanted: AtLeast(8.0), allowed: AtLeast(4.0) },
    // Two threads need two CPUs to themselves: where others work too, all that can be asked is that they do not get in
    // each other's way.
    threads("threads-pin-consecutive"),
    threads("threads-pin-scattered"),
    threads("threads-unpin-consecutive"),
    threads("threads-unpin-scattered"),
];

const fn threads(scene: &'static str) -> Goal {
    Goal { scene, ratio: ("one thread", "two threads"), wanted: AtLeast(1.0), allowed: AtLeast(0.4) }
}

impl Bound {
    fn holds(self, ratio: f64) -> bool {
        match self {
            AtMost(most) => ratio <= most,
            AtLeast(least) => ratio >= least,
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            AtMost(most) => write!(f, "<= {most}"),
            AtLeast(least) => write!(f, ">= {least}"),
        }
    }
}

/// How a goal was met. No ratio: its scene was not timed.
#[derive(Debug)]
struct Verdict<'a> {
    goal: &'a Goal,
    ratio: Option<f64>,
}

impl Verdict<'_> {
    fn is_allowed(&self) -> bool {
        self.ratio.is_some_and(|ratio| self.goal.allowed.holds(ratio))
    }

    fn word(&self) -> &'static str {
        match self.ratio {
            None => "NOT TIMED",
            Some(ratio) if self.goal.wanted.holds(ratio) => "ok",
            Some(ratio) if self.goal.allowed.holds(ratio) => "within the margin",
            Some(_) => "FAILED",
        }
    }
}

/// Times, prints and judges. The exit code is 1 if a ratio is beyond its margin, or missing.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let results = time()?;
    let verdicts: Vec<_> = GOALS.iter().map(|goal| judge(goal, &results)).collect();
    if args.json {
        let verdicts: Vec<_> = verdicts.iter().map(as_json).collect();
        println!("{}", serde_json::to_string_pretty(&json!({ "results": results, "ratios": verdicts }))?);
    } else {
        print!("{}\n{}", times_table(&results), verdicts_table(&verdicts));
    }
    Ok(if verdicts.iter().all(Verdict::is_allowed) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Builds and runs the scenes.
fn time() -> anyhow::Result<Vec<Value>> {
    eprintln!("$ {RATIOS}");
    let output = step::command(RATIOS).stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "`{RATIOS}`: {}", output.status);
    serde_json::from_slice(&output.stdout).with_context(|| format!("cannot read what `{RATIOS}` prints"))
}

fn judge<'a>(goal: &'a Goal, results: &[Value]) -> Verdict<'a> {
    let of = |who| nanos(results.iter().find(|result| result["scene"] == goal.scene)?, who);
    let ratio = of(goal.ratio.0).zip(of(goal.ratio.1)).map(|(time, by)| time / by);
    Verdict { goal, ratio }
}

/// What a contender of a scene took.
fn nanos(result: &Value, who: &str) -> Option<f64> {
    result["figures"].as_array()?.iter().find(|figure| figure["who"] == who)?["nanos"].as_f64()
}

fn as_json(verdict: &Verdict<'_>) -> Value {
    let Goal { scene, ratio: (time, by), wanted, allowed } = verdict.goal;
    json!({
        "scene": scene, "ratio of": time, "to": by, "ratio": verdict.ratio,
        "wanted": wanted.to_string(), "allowed": allowed.to_string(), "verdict": verdict.word(),
    })
}

/// Everybody's time, scene by scene.
fn times_table(results: &[Value]) -> String {
    let mut text = String::new();
    for result in results {
        let [what, unit] = ["what", "unit"].map(|key| result[key].as_str().unwrap_or_default());
        text += &format!("{what}\n");
        for figure in result["figures"].as_array().into_iter().flatten() {
            let who = figure["who"].as_str().unwrap_or_default();
            text += &format!("  {who:20}{:10.2} ns a {unit}", figure["nanos"].as_f64().unwrap_or(f64::NAN));
            if let [map, unmap] = figure["calls"].as_array().map_or(&[][..], Vec::as_slice) {
                text += &format!(", {map} map calls, {unmap} unmap calls");
            }
            text += "\n";
        }
    }
    text
}

/// The ratios and what they should be.
fn verdicts_table(verdicts: &[Verdict<'_>]) -> String {
    let row = |what: &str, ratio: &str, wanted: &str, allowed: &str, word: &str| {
        format!("{what:52}{ratio:>8}  {wanted:>7}  {allowed:>7}  {word}\n")
    };
    let mut text = row("ratio", "measured", "wanted", "allowed", "");
    for verdict in verdicts {
        let Goal { scene, ratio: (time, by), wanted, allowed } = verdict.goal;
        let ratio = verdict.ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let what = format!("{scene}: {time} / {by}");
        text += &row(&what, &ratio, &wanted.to_string(), &allowed.to_string(), verdict.word());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const FASTER: Goal = Goal { scene: "a", ratio: ("rival", "ours"), wanted: AtLeast(8.0), allowed: AtLeast(4.0) };
    const CHEAP: Goal = Goal { scene: "a", ratio: ("ours", "rival"), wanted: AtMost(0.2), allowed: AtMost(0.5) };

    fn timed(ours: f64, rival: f64) -> Vec<Value> {
        vec![
            json!({ "scene": "b", "figures": [{ "who": "ours", "nanos": 1.0 }, { "who": "rival", "nanos": 1.0 }] }),
            json!({ "scene": "a", "figures": [{ "who": "ours", "nanos": ours }, { "who": "rival", "nanos": rival }] }),
        ]
    }

    fn words(ours: f64, rival: f64) -> [&'static str; 2] {
        [&FASTER, &CHEAP].map(|goal| judge(goal, &timed(ours, rival)).word())
    }

    #[test]
    fn ratios_are_judged_on_the_right_side() {
        assert_eq!(words(1.0, 8.0), ["ok", "ok"]);
        assert_eq!(words(1.0, 4.5), ["within the margin", "within the margin"]);
        assert_eq!(words(1.0, 3.9), ["FAILED", "within the margin"]);
        assert_eq!(words(1.0, 1.9), ["FAILED", "FAILED"]);
    }

    #[test]
    fn what_was_not_timed_is_not_allowed() {
        let elsewhere = &timed(1.0, 9.0)[..1];
        let verdict = judge(&FASTER, elsewhere);
        assert_eq!((verdict.word(), verdict.is_allowed()), ("NOT TIMED", false));
        assert!(judge(&FASTER, &timed(1.0, 9.0)).is_allowed());
        let nobody = Goal { ratio: ("floor", "ours"), ..CHEAP };
        assert!(!judge(&nobody, &timed(1.0, 9.0)).is_allowed());
    }

    #[test]
    fn margins_are_wider_than_goals() {
        for Goal { scene, wanted, allowed, .. } in &GOALS {
            match (*wanted, *allowed) {
                (AtMost(wanted), AtMost(allowed)) => assert!(allowed > wanted, "{scene}"),
                (AtLeast(wanted), AtLeast(allowed)) => assert!(allowed < wanted, "{scene}"),
                _ => panic!("{scene}: bounds of two sides"),
            }
        }
    }

    #[test]
    fn tables_name_scenes_times_and_verdicts() {
        let results = [json!({
            "scene": "a", "what": "drain", "unit": "block",
            "figures": [{ "who": "ours", "nanos": 12.345, "calls": [3, 2] }],
        })];
        assert_eq!(
            times_table(&results),
            "drain\n  ours                     12.35 ns a block, 3 map calls, 2 unmap calls\n"
        );
        let table = verdicts_table(&[judge(&CHEAP, &timed(3.0, 4.0))]);
        let row: Vec<_> = table.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row.join(" "), "a: ours / rival 0.75 <= 0.2 <= 0.5 FAILED");
    }
}
