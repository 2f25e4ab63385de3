//! Asking a server over its control socket.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::de::DeserializeOwned;

use crate::control::{Command, Line, Reply};

/// A forced unpin waits for a parked guest, range by range.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a control socket. What it holds is let go when it is dropped.
#[derive(Debug)]
pub(crate) struct Client {
    stream: BufReader<UnixStream>,
    next: u64,
}

impl Client {
    pub(crate) fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path);
        let stream = stream.with_context(|| {
            format!("cannot connect to {}: is it the --control of a `coiommu serve` that runs?", path.display())
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream: BufReader::new(stream), next: 1 })
    }

    /// Has a command carried out.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, command: Command) -> anyhow::Result<T> {
        let id = self.next;
        self.next += 1;
        let mut line = serde_json::to_vec(&Line { id, command })?;
        line.push(b'\n');
        let written = self.stream.get_mut().write_all(&line).context("the server has gone");
        let mut text = String::new();
        let length = match self.stream.read_line(&mut text).context("the server does not answer") {
            // Why it has hung up is there to be read all the same.
            Ok(length) if length > 0 => length,
            read => written.and(read)?,
        };
        ensure!(length > 0, "the server has closed the connection");
        let reply: Reply = serde_json::from_str(&text).with_context(|| format!("not a reply: {}", text.trim_end()))?;
        ensure!(reply.id == id || reply.is_of_none(), "the reply is to another command: {}", text.trim_end());
        Ok(serde_json::from_value(reply.outcome()?)?)
    }
}
