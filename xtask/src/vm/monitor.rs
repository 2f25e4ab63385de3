//! QEMU's monitor, by which a machine is stopped and goes on.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::FOLDER;

/// A connection to a machine's monitor.
pub(crate) struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    /// The option that gives a machine a monitor.
    pub(crate) fn option() -> String {
        format!("-qmp unix:{},server=on,wait=off", path().display())
    }

    /// Connects to the machine that has it.
    pub(crate) fn connect() -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path()).context("cannot connect to QEMU's monitor")?;
        // One that hangs is not waited for.
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut monitor = Self { stream: BufReader::new(stream) };
        monitor.execute("qmp_capabilities")?;
        Ok(monitor)
    }

    /// Has a command carried out; when this returns, it is.
    pub(crate) fn execute(&mut self, command: &str) -> anyhow::Result<()> {
        writeln!(self.stream.get_mut(), "{}", json!({"execute": command}))?;
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line)? == 0 {
                bail!("QEMU's monitor is closed");
            }
            let message: Value = serde_json::from_str(&line)?;
            if message.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = message.get("error") {
                bail!("QEMU's monitor, {command}: {error}");
            }
            // A greeting, or something that happened.
        }
    }
}

fn path() -> PathBuf {
    Path::new(FOLDER).join("monitor.sock")
}
