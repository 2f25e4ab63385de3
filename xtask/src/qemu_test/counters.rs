//! The counters of both sides: of the guest's driver, and of the server.

use std::collections::BTreeMap;

use anyhow::Context as _;
use serde_json::Value;

/// The guest's counters, of the lines that its job wrote.
pub(super) struct Counters(BTreeMap<String, u64>);

impl Counters {
    pub(super) fn of(lines: &[String]) -> Self {
        let counter = |line: &String| {
            let (name, value) = line.strip_prefix("stat ")?.split_once(' ')?;
            let value = value.strip_prefix("0x").map_or_else(|| value.parse(), |hex| u64::from_str_radix(hex, 16));
            Some((name.to_owned(), value.ok()?))
        };
        Self(lines.iter().filter_map(counter).collect())
    }

    pub(super) fn get(&self, name: &str) -> anyhow::Result<u64> {
        self.0.get(name).copied().with_context(|| format!("the guest has no counter {name}"))
    }
}

/// What is wrong with the counters of a guest that has all it asked for, and with those of its server.
pub(super) fn compare(guest: &Counters, server: &Value) -> anyhow::Result<Vec<String>> {
    let of_server = |name: &str| of_server(server, name);
    let mut complaints = Vec::new();
    let mut expect = |what: &str, is: u64, wanted: u64| {
        if is != wanted {
            complaints.push(format!("{what}: {is}, not {wanted}"));
        }
    };
    expect("requests that the server pinned", of_server("requests_pinned")?, guest.get("requests")?);
    expect("pages that it was asked for", of_server("pages_asked")?, guest.get("requested_pages")?);
    for name in ["failures", "timeouts", "underflows"] {
        expect(&format!("the guest's {name}"), guest.get(name)?, 0);
    }
    for name in ["requests_failed", "requests_refused", "requests_timed_out", "anomalies"] {
        expect(&format!("the server's {name}"), of_server(name)?, 0);
    }
    Ok(complaints)
}

pub(super) fn of_server(server: &Value, name: &str) -> anyhow::Result<u64> {
    server[name].as_u64().with_context(|| format!("the server has no counter {name}"))
}
