//! `coiommu ctl`: ask a server what it has pinned, and have memory unpinned.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::{self, ExitStatus};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use signal_hook::consts::{SIGINT, SIGTERM};

pub(crate) mod client;

use crate::control::{Command, Pin, Stats, Unpinned};
use client::Client;

/// Ask a `coiommu serve` what it has pinned, and have memory unpinned
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  coiommu ctl --control /run/vm1.ctl stats
  coiommu ctl --control /run/vm1.ctl pins --json
  coiommu ctl --control /run/vm1.ctl unpin 0x40000000 2097152 -- ./take-memory

Signals: while PROGRAM runs, SIGINT and SIGTERM do not end this, as memory is being taken
Exit codes: 0 done, 1 not done, 2 wrong arguments;
  of unpin: 3 if the memory may not be taken, else what the program exits with")]
pub struct Args {
    /// The server's control socket
    #[arg(long, value_name = "PATH")]
    control: PathBuf,

    /// Print JSON
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Ask,
}

#[derive(Debug, clap::Subcommand)]
enum Ask {
    /// Figures of the guest that is served
    Stats,
    /// What is pinned
    Pins,
    /// Unpin a range of the guest's memory, and run a program while nothing in it is pinned again
    Unpin {
        /// Where it begins, as a guest physical address: 0x40000000
        #[arg(value_parser = parse_number)]
        gpa: u64,
        /// How long it is
        #[arg(value_parser = parse_number)]
        bytes: u64,
        /// A program that takes the memory away; without one, the range is unpinned, and may be pinned again at once
        #[arg(last = true, value_name = "PROGRAM")]
        program: Vec<std::ffi::OsString>,
    },
    /// Unmap all that is pinned behind the server's back, so that devices fault; for tests
    #[cfg(feature = "test-hooks")]
    Yank,
}

fn parse_number(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    // What Rust takes for a number may have a sign.
    let number = number.filter(|_| !text.contains('+'));
    number.ok_or_else(|| "expected a number of bytes, as in 4096 or 0x1000".to_owned())
}

/// Asks.
///
/// # Errors
///
/// There is no server, or it does not do what it is asked to.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut client = Client::connect(&args.control)?;
    match &args.command {
        Ask::Stats => {
            let stats: Stats = client.ask(Command::Stats)?;
            if args.json { print_json(&stats) } else { print(&stats_table(&stats)?) }
        }
        Ask::Pins => {
            let pins: Vec<Pin> = client.ask(Command::Pins)?;
            if args.json { print_json(&pins) } else { print(&pins_table(&pins)) }
        }
        #[cfg(feature = "test-hooks")]
        Ask::Yank => {
            let ranges = client.ask(Command::Pins)?;
            let bytes: u64 = client.ask(Command::Yank { ranges })?;
            print(&format!("unmapped {bytes} bytes\n"))
        }
        Ask::Unpin { gpa, bytes, program } => unpin(&mut client, Pin { gpa: *gpa, bytes: *bytes }, program, args.json),
    }
}

fn unpin(client: &mut Client, range: Pin, program: &[std::ffi::OsString], json: bool) -> anyhow::Result<()> {
    let unpinned: Unpinned = client.ask(Command::Unpin { ranges: vec![range] })?;
    if json {
        print_json(&unpinned)?;
    } else {
        for range in &unpinned.ranges {
            let verdict = if range.may_be_taken { "may be taken" } else { "may not be taken" };
            let line = format!(
                "{:#x} with {} bytes {verdict}: pages released {}, not pinned {}, busy {}, parked {}\n",
                range.range.gpa, range.range.bytes, range.released, range.not_pinned, range.busy, range.parked
            );
            print(&line)?;
        }
    }
    let Some(hold) = unpinned.hold else { process::exit(3) };
    if let Some((program, arguments)) = program.split_first() {
        outlive_signals().context("cannot catch signals")?;
        let status = process::Command::new(program).args(arguments).status();
        let status = status.with_context(|| format!("cannot run {}", program.display()))?;
        client.ask::<serde_json::Value>(Command::Resume { hold })?;
        end_as(status)?;
    }
    Ok(())
}

/// A signal to end is the program's to obey, as a terminal's goes to both: the hold may not end before the program has.
fn outlive_signals() -> io::Result<()> {
    // With a handler, as a program inherits what is ignored.
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::default())?;
    }
    Ok(())
}

/// Exits with what a program exited with, unless that is success.
fn end_as(status: ExitStatus) -> anyhow::Result<()> {
    match status.code() {
        Some(0) => Ok(()),
        Some(code) => process::exit(code),
        None => bail!("the program was ended: {status}"),
    }
}

fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

fn print(text: &str) -> anyhow::Result<()> {
    io::stdout().write_all(text.as_bytes()).context("cannot write the output")
}

/// The figures by the names that JSON has for them.
fn stats_table(stats: &Stats) -> anyhow::Result<String> {
    let mut table = table();
    if let serde_json::Value::Object(figures) = serde_json::to_value(stats)? {
        // A list is no figure.
        for (name, value) in figures.into_iter().filter(|(_, value)| !value.is_array()) {
            let value = value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
            table.add_row([name.replace('_', " "), value]);
        }
    }
    for device in &stats.passed {
        let state = format!("{} in the guest, bus mastering {}", device.guest, device.bus_mastering());
        table.add_row([&device.host, &state]);
    }
    Ok(table.to_string() + "\n")
}

fn pins_table(pins: &[Pin]) -> String {
    let mut table = table();
    table.set_header(["from", "to", "bytes"]);
    for pin in pins {
        let end = pin.gpa.saturating_add(pin.bytes);
        table.add_row([format!("{:#x}", pin.gpa), format!("{end:#x}"), pin.bytes.to_string()]);
    }
    let sum = pins.iter().fold(0, |sum: u64, pin| sum.saturating_add(pin.bytes));
    format!("{table}\n{sum} bytes in {} ranges\n", pins.len())
}

fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Passed;

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(parse_number("4096"), Ok(4096));
        assert_eq!(parse_number("0x1000"), Ok(4096));
        assert!(parse_number("").is_err() && parse_number("-1").is_err() && parse_number("4k").is_err());
    }

    #[test]
    fn devices_are_told_of_in_words() {
        let device = |bus_master_wished, bus_master| Passed {
            host: "0000:03:00.0".into(),
            guest: "00:05.0".into(),
            bus_master_wished,
            bus_master,
        };
        let passed = vec![device(true, true), device(true, false), device(false, false)];
        let text = stats_table(&Stats { pinned_bytes: 4096, passed, ..Stats::default() }).unwrap();
        let line = |state: &str| format!("0000:03:00.0 00:05.0 in the guest, bus mastering {state}");
        let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(["on", "held", "off"].iter().all(|state| words.contains(&line(state))), "{text}");
        assert!(words.contains("pinned bytes 4096") && !words.contains("passed"), "{text}");
    }

    #[test]
    fn pins_are_summed_up() {
        let text = pins_table(&[Pin { gpa: 0x1000, bytes: 0x2000 }, Pin { gpa: 0x10_0000, bytes: 0x1000 }]);
        assert!(text.contains("0x1000") && text.contains("0x3000") && text.ends_with("12288 bytes in 2 ranges\n"));
    }
}
