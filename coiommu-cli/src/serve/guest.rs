//! One guest, as long as its VMM is connected: the device that it sees, its RAM, and the workers that pin it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use coiommu_dtt::{Gpa, PAGE_SIZE};
use coiommu_pci::{Bar, ConfigSpace, Device, DeviceConfig, Doorbells, Outcome, registers};
use coiommu_pin::pinner::{Clock as _, Drain, SystemClock};
use coiommu_pin::worker::{Service, Team, TeamConfig};
use coiommu_pin::{Pinner, PinnerConfig, SharedSlots};
use coiommu_vfio::type1::Needs;
use coiommu_vfio_user::{
    Access, Connection, DeviceInfo, Errno, IrqChange, IrqInfo, Mapping, RegionInfo, RegionWrite, Request, SetIrqs, pci,
};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::passthrough::pin_all::AllPinner;
use super::ram::{Ram, RamError, Space};
use super::watch::Served;
use super::{Config, Host, Serves};

/// The workers of a guest.
pub(crate) type Workers = Team<Space, SharedSlots<GuestMemoryMmap>>;

/// Config space has this index among a PCI device's regions; BAR n is region n.
const CONFIG_REGION: u32 = pci::CONFIG_REGION;

/// A guest.
#[derive(Debug)]
pub(crate) struct Guest<'a> {
    host: &'a Host,
    device: Device,
    doorbells: Doorbells,
    ram: Ram,
    /// What BAR 2 is, which the VMM maps into the guest.
    slots: File,
    /// Of a driver that is active.
    table: Option<Table>,
    served: Arc<Served>,
    /// Where there are devices of the host.
    all_pinner: Option<AllPinner>,
}

/// The guest's table, which may be another's as seen from here.
#[derive(Debug)]
struct Table {
    root: Gpa,
    /// How many requests were not carried out when it was last looked at.
    unserved: u64,
}

impl<'a> Guest<'a> {
    /// A guest that has no RAM yet, with its workers started.
    pub(crate) fn new(config: &Config, host: &'a Host) -> anyhow::Result<Self> {
        let device = Device::new(&DeviceConfig::new(config.vcpus, config.endpoints.clone()))?;
        let ram = Ram::new();
        let pinner_config = PinnerConfig::new(config.policy.clone(), config.endpoints.clone());
        let mapper = host.mapper();
        let pinner = Pinner::new(ram.space().clone(), Arc::clone(&mapper), pinner_config)?;
        let slots = slots_file().context("cannot make the memory of the notify map")?;
        let notify = SharedSlots::new(Arc::new(map_slots(&slots)?), config.vcpus)?;
        let service = Arc::new(Service::new(pinner, notify).context("cannot make the workers' eventfds")?);
        let mut team = TeamConfig::default();
        team.look = config.look;
        team.pin_workers = config.pin_workers;
        let workers = Team::spawn(&service, &team).context("cannot start the workers")?;
        let served = Arc::new(Served::new(workers, Arc::clone(&host.gate), mapper));
        let all_pinner = match host.container() {
            Some(_) => {
                host.gate.guest_comes();
                let spawned = AllPinner::spawn(Arc::clone(&served));
                Some(spawned.inspect_err(|_| host.gate.guest_goes()).context("cannot start a thread")?)
            }
            None => None,
        };
        let doorbells = device.doorbells();
        Ok(Self { host, device, doorbells, ram, slots, table: None, served, all_pinner })
    }

    pub(crate) fn served(&self) -> &Arc<Served> {
        &self.served
    }

    fn pinner(&self) -> &Pinner<Space> {
        self.served.workers.service().pinner()
    }

    /// RAM comes or goes, as the VMM says.
    pub(super) fn change_ram(
        &mut self,
        change: impl FnOnce(&mut Ram, &Pinner<Space>) -> Result<(), RamError>,
    ) -> Result<(), Errno> {
        let (message, before) = (Instant::now(), self.ram.bytes());
        let changed = change(&mut self.ram, self.served.workers.service().pinner());
        let bytes = self.ram.bytes();
        self.served.ram.store(bytes, Relaxed);
        self.host.memory.set(self.ram.ranges());
        if bytes > before {
            self.say_if_it_cannot_be_pinned(bytes);
            self.host.gate.ram_has_come(message);
        }
        changed.map_err(|error| {
            tracing::warn!("{error}");
            error.errno()
        })
    }

    /// Whether the host lets as much be pinned as may have to be.
    fn say_if_it_cannot_be_pinned(&self, ram: u64) {
        let Some(container) = self.host.container() else { return };
        let policy = self.pinner().policy();
        let most = policy.quota.map_or(ram, |quota| quota.min(ram));
        // What is pinned is locked already, and counted with that.
        let more = most.saturating_sub(self.pinner().pinned_pages().saturating_mul(PAGE_SIZE));
        let needs = Needs { ram: Vec::new(), pinned: more, mappings: 0 };
        if let Err(error) = container.prepare(&needs) {
            tracing::warn!("{error}");
        }
    }

    fn region(&self, index: u32) -> Result<RegionInfo, Errno> {
        match place(index)? {
            Place::Bar(Bar::Notify) => {
                let fd = OwnedFd::from(self.slots.try_clone().map_err(|_| Errno::MFILE)?);
                Ok(RegionInfo::mapped(Bar::SIZE, Mapping::whole(fd, 0)))
            }
            // A VMM maps a region for writing if at all, which the topology is not to be.
            Place::Bar(Bar::Registers | Bar::Topology) => Ok(RegionInfo::trapped(Bar::SIZE)),
            Place::Config => Ok(RegionInfo::trapped(ConfigSpace::BYTES as u64)),
            Place::Nothing => Ok(RegionInfo::default()),
        }
    }

    fn doorbell(&self, write: &RegionWrite) -> Option<usize> {
        let Access { region, offset, .. } = write.access();
        let is_there = place(region) == Ok(Place::Bar(Bar::Registers)) && offset < Bar::SIZE;
        is_there.then(|| self.doorbells.at(offset)).flatten()
    }

    /// A guest with more vCPUs than it was said to have waits for answers that never come.
    fn say_if_nobody_rings(&self, Access { region, offset, .. }: Access) {
        let is_register = place(region) == Ok(Place::Bar(Bar::Registers));
        let vcpu = offset.checked_sub(registers::DOORBELLS).filter(|_| is_register && offset < Bar::SIZE);
        if let Some(vcpu) = vcpu {
            tracing::warn!("vCPU {vcpu} of the guest asks for something, and is not served: raise --vcpus");
        }
    }

    fn ring(&self, vcpu: usize, came: Duration) {
        self.served.workers.service().rang(vcpu, came);
        // It fails only if it rings already.
        let _rings = self.served.workers.doorbell(vcpu).map(|doorbell| doorbell.write(1));
    }

    fn read(&self, access: Access, data: &mut [u8]) -> Result<(), Errno> {
        let Access { region, offset, .. } = access;
        let place = place(region)?;
        place.check(offset, data.len())?;
        match place {
            Place::Config => self.device.read_config(usize::try_from(offset).map_err(|_| Errno::INVAL)?, data),
            Place::Bar(Bar::Notify) => self.slots.read_exact_at(data, offset).map_err(|_| Errno::IO)?,
            Place::Bar(bar) => self.device.read_bar(bar, offset, data),
            Place::Nothing => return Err(Errno::INVAL),
        }
        Ok(())
    }

    fn write(&mut self, access: Access, data: &[u8]) -> Result<(), Errno> {
        let Access { region, offset, .. } = access;
        let place = place(region)?;
        place.check(offset, data.len())?;
        let outcome = match place {
            Place::Config => self.device.write_config(usize::try_from(offset).map_err(|_| Errno::INVAL)?, data),
            Place::Bar(Bar::Notify) => {
                self.slots.write_all_at(data, offset).map_err(|_| Errno::IO)?;
                Outcome::Nothing
            }
            Place::Bar(bar) => self.device.write_bar(bar, offset, data),
            Place::Nothing => return Err(Errno::INVAL),
        };
        self.carry_out(outcome);
        Ok(())
    }

    /// Does what an access means; it is done when this returns.
    fn carry_out(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Activate { root, levels } => self.activate(root, levels),
            Outcome::Deactivate => {
                self.drain(Drain::Deactivate);
                tracing::info!("the guest's driver is not active any more");
            }
            Outcome::Reset => self.drain(Drain::Reset),
            Outcome::Park => {
                self.pinner().park();
                self.served.parked.park();
            }
            Outcome::Unpark => {
                self.pinner().unpark();
                self.served.parked.unpark();
            }
            Outcome::Doorbell { vcpu } => self.ring(vcpu, SystemClock.now()),
            // Where regions answer is the VMM's business.
            Outcome::Nothing | Outcome::MemorySpace => {}
        }
    }

    fn activate(&mut self, root: Gpa, levels: u64) {
        // It ends all parking, as a kernel needs that was booted after one that crashed.
        self.served.parked.clear();
        self.table = None;
        if self.ram.bytes() == 0 {
            self.ram.say_not_shared();
        }
        let _draining = self.pinner().is_active().then(|| self.host.gate.drain());
        // Where it is not, the pinner has said why, as rarely as a guest may have things said.
        if self.pinner().activate(root, levels).is_ok() {
            self.host.gate.activated();
            tracing::info!("the guest's driver is active: its table is at {root}, of {levels} levels");
            self.table = Some(Table { root, unserved: self.unserved() });
        }
    }

    /// Requests that were not carried out.
    fn unserved(&self) -> u64 {
        let counters = self.pinner().counters();
        counters.requests_failed.saturating_add(counters.requests_refused)
    }

    /// QEMU gives a file for memory that is not shared, too, whose pages the guest then leaves as they are. What is
    /// seen of its table is empty, however much it asks for.
    fn look_for_the_table(&mut self) {
        let unserved = self.unserved();
        let Some(table) = self.table.as_mut().filter(|table| unserved > table.unserved) else { return };
        table.unserved = unserved;
        if self.ram.is_empty_page(table.root) {
            self.ram.say_not_seen();
        }
    }

    fn drain(&mut self, drain: Drain) {
        self.table = None;
        // Before anything is, and until all is, no device does DMA.
        let _draining = self.host.gate.drain();
        // What cannot be unmapped is said by the pinner, and keeps its memory.
        let _stuck = self.pinner().deactivate(drain);
        self.served.parked.clear();
    }

    /// Nothing is pinned any more, and the workers end. `Deactivate` tells the guest, if there still is one.
    pub(crate) fn end(self, drain: Drain) -> anyhow::Result<()> {
        self.host.gate.guest_goes();
        if let Some(all_pinner) = self.all_pinner {
            all_pinner.join();
        }
        self.served.workers.stop(drain).context("some memory stays pinned")
    }
}

impl Serves for Guest<'_> {
    /// Answers when it has taken effect, but for doorbells.
    fn serve(&mut self, connection: &mut Connection, request: Request) {
        match request {
            Request::DeviceInfo(ticket) => connection.answer(ticket, Ok(DeviceInfo::pci(true))),
            Request::RegionInfo(index, ticket) => connection.answer(ticket, self.region(index)),
            Request::IrqInfo(index, ticket) => connection.answer(ticket, no_irqs(index)),
            Request::SetIrqs(set, ticket) => connection.answer(ticket, set_no_irqs(&set)),
            Request::RegionRead(access, ticket) => {
                let mut data = ticket.buffer();
                let read = self.read(access, &mut data);
                connection.answer(ticket, read.map(|()| data));
            }
            Request::RegionWrite(write, ticket) => match self.doorbell(&write) {
                // A CPU of the guest waits for the answer, with everything else in the VMM that takes its lock.
                Some(vcpu) => {
                    let came = SystemClock.now();
                    connection.answer(ticket, Ok(()));
                    self.ring(vcpu, came);
                    self.look_for_the_table();
                }
                None => {
                    self.say_if_nobody_rings(write.access());
                    connection.answer(ticket, self.write(write.access(), write.data()));
                }
            },
            Request::DmaMap(map, ticket) => {
                let mapped = self.change_ram(|ram, pinner| ram.map(map, pinner));
                connection.answer(ticket, mapped);
            }
            Request::DmaUnmap(unmap, ticket) => {
                let unmapped = self.change_ram(|ram, pinner| ram.unmap(unmap, pinner));
                connection.answer(ticket, unmapped);
            }
            Request::Reset(ticket) => {
                let outcome = self.device.reset();
                self.carry_out(outcome);
                connection.answer(ticket, Ok(()));
            }
            Request::RegionIoFds(_, ticket) => connection.answer(ticket, Err(Errno::NOTSUP)),
            // Answered with an error as it is dropped.
            other => tracing::warn!("the VMM asks for what is not served: {other:?}"),
        }
    }
}

/// What is behind the index of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Bar(Bar),
    Config,
    /// A region that a PCI device may have, and this one has not.
    Nothing,
}

impl Place {
    /// Whether an access lies within.
    fn check(self, offset: u64, length: usize) -> Result<(), Errno> {
        let size = match self {
            Self::Bar(_) => Bar::SIZE,
            Self::Config => ConfigSpace::BYTES as u64,
            Self::Nothing => 0,
        };
        let end = offset.checked_add(length as u64);
        if end.is_some_and(|end| end <= size) { Ok(()) } else { Err(Errno::INVAL) }
    }
}

fn place(region: u32) -> Result<Place, Errno> {
    match region {
        CONFIG_REGION => Ok(Place::Config),
        0..pci::REGIONS => {
            let bar = usize::try_from(region).ok().and_then(Bar::from_index);
            Ok(bar.map_or(Place::Nothing, Place::Bar))
        }
        _ => Err(Errno::INVAL),
    }
}

/// The device has no interrupts, of any kind.
fn no_irqs(index: u32) -> Result<IrqInfo, Errno> {
    if index < pci::IRQS { Ok(IrqInfo::default()) } else { Err(Errno::INVAL) }
}

/// To disable them is all that there is to do.
fn set_no_irqs(set: &SetIrqs) -> Result<(), Errno> {
    match set.change {
        IrqChange::Disable if set.index < pci::IRQS => Ok(()),
        _ => Err(Errno::INVAL),
    }
}

/// Memory for the notify map that nobody can resize.
fn slots_file() -> io::Result<File> {
    let file = memfd_create("coiommu-notify", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, Bar::SIZE)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

fn map_slots(file: &File) -> anyhow::Result<GuestMemoryMmap> {
    let bytes = usize::try_from(Bar::SIZE)?;
    let file = FileOffset::new(file.try_clone()?, 0);
    let region = GuestRegionMmap::from_range(GuestAddress(0), bytes, Some(file))?;
    Ok(GuestMemoryMmap::from_regions(vec![region])?)
}
