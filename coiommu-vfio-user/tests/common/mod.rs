//! What a client sends, written from the specification and by no code of the library.
#![allow(dead_code, reason = "no test needs all of it")]

use std::fs::File;
use std::os::fd::OwnedFd;

use coiommu_vfio_user::{ProtocolError, Request, Session};

pub(crate) const VERSION: u16 = 1;
pub(crate) const DMA_MAP: u16 = 2;
pub(crate) const DMA_UNMAP: u16 = 3;
pub(crate) const GET_INFO: u16 = 4;
pub(crate) const GET_REGION_INFO: u16 = 5;
pub(crate) const GET_REGION_IO_FDS: u16 = 6;
pub(crate) const GET_IRQ_INFO: u16 = 7;
pub(crate) const SET_IRQS: u16 = 8;
pub(crate) const REGION_READ: u16 = 9;
pub(crate) const REGION_WRITE: u16 = 10;
pub(crate) const RESET: u16 = 13;

pub(crate) const NO_REPLY: u32 = 0x10;

/// A message: a header, and what follows it.
pub(crate) fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    header(id, command, 16 + u32::try_from(body.len()).unwrap(), flags, 0, body)
}

pub(crate) fn header(id: u16, command: u16, size: u32, flags: u32, error: u32, body: &[u8]) -> Vec<u8> {
    let head = [&id.to_ne_bytes()[..], &command.to_ne_bytes()].concat();
    [&head[..], &u32s(&[size, flags, error]), body].concat()
}

/// A reply as a client expects it.
pub(crate) fn reply(id: u16, command: u16, body: &[u8]) -> Vec<u8> {
    message(id, command, 1, body)
}

/// A reply that is an error.
pub(crate) fn error(id: u16, command: u16, errno: u32) -> Vec<u8> {
    header(id, command, 16, 0x21, errno, &[])
}

pub(crate) fn u32s(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

pub(crate) fn u64s(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

/// The VERSION that QEMU begins with.
pub(crate) fn version() -> Vec<u8> {
    let data = br#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"write_multiple":true}}"#;
    message(0, VERSION, 0, &[&[0; 4], &data[..], &[0]].concat())
}

pub(crate) fn dma_map(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    [u32s(&[32, flags]), u64s(&[offset, address, size])].concat()
}

pub(crate) fn dma_unmap(flags: u32, address: u64, size: u64) -> Vec<u8> {
    [u32s(&[24, flags]), u64s(&[address, size])].concat()
}

pub(crate) fn access(region: u32, offset: u64, count: u32) -> Vec<u8> {
    [u64s(&[offset]), u32s(&[region, count])].concat()
}

/// So many open files.
pub(crate) fn files(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| File::open("/dev/null").unwrap().into()).collect()
}

/// Gives a session bytes, in pieces of at most `piece`, until they end or give a request; `fds` come with the first. Returns
/// how many bytes were taken.
pub(crate) fn feed(
    session: &mut Session,
    bytes: &[u8],
    mut fds: Vec<OwnedFd>,
    piece: usize,
) -> (usize, Result<Option<Request>, ProtocolError>) {
    let mut taken = 0;
    while taken < bytes.len() {
        let space = session.space();
        let count = space.len().min(piece).min(bytes.len() - taken);
        if count == 0 {
            break;
        }
        space[..count].copy_from_slice(&bytes[taken..taken + count]);
        taken += count;
        match session.received(count, fds.drain(..), false) {
            Ok(None) => {}
            event => return (taken, event),
        }
    }
    (taken, Ok(None))
}

/// All that a session has to send: the messages, and how many file descriptors go with each.
pub(crate) fn sent(session: &mut Session) -> Vec<(Vec<u8>, usize)> {
    let mut all = Vec::new();
    while let Some(outgoing) = session.outgoing() {
        let (bytes, fds) = (outgoing.bytes.to_vec(), outgoing.fds.len());
        session.sent(bytes.len());
        all.push((bytes, fds));
    }
    all
}
