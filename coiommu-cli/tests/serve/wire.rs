//! A VMM's end of vfio-user, written from the specification and by no code of the library.
//!
//! A call waits for its reply; an error is the number in it.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use crate::PATIENCE;

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

/// What may be done with memory that is mapped.
pub(crate) const READ: u32 = 1;
pub(crate) const WRITE: u32 = 2;

/// The regions: three BARs, and config space.
pub(crate) const BAR0: u32 = 0;
pub(crate) const BAR2: u32 = 2;
pub(crate) const BAR4: u32 = 4;
pub(crate) const CONFIG: u32 = 7;

/// The errors that are looked for.
pub(crate) const ENOENT: u32 = 2;
pub(crate) const EEXIST: u32 = 17;
pub(crate) const EINVAL: u32 = 22;
pub(crate) const ENOTSUP: u32 = 95;

/// A region as the server tells of it.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) flags: u32,
    pub(crate) size: u64,
    pub(crate) offset: u64,
    pub(crate) file: Option<File>,
}

/// A connection that both ends have agreed on.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) stream: UnixStream,
    next: u16,
}

impl Wire {
    pub(crate) fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut wire = Self { stream, next: 0 };
        let capabilities = br#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576}}"#;
        wire.call(VERSION, &[&[0; 4], &capabilities[..], &[0]].concat(), &[]).unwrap();
        wire
    }

    /// Sends a command, and waits for what comes of it: a body and files, or an error.
    pub(crate) fn call(
        &mut self,
        command: u16,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Vec<u8>, Vec<OwnedFd>), u32> {
        let id = self.next;
        self.next = self.next.wrapping_add(1);
        self.send(&message(id, command, 0, body), fds);
        let (header, body, fds) = self.receive();
        assert_eq!(&header[..4], [id.to_ne_bytes(), command.to_ne_bytes()].concat());
        let [_, flags, error] = [4, 8, 12].map(|at| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap()));
        match flags {
            1 => Ok((body, fds)),
            0x21 => Err(error),
            _ => panic!("a reply with flags {flags:#x}"),
        }
    }

    /// Memory that the device may use.
    pub(crate) fn dma_map(&mut self, gpa: u64, bytes: u64, flags: u32, file: Option<(&File, u64)>) -> Result<(), u32> {
        let (fd, offset) = file.map_or((None, 0), |(file, offset)| (Some(file.as_fd()), offset));
        let body = [u32s(&[32, flags]), u64s(&[offset, gpa, bytes])].concat();
        self.call(DMA_MAP, &body, fd.as_slice()).map(drop)
    }

    pub(crate) fn dma_unmap(&mut self, gpa: u64, bytes: u64) -> Result<(), u32> {
        self.call(DMA_UNMAP, &[u32s(&[24, 0]), u64s(&[gpa, bytes])].concat(), &[]).map(drop)
    }

    pub(crate) fn dma_unmap_all(&mut self) -> Result<(), u32> {
        self.call(DMA_UNMAP, &[u32s(&[24, 2]), u64s(&[0, 0])].concat(), &[]).map(drop)
    }

    /// So many bytes of a region.
    pub(crate) fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, u32> {
        let asked = [u64s(&[offset]), u32s(&[region, count])].concat();
        let (body, _) = self.call(REGION_READ, &asked, &[])?;
        let data = body.strip_prefix(asked.as_slice()).unwrap();
        assert_eq!(data.len(), usize::try_from(count).unwrap());
        Ok(data.to_vec())
    }

    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), u32> {
        self.call(REGION_WRITE, &write_of(region, offset, data), &[]).map(drop)
    }

    pub(crate) fn read_u64(&mut self, region: u32, offset: u64) -> u64 {
        u64::from_le_bytes(self.read(region, offset, 8).unwrap().try_into().unwrap())
    }

    pub(crate) fn region(&mut self, index: u32) -> Result<Region, u32> {
        let (body, fds) = self.call(GET_REGION_INFO, &[u32s(&[32, 0, index, 0]), u64s(&[0, 0])].concat(), &[])?;
        let at = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().unwrap());
        let flags = u32::from_ne_bytes(body[4..8].try_into().unwrap());
        let file = fds.into_iter().next().map(File::from);
        Ok(Region { flags, size: at(16), offset: at(24), file })
    }

    pub(crate) fn reset(&mut self) {
        self.call(RESET, &[], &[]).unwrap();
    }

    /// Sees that the server has closed the connection.
    #[track_caller]
    pub(crate) fn assert_closed(&mut self) {
        match self.stream.read(&mut [0]) {
            Ok(bytes) => assert_eq!(bytes, 0, "something comes"),
            // With something unread.
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }

    fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        if fds.is_empty() {
            return self.stream.write_all(bytes).unwrap();
        }
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut ancillary = SendAncillaryBuffer::new(&mut room);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        assert_eq!(sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL), Ok(bytes.len()));
    }

    fn receive(&mut self) -> ([u8; 16], Vec<u8>, Vec<OwnedFd>) {
        let (mut header, mut filled, mut fds) = ([0; 16], 0, Vec::new());
        while filled < header.len() {
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut room);
            let mut space = [IoSliceMut::new(&mut header[filled..])];
            let received = recvmsg(&self.stream, &mut space, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
            assert_ne!(received.bytes, 0, "the server has closed the connection");
            filled += received.bytes;
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    fds.extend(rights);
                }
            }
        }
        let size = u32::from_ne_bytes(header[4..8].try_into().unwrap());
        let mut body = vec![0; usize::try_from(size).unwrap() - header.len()];
        self.stream.read_exact(&mut body).unwrap();
        (header, body, fds)
    }
}

/// A message: a header, and what follows it.
pub(crate) fn message(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = 16 + u32::try_from(body.len()).unwrap();
    [&id.to_ne_bytes()[..], &command.to_ne_bytes(), &u32s(&[size, flags, 0]), body].concat()
}

/// A region write that nobody waits for.
pub(crate) fn posted_write(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    message(0, REGION_WRITE, 0x10, &write_of(region, offset, data))
}

fn write_of(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    [u64s(&[offset]), u32s(&[region, u32::try_from(data.len()).unwrap()]), data.to_vec()].concat()
}

pub(crate) fn u32s(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

pub(crate) fn u64s(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}
