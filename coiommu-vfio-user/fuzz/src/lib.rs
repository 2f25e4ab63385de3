//! Fuzzing the protocol: any stream of a client, in any pieces.
//!
//! That memory stays bounded is for the fuzzer's limits to find (`cargo xtask fuzz wire` sets them).

mod server;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::LazyLock;

use coiommu_vfio_user::{Limits, Session};
use server::{Request, Server};

/// Plays a stream twice, in pieces as large as they come and in others.
///
/// The first byte of an input says what the server takes, the second how the stream is cut; the rest is the stream. How many
/// file descriptors come with a message, and whether some are lost, is in its id.
///
/// # Panics
///
/// If the pieces make a difference, or a message has not one reply, if it wants one.
pub fn wire(input: &[u8]) {
    let [limits, cuts, stream @ ..] = input else { return };
    let limits = Limits::default().max_msg_fds(usize::from(limits & 3)).max_data_xfer_size(u32::from(limits >> 2) << 8);
    let whole = play(limits, stream, usize::MAX..=usize::MAX);
    let cut = play(limits, stream, 1..=usize::from(*cuts) + 1);
    assert_eq!(whole, cut);
    whole.check(stream);
}

/// What came of a stream.
#[derive(Debug, Default, PartialEq)]
struct Transcript {
    requests: Vec<Request>,
    /// What the server sent, and with how many file descriptors.
    replies: Vec<(Vec<u8>, usize)>,
    /// How much of the stream was taken.
    taken: usize,
    /// Whether the stream was one.
    ended: bool,
}

/// Plays a stream; its pieces have these lengths, over and over.
fn play(limits: Limits, stream: &[u8], pieces: std::ops::RangeInclusive<usize>) -> Transcript {
    let mut session = Session::new(limits);
    let mut server = Server::default();
    let mut transcript = Transcript::default();
    for piece in pieces.cycle() {
        let rest = &stream[transcript.taken..];
        let space = session.space();
        let count = space.len().min(rest.len()).min(piece);
        if count == 0 {
            break;
        }
        space[..count].copy_from_slice(&rest[..count]);
        transcript.taken += count;
        let (fds, lost) = if session.is_inside_message() { (0, false) } else { fds_with(rest) };
        match session.received(count, (0..fds).map(|_| file()), lost) {
            Ok(None) => {}
            Ok(Some(request)) => transcript.requests.push(server.serve(&mut session, request)),
            Err(_) => transcript.ended = true,
        }
        transcript.take_replies(&mut session);
    }
    server.answer_late(&mut session);
    transcript.take_replies(&mut session);
    assert_eq!(transcript.ended, session.is_ended());
    transcript
}

/// How many file descriptors come with the message that is to come, and whether some are lost.
fn fds_with(message: &[u8]) -> (u8, bool) {
    // A first byte alone, in the pieces, must not be another message than with the second.
    message.first().map_or((0, false), |id| (id & 3, id & 0xc0 == 0xc0))
}

fn file() -> OwnedFd {
    static FILE: LazyLock<File> = LazyLock::new(|| File::open("/dev/null").expect("/dev/null"));
    FILE.try_clone().expect("few files are open").into()
}

impl Transcript {
    fn take_replies(&mut self, session: &mut Session) {
        while let Some(outgoing) = session.outgoing() {
            let reply = (outgoing.bytes.to_vec(), outgoing.fds.len());
            session.sent(reply.0.len());
            self.replies.push(reply);
        }
    }

    /// Every message has its reply, and nothing else is sent.
    fn check(&self, stream: &[u8]) {
        let mut expected = Vec::new();
        let mut rest = &stream[..self.taken];
        while let Some(size) = number::<4>(rest, 4).map(u32::from_ne_bytes) {
            let Some(message) = usize::try_from(size).ok().and_then(|size| rest.get(..size)) else { break };
            // What is shorter than a header is no message, and ends a session.
            let Some(header) = message.first_chunk::<16>() else { break };
            let (start, flags) = (&header[..4], number::<4>(header, 8).map_or(0, u32::from_ne_bytes));
            // What ends a session has no reply, unless it is a version.
            let is_last = self.ended && message.len() == rest.len();
            if flags & 0x10 == 0 && !(is_last && start[2..] != 1_u16.to_ne_bytes()) && flags & 0xf == 0 {
                expected.push(start.to_vec());
            }
            rest = &rest[message.len()..];
        }
        for (reply, fds) in &self.replies {
            assert_eq!(number::<4>(reply, 4).map(u32::from_ne_bytes), u32::try_from(reply.len()).ok());
            match number::<4>(reply, 8).map(u32::from_ne_bytes) {
                Some(1) => assert_eq!(number::<4>(reply, 12), Some([0; 4])),
                Some(0x21) => assert!(reply.len() == 16 && *fds == 0 && number::<4>(reply, 12) != Some([0; 4])),
                flags => panic!("{flags:?}"),
            }
            let asked = expected.iter().position(|start| *start == reply[..4]).expect("nobody asked");
            expected.swap_remove(asked);
        }
        // Where there is an end, answers may come too late.
        assert!(expected.is_empty() || self.ended, "{expected:x?}");
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}
