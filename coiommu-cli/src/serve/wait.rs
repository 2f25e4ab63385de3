//! Waiting: for the VMM that is served, for the next one, and for signals.

use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use coiommu_vfio_user::{Connection, Interest, Listener};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

/// The signals that end it.
#[derive(Debug)]
pub(crate) struct Signals {
    /// Readable once one has come; never read.
    caught: UnixStream,
    /// What makes it so.
    raise: UnixStream,
}

impl Signals {
    pub(crate) fn catch() -> io::Result<Self> {
        let (caught, raise) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT] {
            pipe::register(signal, raise.try_clone()?)?;
        }
        Ok(Self { caught, raise })
    }

    /// As if one had come: everybody who waits ends.
    pub(crate) fn raise(&self) {
        // It fails only if so much was written already that nothing more has room.
        let _full = (&self.raise).write(&[0]);
    }
}

/// What has ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// A signal came.
    Stop,
    /// The connection is to be looked at.
    Connection,
}

/// Waits for so long; whether a signal has come.
pub(crate) fn for_signal(signals: &Signals, time: Duration) -> anyhow::Result<bool> {
    let time = Timespec::try_from(time).context("it is too long to wait")?;
    let [stop] = ready([(signals.caught.as_fd(), PollFlags::IN)], Some(&time))?;
    Ok(stop)
}

/// Waits for a VMM. `None`: a signal came first.
pub(crate) fn for_client(listener: &Listener, signals: &Signals) -> anyhow::Result<Option<UnixStream>> {
    loop {
        let [stop, _] = wait([(signals.caught.as_fd(), PollFlags::IN), (listener.as_fd(), PollFlags::IN)])?;
        if stop {
            return Ok(None);
        }
        match listener.accept() {
            Ok(Some(stream)) => return Ok(Some(stream)),
            Ok(None) => {}
            Err(error) => later("a VMM cannot be accepted", &error),
        }
    }
}

/// Waits until there is something to do for a VMM that is served. Others that come are turned away.
pub(crate) fn for_any(connection: &mut Connection, listener: &Listener, signals: &Signals) -> anyhow::Result<Woken> {
    loop {
        let Interest { read, write } = connection.interest();
        let mut events = PollFlags::empty();
        events.set(PollFlags::IN, read);
        events.set(PollFlags::OUT, write);
        let [stop, is_ready, other] = wait([
            (signals.caught.as_fd(), PollFlags::IN),
            (connection.as_fd(), events),
            (listener.as_fd(), PollFlags::IN),
        ])?;
        if stop {
            return Ok(Woken::Stop);
        }
        // It may have gone, and be it before the other came: then that one is next, and not turned away.
        if is_ready || other && ready([(connection.as_fd(), events)], Some(&Timespec::default()))? == [true] {
            return Ok(Woken::Connection);
        }
        if other {
            turn_away(listener);
        }
    }
}

/// Whether a signal has come, without waiting. Others that come are turned away. For between requests, when the VMM
/// that is served always has another.
pub(crate) fn is_stopped(listener: &Listener, signals: &Signals) -> anyhow::Result<bool> {
    let fds = [(signals.caught.as_fd(), PollFlags::IN), (listener.as_fd(), PollFlags::IN)];
    let [stop, other] = ready(fds, Some(&Timespec::default()))?;
    if other {
        turn_away(listener);
    }
    Ok(stop)
}

fn turn_away(listener: &Listener) {
    match listener.turn_away() {
        Ok(away) => tracing::warn!("{away} turned away: a VMM is served already, one at a time"),
        Err(error) => later("another VMM cannot be turned away", &error),
    }
}

/// What fails for want of file descriptors, or of memory, may do later; the one that waits still does. Until then it is
/// not tried all the time.
fn later(what: &str, error: &io::Error) {
    tracing::warn!("{what} just now: {error}");
    thread::sleep(Duration::from_millis(20));
}

/// Waits until one of them is ready, or has ended; which are.
fn wait<const N: usize>(fds: [(BorrowedFd<'_>, PollFlags); N]) -> anyhow::Result<[bool; N]> {
    ready(fds, None)
}

fn ready<const N: usize>(
    fds: [(BorrowedFd<'_>, PollFlags); N],
    patience: Option<&Timespec>,
) -> anyhow::Result<[bool; N]> {
    let mut fds = fds.map(|(fd, events)| PollFd::from_borrowed_fd(fd, events));
    match poll(&mut fds, patience) {
        // A handler has run, and has left word of it.
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error).context("cannot wait"),
    }
    Ok(fds.map(|fd| !fd.revents().is_empty()))
}
