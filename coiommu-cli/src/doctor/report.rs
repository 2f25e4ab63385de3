//! What is printed: for people, or as JSON.

use std::fmt::Write as _;

use ratatui::crossterm::style::Stylize as _;
use serde::Serialize;

use super::check::{Check, Verdict};

/// All that was looked at, and the worst that was found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    result: Verdict,
    checks: Vec<Check>,
}

impl Report {
    pub(super) fn new(checks: Vec<Check>) -> Self {
        let has = |verdict| checks.iter().any(|check| check.verdict == verdict);
        let result = match () {
            () if has(Verdict::Failed) => Verdict::Failed,
            () if has(Verdict::Warning) || has(Verdict::Unknown) => Verdict::Warning,
            () => Verdict::Ok,
        };
        Self { result, checks }
    }

    pub(super) fn has_failed(&self) -> bool {
        self.result == Verdict::Failed
    }

    pub(super) fn json(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// A line a check, and below it what to do.
    pub(super) fn text(&self, in_colour: bool) -> String {
        let subject = |check: &Check| match &check.device {
            Some(device) => format!("{device} {}", check.name),
            None => check.name.to_owned(),
        };
        let width = self.checks.iter().map(|check| subject(check).len()).max().unwrap_or(0);
        let mut text = String::new();
        for check in &self.checks {
            let word = format!("{:<7}", check.verdict.word());
            let word = if in_colour { coloured(&word, check.verdict) } else { word };
            let _ = writeln!(text, "{word}  {:<width$}  {}", subject(check), check.seen);
            if let Some(remedy) = &check.remedy {
                let end = if check.commands.is_empty() { "" } else { ":" };
                let _ = writeln!(text, "    {remedy}{end}");
            }
            for command in &check.commands {
                let _ = writeln!(text, "        {command}");
            }
        }
        text + &self.sum() + "\n"
    }

    fn sum(&self) -> String {
        let count = |verdict| self.checks.iter().filter(|check| check.verdict == verdict).count();
        let verdicts = [Verdict::Ok, Verdict::Warning, Verdict::Failed, Verdict::Unknown];
        let counts =
            verdicts.map(|verdict| (count(verdict), verdict.word())).into_iter().filter(|(count, _)| *count > 0);
        let counts: Vec<_> = counts.map(|(count, word)| format!("{count} {word}")).collect();
        let verdict = if self.has_failed() { "this host cannot do it yet" } else { "this host can do it" };
        format!("{}: {verdict}", counts.join(", "))
    }
}

fn coloured(word: &str, verdict: Verdict) -> String {
    match verdict {
        Verdict::Ok => word.dark_green(),
        Verdict::Warning | Verdict::Unknown => word.dark_yellow(),
        Verdict::Failed => word.dark_red(),
    }
    .to_string()
}
