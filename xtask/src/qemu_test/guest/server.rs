//! A `coiommu serve`, and what it says.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use crate::step;
use crate::vm::process::Process;

const SOCKET: &str = "target/vm/serve.sock";
const CONTROL: &str = "target/vm/serve.ctl";

/// A server. It ends when it is dropped.
pub(super) struct Server {
    process: RefCell<Process>,
    program: PathBuf,
}

impl Server {
    /// One for the guests of these tests. It serves one emulator after the other, as a kernel may have to be booted again.
    pub(super) fn start(program: &Path, arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = Process::command(program);
        command.args(["serve", "--socket", SOCKET, "--control", CONTROL, "--vcpus=2", "--persist"]).args(arguments);
        let mut process = Process::spawn(&mut command).context("cannot run setpriv")?;
        let start = Instant::now();
        // What another left there does not answer.
        while UnixStream::connect(CONTROL).is_err() {
            ensure!(!process.has_ended()?, "coiommu serve has ended");
            if start.elapsed() > Duration::from_secs(30) {
                bail!("coiommu serve does not listen");
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(Self { process: RefCell::new(process), program: program.to_owned() })
    }

    /// The option by which QEMU shows its device to the guest.
    pub(super) fn device(&self) -> String {
        device(SOCKET, "04.0")
    }

    /// Its figures of the guest.
    pub(super) fn stats(&self) -> anyhow::Result<Value> {
        self.ask("stats")
    }

    /// What it has pinned, in bytes from where to where.
    pub(super) fn pins(&self) -> anyhow::Result<Vec<Range<u64>>> {
        let Value::Array(pins) = self.ask("pins")? else { bail!("pins are a list") };
        let range = |pin: &Value| {
            let gpa = u64::from_str_radix(pin["gpa"].as_str()?.strip_prefix("0x")?, 16).ok()?;
            Some(gpa..gpa.checked_add(pin["bytes"].as_u64()?)?)
        };
        pins.iter().map(|pin| range(pin).with_context(|| format!("{pin} is no pin"))).collect()
    }

    fn ask(&self, what: &str) -> anyhow::Result<Value> {
        let mut command = Command::new(&self.program);
        command.args(["ctl", "--control", CONTROL, what, "--json"]);
        Ok(serde_json::from_str(&step::output_of(&mut command, &format!("coiommu ctl {what}"))?)?)
    }

    /// A connection to its control socket, for what is held as long as it is open.
    pub(super) fn control(&self) -> anyhow::Result<Control> {
        let stream = UnixStream::connect(CONTROL).context("cannot connect to the control socket")?;
        // One that hangs is not waited for.
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        Ok(Control { stream: BufReader::new(stream) })
    }

    /// Its memory that is in RAM, in KiB.
    pub(super) fn resident_kib(&self) -> anyhow::Result<u64> {
        let id = self.process.borrow().id();
        let status = fs::read_to_string(format!("/proc/{id}/status")).context("the server has ended")?;
        // Of its own; that of the guest is shared with the guest.
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
        Ok(line.trim_end_matches("kB").trim().parse()?)
    }

    /// What is in the notify map: a word a vCPU, which is not 0 while a request of its waits.
    pub(super) fn slots(&self) -> anyhow::Result<Slots> {
        Ok(Slots(file_of(self.process.borrow().id(), "coiommu-notify")?))
    }

    pub(super) fn has_ended(&self) -> anyhow::Result<bool> {
        Ok(self.process.borrow_mut().has_ended()?)
    }

    /// Ends it with no warning.
    pub(super) fn kill(&self) -> anyhow::Result<()> {
        Ok(self.process.borrow_mut().kill()?)
    }
}

/// The option by which QEMU shows the device behind a socket to the guest, at an address.
pub(super) fn device(socket: &str, address: &str) -> String {
    format!(r#"-device {{"driver":"vfio-user-pci","socket":{{"path":"{socket}","type":"unix"}},"addr":"{address}"}}"#)
}

/// A connection to a control socket: docs/control.md.
pub(super) struct Control {
    stream: BufReader<UnixStream>,
}

impl Control {
    /// Has ranges unpinned: what came of it.
    pub(super) fn unpin(&mut self, ranges: &[Range<u64>]) -> anyhow::Result<Unpinned> {
        let ranges: Vec<_> =
            ranges.iter().map(|r| json!({"gpa": format!("{:#x}", r.start), "bytes": r.end - r.start})).collect();
        let reply = self.ask(&json!({"id": 1, "cmd": "unpin", "ranges": ranges}))?;
        let sum = |what: &str| reply["ranges"].as_array().into_iter().flatten().filter_map(|r| r[what].as_u64()).sum();
        Ok(Unpinned { hold: reply["hold"].as_u64(), released: sum("released"), busy: sum("busy") })
    }

    /// Ends a hold.
    pub(super) fn resume(&mut self, hold: u64) -> anyhow::Result<()> {
        self.ask(&json!({"id": 1, "cmd": "resume", "hold": hold})).map(drop)
    }

    fn ask(&mut self, command: &Value) -> anyhow::Result<Value> {
        writeln!(self.stream.get_mut(), "{command}")?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let mut reply: Value = serde_json::from_str(&line).with_context(|| format!("no reply: {line}"))?;
        ensure!(reply.get("ok").is_some(), "{command}: {}", reply["error"]);
        Ok(reply["ok"].take())
    }
}

/// The notify map of a server's guest.
pub(super) struct Slots(File);

impl Slots {
    /// The words of two vCPUs.
    pub(super) fn words(&self) -> anyhow::Result<[u64; 2]> {
        let mut bytes = [[0; 8]; 2];
        self.0.read_exact_at(bytes.as_flattened_mut(), 0)?;
        Ok(bytes.map(u64::from_le_bytes))
    }
}

/// A file without a name that a process has open.
pub(super) fn file_of(process: u32, name: &str) -> anyhow::Result<File> {
    for entry in fs::read_dir(format!("/proc/{process}/fd")).context("the process has ended")? {
        let path = entry?.path();
        if fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().contains(name)) {
            return File::options().read(true).write(true).open(&path).context("cannot open its memory");
        }
    }
    bail!("the process has no {name}")
}

/// What came of an unpin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unpinned {
    pub(super) hold: Option<u64>,
    /// In pages.
    pub(super) released: u64,
    pub(super) busy: u64,
}
