//! A device that adds: a driver fills the memory that is BAR 2 with numbers, writes to BAR 0 how many there are, and finds
//! their sum in BAR 0 when the interrupt comes.
//!
//! | BAR 0 | |
//! | --- | --- |
//! | `0x00` | doorbell: the number of words to add. It is acknowledged before they are added |
//! | `0x04` | their sum |
//! | `0x08` | how many sums there were |

use std::error::Error;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use coiommu_vfio_user::{
    Access, Connection, DeviceInfo, DmaMap, DmaRange, DmaUnmap, Errno, Event, IrqAction, IrqChange, IrqFlags, IrqInfo,
    Mapping, RegionInfo, Request, SetIrqs, Wake, pci,
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

/// BAR 0: registers.
const REGISTERS: u32 = 0;
/// BAR 2: memory.
const MEMORY: u32 = 2;
const PAGE: usize = 0x1000;
/// So many mappings of the client's memory are remembered.
const MAPPINGS: usize = 1024;

/// The device.
#[derive(Debug)]
pub(crate) struct Device {
    config: [u8; 256],
    sum: u32,
    sums: u32,
    memory: File,
    /// What the driver's interrupt is signalled by.
    eventfd: Option<File>,
    /// Where the client's memory is. This device does no DMA; one that does maps the files that come with these.
    dma: Vec<DmaRange>,
}

impl Device {
    /// The device as it is after a reset.
    pub(crate) fn new() -> io::Result<Self> {
        let memory = memfd_create("sum", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&memory, PAGE as u64)?;
        // The client maps it: it must not be able to cut it off under us, nor we under the client.
        fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Self { config: config(), sum: 0, sums: 0, memory: memory.into(), eventfd: None, dma: Vec::new() })
    }

    /// Serves a client: until it goes, or (then it is false) until `stop` is readable.
    pub(crate) fn serve(
        &mut self,
        connection: &mut Connection,
        stop: Option<BorrowedFd<'_>>,
    ) -> Result<bool, Box<dyn Error>> {
        loop {
            match connection.receive()? {
                Event::Request(request) => self.request(connection, request),
                Event::Closed => return Ok(true),
                Event::More => {}
                Event::Idle if connection.wait(stop, None)? == Wake::Stop => return Ok(false),
                Event::Idle => {}
            }
        }
    }

    fn request(&mut self, connection: &mut Connection, request: Request) {
        match request {
            Request::DeviceInfo(ticket) => connection.answer(ticket, Ok(DeviceInfo::pci(true))),
            Request::RegionInfo(index, ticket) => connection.answer(ticket, self.region(index)),
            Request::IrqInfo(index, ticket) => connection.answer(ticket, irqs(index)),
            Request::SetIrqs(set, ticket) => connection.answer(ticket, self.set_irqs(set)),
            Request::RegionRead(access, ticket) => {
                let mut data = ticket.buffer();
                let done = self.read(access, &mut data);
                connection.answer(ticket, done.map(|()| data));
            }
            // The doorbell: the guest's CPU waits for this answer, so it goes first.
            Request::RegionWrite(write, ticket) if is_doorbell(write.access()) => {
                connection.answer(ticket, Ok(()));
                self.add(write.data());
            }
            Request::RegionWrite(write, ticket) => connection.answer(ticket, self.write(write.access(), write.data())),
            Request::DmaMap(map, ticket) => connection.answer(ticket, self.map(&map)),
            Request::DmaUnmap(unmap, ticket) => connection.answer(ticket, self.unmap(unmap)),
            Request::Reset(ticket) => {
                (self.config, self.sum, self.sums) = (config(), 0, 0);
                connection.answer(ticket, Ok(()));
            }
            Request::RegionIoFds(_, ticket) => connection.answer(ticket, Err(Errno::NOTSUP)),
            // Answered with an error.
            other => drop(other),
        }
    }

    fn region(&self, index: u32) -> Result<RegionInfo, Errno> {
        match index {
            MEMORY => {
                let fd = OwnedFd::from(self.memory.try_clone().map_err(|_| Errno::MFILE)?);
                Ok(RegionInfo::mapped(size(MEMORY), Mapping::whole(fd, 0)))
            }
            _ if size(index) > 0 => Ok(RegionInfo::trapped(size(index))),
            _ if index < pci::REGIONS => Ok(RegionInfo::default()),
            _ => Err(Errno::INVAL),
        }
    }

    fn set_irqs(&mut self, SetIrqs { index, change }: SetIrqs) -> Result<(), Errno> {
        let interrupts = irqs(index)?.count;
        match change {
            IrqChange::Disable => {
                if index == pci::MSI_IRQ {
                    self.eventfd = None;
                }
            }
            IrqChange::Assign { action: IrqAction::Trigger, range, mut eventfds } => {
                range.within(interrupts).ok_or(Errno::INVAL)?;
                self.eventfd = eventfds.pop().map(File::from);
            }
            IrqChange::Unassign { action: IrqAction::Trigger, range } => {
                range.within(interrupts).ok_or(Errno::INVAL)?;
                self.eventfd = None;
            }
            IrqChange::Act { action: IrqAction::Trigger, range, only } => {
                range.within(interrupts).ok_or(Errno::INVAL)?;
                if only.is_none_or(|only| only.contains(&true)) {
                    self.interrupt();
                }
            }
            _ => return Err(Errno::NOTSUP),
        }
        Ok(())
    }

    fn read(&self, access: Access, data: &mut [u8]) -> Result<(), Errno> {
        check(access)?;
        let registers = [0, self.sum, self.sums].map(u32::to_le_bytes).concat();
        match access.region {
            REGISTERS => copy(&registers, access.offset, data),
            MEMORY => self.memory.read_exact_at(data, access.offset).map_err(|_| Errno::IO)?,
            _ => copy(&self.config, access.offset, data),
        }
        Ok(())
    }

    fn write(&mut self, access: Access, data: &[u8]) -> Result<(), Errno> {
        check(access)?;
        match access.region {
            REGISTERS => {} // nothing else is writable
            MEMORY => self.memory.write_all_at(data, access.offset).map_err(|_| Errno::IO)?,
            _ => {
                for (at, byte) in (access.offset..).zip(data) {
                    if let Some(place) = usize::try_from(at).ok().and_then(|at| self.config.get_mut(at))
                        && is_writable(at)
                    {
                        *place = *byte;
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds the first words of the memory, as many as the driver says and there are.
    fn add(&mut self, words: &[u8]) {
        let words = words.iter().rev().fold(0_usize, |number, &byte| number << 8 | usize::from(byte));
        let mut bytes = [0; PAGE];
        if self.memory.read_exact_at(&mut bytes, 0).is_err() {
            return;
        }
        let (all, _) = bytes.as_chunks();
        self.sum = all.iter().take(words).map(|&word| u32::from_le_bytes(word)).fold(0, u32::wrapping_add);
        self.sums = self.sums.wrapping_add(1);
        self.interrupt();
    }

    fn interrupt(&self) {
        if let Some(mut eventfd) = self.eventfd.as_ref() {
            // It may fail or block if it is full, or no eventfd: a client can stop the device that it has to itself.
            let _full = eventfd.write(&1_u64.to_ne_bytes());
        }
    }

    fn map(&mut self, map: &DmaMap) -> Result<(), Errno> {
        let range = map.range;
        if self.dma.iter().any(|other| other.start() <= range.last() && range.start() <= other.last()) {
            return Err(Errno::EXIST);
        }
        if self.dma.len() == MAPPINGS {
            return Err(Errno::NOSPC);
        }
        self.dma.push(range);
        Ok(())
    }

    fn unmap(&mut self, unmap: DmaUnmap) -> Result<(), Errno> {
        match unmap {
            DmaUnmap::All => self.dma.clear(),
            DmaUnmap::Range(range) => {
                let place = self.dma.iter().position(|other| *other == range).ok_or(Errno::NOENT)?;
                self.dma.swap_remove(place);
            }
        }
        Ok(())
    }
}

fn irqs(index: u32) -> Result<IrqInfo, Errno> {
    match index {
        pci::MSI_IRQ => Ok(IrqInfo { flags: IrqFlags::EVENTFD | IrqFlags::NORESIZE, count: 1 }),
        _ if index < pci::IRQS => Ok(IrqInfo::default()),
        _ => Err(Errno::INVAL),
    }
}

/// Config space: two BARs of memory, and MSI at 0x40.
fn config() -> [u8; 256] {
    let mut config = [0; 256];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x00, &[0x34, 0x12, 0x01, 0x00]); // 1234:0001
    put(0x06, &[0x10, 0x00]); // it has capabilities
    put(0x08, &[0x01, 0x00, 0x00, 0xff]); // revision 1, of no class
    put(0x34, &[0x40]);
    put(0x40, &[0x05, 0x00, 0x80, 0x00]); // MSI, the only capability, with addresses of 64 bits
    config
}

/// The command register, and what MSI is told.
fn is_writable(at: u64) -> bool {
    matches!(at, 0x04 | 0x05 | 0x42 | 0x44..0x4e)
}

/// A region's length in bytes; 0: there is none.
fn size(region: u32) -> u64 {
    match region {
        REGISTERS | MEMORY => PAGE as u64,
        pci::CONFIG_REGION => 256,
        _ => 0,
    }
}

fn is_doorbell(Access { region, offset, count }: Access) -> bool {
    (region, offset) == (REGISTERS, 0) && count <= 4
}

/// The client has not checked where it goes.
fn check(access: Access) -> Result<(), Errno> {
    if access.is_within(size(access.region)) { Ok(()) } else { Err(Errno::INVAL) }
}

/// Copies from a region that begins with these bytes, and goes on with zeros.
fn copy(bytes: &[u8], offset: u64, data: &mut [u8]) {
    for (at, byte) in (offset..).zip(data) {
        *byte = usize::try_from(at).ok().and_then(|at| bytes.get(at)).copied().unwrap_or_default();
    }
}
