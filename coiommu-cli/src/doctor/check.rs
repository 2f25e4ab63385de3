//! A check: what was looked at, what came of it, and what to do.

use std::error::Error as _;

use coiommu_vfio::type1::OpenError;
use serde::Serialize;

/// What came of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    /// It is as it has to be.
    Ok,
    /// It will do, and less than it could.
    Warning,
    /// It has to be changed.
    Failed,
    /// It could not be looked at.
    Unknown,
}

impl Verdict {
    /// The same word as in JSON.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }
}

/// One thing that was looked at; its JSON is documented in the README.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    #[serde(rename = "check")]
    pub(super) name: &'static str,
    /// The device that it is about, if it is about one.
    pub(super) device: Option<String>,
    #[serde(rename = "result")]
    pub(super) verdict: Verdict,
    pub(super) seen: String,
    pub(super) remedy: Option<String>,
    /// The remedy, or the part of it that a shell can do, as root.
    pub(super) commands: Vec<String>,
}

impl Check {
    fn new(name: &'static str, verdict: Verdict, seen: impl Into<String>) -> Self {
        Self { name, device: None, verdict, seen: seen.into(), remedy: None, commands: Vec::new() }
    }

    pub(super) fn ok(name: &'static str, seen: impl Into<String>) -> Self {
        Self::new(name, Verdict::Ok, seen)
    }

    pub(super) fn warning(name: &'static str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(name, Verdict::Warning, seen) }
    }

    pub(super) fn failed(name: &'static str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(name, Verdict::Failed, seen) }
    }

    /// Why it could not be looked at.
    pub(super) fn unknown(name: &'static str, why: impl Into<String>) -> Self {
        Self::new(name, Verdict::Unknown, why)
    }

    /// What VFIO's room says is a failure, with the remedy that it knows.
    pub(super) fn refused(name: &'static str, error: &OpenError) -> Self {
        let cause = error.cause();
        let seen = error.source().map_or_else(|| cause.clone(), |source| format!("{cause}: {source}"));
        Self { remedy: error.remedy(), ..Self::new(name, Verdict::Failed, seen) }
    }

    pub(super) fn remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }

    pub(super) fn commands(self, commands: impl IntoIterator<Item = String>) -> Self {
        Self { commands: commands.into_iter().collect(), ..self }
    }
}
