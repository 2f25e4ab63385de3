//! Where a message begins and ends in the stream, and which file descriptors came with it.
//!
//! What is read never goes past the end of a message: the file descriptors that a read returns belong to the message whose
//! bytes it returns, which is the only way to tell.

use std::mem::take;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::layout::Header;

/// How much of a body is read at once, so how much a client makes us hold that has sent nothing.
const CHUNK: usize = 64 << 10;
/// How much of a body that is skipped is read at once.
const SKIPPED: usize = 4 << 10;

/// A message with its last byte.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    /// What it carries, or why that was not kept.
    pub(super) cargo: Result<Cargo, Errno>,
}

/// What a message carries behind its header.
#[derive(Debug)]
pub(super) struct Cargo {
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// What becomes of a message whose header is known.
#[derive(Clone, Copy, Debug)]
pub(super) enum Admission {
    Keep,
    Skip(Errno),
}

#[derive(Debug)]
enum Part {
    Header,
    Body(Header),
    /// A body that is not kept, and how much of it is still to come.
    Skipped(Header, usize, Errno),
}

/// One client's stream.
#[derive(Debug)]
pub(super) struct Framing {
    part: Part,
    header: Header,
    /// How many bytes of `header` or of `body` are there.
    filled: usize,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// What was wrong with the file descriptors.
    fault: Option<Errno>,
    max_fds: usize,
}

impl Framing {
    pub(super) fn new(max_fds: usize) -> Self {
        let header = Header { id: 0, command: 0, size: 0, flags: 0, error: 0 };
        Self { part: Part::Header, header, filled: 0, body: Vec::new(), fds: Vec::new(), fault: None, max_fds }
    }

    /// Whether a message has begun and not ended.
    pub(super) fn is_inside(&self) -> bool {
        !matches!(self.part, Part::Header) || self.filled > 0
    }

    /// Where the next bytes of the stream go: some, never none, and none of the next message.
    pub(super) fn space(&mut self) -> &mut [u8] {
        let end = match self.part {
            Part::Header => return self.header.as_mut_bytes().get_mut(self.filled..).unwrap_or_default(),
            Part::Body(header) => self.filled + left(&header, self.filled).min(CHUNK),
            Part::Skipped(_, left, _) => left.min(SKIPPED),
        };
        self.body.resize(end, 0);
        self.body.get_mut(self.filled..).unwrap_or_default()
    }

    /// Takes note of file descriptors that came with the bytes that [`received`](Self::received) will be told of.
    pub(super) fn take_fds(&mut self, fds: impl IntoIterator<Item = OwnedFd>, lost: bool) {
        for fd in fds {
            if self.fds.len() == self.max_fds {
                self.fault = Some(Errno::TOOBIG);
            } else {
                self.fds.push(fd);
            }
        }
        if lost {
            self.fault = Some(Errno::MFILE);
        }
    }

    /// So many bytes of [`space`](Self::space) are filled. Returns a message if that was its last part; `admit` decides once
    /// its header is there.
    pub(super) fn received<E>(
        &mut self,
        bytes: usize,
        admit: impl FnOnce(&Header) -> Result<Admission, E>,
    ) -> Result<Option<Message>, E> {
        match &mut self.part {
            Part::Header => {
                self.filled = size_of::<Header>().min(self.filled.saturating_add(bytes));
                if self.filled < size_of::<Header>() {
                    return Ok(None);
                }
                let header = self.header;
                self.filled = 0;
                self.part = match admit(&header)? {
                    Admission::Keep => Part::Body(header),
                    Admission::Skip(errno) => Part::Skipped(header, left(&header, 0), errno),
                };
            }
            Part::Body(_) => self.filled = self.body.len().min(self.filled.saturating_add(bytes)),
            Part::Skipped(_, left, _) => *left = left.saturating_sub(bytes),
        }
        Ok(self.message())
    }

    /// The message, if all of it is there.
    fn message(&mut self) -> Option<Message> {
        let (header, refused) = match self.part {
            Part::Body(header) if left(&header, self.filled) == 0 => (header, None),
            Part::Skipped(header, 0, errno) => (header, Some(errno)),
            _ => return None,
        };
        self.part = Part::Header;
        self.filled = 0;
        let (body, fds) = (take(&mut self.body), take(&mut self.fds));
        let cargo = match refused.or(self.fault.take()) {
            None => Ok(Cargo { body, fds }),
            Some(errno) => Err(errno),
        };
        Some(Message { header, cargo })
    }
}

/// How much of a body is still to come when so much of it is there.
fn left(header: &Header, filled: usize) -> usize {
    let size = usize::try_from(header.size).unwrap_or(usize::MAX);
    size.saturating_sub(size_of::<Header>()).saturating_sub(filled)
}
