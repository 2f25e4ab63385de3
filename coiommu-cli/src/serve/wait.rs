//! Waiting: for the VMM that is served, for the next one, and for the end.

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

/// That it is time to end, for all who wait.
#[derive(Debug)]
pub(crate) struct Stop {
    /// Readable once it is; never read.
    come: UnixStream,
    /// What makes it so.
    raise: UnixStream,
}

impl Stop {
    pub(crate) fn new() -> io::Result<Self> {
        let (come, raise) = UnixStream::pair()?;
        Ok(Self { come, raise })
    }

    /// When a signal comes that is to end the program.
    pub(crate) fn on_signals() -> io::Result<Self> {
        let stop = Self::new()?;
        for signal in [SIGTERM, SIGINT] {
            pipe::register(signal, stop.raise.try_clone()?)?;
        }
        Ok(stop)
    }

    /// It is time.
    pub(crate) fn raise(&self) {
        // It fails only if so much was written already that nothing more has room.
        let _full = (&self.raise).write(&[0]);
    }
}

/// What has ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// It is time to end.
    Stop,
    /// The connection is to be looked at.
    Connection,
}

/// Waits for so long; whether it is time to end.
pub(crate) fn for_stop(stop: &Stop, time: Duration) -> anyhow::Result<bool> {
    let time = Timespec::try_from(time).context("it is too long to wait")?;
    let [is_over] = ready([(stop.come.as_fd(), PollFlags::IN)], Some(&time))?;
    Ok(is_over)
}

/// Waits for a VMM. `None`: it is time to end.
pub(crate) fn for_client(listener: &Listener, stop: &Stop) -> anyhow::Result<Option<UnixStream>> {
    loop {
        let [is_over, _] = wait([(stop.come.as_fd(), PollFlags::IN), (listener.as_fd(), PollFlags::IN)])?;
        if is_over {
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
pub(crate) fn for_any(connection: &mut Connection, listener: &Listener, stop: &Stop) -> anyhow::Result<Woken> {
    loop {
        let Interest { read, write } = connection.interest();
        let mut events = PollFlags::empty();
        events.set(PollFlags::IN, read);
        events.set(PollFlags::OUT, write);
        let [is_over, is_ready, other] = wait([
            (stop.come.as_fd(), PollFlags::IN),
            (connection.as_fd(), events),
            (listener.as_fd(), PollFlags::IN),
        ])?;
        if is_over {
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

/// Whether it is time to end, without waiting. Others that come are turned away. For between requests, when the VMM
/// that is served always has another.
pub(crate) fn is_stopped(listener: &Listener, stop: &Stop) -> anyhow::Result<bool> {
    let fds = [(stop.come.as_fd(), PollFlags::IN), (listener.as_fd(), PollFlags::IN)];
    let [is_over, other] = ready(fds, Some(&Timespec::default()))?;
    if other {
        turn_away(listener);
    }
    Ok(is_over)
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
