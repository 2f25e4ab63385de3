//! What is said on a control socket: by `coiommu serve` at one end, by `coiommu ctl` and `coiommu top` at the other.
//!
//! `docs/control.md` is the contract; here is the same in types.

use coiommu_dtt::PAGE_SIZE;
use coiommu_pin::pinner::UnpinReport;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What is asked.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Line {
    /// By which the reply is known.
    pub(crate) id: u64,
    #[serde(flatten)]
    pub(crate) command: Command,
}

/// A command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "lowercase")]
pub(crate) enum Command {
    /// Figures of the guest that is served.
    Stats,
    /// What is pinned.
    Pins,
    /// Unpin ranges, as their memory is about to be taken.
    Unpin {
        /// Which.
        ranges: Vec<Pin>,
    },
    /// The memory of a hold was taken, or is not wanted: pages there may be pinned again.
    Resume {
        /// The hold.
        hold: u64,
    },
    /// Unmap ranges behind the pinner's back, so that devices fault there.
    #[cfg(feature = "test-hooks")]
    Yank {
        /// Which: each a whole number of mappings.
        ranges: Vec<Pin>,
    },
}

/// A range of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pin {
    /// Where it begins; as text, in hexadecimal.
    #[serde(with = "hex")]
    pub(crate) gpa: u64,
    pub(crate) bytes: u64,
}

impl Pin {
    /// Whether it is made of whole pages, one at least, and ends where there still are addresses.
    pub(crate) fn is_pages(&self) -> bool {
        let is_whole = self.gpa.is_multiple_of(PAGE_SIZE) && self.bytes.is_multiple_of(PAGE_SIZE);
        is_whole && self.bytes > 0 && self.gpa.checked_add(self.bytes).is_some()
    }
}

/// A reply: what came of a command.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Reply {
    pub(crate) id: u64,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Ok(Value),
    Error(Failure),
}

impl Reply {
    pub(crate) fn new(id: u64, outcome: Result<Value, Failure>) -> Self {
        Self { id, outcome: outcome.map_or_else(Outcome::Error, Outcome::Ok) }
    }

    /// Whether it is an error that answers no command: there are too many connections.
    pub(crate) fn is_of_none(&self) -> bool {
        self.id == 0 && matches!(self.outcome, Outcome::Error(_))
    }

    pub(crate) fn outcome(self) -> Result<Value, Failure> {
        match self.outcome {
            Outcome::Ok(value) => Ok(value),
            Outcome::Error(failure) => Err(failure),
        }
    }
}

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    /// For programs.
    pub(crate) code: Code,
    /// For people.
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Kinds of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Code {
    /// The line is no command.
    BadRequest,
    /// No VMM is connected.
    NoGuest,
    /// This connection has no such hold, or its guest has gone.
    UnknownHold,
    /// More than can be kept.
    TooMany,
    /// It could not be done.
    Failed,
}

/// Figures of a guest; counters are those since its VMM connected.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Stats {
    /// Whether its driver is active.
    pub(crate) active: bool,
    /// What has ended the workers, if something has.
    pub(crate) failure: Option<String>,
    /// How it is pinned and unpinned.
    pub(crate) policy: String,
    /// Of RAM that may be pinned.
    pub(crate) guest_memory_bytes: u64,
    pub(crate) pinned_bytes: u64,
    pub(crate) mappings: u64,
    pub(crate) requests_pinned: u64,
    pub(crate) requests_failed: u64,
    pub(crate) requests_refused: u64,
    pub(crate) requests_timed_out: u64,
    pub(crate) pages_asked: u64,
    pub(crate) pages_pinned: u64,
    pub(crate) pages_unpinned_idle: u64,
    pub(crate) pages_unpinned_for_room: u64,
    pub(crate) pages_unpinned_forced: u64,
    pub(crate) anomalies: u64,
    pub(crate) parked_seconds: f64,
    /// Of requests, from a doorbell to its answer.
    pub(crate) answer_p50_us: u64,
    pub(crate) answer_p99_us: u64,
    /// How far all memory is pinned, for devices that are started without the guest's driver.
    pub(crate) pin_all: All,
    /// The devices that are passed through.
    pub(crate) passed: Vec<Passed>,
}

/// How far all RAM is pinned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum All {
    /// It is not to be.
    #[default]
    No,
    /// It is to be, and is not yet.
    Pinning,
    /// It is.
    Pinned,
    /// It cannot be.
    Failed,
    /// It does not have to be any more: what is idle goes.
    Leaving,
}

/// A device as others see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Passed {
    /// Where the host has it.
    pub(crate) host: String,
    /// Where the guest has it.
    pub(crate) guest: String,
    /// Whether the guest has its bus mastering on.
    pub(crate) bus_master_wished: bool,
    /// Whether the device has.
    pub(crate) bus_master: bool,
}

impl Passed {
    /// Whether it may do DMA, in a word; `held`: the guest believes so.
    pub(crate) fn bus_mastering(&self) -> &'static str {
        match (self.bus_master_wished, self.bus_master) {
            (_, true) => "on",
            (true, false) => "held",
            (false, false) => "off",
        }
    }
}

/// What came of an unpin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unpinned {
    /// Ends with RESUME, with the connection or with the VMM's; until then nothing is pinned in the ranges that may be
    /// taken. None if none may.
    pub(crate) hold: Option<u64>,
    pub(crate) ranges: Vec<UnpinnedRange>,
}

/// What came of unpinning a range, in pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UnpinnedRange {
    #[serde(flatten)]
    pub(crate) range: Pin,
    /// Whether its memory may be taken.
    pub(crate) may_be_taken: bool,
    pub(crate) released: u64,
    pub(crate) not_pinned: u64,
    pub(crate) busy: u64,
    pub(crate) parked: u64,
}

impl UnpinnedRange {
    /// One that was not tried, as the guest has unpinning parked.
    pub(crate) fn parked(range: Pin) -> Self {
        let parked = range.bytes / PAGE_SIZE;
        Self { range, may_be_taken: false, released: 0, not_pinned: 0, busy: 0, parked }
    }

    pub(crate) fn new(range: Pin, report: &UnpinReport) -> Self {
        let UnpinReport { released, not_pinned, busy, parked, .. } = *report;
        Self { range, may_be_taken: report.may_be_taken(), released, not_pinned, busy, parked }
    }
}

/// Addresses as text, as `0x1000`.
mod hex {
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(value: &u64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{value:#x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
        let text = String::deserialize(from)?;
        let digits = text.strip_prefix("0x").filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let value = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        value.ok_or_else(|| de::Error::custom(format!("{text:?} is no address, as \"0x1000\" is")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lines_are_as_documented() {
        let line = |text: &str| serde_json::from_str::<Line>(text).map(|line| (line.id, line.command));
        assert_eq!(line(r#"{"id":1,"cmd":"stats"}"#).unwrap(), (1, Command::Stats));
        let ranges = vec![Pin { gpa: 0x10_0000, bytes: 4096 }];
        let unpin = r#"{"id":2,"cmd":"unpin","ranges":[{"gpa":"0x100000","bytes":4096}]}"#;
        assert_eq!(line(unpin).unwrap(), (2, Command::Unpin { ranges: ranges.clone() }));
        assert_eq!(serde_json::to_string(&Line { id: 2, command: Command::Unpin { ranges } }).unwrap(), unpin);
        assert_eq!(line(r#"{"id":3,"cmd":"resume","hold":7}"#).unwrap(), (3, Command::Resume { hold: 7 }));
        for bad in [
            "",
            "1",
            r#"{"id":1}"#,
            r#"{"cmd":"stats"}"#,
            r#"{"id":1,"cmd":"explode"}"#,
            r#"{"id":1,"cmd":"unpin","ranges":[{"gpa":4096,"bytes":4096}]}"#,
            r#"{"id":1,"cmd":"unpin","ranges":[{"gpa":"0x+1","bytes":4096}]}"#,
        ] {
            assert!(line(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn replies_are_as_documented() {
        let text = |outcome| serde_json::to_value(Reply::new(1, outcome)).unwrap();
        assert_eq!(text(Ok(json!({"hold": 1}))), json!({"id": 1, "ok": {"hold": 1}}));
        let failure = Failure::new(Code::NoGuest, "nobody");
        assert_eq!(text(Err(failure.clone())), json!({"id": 1, "error": {"code": "no_guest", "message": "nobody"}}));
        let back: Reply = serde_json::from_value(text(Err(failure.clone()))).unwrap();
        assert_eq!((back.id, back.outcome().unwrap_err()), (1, failure));
    }

    #[test]
    fn ranges_are_pages() {
        let is_pages = |gpa, bytes| Pin { gpa, bytes }.is_pages();
        assert!(is_pages(0, 4096) && is_pages(u64::MAX - 8191, 4096));
        assert!(!is_pages(1, 4096) && !is_pages(0, 0) && !is_pages(0, 4095) && !is_pages(u64::MAX - 4095, 4096));
    }
}
