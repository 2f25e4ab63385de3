//! `cargo xtask qemu-test`: tests that need another machine, in one that QEMU makes.
//!
//! | file | what |
//! | --- | --- |
//! | [`vfio`] | coiommu-vfio on the kernel's VFIO |
//! | [`guest`] | the guest's driver, and `coiommu serve` for a stock QEMU |
//! | [`nested`] | devices passed through to guests of a stock QEMU, in a machine with an IOMMU |
//! | [`driver`] | the guest's driver, built for kernels; and those kernels |
//! | [`counters`] | the counters of both sides |
//! | [`data`] | random bytes that guests copy |
//! | `lib.sh` | what the jobs of guests have in common |

use std::process::ExitCode;

use crate::vm::{Answer, Ended, FOLDER, console};

mod counters;
mod data;
mod driver;
mod guest;
mod nested;
mod vfio;

/// What the jobs of guests have in common; each of them comes after this.
const LIB: &str = include_str!("lib.sh");

/// Run tests that need another machine, in one that QEMU makes
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(clap::Subcommand)]
enum Suite {
    Vfio(vfio::Args),
    Guest(guest::Args),
    Nested(nested::Args),
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    match &args.suite {
        Suite::Vfio(args) => vfio::run(args),
        Suite::Guest(args) => guest::run(args),
        Suite::Nested(args) => nested::run(args),
    }
}

/// Nothing is answered.
fn nothing(_: &str, _: u32) -> anyhow::Result<Answer> {
    Ok(Answer::Nothing)
}

/// Says what was wrong with a machine, or with what it was for; or if nothing was, what was good.
fn judge(ended: &Ended, others: &[String], good: &str) -> ExitCode {
    let complaints = [complaints(ended), others.to_vec()].concat();
    if complaints.is_empty() {
        eprintln!("qemu-test: {good}");
        return ExitCode::SUCCESS;
    }
    if ended.exit.is_none() {
        let lines: Vec<_> = ended.console.lines().collect();
        eprintln!("the end of the machine's console:");
        lines[lines.len().saturating_sub(40)..].iter().for_each(|line| eprintln!("    {line}"));
    }
    complaints.iter().for_each(|complaint| eprintln!("qemu-test: {complaint}"));
    eprintln!("qemu-test: all of the machine's console is in {FOLDER}/console.log");
    ExitCode::FAILURE
}

fn complaints(ended: &Ended) -> Vec<String> {
    let mut complaints = Vec::new();
    if ended.was_stopped {
        complaints.push("it took longer than --time-limit".to_owned());
    }
    match ended.exit {
        Some(0) => {}
        Some(code) => complaints.push(format!("the job exited with {code}")),
        None => complaints.push("the job did not end".to_owned()),
    }
    complaints.extend(console::complaints(&ended.console).into_iter().map(|line| format!("the kernel says: {line}")));
    complaints
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(exit: Option<i32>, console: &str) -> Ended {
        Ended {
            lines: Vec::new(),
            exit,
            console: console.to_owned(),
            was_stopped: false,
            signal: None,
            has_begun: true,
        }
    }

    #[test]
    fn only_a_job_that_ended_well_is_good() {
        assert_eq!(complaints(&ended(Some(0), "")), [""; 0]);
        assert_eq!(complaints(&ended(Some(101), "")), ["the job exited with 101"]);
        assert_eq!(complaints(&ended(None, "")), ["the job did not end"]);
        let stopped = Ended { was_stopped: true, ..ended(Some(0), "") };
        assert_eq!(complaints(&stopped), ["it took longer than --time-limit"]);
        assert_eq!(complaints(&ended(Some(0), "BUG: no")), ["the kernel says: BUG: no"]);
    }
}
