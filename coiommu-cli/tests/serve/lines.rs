//! The control socket's other end.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use crate::PATIENCE;

/// A connection to a control socket.
#[derive(Debug)]
pub(crate) struct Lines {
    pub(crate) stream: BufReader<UnixStream>,
    next: u64,
}

impl Lines {
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Self { stream: BufReader::new(stream), next: 1 }
    }

    /// Sends a line as it is; the reply, or None if the connection is closed.
    pub(crate) fn say(&mut self, line: &[u8]) -> Option<Value> {
        // A server that has heard enough does not take all of it.
        let _taken = self.stream.get_mut().write_all(&[line, b"\n"].concat());
        self.reply()
    }

    /// The next line, or None if the connection is closed.
    pub(crate) fn reply(&mut self) -> Option<Value> {
        let mut reply = String::new();
        match self.stream.read_line(&mut reply) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&reply).unwrap()),
            // Closed, with something unread.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Has a command carried out: `ok`, or `error`.
    pub(crate) fn ask(&mut self, mut command: Value) -> Result<Value, Value> {
        let id = self.next;
        self.next += 1;
        command["id"] = id.into();
        let mut reply = self.say(command.to_string().as_bytes()).unwrap();
        assert_eq!((&reply["id"], reply.as_object().unwrap().len()), (&json!(id), 2), "{reply}");
        if reply.get("ok").is_some() { Ok(reply["ok"].take()) } else { Err(reply["error"].take()) }
    }

    pub(crate) fn stats(&mut self) -> Value {
        self.ask(json!({"cmd": "stats"})).unwrap()
    }

    /// A figure of `stats`.
    pub(crate) fn stat(&mut self, name: &str) -> u64 {
        self.stats()[name].as_u64().unwrap()
    }

    /// What is pinned: where, and how many bytes.
    pub(crate) fn pins(&mut self) -> Vec<(u64, u64)> {
        let pins = self.ask(json!({"cmd": "pins"})).unwrap();
        pins.as_array().unwrap().iter().map(|pin| (hex(&pin["gpa"]), pin["bytes"].as_u64().unwrap())).collect()
    }

    pub(crate) fn unpin(&mut self, ranges: &[(u64, u64)]) -> Result<Value, Value> {
        let ranges: Vec<_> =
            ranges.iter().map(|(gpa, bytes)| json!({"gpa": format!("{gpa:#x}"), "bytes": bytes})).collect();
        self.ask(json!({"cmd": "unpin", "ranges": ranges}))
    }

    pub(crate) fn resume(&mut self, hold: &Value) -> Result<Value, Value> {
        self.ask(json!({"cmd": "resume", "hold": hold}))
    }
}

fn hex(text: &Value) -> u64 {
    u64::from_str_radix(text.as_str().unwrap().strip_prefix("0x").unwrap(), 16).unwrap()
}
