//! Running the steps of a task, timing them, and saying which ones failed.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// How a step ended.
pub(crate) struct Outcome {
    name: String,
    took: Duration,
    ok: bool,
}

/// Runs every step, whatever became of those before it, and prints what they took. True if all passed.
pub(crate) fn run_all<S: Copy>(
    steps: &[S],
    name: impl Fn(S) -> String,
    mut run: impl FnMut(S) -> anyhow::Result<()>,
) -> bool {
    let mut outcomes = Vec::new();
    for &step in steps {
        let name = name(step);
        eprintln!("\n== {name}");
        let start = Instant::now();
        let result = run(step);
        let took = start.elapsed();
        if let Err(error) = &result {
            eprintln!("{name}: {error:#}");
        }
        outcomes.push(Outcome { name, took, ok: result.is_ok() });
    }
    eprint!("\n{}", table(&outcomes));
    outcomes.iter().all(|outcome| outcome.ok)
}

/// The outcomes as lines of text, those that failed named again at the end.
fn table(outcomes: &[Outcome]) -> String {
    let width = outcomes.iter().map(|outcome| outcome.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for Outcome { name, took, ok } in outcomes {
        let (minutes, seconds) = (took.as_secs() / 60, took.as_secs() % 60);
        let tenths = took.subsec_millis() / 100;
        let result = if *ok { "ok" } else { "FAILED" };
        text += &format!("{name:width$}  {minutes:3} min {seconds:2}.{tenths} s  {result}\n");
    }
    let failed: Vec<_> = outcomes.iter().filter(|outcome| !outcome.ok).map(|outcome| outcome.name.as_str()).collect();
    if !failed.is_empty() {
        text += &format!("failed: {}\n", failed.join(", "));
    }
    text
}

/// Runs a command, written as one would type it; words are cut at spaces, there is no quoting.
pub(crate) fn run(line: &str) -> anyhow::Result<()> {
    finish(&mut command(line), line)
}

/// Runs a prepared command, shown as `line`. An error unless it exits with 0.
pub(crate) fn finish(command: &mut Command, line: &str) -> anyhow::Result<()> {
    eprintln!("$ {line}");
    let status = command.status().with_context(|| format!("cannot run `{line}`"))?;
    if !status.success() {
        bail!("`{line}`: {status}");
    }
    Ok(())
}

/// What a command writes to its standard output. An error unless it exits with 0.
pub(crate) fn output(line: &str) -> anyhow::Result<String> {
    output_of(&mut command(line), line)
}

/// What a prepared command, shown as `line`, writes to its standard output. An error unless it exits with 0.
pub(crate) fn output_of(command: &mut Command, line: &str) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("cannot run `{line}`"))?;
    if !output.status.success() {
        bail!("`{line}`: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{line}` wrote something that is not UTF-8"))
}

/// A command from a line cut at spaces.
pub(crate) fn command(line: &str) -> Command {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_names_what_failed() {
        let outcome = |name: &str, millis, ok| Outcome { name: name.into(), took: Duration::from_millis(millis), ok };
        let outcomes = [outcome("fmt", 40, true), outcome("clippy", 83_950, false), outcome("doc", 7_200_000, false)];
        assert_eq!(
            table(&outcomes),
            "fmt       0 min  0.0 s  ok\n\
             clippy    1 min 23.9 s  FAILED\n\
             doc     120 min  0.0 s  FAILED\n\
             failed: clippy, doc\n"
        );
    }

    #[test]
    fn a_failure_stops_nothing() {
        let mut ran = Vec::new();
        let all_ok = run_all(
            &[1, 2, 3],
            |step| step.to_string(),
            |step| {
                ran.push(step);
                if step == 2 { bail!("no") } else { Ok(()) }
            },
        );
        assert!(!all_ok);
        assert_eq!(ran, [1, 2, 3]);
        assert!(run_all(&[1], |step| step.to_string(), |_| Ok(())));
    }

    #[test]
    fn exit_status_is_the_result() {
        assert!(run("true").is_ok());
        assert!(run("false").unwrap_err().to_string().starts_with("`false`: exit status: 1"));
        assert!(run("no-such-program --at all").is_err());
        assert_eq!(output("echo a  b").unwrap(), "a b\n");
        assert!(output("false").is_err());
    }
}
