//! What these tests share: running the program, and writing traces.

#![allow(dead_code, reason = "no test file uses all of it")]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;
use tempfile::NamedTempFile;

/// What `--json` prints: these keys and no others.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Report {
    pub(crate) trace: TraceFigures,
    pub(crate) guest_memory_bytes: u64,
    pub(crate) policies: Vec<PolicyFigures>,
    pub(crate) elapsed_seconds: f64,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct TraceFigures {
    pub(crate) events: u64,
    pub(crate) map_calls: u64,
    pub(crate) unmap_calls: u64,
    pub(crate) distinct_pages: u64,
    pub(crate) peak_mapped_pages: u64,
    pub(crate) final_mapped_pages: u64,
    pub(crate) unmatched_unmaps: u64,
    pub(crate) lost_events: u64,
    pub(crate) skipped_lines: u64,
    pub(crate) seconds: f64,
}

#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct PolicyFigures {
    pub(crate) policy: String,
    pub(crate) pin_requests: u64,
    pub(crate) peak_pinned_pages: u64,
    pub(crate) mean_pinned_pages: f64,
    pub(crate) final_pinned_pages: u64,
    pub(crate) pages_pinned: u64,
    pub(crate) pages_unpinned: u64,
    pub(crate) iommu_map_calls: u64,
    pub(crate) iommu_unmap_calls: u64,
    pub(crate) peak_mappings: u64,
    pub(crate) failed_pins: u64,
    pub(crate) dma_faults: u64,
}

impl Report {
    /// All that has to be the same whenever the same trace is played.
    pub(crate) fn timeless(mut self) -> Self {
        self.elapsed_seconds = 0.0;
        self
    }

    /// No policy lost a page that a device used: nothing that a trace holds may lead to that.
    #[track_caller]
    pub(crate) fn assert_no_faults(&self) {
        for policy in &self.policies {
            assert_eq!(policy.dma_faults, 0, "{}", policy.policy);
        }
    }
}

/// A run that has ended.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// The most memory that was resident, in bytes: the kernel's own high-water mark (VmHWM), looked at every few
    /// milliseconds, as nobody tells it of a process that is gone.
    pub(crate) peak_memory: u64,
}

impl Run {
    /// The report of a run that went well and had nothing to say besides.
    #[track_caller]
    pub(crate) fn report(&self) -> Report {
        assert_eq!((self.status.code(), self.stderr.as_str()), (Some(0), ""), "{}", self.status);
        serde_json::from_str(&self.stdout).unwrap()
    }

    /// What the one line says, without its newline, that a run ended with which could not do its work.
    #[track_caller]
    pub(crate) fn complaint(&self) -> &str {
        assert_eq!((self.status.code(), self.stdout.as_str()), (Some(1), ""), "{}: {}", self.status, self.stderr);
        let line = self.stderr.strip_suffix('\n').unwrap();
        assert!(!line.is_empty() && !line.contains('\n'), "{line:?}");
        line
    }
}

/// The program, yet to be run.
pub(crate) fn coiommu<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coiommu"));
    command.args(args);
    command
}

/// Runs `coiommu`, with nothing on its standard input.
pub(crate) fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    finish(coiommu(args).stdin(Stdio::null()))
}

/// Runs `coiommu replay --json` under some policies.
pub(crate) fn replay(trace: &Path, policies: &[&str]) -> Run {
    finish(replay_command(trace, policies).stdin(Stdio::null()))
}

pub(crate) fn replay_command(trace: &Path, policies: &[&str]) -> Command {
    let mut command = coiommu(["replay", "--json"]);
    command.args(policies.iter().flat_map(|policy| ["--policy", policy])).arg(trace);
    command
}

/// Runs a command to its end. One that takes too long is killed, and its status says so.
pub(crate) fn finish(command: &mut Command) -> Run {
    // Files, as pipes would have to be read while we look at the memory.
    let (mut stdout, mut stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    command.stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap());
    let mut child = command.spawn().unwrap();
    let (status, peak_memory) = watch(&mut child);
    Run { status, stdout: text(&mut stdout), stderr: text(&mut stderr), peak_memory }
}

fn watch(child: &mut Child) -> (ExitStatus, u64) {
    const PATIENCE: Duration = Duration::from_secs(120);
    let started = Instant::now();
    let mut peak = 0;
    loop {
        peak = peak.max(resident_peak(child.id()));
        if let Some(status) = child.try_wait().unwrap() {
            return (status, peak);
        }
        if started.elapsed() > PATIENCE {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

fn resident_peak(process: u32) -> u64 {
    // Not there, or without memory: it has just ended.
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn text(file: &mut File) -> String {
    file.rewind().unwrap();
    std::io::read_to_string(file).unwrap()
}

/// A trace that ships with the program.
pub(crate) fn shipped(kernel: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("traces/linux-{kernel}-nvme-e1000e.trace.zst"))
}

/// The text of a trace that ships with the program.
pub(crate) fn shipped_text(kernel: &str) -> String {
    std::io::read_to_string(zstd::Decoder::new(File::open(shipped(kernel)).unwrap()).unwrap()).unwrap()
}

/// The first so many lines of a text.
pub(crate) fn first_lines(text: &str, lines: usize) -> String {
    text.split_inclusive('\n').take(lines).collect()
}

/// A file that is gone when this is dropped.
pub(crate) fn file(content: impl AsRef<[u8]>) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(content.as_ref()).unwrap();
    file
}

pub(crate) fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

/// The device that made most of our events.
pub(crate) const DEVICE: &str = "0000:00:03.0";

/// A line of a trace, as tracefs writes it, this many microseconds after boot.
pub(crate) fn event(at: u64, name: &str, device: &str, fields: &str) -> String {
    let (seconds, micros) = (at / 1_000_000, at % 1_000_000);
    format!(
        "    kworker/u8:1-31      [000] ..s1. {seconds:5}.{micros:06}: {name}: {device} dir=TO_DEVICE {fields} attrs=\n"
    )
}

pub(crate) fn map(at: u64, addr: u64, size: u64) -> String {
    event(at, "dma_map_page", DEVICE, &format!("dma_addr={addr:x} size={size} phys_addr={addr:x}"))
}

pub(crate) fn unmap(at: u64, addr: u64, size: u64) -> String {
    event(at, "dma_unmap_page", DEVICE, &format!("dma_addr={addr:x} size={size}"))
}

/// A scatter list of pages at these addresses, which are physical ones too.
pub(crate) fn map_sg(at: u64, addrs: &[u64]) -> String {
    let list = list(addrs);
    let sizes = list_of(addrs.iter().map(|_| "0x1000".to_owned()));
    event(at, "dma_map_sg", DEVICE, &format!("dma_addrs={list} sizes={sizes} phys_addrs={list}"))
}

pub(crate) fn unmap_sg(at: u64, addrs: &[u64]) -> String {
    event(at, "dma_unmap_sg", DEVICE, &format!("phys_addrs={}", list(addrs)))
}

fn list(addrs: &[u64]) -> String {
    list_of(addrs.iter().map(|addr| format!("{addr:#x}")))
}

fn list_of(items: impl Iterator<Item = String>) -> String {
    format!("{{{}}}", items.collect::<Vec<_>>().join(","))
}
