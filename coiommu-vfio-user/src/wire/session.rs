//! One client, from its first byte to its last.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::answer::{Answer, Dropped, Reply, ReplyTo, Ticket};
use super::framing::{Admission, Framing, Message};
use super::layout::{COMMAND, Header, NO_REPLY, TYPE, command, length};
use super::request::{self, Request};
use super::version::{self, Client, KERNEL_FDS, Limits};

/// When answers that are not taken cost so much, no more requests are.
const UNSENT: usize = 64 << 10;
/// What a reply costs besides its bytes.
const REPLY_COST: usize = 128;
/// What a file descriptor costs that goes with it: a process has fewer of those than of bytes.
const FD_COST: usize = 4 << 10;

/// What ends a connection: the client does not speak this protocol, or not any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// A message is shorter than its header, so nobody knows where the next begins.
    #[error("the client sent a message of {size} bytes, fewer than its header has")]
    Size {
        /// What it claims to be, in bytes.
        size: u32,
    },
    /// A message is not a command, and nothing was asked that it could answer.
    #[error("the client sent a message that is not a command: flags {flags:#x}")]
    NotACommand {
        /// The flags in its header.
        flags: u32,
    },
    /// The first message does not say which version the client speaks.
    #[error("the client began with command {command}, not with its version")]
    NoVersion {
        /// The command's number.
        command: u16,
    },
    /// The client speaks a version that is not spoken here.
    #[error("the client speaks vfio-user {major}.{minor}, this server 0.0")]
    Version {
        /// Its major version.
        major: u16,
        /// Its minor version.
        minor: u16,
    },
    /// What the client says of itself cannot be read.
    #[error("the client's version and capabilities cannot be read")]
    VersionData,
}

/// Something to send.
#[derive(Debug)]
pub struct Outgoing<'a> {
    /// The rest of one message, not empty. Never send the beginning of another with it: QEMU gives up if it does not find a
    /// header in one piece.
    pub bytes: &'a [u8],
    /// What goes with the first of these bytes.
    pub fds: Vec<BorrowedFd<'a>>,
}

/// One client's side of the protocol, without I/O.
///
/// It is driven like this: read from the socket into [`space`](Self::space), tell [`received`](Self::received) what came,
/// serve the request that it returns, and give the answer to [`answer`](Self::answer); send what [`outgoing`](Self::outgoing)
/// has, and tell [`sent`](Self::sent).
#[derive(Debug)]
pub struct Session {
    framing: Framing,
    limits: Limits,
    client: Option<Client>,
    unsent: VecDeque<Reply>,
    unsent_cost: usize,
    /// How much of the first of them is sent.
    sent: usize,
    dropped: Dropped,
    ended: bool,
}

impl Session {
    /// A session with a client that has not said anything.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            framing: Framing::new(limits.fds()),
            limits,
            client: None,
            unsent: VecDeque::new(),
            unsent_cost: 0,
            sent: 0,
            dropped: Dropped::default(),
            ended: false,
        }
    }

    /// What the client has said of itself; `None` until it has.
    #[must_use]
    pub const fn client(&self) -> Option<Client> {
        self.client
    }

    /// Whether the client has sent a part of a message, and not all of it.
    #[must_use]
    pub fn is_inside_message(&self) -> bool {
        self.framing.is_inside()
    }

    /// Where the next bytes from the client go. Empty if none are wanted: the session has ended, or the client leaves too many
    /// answers lying about.
    ///
    /// All bytes that are read at once have to be read into this, and no more: file descriptors are passed with bytes, and it
    /// is the bytes that tell whose they are.
    pub fn space(&mut self) -> &mut [u8] {
        self.answer_dropped();
        if self.ended || self.unsent_cost >= UNSENT { &mut [] } else { self.framing.space() }
    }

    /// So many bytes of [`space`](Self::space) are filled, and these file descriptors came with them. `fds_lost`: more did,
    /// and could not be taken, so the message is not what the client means: it is answered with `EMFILE`.
    ///
    /// Returns a request, if one is complete. What is wrong with a message is answered here.
    ///
    /// # Errors
    ///
    /// The client cannot be understood any more, and the session has ended: send what is to be sent, and close the connection.
    pub fn received(
        &mut self,
        bytes: usize,
        fds: impl IntoIterator<Item = OwnedFd>,
        fds_lost: bool,
    ) -> Result<Option<Request>, ProtocolError> {
        if self.ended || bytes == 0 {
            return Ok(None);
        }
        self.framing.take_fds(fds, fds_lost);
        let result = self.message(bytes);
        if result.is_err() {
            self.stop_reading();
        }
        result
    }

    /// Answers a request. An answer to another session's request is dropped.
    pub fn answer<A: Answer>(&mut self, ticket: Ticket<A>, answer: Result<A, Errno>) {
        let client_fds = self.client.map_or(0, |client| client.max_msg_fds.min(KERNEL_FDS as u64));
        if let Some(reply) = ticket.redeem(&self.dropped, answer, client_fds) {
            self.push(reply);
        }
    }

    /// What is to be sent next.
    pub fn outgoing(&mut self) -> Option<Outgoing<'_>> {
        self.answer_dropped();
        let reply = self.unsent.front()?;
        let fds = if self.sent == 0 { reply.fds.iter().map(AsFd::as_fd).collect() } else { Vec::new() };
        Some(Outgoing { bytes: reply.bytes.get(self.sent..).unwrap_or_default(), fds })
    }

    /// So many bytes of what is [`outgoing`](Self::outgoing) are sent.
    pub fn sent(&mut self, bytes: usize) {
        self.sent = self.sent.saturating_add(bytes);
        if let Some(reply) = self.unsent.pop_front_if(|reply| reply.bytes.len() <= self.sent) {
            self.unsent_cost -= cost(&reply);
            self.sent = 0;
        }
    }

    /// Ends the session: nothing is received any more, and nothing sent.
    pub fn end(&mut self) {
        self.stop_reading();
        self.unsent.clear();
        self.unsent_cost = 0;
        self.sent = 0;
    }

    /// Whether the session has ended.
    #[must_use]
    pub const fn is_ended(&self) -> bool {
        self.ended
    }

    /// What has come of a message is closed and forgotten.
    fn stop_reading(&mut self) {
        self.ended = true;
        self.framing = Framing::new(self.limits.fds());
    }

    fn message(&mut self, bytes: usize) -> Result<Option<Request>, ProtocolError> {
        let (client, limits) = (&self.client, &self.limits);
        match self.framing.received(bytes, |header| admit(header, client.is_some(), limits))? {
            None => Ok(None),
            Some(message) if message.header.command == command::VERSION => self.version(message).map(|()| None),
            Some(message) => Ok(self.command(message)),
        }
    }

    fn version(&mut self, Message { header, cargo }: Message) -> Result<(), ProtocolError> {
        let refusal = match (self.client, cargo) {
            (Some(_), _) => Ok(()),
            (None, Err(_)) => Err(ProtocolError::VersionData),
            (None, Ok(cargo)) => match version::negotiate(&cargo.body, &self.limits) {
                Ok((client, reply)) => {
                    self.client = Some(client);
                    self.reply(&header, Reply::new(&header, &reply));
                    return Ok(());
                }
                Err(error) => Err(error),
            },
        };
        self.reply(&header, Err(version::REFUSED));
        refusal
    }

    fn command(&mut self, Message { header, cargo }: Message) -> Option<Request> {
        let dropped = self.dropped.clone();
        let read = cargo
            .and_then(|cargo| request::read(header.command, cargo, &self.limits, || ReplyTo::new(header, dropped)));
        read.map_err(|errno| self.reply(&header, Err(errno))).ok()
    }

    /// Answers a message that nobody else sees.
    fn reply(&mut self, header: &Header, reply: Result<Reply, Errno>) {
        if header.flags & NO_REPLY == 0 {
            self.push(reply.unwrap_or_else(|errno| Reply::error(header, errno)));
        }
    }

    fn answer_dropped(&mut self) {
        for header in self.dropped.drain() {
            self.push(Reply::error(&header, Errno::IO));
        }
    }

    fn push(&mut self, reply: Reply) {
        if !self.ended {
            self.unsent_cost += cost(&reply);
            self.unsent.push_back(reply);
        }
    }
}

fn cost(reply: &Reply) -> usize {
    REPLY_COST + reply.bytes.len() + reply.fds.len() * FD_COST
}

/// What becomes of a message with this header.
fn admit(header: &Header, is_negotiated: bool, limits: &Limits) -> Result<Admission, ProtocolError> {
    let Header { command, size, flags, .. } = *header;
    let body = size.checked_sub(length::<Header>()).ok_or(ProtocolError::Size { size })?;
    if flags & TYPE != COMMAND {
        return Err(ProtocolError::NotACommand { flags });
    }
    if !is_negotiated && command != command::VERSION {
        return Err(ProtocolError::NoVersion { command });
    }
    Ok(match request::most(command, limits) {
        Ok(most) if body <= most => Admission::Keep,
        Ok(_) => Admission::Skip(Errno::MSGSIZE),
        Err(errno) => Admission::Skip(errno),
    })
}
