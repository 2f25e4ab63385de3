//! Who waits for an answer, and how answers are written.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS,
    VFIO_REGION_INFO_FLAG_MMAP,
};
use zerocopy::IntoBytes;

use super::info::{DeviceInfo, IoEventFd, IoEventFds, IrqInfo, RegionInfo};
use super::layout::{self, ERROR, Header, NO_REPLY, REPLY, length};
use super::request::Access;

const HEADER: usize = size_of::<Header>();

/// The right, and the duty, to answer a request: with an `A`, or with an error.
///
/// It is given to [`Session::answer`](super::Session::answer) or
/// [`Connection::answer`](crate::Connection::answer). Dropped, it answers `EIO`, the next time that its session does
/// anything. A ticket of a connection that has ended answers nobody.
#[must_use = "the client waits for an answer"]
pub struct Ticket<A: Answer> {
    to: ReplyTo,
    echo: A::Echo,
}

impl<A: Answer> Ticket<A> {
    pub(super) const fn new(to: ReplyTo, echo: A::Echo) -> Self {
        Self { to, echo }
    }

    /// Whether the client waits. If not, it takes no answer, not even an error.
    #[must_use]
    pub const fn is_waited_for(&self) -> bool {
        self.to.header.flags & NO_REPLY == 0
    }

    /// The reply, in the session that this is a ticket of; `None` if none is wanted.
    pub(super) fn redeem(self, owner: &Dropped, answer: Result<A, Errno>, client_fds: u64) -> Option<Reply> {
        let Self { to, echo } = self;
        let header = to.take(owner)?;
        let answer = if client_fds == 0 { answer.map(A::without_fds) } else { answer };
        let written = answer.and_then(|answer| answer.write(echo));
        let reply = written.and_then(|reply| reply.finish(&header, client_fds));
        Some(reply.unwrap_or_else(|errno| Reply::error(&header, errno)))
    }
}

impl Ticket<ReadData> {
    /// The place for the data that is read, filled with zeros.
    #[must_use]
    pub fn buffer(&self) -> ReadData {
        // What may be read at once is limited, and fits.
        let count = usize::try_from(self.echo.count).unwrap_or_default();
        ReadData { bytes: vec![0; ReadData::HEAD + count] }
    }
}

impl<A: Answer> fmt::Debug for Ticket<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Header { id, command, .. } = self.to.header;
        f.debug_struct("Ticket").field("id", &id).field("command", &command).finish_non_exhaustive()
    }
}

/// The message that an answer is for.
pub(super) struct ReplyTo {
    header: Header,
    owner: Dropped,
    answered: bool,
}

impl ReplyTo {
    pub(super) const fn new(header: Header, owner: Dropped) -> Self {
        Self { header, owner, answered: false }
    }

    /// The message, if it is of this owner's and wants an answer.
    fn take(mut self, owner: &Dropped) -> Option<Header> {
        self.answered = Arc::ptr_eq(&self.owner.0, &owner.0);
        (self.answered && self.header.flags & NO_REPLY == 0).then_some(self.header)
    }
}

impl Drop for ReplyTo {
    fn drop(&mut self) {
        if !self.answered && self.header.flags & NO_REPLY == 0 {
            self.owner.lock().push(self.header);
        }
    }
}

/// The messages whose tickets were dropped, and the identity of the session that is to answer them.
#[derive(Clone, Debug, Default)]
pub(super) struct Dropped(Arc<Mutex<Vec<Header>>>);

impl Dropped {
    pub(super) fn drain(&self) -> Vec<Header> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Header>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A message to the client.
#[derive(Debug)]
pub(super) struct Reply {
    /// The whole message, with its header.
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Reply {
    /// A reply that says why there is no answer.
    pub(super) fn error(header: &Header, errno: Errno) -> Self {
        let error = u32::try_from(errno.raw_os_error()).unwrap_or_default();
        let header = Header { size: length::<Header>(), flags: REPLY | ERROR, error, ..*header };
        Self { bytes: header.as_bytes().to_vec(), fds: Vec::new() }
    }

    /// A reply of this body.
    pub(super) fn new(header: &Header, body: &[u8]) -> Result<Self, Errno> {
        Written::bytes(&[body]).finish(header, 0)
    }
}

/// A reply but for its header.
#[derive(Debug)]
pub struct Written {
    /// Room for the header, then the body.
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Written {
    fn bytes(parts: &[&[u8]]) -> Self {
        Self { bytes: [&[0; HEADER], &*parts.concat()].concat(), fds: Vec::new() }
    }

    fn with_fds(self, fds: Vec<OwnedFd>) -> Self {
        Self { fds, ..self }
    }

    fn finish(self, header: &Header, client_fds: u64) -> Result<Reply, Errno> {
        let Self { mut bytes, fds } = self;
        if fds.len() as u64 > client_fds {
            return Err(Errno::TOOBIG);
        }
        let size = u32::try_from(bytes.len()).map_err(|_| Errno::TOOBIG)?;
        let header = Header { size, flags: REPLY, error: 0, ..*header };
        bytes.get_mut(..HEADER).ok_or(Errno::IO)?.copy_from_slice(header.as_bytes());
        Ok(Reply { bytes, fds })
    }
}

/// What a request is answered with.
///
/// These are the types in [`Request`](super::Request)'s tickets, and no others: `()` says that it is done.
pub trait Answer: sealed::Write {}

mod sealed {
    use super::{Errno, Written};

    /// How an answer is written, which no other crate does.
    pub trait Write: Sized {
        /// What of the request is needed for it.
        type Echo: Send + 'static;

        fn write(self, echo: Self::Echo) -> Result<Written, Errno>;

        /// What of it is for a client that takes no file descriptors.
        fn without_fds(self) -> Self {
            self
        }
    }
}

impl Answer for () {}
impl sealed::Write for () {
    /// The body.
    type Echo = Vec<u8>;

    fn write(self, body: Vec<u8>) -> Result<Written, Errno> {
        Ok(Written::bytes(&[&body]))
    }
}

impl Answer for DeviceInfo {}
impl sealed::Write for DeviceInfo {
    type Echo = ();

    fn write(self, (): ()) -> Result<Written, Errno> {
        let reset = if self.resettable { VFIO_DEVICE_FLAGS_RESET } else { 0 };
        let info = layout::DeviceInfo {
            argsz: length::<layout::DeviceInfo>(),
            flags: VFIO_DEVICE_FLAGS_PCI | reset,
            regions: self.regions,
            irqs: self.irqs,
        };
        Ok(Written::bytes(&[info.as_bytes()]))
    }
}

/// How long a reply the client takes, and which region it asked for.
#[derive(Clone, Copy, Debug)]
pub struct RegionEcho {
    pub(super) argsz: u32,
    pub(super) index: u32,
}

impl Answer for RegionInfo {}
impl sealed::Write for RegionInfo {
    type Echo = RegionEcho;

    /// If the client takes too short a reply for the list of areas, it learns how long it is, and asks again. The rest is then
    /// as in the whole reply, but for the file: QEMU takes an offset of 0 for a fault, and nobody maps without the areas.
    fn write(self, RegionEcho { argsz, index }: RegionEcho) -> Result<Written, Errno> {
        let Self { flags, size, mapping } = self;
        let mut info = layout::RegionInfo {
            argsz: length::<layout::RegionInfo>(),
            flags: flags.bits(),
            index,
            cap_offset: 0,
            size,
            offset: 0,
        };
        let Some(mapping) = mapping.filter(|mapping| mapping.areas.as_ref().is_none_or(|areas| !areas.is_empty()))
        else {
            return Ok(Written::bytes(&[info.as_bytes()]));
        };
        info.flags |= VFIO_REGION_INFO_FLAG_MMAP;
        info.offset = mapping.offset;
        let mut capability = Vec::new();
        if let Some(areas) = mapping.areas {
            capability = sparse_mmap(&areas)?;
            info.flags |= VFIO_REGION_INFO_FLAG_CAPS;
            info.cap_offset = info.argsz;
            info.argsz = u32::try_from(capability.len())
                .ok()
                .and_then(|more| info.argsz.checked_add(more))
                .ok_or(Errno::TOOBIG)?;
        }
        if info.argsz > argsz {
            return Ok(Written::bytes(&[info.as_bytes()]));
        }
        Ok(Written::bytes(&[info.as_bytes(), &capability]).with_fds(vec![mapping.fd]))
    }

    /// Such a client reads and writes by messages.
    fn without_fds(self) -> Self {
        Self { mapping: None, ..self }
    }
}

/// The capability that lists areas.
fn sparse_mmap(areas: &[super::info::Area]) -> Result<Vec<u8>, Errno> {
    let head = layout::SparseMmap {
        #[allow(clippy::cast_possible_truncation, reason = "it is 1")]
        id: VFIO_REGION_INFO_CAP_SPARSE_MMAP as u16,
        version: 1,
        next: 0,
        areas: u32::try_from(areas.len()).map_err(|_| Errno::TOOBIG)?,
        reserved: 0,
    };
    let areas: Vec<_> = areas.iter().map(|area| layout::SparseArea { offset: area.offset, size: area.size }).collect();
    Ok([head.as_bytes(), areas.as_bytes()].concat())
}

/// How long a reply the client takes, and which region it asked for.
#[derive(Clone, Copy, Debug)]
pub struct IoFdsEcho {
    pub(super) argsz: u32,
    pub(super) index: u32,
}

impl Answer for IoEventFds {}
impl sealed::Write for IoEventFds {
    type Echo = IoFdsEcho;

    /// If the client takes too short a reply, it learns how long it is, and asks again.
    fn write(self, IoFdsEcho { argsz, index }: IoFdsEcho) -> Result<Written, Errno> {
        let Self { events, fds } = self;
        let events: Vec<_> = events.into_iter().map(layout::IoEventFd::from).collect();
        let mut head = layout::RegionIoFds {
            argsz: length::<layout::RegionIoFds>(),
            flags: 0,
            index,
            count: u32::try_from(events.len()).map_err(|_| Errno::TOOBIG)?,
        };
        let more = u32::try_from(events.as_bytes().len()).map_err(|_| Errno::TOOBIG)?;
        head.argsz = head.argsz.checked_add(more).ok_or(Errno::TOOBIG)?;
        if head.argsz > argsz {
            return Ok(Written::bytes(&[head.as_bytes()]));
        }
        Ok(Written::bytes(&[head.as_bytes(), events.as_bytes()]).with_fds(fds))
    }
}

impl From<IoEventFd> for layout::IoEventFd {
    fn from(IoEventFd { offset, size, value, fd }: IoEventFd) -> Self {
        /// Of KVM's ioeventfds.
        const DATAMATCH: u32 = 1;
        let flags = if value.is_some() { DATAMATCH } else { 0 };
        Self { offset, size, fd_index: fd, kind: 0, flags, padding: 0, datamatch: value.unwrap_or_default() }
    }
}

impl Answer for IrqInfo {}
impl sealed::Write for IrqInfo {
    /// The index.
    type Echo = u32;

    fn write(self, index: u32) -> Result<Written, Errno> {
        let argsz = length::<layout::IrqInfo>();
        let info = layout::IrqInfo { argsz, flags: self.flags.bits(), index, count: self.count };
        Ok(Written::bytes(&[info.as_bytes()]))
    }
}

/// What is read of a region: [`Ticket::buffer`] makes one, and the device fills it.
#[derive(Debug)]
pub struct ReadData {
    /// The reply: room for what is before the data, then the data.
    bytes: Vec<u8>,
}

impl ReadData {
    const HEAD: usize = HEADER + size_of::<layout::RegionAccess>();
}

impl Deref for ReadData {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(Self::HEAD..).unwrap_or_default()
    }
}

impl DerefMut for ReadData {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(Self::HEAD..).unwrap_or_default()
    }
}

impl Answer for ReadData {}
impl sealed::Write for ReadData {
    type Echo = Access;

    fn write(self, access: Access) -> Result<Written, Errno> {
        // The buffer may be another ticket's.
        if usize::try_from(access.count) != Ok(self.len()) {
            return Err(Errno::IO);
        }
        let mut bytes = self.bytes;
        let head = bytes.get_mut(HEADER..Self::HEAD).ok_or(Errno::IO)?;
        head.copy_from_slice(layout::RegionAccess::from(access).as_bytes());
        Ok(Written { bytes, fds: Vec::new() })
    }
}
