//! `coiommu replay`: what would passing a device through really pin?
//!
//! A trace of what a real kernel's drivers mapped for DMA is played, event by event and in the trace's own time,
//! through the stack that would serve the guest: its side of the DTT, the pinner, and an IOMMU in software. One stack a
//! policy, all of them in one pass over the trace.
//!
//! | file | what it does |
//! | --- | --- |
//! | `mod.rs` | arguments, and the way from a trace to a report |
//! | `driver.rs` | which mappings are open, as the traced drivers see it; what cannot be played |
//! | `space.rs` | the guest's memory: grown on demand, never touched |
//! | `stack.rs` | one policy's guest, pinner and IOMMU, and its clock |
//! | `meter.rs` | a quantity over time: peak, mean, and a curve |
//! | `report.rs` | the figures, and their JSON |
//! | `table.rs`, `plot.rs`, `progress.rs` | for people |

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::CommandFactory;
use coiommu_pin::Policy;

use crate::cli::Cli;
use crate::trace::{Event, TraceReader};
use crate::units::parse_memory;

mod driver;
mod meter;
mod plot;
mod progress;
mod report;
mod space;
mod stack;
mod table;

use driver::{Drivers, Played};
use report::Report;
use stack::Stack;

/// Policies worth comparing: each extent, with pages that stay and with pages that go.
const DEFAULT_POLICIES: [&str; 6] = [
    "extent=page",
    "extent=run",
    "extent=aligned=2m",
    "extent=page,unpin_policy=lru,unpin_interval=1",
    "extent=run,unpin_policy=lru,unpin_interval=1",
    "extent=aligned=2m,unpin_policy=lru,unpin_interval=1",
];

/// Each policy has a guest table and a pin map of its own.
const MOST_POLICIES: usize = 64;

/// Tell from a DMA trace how much of a guest's memory a passed-through device would really pin
///
/// TRACE is the text of the kernel's dma events, as tracefs or `trace-cmd report` give it, of a machine that works as
/// the guest will: plain, gzip or zstd, or - for standard input. Each policy is played over it as the real thing would
/// go.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  coiommu replay guest.trace.gz
  coiommu replay guest.trace.gz --device 0000:03:00.0 --memory 8g --plot pinned.svg
  coiommu replay guest.trace.gz --policy extent=run,unpin_policy=lru,unpin_interval=1 --policy extent=aligned=2m
  trace-cmd report -i trace.dat | coiommu replay - --json

Policy keys (what is not named has its default):
  extent=page|run|aligned=SIZE   what one IOMMU mapping covers, SIZE 64k to 2m   [run]
  unpin_policy=off|lru           whether idle pages are taken back over time     [off]
  unpin_interval=SECONDS         from one look for idle pages to the next        [60]
  unpin_limit=PAGES|none         the most pages taken back by one look           [none]
  unpin_gen_threshold=ROUNDS     look less often where nothing changed so long   [10]
  quota=BYTES|none               the most memory pinned at once (k, m, g, t)     [none]

Record a trace (as root, best before the device's driver loads; Ctrl-C ends it):
  cd /sys/kernel/tracing && echo 16384 > buffer_size_kb && echo 1 > events/dma/enable && cat trace_pipe > /tmp/guest.trace

Exit codes: 0 done, 1 the trace cannot be played, 2 wrong arguments")]
pub struct Args {
    /// The trace, or - for standard input
    trace: PathBuf,

    /// A policy as key=value pairs with commas between; may be given many times [default: a set worth comparing]
    #[arg(long, value_name = "LIST")]
    policy: Vec<Policy>,

    /// Only what this device maps, named as in the trace (0000:03:00.0, or 03:00.0); may be given many times
    #[arg(long, value_name = "BDF", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    device: Vec<String>,

    /// The guest's RAM, that shares are computed of, as in 4g [default: the highest address, rounded up to 1 GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    memory: Option<u64>,

    /// Draw pinned memory over time
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,

    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Plays a trace and reports.
///
/// # Errors
///
/// The trace cannot be read or has nothing to play, or the output cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let started = Instant::now();
    // A place that cannot be written to is found out now, not after a long replay.
    let drawing = args.plot.as_deref().map(plot::Drawing::create).transpose()?;
    let mut report = replay(args)?;
    report.set_elapsed(started.elapsed());
    if let Some(drawing) = drawing {
        drawing.draw(&report)?;
    }
    let text = if args.json { report.json()? } else { table::render(&report) };
    io::stdout().lock().write_all(text.as_bytes()).context("cannot write the output")
}

fn policies(args: &Args) -> anyhow::Result<Vec<Policy>> {
    if args.policy.is_empty() {
        return DEFAULT_POLICIES.iter().map(|text| text.parse().context("a default policy")).collect();
    }
    Ok(args.policy.clone())
}

fn replay(args: &Args) -> anyhow::Result<Report> {
    let policies = policies(args)?;
    if policies.len() > MOST_POLICIES {
        usage_error(&format!("{} policies are too many: {MOST_POLICIES} can be compared at once", policies.len()));
    }
    let mut reader = TraceReader::open(&args.trace)?;
    let progress = progress::Bar::show(reader.progress());
    let mut drivers = Drivers::new(policies.len());
    let curves = args.plot.is_some();
    let mut stacks = policies
        .into_iter()
        .map(|policy| Stack::new(policy, drivers.space(), curves))
        .collect::<Result<Vec<_>, _>>()?;
    let mut other_devices = BTreeSet::new();
    while let Some(record) = reader.next()? {
        if !is_wanted(&args.device, record.device) {
            note_device(&mut other_devices, record.device);
            continue;
        }
        drivers.see(record.time);
        let now = drivers.now();
        for stack in &mut stacks {
            stack.advance(now);
        }
        match play(&mut drivers, &mut stacks, record.device, record.event)? {
            Played::Yes => {}
            Played::Skipped => drivers.count_skipped(),
        }
    }
    drop(progress);
    let read = reader.finish()?;
    ensure!(
        drivers.counts().events > 0,
        "no dma events of {} in {}; there are {}",
        args.device.join(" or "),
        args.trace.display(),
        name_devices(other_devices)
    );
    Ok(Report::new(args.memory, read, &drivers, stacks))
}

/// Plays one event on all stacks.
fn play(drivers: &mut Drivers, stacks: &mut [Stack], device: &str, event: Event<'_>) -> anyhow::Result<Played> {
    drivers.count(&event);
    match event {
        Event::Map { family, key, segments } => {
            let Some(bdf) = drivers.map(device, segments)? else {
                return Ok(Played::Skipped);
            };
            let mut failed = 0;
            for (index, stack) in stacks.iter_mut().enumerate() {
                let pinned = stack.map(bdf, drivers.runs(), drivers.space())?;
                failed |= u64::from(!pinned) << index;
            }
            drivers.opened(bdf, family, key, failed);
        }
        Event::Unmap { family, key, .. } => {
            let Some(closed) = drivers.unmap(device, family, key) else {
                return Ok(Played::Yes);
            };
            for (index, stack) in stacks.iter_mut().enumerate() {
                if closed.failed >> index & 1 == 0 {
                    stack.unmap(&closed.runs)?;
                }
            }
        }
        Event::MapResource | Event::UnmapResource | Event::Sync | Event::Failed => {}
    }
    Ok(Played::Yes)
}

fn is_wanted(devices: &[String], device: &str) -> bool {
    devices.is_empty() || devices.iter().any(|wanted| device == wanted || device.strip_prefix("0000:") == Some(wanted))
}

/// How many other devices are named when the one asked for is not in the trace.
const NAMED_DEVICES: usize = 8;

fn note_device(devices: &mut BTreeSet<String>, device: &str) {
    if !devices.contains(device) {
        devices.insert(device.to_owned());
        // The first in order are kept, and one more to tell that there are more.
        if devices.len() > NAMED_DEVICES + 1 {
            devices.pop_last();
        }
    }
}

fn name_devices(devices: BTreeSet<String>) -> String {
    let more = devices.len() > NAMED_DEVICES;
    let names: Vec<_> = devices.into_iter().take(NAMED_DEVICES).collect();
    names.join(", ") + if more { " and more" } else { "" }
}

/// Says what is wrong with the arguments, as clap does.
fn usage_error(message: &str) -> ! {
    let mut program = Cli::command();
    program.build();
    let replay = program.find_subcommand_mut("replay").expect("it is this one");
    replay.error(clap::error::ErrorKind::TooManyValues, message).exit()
}
