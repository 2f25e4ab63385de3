//! A session on a Unix socket, to be polled.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::wire::{Answer, Client, KERNEL_FDS, Limits, Outgoing, ProtocolError, Request, Session, Ticket};

/// How often a call of [`Connection::receive`] reads, before whoever calls it gets to look at other things.
const READS: usize = 64;

/// Why a connection has ended before the client closed it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The client does not speak the protocol.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The client has closed the connection in the middle of a message.
    #[error("the client went in the middle of a message")]
    CutShort,
    /// The socket cannot be used.
    #[error("cannot use the client's socket")]
    Socket(#[source] io::Error),
}

/// What has come of a look at a connection.
#[derive(Debug)]
#[must_use = "a request is answered with an error if it is dropped"]
pub enum Event {
    /// The client asks for something.
    Request(Request),
    /// There is nothing now: wait until the socket is as [`Connection::interest`] says, then look again.
    Idle,
    /// There may be more: look again, after others had their turn.
    More,
    /// The client has gone, or the connection was ended: there will be nothing any more. What the client had mapped and set up
    /// goes with it.
    Closed,
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// That its socket can be read.
    pub read: bool,
    /// That its socket can be written.
    pub write: bool,
}

/// What has ended a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The connection is to be looked at.
    Connection,
    /// The other file descriptor is readable.
    Stop,
    /// Time is up.
    Timeout,
}

/// A client's connection.
///
/// It never blocks, but in [`wait`](Self::wait) and [`close`](Self::close), and needs no thread. In an event loop, register
/// its file descriptor for what [`interest`](Self::interest) says, and when it is ready call [`receive`](Self::receive) until
/// that returns [`Event::Idle`]; look at the interest again, as answers may have to wait until the client takes them.
///
/// When it is dropped, the socket is closed, and every file descriptor that nobody has claimed.
pub struct Connection {
    stream: UnixStream,
    session: Session,
    /// What went wrong, until it is told.
    failure: Option<ConnectionError>,
}

impl Connection {
    /// A connection with a client that has not said anything.
    #[must_use]
    pub fn new(stream: UnixStream, limits: Limits) -> Self {
        Self { stream, session: Session::new(limits), failure: None }
    }

    /// What the client has said of itself; `None` until it has.
    #[must_use]
    pub const fn client(&self) -> Option<Client> {
        self.session.client()
    }

    /// Looks once: sends what can be sent, and takes a request if there is one.
    ///
    /// # Errors
    ///
    /// The connection has ended, and should be dropped. From then on it is [`Event::Closed`].
    pub fn receive(&mut self) -> Result<Event, ConnectionError> {
        for _ in 0..READS {
            self.flush();
            if let Some(failure) = self.failure.take() {
                return Err(failure);
            }
            if self.session.is_ended() {
                return Ok(Event::Closed);
            }
            match self.read() {
                Ok(Read::Request(request)) => return Ok(Event::Request(request)),
                Ok(Read::Part) => {}
                Ok(Read::Nothing) => return Ok(Event::Idle),
                Ok(Read::End) => {
                    let inside = self.session.is_inside_message();
                    self.session.end();
                    return if inside { Err(ConnectionError::CutShort) } else { Ok(Event::Closed) };
                }
                Err(error) => {
                    // The client may want to know why.
                    self.flush();
                    self.session.end();
                    self.failure = None;
                    return Err(error);
                }
            }
        }
        Ok(Event::More)
    }

    /// Answers a request. The answer is on its way when this returns, as far as the client takes it now.
    ///
    /// If it cannot be sent, [`receive`](Self::receive) says so.
    pub fn answer<A: Answer>(&mut self, ticket: Ticket<A>, answer: Result<A, Errno>) {
        self.session.answer(ticket, answer);
        self.flush();
    }

    /// What the socket is to be polled for.
    #[must_use]
    pub fn interest(&mut self) -> Interest {
        let write = self.session.outgoing().is_some();
        Interest { read: !self.session.space().is_empty(), write }
    }

    /// Waits until there is something for [`receive`](Self::receive), `stop` is readable, or time is up (`None`: never). `stop`
    /// goes before the connection.
    ///
    /// For servers that have nothing else to wait for; others poll.
    ///
    /// # Errors
    ///
    /// Of the system call.
    pub fn wait(&mut self, stop: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> io::Result<Wake> {
        let Interest { read, write } = self.interest();
        if self.session.is_ended() {
            return Ok(Wake::Connection);
        }
        let mut events = PollFlags::empty();
        events.set(PollFlags::IN, read);
        events.set(PollFlags::OUT, write);
        let mut fds = vec![PollFd::from_borrowed_fd(self.stream.as_fd(), events)];
        fds.extend(stop.map(|stop| PollFd::from_borrowed_fd(stop, PollFlags::IN)));
        poll_all(&mut fds, timeout)?;
        Ok(match fds.as_slice() {
            [_, stop] if !stop.revents().is_empty() => Wake::Stop,
            [connection, ..] if !connection.revents().is_empty() => Wake::Connection,
            _ => Wake::Timeout,
        })
    }

    /// Ends the connection: sends the answers that are to be sent, as far as the client takes them in this time, and closes.
    ///
    /// Requests that were received and not answered are left without an answer, as are those that were not read.
    pub fn close(mut self, patience: Duration) {
        // `None`: later than anybody waits.
        let deadline = Instant::now().checked_add(patience);
        loop {
            self.flush();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if self.session.outgoing().is_none() || left.is_some_and(|left| left.is_zero()) {
                break;
            }
            let mut fds = [PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::OUT)];
            if poll_all(&mut fds, left).is_err() {
                break;
            }
        }
        // The client may have gone before.
        let _gone = self.stream.shutdown(Shutdown::Both);
    }

    /// Sends what can be sent. The session ends if nothing can be sent any more.
    fn flush(&mut self) {
        while let Some(outgoing) = self.session.outgoing() {
            match send(&self.stream, &outgoing) {
                Ok(bytes) => self.session.sent(bytes),
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(error) => {
                    self.session.end();
                    if !is_gone(error) {
                        self.failure = Some(ConnectionError::Socket(error.into()));
                    }
                }
            }
        }
    }

    /// Reads once.
    fn read(&mut self) -> Result<Read, ConnectionError> {
        let space = self.session.space();
        if space.is_empty() {
            return Ok(Read::Nothing);
        }
        let (bytes, fds, fds_lost) = match receive(&self.stream, space) {
            Ok((0, ..)) => return Ok(Read::End),
            Ok(received) => received,
            Err(Errno::AGAIN) => return Ok(Read::Nothing),
            Err(Errno::INTR) => return Ok(Read::Part),
            Err(error) if is_gone(error) => return Ok(Read::End),
            Err(error) => return Err(ConnectionError::Socket(error.into())),
        };
        Ok(self.session.received(bytes, fds, fds_lost)?.map_or(Read::Part, Read::Request))
    }
}

/// What a read has come to.
enum Read {
    Request(Request),
    Part,
    Nothing,
    End,
}

/// Bytes, the file descriptors that came with them, and whether there were more of those.
fn receive(stream: &UnixStream, space: &mut [u8]) -> Result<(usize, Vec<OwnedFd>, bool), Errno> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut room);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(stream, &mut [IoSliceMut::new(space)], &mut ancillary, flags)?;
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    // There is room for all: it was the process's limit of open files.
    Ok((received.bytes, fds, received.flags.contains(ReturnFlags::CTRUNC)))
}

fn send(stream: &UnixStream, outgoing: &Outgoing<'_>) -> Result<usize, Errno> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut room);
    if !outgoing.fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&outgoing.fds)) {
        return Err(Errno::TOOBIG);
    }
    sendmsg(stream, &[IoSlice::new(outgoing.bytes)], &mut ancillary, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
}

/// The other end is closed.
fn is_gone(error: Errno) -> bool {
    matches!(error, Errno::PIPE | Errno::CONNRESET)
}

/// Waits for one of them; a signal ends the wait early.
fn poll_all(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<()> {
    // A time that cannot be told is longer than anybody waits.
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("stream", &self.stream)
            .field("client", &self.client())
            .finish_non_exhaustive()
    }
}
