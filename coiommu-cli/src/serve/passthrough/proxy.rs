//! A device of the host for the VMM that is connected: what it asks for, the kernel's VFIO does.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use coiommu_vfio::type1::{Action, Area, Device, InterruptError, InterruptInfo, Interrupts};
use coiommu_vfio_user::{
    self as wire, Connection, DeviceInfo, DmaFlags, DmaMap, DmaUnmap, Errno, IrqAction, IrqChange, IrqFlags, IrqInfo,
    Mapping, RegionFlags, RegionInfo, Request, SetIrqs, pci,
};

use super::config;
use super::gate::Gate;
use super::memory::{Memory, RamRanges};
use crate::serve::Serves;

/// The command register, and its bits that let a device answer, and do DMA.
const COMMAND: u64 = 4;
const ANSWERS: u16 = 0b111;

/// One device, as long as a VMM is connected.
#[derive(Debug)]
pub(super) struct Proxy<'a> {
    device: Arc<Device>,
    /// Which of the gate's devices it is.
    number: usize,
    gate: &'a Gate,
    interrupts: Interrupts,
    /// What this VMM's other device has told of RAM, and what it has told here.
    memory: &'a Memory,
    told: RamRanges,
    has_said_difference: bool,
}

impl<'a> Proxy<'a> {
    /// A device that is as after a reset.
    pub(super) fn new(device: Arc<Device>, number: usize, gate: &'a Gate, memory: &'a Memory) -> io::Result<Self> {
        let interrupts = Interrupts::new(Arc::clone(&device))?;
        Ok(Self { device, number, gate, interrupts, memory, told: BTreeMap::new(), has_said_difference: false })
    }

    /// The VMM has gone: the device does nothing any more, and is as after a reset.
    pub(super) fn end(mut self) {
        self.gate.wish(self.number, false);
        let address = self.device.address();
        if let Err(error) = self.interrupts.disable_all() {
            tracing::warn!("interrupts of {address} stay enabled: {error}");
        }
        if let Err(error) = self.reset() {
            tracing::debug!("{address} is not reset: {error}");
        }
    }

    fn region(&self, index: u32) -> Result<RegionInfo, Errno> {
        if index >= pci::REGIONS {
            return Err(Errno::INVAL);
        }
        let region = self.device.region(index);
        let mut flags = RegionFlags::empty();
        flags.set(RegionFlags::READ, region.readable);
        flags.set(RegionFlags::WRITE, region.writable);
        let areas = self.device.mappable(index);
        let mapping = if areas.is_empty() {
            None
        } else {
            let fd = self.device.try_clone_fd().map_err(|error| errno_of(&error))?;
            let is_whole = areas == [Area { offset: 0, size: region.size }];
            let areas = areas.iter().map(|area| wire::Area { offset: area.offset, size: area.size }).collect();
            Some(Mapping { fd, offset: region.offset, areas: (!is_whole).then_some(areas) })
        };
        Ok(RegionInfo { flags, size: region.size, mapping })
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.device.read(region, offset, data).map_err(|error| errno_of(&error))?;
        if region == pci::CONFIG_REGION {
            config::set_bus_master(offset, data, self.gate.is_wished(self.number));
        }
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let write = |data: &[u8]| self.device.write(region, offset, data).map_err(|error| errno_of(&error));
        if region != pci::CONFIG_REGION {
            return write(data);
        }
        let wish = config::bus_master(offset, data);
        // Off before what else the write does, on after it.
        if wish == Some(false) {
            self.gate.wish(self.number, false);
        }
        self.gate.write_config(self.number, |is_on| {
            let mut data = data.to_vec();
            config::set_bus_master(offset, &mut data, is_on);
            write(&data)
        })?;
        if wish == Some(true) {
            self.say_if_memory_differs();
            self.gate.wish(self.number, true);
        }
        Ok(())
    }

    fn interrupt(&self, index: u32) -> Result<IrqInfo, Errno> {
        if index >= pci::IRQS {
            return Err(Errno::INVAL);
        }
        let InterruptInfo { count, eventfd, maskable, automasked, noresize } = self.interrupts.info(index);
        let mut flags = IrqFlags::empty();
        for (flag, is_set) in [
            (IrqFlags::EVENTFD, eventfd),
            (IrqFlags::MASKABLE, maskable),
            (IrqFlags::AUTOMASKED, automasked),
            (IrqFlags::NORESIZE, noresize),
        ] {
            flags.set(flag, is_set);
        }
        Ok(IrqInfo { flags, count })
    }

    fn set_interrupts(&mut self, SetIrqs { index, change }: SetIrqs) -> Result<(), Errno> {
        let count = self.interrupts.info(index).count;
        let done = match change {
            IrqChange::Disable => self.interrupts.disable(index),
            IrqChange::Assign { action, range, eventfds } => {
                let eventfds = eventfds.into_iter().map(Some).collect();
                self.assign(index, action, range.start(), eventfds)?
            }
            IrqChange::Unassign { action, range } => {
                let length = range.within(count).ok_or(Errno::INVAL)?.len();
                self.assign(index, action, range.start(), std::iter::repeat_with(|| None).take(length).collect())?
            }
            IrqChange::Act { action, range, only } => {
                let action = match action {
                    IrqAction::Mask => Action::Mask,
                    IrqAction::Unmask => Action::Unmask,
                    IrqAction::Trigger => Action::Trigger,
                };
                self.interrupts.act(index, action, range.start(), range.count(), only.as_deref())
            }
        };
        done.map_err(|error| self.refused(&error))
    }

    fn assign(
        &mut self,
        index: u32,
        action: IrqAction,
        start: u32,
        eventfds: Vec<Option<std::os::fd::OwnedFd>>,
    ) -> Result<Result<(), InterruptError>, Errno> {
        match action {
            IrqAction::Trigger => Ok(self.interrupts.assign(index, start, eventfds)),
            IrqAction::Unmask => Ok(self.interrupts.assign_unmask(index, start, eventfds)),
            IrqAction::Mask => Err(Errno::INVAL),
        }
    }

    fn refused(&self, error: &InterruptError) -> Errno {
        tracing::warn!("{}: {error}", self.device.address());
        Errno::from_raw_os_error(error.errno())
    }

    /// As a bus does that is reset: the device answers nowhere, and does no DMA.
    fn reset(&self) -> io::Result<()> {
        self.gate.wish(self.number, false);
        self.gate.write_config(self.number, |_off| {
            let mut command = [0; 2];
            self.device.read(pci::CONFIG_REGION, COMMAND, &mut command)?;
            let command = u16::from_le_bytes(command) & !ANSWERS;
            self.device.write(pci::CONFIG_REGION, COMMAND, &command.to_le_bytes())
        })?;
        self.device.reset()
    }

    /// RAM is what the CoIOMMU device is told of. This one is told the same, by the same VMM.
    fn note_memory(&mut self, map: &DmaMap) {
        let is_ram = map.file.is_some() && map.flags.contains(DmaFlags::READ | DmaFlags::WRITE);
        if is_ram && self.told.len() < Memory::MOST {
            self.told.insert(map.range.start(), map.range.last());
        }
    }

    fn forget_memory(&mut self, unmap: DmaUnmap) {
        match unmap {
            DmaUnmap::All => self.told.clear(),
            DmaUnmap::Range(range) => _ = self.told.remove(&range.start()),
        }
    }

    fn say_if_memory_differs(&mut self) {
        let Some(difference) = self.memory.difference(&self.told).filter(|_| !self.has_said_difference) else { return };
        self.has_said_difference = true;
        tracing::warn!(
            "the VMM tells {} of other memory than the CoIOMMU device, whose is pinned: {difference}",
            self.device.address()
        );
    }
}

impl Serves for Proxy<'_> {
    fn serve(&mut self, connection: &mut Connection, request: Request) {
        match request {
            Request::DeviceInfo(ticket) => {
                connection.answer(ticket, Ok(DeviceInfo::pci(self.device.is_resettable())));
            }
            Request::RegionInfo(index, ticket) => connection.answer(ticket, self.region(index)),
            Request::IrqInfo(index, ticket) => connection.answer(ticket, self.interrupt(index)),
            Request::SetIrqs(set, ticket) => {
                let set = self.set_interrupts(set);
                connection.answer(ticket, set);
            }
            Request::RegionRead(access, ticket) => {
                let mut data = ticket.buffer();
                let read = self.read(access.region, access.offset, &mut data);
                connection.answer(ticket, read.map(|()| data));
            }
            Request::RegionWrite(write, ticket) => {
                let written = self.write(write.access().region, write.access().offset, write.data());
                connection.answer(ticket, written);
            }
            Request::DmaMap(map, ticket) => {
                self.note_memory(&map);
                connection.answer(ticket, Ok(()));
            }
            Request::DmaUnmap(unmap, ticket) => {
                self.forget_memory(unmap);
                connection.answer(ticket, Ok(()));
            }
            Request::Reset(ticket) => {
                let reset = self.reset().map_err(|error| {
                    tracing::warn!("{} cannot be reset: {error}", self.device.address());
                    errno_of(&error)
                });
                connection.answer(ticket, reset);
            }
            Request::RegionIoFds(_, ticket) => connection.answer(ticket, Err(Errno::NOTSUP)),
            // Answered with an error as it is dropped.
            other => tracing::warn!("the VMM asks for what is not served: {other:?}"),
        }
    }
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
