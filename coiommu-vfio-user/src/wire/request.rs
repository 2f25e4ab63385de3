//! Commands that make sense: what a client asks for, in types that hold nothing else.

use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::OwnedFd;

use bitflags::bitflags;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
    VFIO_DMA_UNMAP_FLAG_VADDR, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TYPE_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_IRQ_SET_DATA_TYPE_MASK,
};
use zerocopy::{FromBytes, IntoBytes};

use super::answer::{IoFdsEcho, ReadData, RegionEcho, ReplyTo, Ticket};
use super::framing::Cargo;
use super::info::{DeviceInfo, IoEventFds, IrqInfo, RegionInfo};
use super::layout::{self, command, length};
use super::version::Limits;

/// How long a body may be of a command that carries no data: a SET_IRQS has a byte for each of 2,048 vectors, a VERSION some
/// hundred bytes of JSON.
const MOST: u32 = 4 << 10;

/// What a client asks for. Each comes with the ticket that answers it.
///
/// Regions and interrupts are named by indexes, and lie where the client says: whether the device has them is for the
/// embedder to say, which answers `EINVAL` if not.
#[derive(Debug)]
#[non_exhaustive]
pub enum Request {
    /// Memory that the device may access from now on. `EEXIST` if there is some already.
    DmaMap(DmaMap, Ticket<()>),
    /// Memory that the device may not access any more, and does not when this is answered.
    DmaUnmap(DmaUnmap, Ticket<()>),
    /// What the device is.
    DeviceInfo(Ticket<DeviceInfo>),
    /// What the region of this index is.
    RegionInfo(u32, Ticket<RegionInfo>),
    /// Which eventfds there are for writes to the region of this index. No client is known that asks; `ENOTSUP` is an answer.
    RegionIoFds(u32, Ticket<IoEventFds>),
    /// What interrupts of the kind with this index there are.
    IrqInfo(u32, Ticket<IrqInfo>),
    /// Set up, mask, unmask or trigger interrupts.
    SetIrqs(SetIrqs, Ticket<()>),
    /// Read a region. [`Ticket::buffer`] has the place for the data.
    RegionRead(Access, Ticket<ReadData>),
    /// Write to a region.
    RegionWrite(RegionWrite, Ticket<()>),
    /// Reset the device. Mappings of memory and eventfds stay.
    Reset(Ticket<()>),
}

bitflags! {
    /// What a device may do with memory.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct DmaFlags: u32 {
        /// Read it.
        const READ = VFIO_DMA_MAP_FLAG_READ;
        /// Write it.
        const WRITE = VFIO_DMA_MAP_FLAG_WRITE;
    }
}

/// Addresses of memory as the device sees it: at least one, and none past the last that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRange {
    start: u64,
    size: NonZeroU64,
}

impl DmaRange {
    /// So many bytes from `start` on; `None` if they are none, or end past the last address.
    #[must_use]
    pub fn new(start: u64, size: u64) -> Option<Self> {
        start.checked_add(size.checked_sub(1)?)?;
        Some(Self { start, size: NonZeroU64::new(size)? })
    }

    /// The first address.
    #[must_use]
    pub const fn start(&self) -> u64 {
        self.start
    }

    /// How many bytes there are; not 0.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size.get()
    }

    /// The last address.
    #[must_use]
    pub const fn last(&self) -> u64 {
        self.start + (self.size.get() - 1)
    }
}

/// Memory that the device may access.
#[derive(Debug)]
pub struct DmaMap {
    /// Where the device sees it.
    pub range: DmaRange,
    /// What it may do there.
    pub flags: DmaFlags,
    /// The file that it is; `None`: the client keeps it to itself, as QEMU does with other devices' regions, and with all RAM
    /// that is not shared memory.
    pub file: Option<DmaFile>,
}

/// Where memory is in a file. Nothing is known of the file: it may be shorter, or shrink.
#[derive(Debug)]
pub struct DmaFile {
    /// The file.
    pub fd: OwnedFd,
    /// Where the memory begins in it, in bytes. It does not go past the last offset that a file can have, which is `i64::MAX`.
    pub offset: u64,
}

/// Memory that the device may not access any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaUnmap {
    /// What was mapped here, by one request.
    Range(DmaRange),
    /// All there is.
    All,
}

/// A place in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The region's index.
    pub region: u32,
    /// Where it begins, in bytes from the region's beginning; the end is not past the last offset that there is.
    pub offset: u64,
    /// How many bytes there are: not 0, and no more than [`Limits::max_data_xfer_size`].
    pub count: u32,
}

impl Access {
    /// Whether all of it is in a region of this size.
    #[must_use]
    pub fn is_within(&self, size: u64) -> bool {
        size.checked_sub(self.offset).is_some_and(|left| u64::from(self.count) <= left)
    }
}

/// A write to a region.
#[derive(Debug)]
pub struct RegionWrite {
    access: Access,
    body: Vec<u8>,
}

impl RegionWrite {
    /// Where.
    #[must_use]
    pub const fn access(&self) -> Access {
        self.access
    }

    /// What is written: as many bytes as the access has.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        self.body.get(size_of::<layout::RegionAccess>()..).unwrap_or_default()
    }
}

/// Interrupts of a kind: at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqRange {
    start: u32,
    /// One more than the last.
    end: u32,
}

impl IrqRange {
    /// So many from `start` on; `None` if they are none, or past what can be counted.
    #[must_use]
    pub fn new(start: u32, count: u32) -> Option<Self> {
        let end = start.checked_add(count)?;
        (count > 0).then_some(Self { start, end })
    }

    /// The first.
    #[must_use]
    pub const fn start(&self) -> u32 {
        self.start
    }

    /// How many there are; not 0. A client can say any number: see [`within`](Self::within).
    #[must_use]
    pub const fn count(&self) -> u32 {
        self.end - self.start
    }

    /// These interrupts as indexes, if the device has so many of the kind.
    #[must_use]
    pub fn within(&self, interrupts: u32) -> Option<Range<usize>> {
        let start = usize::try_from(self.start).ok()?;
        let end = usize::try_from(self.end).ok()?;
        (self.end <= interrupts).then_some(start..end)
    }
}

/// What happens to interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// They are masked.
    Mask,
    /// They are not masked any more.
    Unmask,
    /// They are triggered.
    Trigger,
}

/// A change to interrupts of a kind.
#[derive(Debug)]
pub struct SetIrqs {
    /// The kind.
    pub index: u32,
    /// What changes.
    pub change: IrqChange,
}

/// What changes for interrupts.
///
/// Clients send many eventfds in pieces, and one piece for those that are to have none: a device with VFIO below it, which
/// wants to know with the first how many there will be, has to remember them. [`Unassign`](Self::Unassign) may come before any
/// other: QEMU enables MSI-X so, where it can be resized.
#[derive(Debug)]
pub enum IrqChange {
    /// Disable all of the kind: no eventfd is signalled any more.
    Disable,
    /// When `action` happens to these, signal these eventfds: one each.
    Assign {
        /// What is waited for.
        action: IrqAction,
        /// Which interrupts.
        range: IrqRange,
        /// As many as the range has. Nothing is known of them: they may be any files, and writing to them may block.
        eventfds: Vec<OwnedFd>,
    },
    /// When `action` happens to these, signal nothing any more.
    Unassign {
        /// What was waited for.
        action: IrqAction,
        /// Which interrupts.
        range: IrqRange,
    },
    /// Do this now.
    Act {
        /// What.
        action: IrqAction,
        /// To which interrupts.
        range: IrqRange,
        /// As many as the range has: to those that are true. `None`: to all.
        only: Option<Vec<bool>>,
    },
}

/// How long the body of a command may be; an error for commands that are not served.
pub(super) fn most(command: u16, limits: &Limits) -> Result<u32, Errno> {
    match command {
        command::REGION_WRITE => Ok(length::<layout::RegionAccess>().saturating_add(limits.data())),
        command::VERSION..=command::REGION_READ | command::DEVICE_RESET => Ok(MOST),
        command::DMA_READ
        | command::DMA_WRITE
        | command::DIRTY_PAGES
        | command::REGION_WRITE_MULTI
        | command::DEVICE_FEATURE
        | command::MIG_DATA_READ
        | command::MIG_DATA_WRITE => Err(Errno::NOTSUP),
        _ => Err(Errno::NOSYS),
    }
}

/// Reads a command; `reply_to` makes what its ticket needs. File descriptors that it has no use for are closed.
pub(super) fn read(
    command: u16,
    cargo: Cargo,
    limits: &Limits,
    reply_to: impl FnOnce() -> ReplyTo,
) -> Result<Request, Errno> {
    let Cargo { body, fds } = cargo;
    match command {
        command::DMA_MAP => {
            let map = dma_map(&body, fds)?;
            Ok(Request::DmaMap(map, Ticket::new(reply_to(), Vec::new())))
        }
        command::DMA_UNMAP => {
            let (unmap, echo) = dma_unmap(&body)?;
            Ok(Request::DmaUnmap(unmap, Ticket::new(reply_to(), echo)))
        }
        command::DEVICE_GET_INFO => {
            let (info, _) = fixed::<layout::DeviceInfo>(&body)?;
            room_for::<layout::DeviceInfo>(info.argsz)?;
            Ok(Request::DeviceInfo(Ticket::new(reply_to(), ())))
        }
        command::DEVICE_GET_REGION_INFO => {
            let (layout::RegionInfo { argsz, index, .. }, _) = fixed(&body)?;
            room_for::<layout::RegionInfo>(argsz)?;
            Ok(Request::RegionInfo(index, Ticket::new(reply_to(), RegionEcho { argsz, index })))
        }
        command::DEVICE_GET_REGION_IO_FDS => {
            let (layout::RegionIoFds { argsz, index, .. }, _) = fixed(&body)?;
            room_for::<layout::RegionIoFds>(argsz)?;
            Ok(Request::RegionIoFds(index, Ticket::new(reply_to(), IoFdsEcho { argsz, index })))
        }
        command::DEVICE_GET_IRQ_INFO => {
            let (layout::IrqInfo { argsz, index, .. }, _) = fixed(&body)?;
            room_for::<layout::IrqInfo>(argsz)?;
            Ok(Request::IrqInfo(index, Ticket::new(reply_to(), index)))
        }
        command::DEVICE_SET_IRQS => {
            let set = set_irqs(&body, fds)?;
            Ok(Request::SetIrqs(set, Ticket::new(reply_to(), Vec::new())))
        }
        command::REGION_READ => {
            let (access, _) = access(&body, limits)?;
            Ok(Request::RegionRead(access, Ticket::new(reply_to(), access)))
        }
        command::REGION_WRITE => {
            let (access, data) = access(&body, limits)?;
            if usize::try_from(access.count) != Ok(data.len()) {
                return Err(Errno::INVAL);
            }
            let echo = layout::RegionAccess::from(access).as_bytes().to_vec();
            Ok(Request::RegionWrite(RegionWrite { access, body }, Ticket::new(reply_to(), echo)))
        }
        command::DEVICE_RESET => Ok(Request::Reset(Ticket::new(reply_to(), Vec::new()))),
        _ => Err(Errno::NOSYS),
    }
}

/// The structure that a body begins with, and what is behind it.
fn fixed<T: FromBytes>(body: &[u8]) -> Result<(T, &[u8]), Errno> {
    T::read_from_prefix(body).map_err(|_| Errno::INVAL)
}

/// The client has said how long a reply it takes, or how long what it sent is; it is not less than the structure.
fn room_for<T>(argsz: u32) -> Result<(), Errno> {
    if argsz < length::<T>() { Err(Errno::INVAL) } else { Ok(()) }
}

fn dma_map(body: &[u8], fds: Vec<OwnedFd>) -> Result<DmaMap, Errno> {
    let (layout::DmaMap { argsz, flags, offset, address, size }, _) = fixed(body)?;
    room_for::<layout::DmaMap>(argsz)?;
    let range = DmaRange::new(address, size).ok_or(Errno::INVAL)?;
    let flags = DmaFlags::from_bits(flags).ok_or(Errno::INVAL)?;
    let mut fds = fds.into_iter();
    let file = match (fds.next(), fds.next()) {
        (None, _) => None,
        (Some(fd), None) => {
            let last = DmaRange::new(offset, size).ok_or(Errno::INVAL)?.last();
            i64::try_from(last).map_err(|_| Errno::INVAL)?;
            Some(DmaFile { fd, offset })
        }
        (Some(_), Some(_)) => return Err(Errno::INVAL),
    };
    Ok(DmaMap { range, flags, file })
}

fn dma_unmap(body: &[u8]) -> Result<(DmaUnmap, Vec<u8>), Errno> {
    let (unmap, _) = fixed::<layout::DmaUnmap>(body)?;
    let layout::DmaUnmap { argsz, flags, address, size } = unmap;
    room_for::<layout::DmaUnmap>(argsz)?;
    let what = match flags {
        0 => DmaUnmap::Range(DmaRange::new(address, size).ok_or(Errno::INVAL)?),
        VFIO_DMA_UNMAP_FLAG_ALL if (address, size) == (0, 0) => DmaUnmap::All,
        _ if flags & (VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP | VFIO_DMA_UNMAP_FLAG_VADDR) != 0 => {
            return Err(Errno::NOTSUP);
        }
        _ => return Err(Errno::INVAL),
    };
    Ok((what, unmap.as_bytes().to_vec()))
}

fn set_irqs(body: &[u8], eventfds: Vec<OwnedFd>) -> Result<SetIrqs, Errno> {
    let (layout::IrqSet { argsz, flags, index, start, count }, booleans) = fixed(body)?;
    room_for::<layout::IrqSet>(argsz)?;
    let (data, action) = (flags & VFIO_IRQ_SET_DATA_TYPE_MASK, flags & VFIO_IRQ_SET_ACTION_TYPE_MASK);
    let action = match action {
        VFIO_IRQ_SET_ACTION_MASK => IrqAction::Mask,
        VFIO_IRQ_SET_ACTION_UNMASK => IrqAction::Unmask,
        VFIO_IRQ_SET_ACTION_TRIGGER => IrqAction::Trigger,
        _ => return Err(Errno::INVAL),
    };
    if flags & !(VFIO_IRQ_SET_DATA_TYPE_MASK | VFIO_IRQ_SET_ACTION_TYPE_MASK) != 0 {
        return Err(Errno::INVAL);
    }
    if (data, action, start, count) == (VFIO_IRQ_SET_DATA_NONE, IrqAction::Trigger, 0, 0) {
        return Ok(SetIrqs { index, change: IrqChange::Disable });
    }
    let range = IrqRange::new(start, count).ok_or(Errno::INVAL)?;
    let each = usize::try_from(count).map_err(|_| Errno::INVAL)?;
    let change = match data {
        VFIO_IRQ_SET_DATA_NONE => IrqChange::Act { action, range, only: None },
        VFIO_IRQ_SET_DATA_BOOL => {
            let only = booleans.get(..each).ok_or(Errno::INVAL)?.iter().map(|&byte| byte != 0).collect();
            IrqChange::Act { action, range, only: Some(only) }
        }
        VFIO_IRQ_SET_DATA_EVENTFD if eventfds.is_empty() => IrqChange::Unassign { action, range },
        VFIO_IRQ_SET_DATA_EVENTFD if eventfds.len() == each => IrqChange::Assign { action, range, eventfds },
        _ => return Err(Errno::INVAL),
    };
    Ok(SetIrqs { index, change })
}

fn access<'a>(body: &'a [u8], limits: &Limits) -> Result<(Access, &'a [u8]), Errno> {
    let (layout::RegionAccess { offset, region, count }, data) = fixed(body)?;
    DmaRange::new(offset, count.into()).ok_or(Errno::INVAL)?;
    if count > limits.data() {
        return Err(Errno::INVAL);
    }
    Ok((Access { region, offset, count }, data))
}

impl From<Access> for layout::RegionAccess {
    fn from(Access { region, offset, count }: Access) -> Self {
        Self { offset, region, count }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_nothing_empty_or_past_the_end() {
        for (start, size) in [(0, 0), (u64::MAX, 0), (1, u64::MAX.wrapping_add(1)), (2, u64::MAX), (u64::MAX, 2)] {
            assert_eq!(DmaRange::new(start, size), None, "{start:#x} {size:#x}");
        }
        let all = DmaRange::new(1, u64::MAX).unwrap();
        assert_eq!((all.start(), all.size(), all.last()), (1, u64::MAX, u64::MAX));
        assert_eq!(DmaRange::new(u64::MAX, 1).unwrap().last(), u64::MAX);
    }

    #[test]
    fn accesses_are_to_what_the_region_has() {
        let access = |offset, count| Access { region: 0, offset, count };
        assert!(access(0, 8).is_within(8) && access(7, 1).is_within(8));
        for (offset, count) in [(0, 9), (7, 2), (8, 1), (9, 1), (u64::MAX, 1)] {
            assert!(!access(offset, count).is_within(8), "{offset:#x} {count}");
        }
        assert!(access(u64::MAX - 1, 1).is_within(u64::MAX) && !access(u64::MAX - 1, 2).is_within(u64::MAX));
    }

    #[test]
    fn interrupts_are_those_that_the_device_has() {
        assert_eq!((IrqRange::new(0, 0), IrqRange::new(1, u32::MAX)), (None, None));
        let range = IrqRange::new(2, 3).unwrap();
        assert_eq!((range.start(), range.count()), (2, 3));
        assert_eq!((range.within(4), range.within(5)), (None, Some(2..5)));
        assert_eq!(IrqRange::new(0, u32::MAX).unwrap().within(2048), None);
    }
}
