//! The control socket: one JSON object a line comes in, one a line goes out. `docs/control.md` has all of them.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use coiommu_dtt::Gpa;
use coiommu_pin::pinner::Hold;
use coiommu_vfio_user::Listener;
use serde_json::{Value, json};

use super::watch::{Served, Watch};
use crate::control::{Code, Command, Failure, Line, Pin, Reply, Unpinned, UnpinnedRange};

/// How long a line may be.
const LINE: u64 = 1 << 20;
/// How many ranges a line may name, and how many all may hold together: each page that is pinned is looked for in them.
const RANGES: usize = 4096;
/// How many may be connected at once.
const CONNECTIONS: usize = 16;
/// How long one that is too many may take to be told so, as its line is already there to be read.
const TELL: Duration = Duration::from_millis(10);

/// The control socket, until it is dropped. Those who are connected then stay so until they go.
#[derive(Debug)]
pub(crate) struct Control {
    /// Removes the path.
    _socket: Listener,
}

/// Listens at a path.
pub(crate) fn listen(path: &Path, watch: &Watch) -> anyhow::Result<Control> {
    let socket = Listener::bind(path)?;
    let listener = UnixListener::from(socket.as_fd().try_clone_to_owned()?);
    listener.set_nonblocking(false)?;
    let watch = watch.clone();
    let accept = move || {
        let connected = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming() {
            match stream.and_then(|stream| begin(stream, &watch, &connected)) {
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!("a connection to the control socket: {error}");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    };
    thread::Builder::new().name("coiommu-control".into()).spawn(accept).context("cannot start a thread")?;
    Ok(Control { _socket: socket })
}

/// So many of what there is an end to.
#[derive(Debug)]
struct Share {
    of: Arc<AtomicUsize>,
    count: usize,
}

impl Share {
    /// Takes so many, if there are not more than `most` then.
    fn take(of: &Arc<AtomicUsize>, count: usize, most: usize) -> Option<Self> {
        let add = |taken: usize| taken.checked_add(count).filter(|&sum| sum <= most);
        of.fetch_update(Relaxed, Relaxed, add).ok()?;
        Some(Self { of: Arc::clone(of), count })
    }

    /// Gives back what is more than this.
    fn keep(&mut self, count: usize) {
        let kept = self.count.min(count);
        self.of.fetch_sub(self.count - kept, Relaxed);
        self.count = kept;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.keep(0);
    }
}

fn begin(stream: UnixStream, watch: &Watch, connected: &Arc<AtomicUsize>) -> std::io::Result<()> {
    let Some(place) = Share::take(connected, 1, CONNECTIONS) else {
        tracing::warn!("a connection to the control socket is closed: {CONNECTIONS} are there");
        return refuse(&stream);
    };
    let session = Session { watch: watch.clone(), holds: BTreeMap::new(), next: 1 };
    thread::Builder::new().name("coiommu-control".into()).spawn(move || {
        let _place = place;
        // Who is gone needs no answer; what it held is let go.
        let _gone = session.run(&stream);
    })?;
    Ok(())
}

/// Says why to one that is too many. That it may have gone is nobody else's trouble.
fn refuse(stream: &UnixStream) -> std::io::Result<()> {
    let message = format!("{CONNECTIONS} are connected, and that is all that may be");
    stream.set_write_timeout(Some(TELL))?;
    let _gone = send(stream, &Reply::new(0, Err(Failure::new(Code::TooMany, message))));
    Ok(())
}

fn send(mut stream: &UnixStream, reply: &Reply) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(reply)?;
    text.push(b'\n');
    stream.write_all(&text)
}

/// What one request holds.
struct Held {
    /// Goes before its share does.
    _holds: Vec<Hold>,
    _share: Share,
    /// The guest whose memory it is.
    of: Weak<Served>,
}

/// Who is connected, and what it holds.
struct Session {
    watch: Watch,
    /// By their ids.
    holds: BTreeMap<u64, Held>,
    next: u64,
}

impl Session {
    fn run(mut self, stream: &UnixStream) -> std::io::Result<()> {
        let mut input = BufReader::new(stream);
        let mut line = Vec::new();
        loop {
            line.clear();
            let length = (&mut input).take(LINE + 1).read_until(b'\n', &mut line)?;
            if length == 0 {
                return Ok(());
            }
            let is_whole = length as u64 <= LINE;
            let reply = if is_whole { self.answer(&line) } else { too_long() };
            send(stream, &reply)?;
            if !is_whole {
                return Ok(());
            }
        }
    }

    fn answer(&mut self, line: &[u8]) -> Reply {
        match serde_json::from_slice::<Line>(line) {
            Ok(Line { id, command }) => Reply::new(id, self.carry_out(command)),
            Err(error) => {
                // What can be told of whom to answer.
                let id = serde_json::from_slice::<Value>(line).ok().and_then(|value| value.get("id")?.as_u64());
                Reply::new(id.unwrap_or(0), Err(Failure::new(Code::BadRequest, error.to_string())))
            }
        }
    }

    fn carry_out(&mut self, command: Command) -> Result<Value, Failure> {
        let served = self.watch.served();
        // A hold ends with its guest.
        let now = served.as_ref().map(Arc::downgrade);
        self.holds.retain(|_, held| now.as_ref().is_some_and(|now| held.of.ptr_eq(now)));
        if let Command::Resume { hold } = command {
            let unknown = || Failure::new(Code::UnknownHold, format!("this connection has no hold {hold}"));
            return self.holds.remove(&hold).map(|_ended| json!({})).ok_or_else(unknown);
        }
        let served = served.ok_or_else(|| Failure::new(Code::NoGuest, "no VMM is connected"))?;
        let value = match command {
            Command::Stats => serde_json::to_value(served.stats()),
            Command::Pins => serde_json::to_value(served.pins()),
            Command::Unpin { ranges } => serde_json::to_value(self.unpin(&served, &ranges)?),
            Command::Resume { .. } => Ok(json!({})),
            #[cfg(feature = "test-hooks")]
            Command::Yank { ranges } => serde_json::to_value(yank(&served, &ranges)?),
        };
        value.map_err(|error| Failure::new(Code::Failed, error.to_string()))
    }

    fn unpin(&mut self, served: &Arc<Served>, ranges: &[Pin]) -> Result<Unpinned, Failure> {
        if ranges.len() > RANGES {
            return Err(Failure::new(Code::TooMany, format!("{} ranges: {RANGES} at most", ranges.len())));
        }
        let is_good = |range: &&Pin| range.is_pages();
        if let Some(bad) = ranges.iter().find(|range| !is_good(range)) {
            let message = format!("{:#x} with {} bytes is not made of whole pages", bad.gpa, bad.bytes);
            return Err(Failure::new(Code::BadRequest, message));
        }
        // Nothing is unpinned that could not be held.
        let too_many = || Failure::new(Code::TooMany, format!("{RANGES} ranges may be held in all: resume some"));
        let mut share = Share::take(&served.held, ranges.len(), RANGES).ok_or_else(too_many)?;
        let (mut answers, mut holds) = (Vec::new(), Vec::new());
        let mut is_parked = false;
        for range in ranges {
            if is_parked {
                // Each would be waited for as long.
                answers.push(UnpinnedRange::parked(*range));
                continue;
            }
            let unpinned = served.workers.reclaimer().unpin_and_wait(Gpa::new(range.gpa), range.bytes);
            let (report, hold) = unpinned.map_err(|error| Failure::new(Code::Failed, error.to_string()))?;
            served.unpins.count(&report);
            is_parked = report.parked > 0;
            answers.push(UnpinnedRange::new(*range, &report));
            holds.extend(hold);
        }
        let hold = (!holds.is_empty()).then_some(self.next);
        if let Some(id) = hold {
            share.keep(holds.len());
            self.holds.insert(id, Held { _holds: holds, _share: share, of: Arc::downgrade(served) });
            self.next += 1;
        }
        Ok(Unpinned { hold, ranges: answers })
    }
}

/// How many bytes are not mapped any more.
#[cfg(feature = "test-hooks")]
fn yank(served: &Served, ranges: &[Pin]) -> Result<u64, Failure> {
    let unmapped = ranges.iter().map(|range| served.mapper.unmap(range.gpa, range.bytes));
    unmapped.sum::<Result<u64, _>>().map_err(|error| Failure::new(Code::Failed, error.to_string()))
}

fn too_long() -> Reply {
    Reply::new(0, Err(Failure::new(Code::BadRequest, format!("a line has {LINE} bytes at most"))))
}
