//! Your side: what your bus calls when a vCPU exits, and what it carries out.

use std::error::Error;
use std::sync::{Arc, Mutex, RwLock};

use coiommu_dtt::Bdf;
use coiommu_pci::{Bar, Device, DeviceConfig, Doorbells, Outcome};
use coiommu_pin::pinner::{Drain, DrainError};
use coiommu_pin::worker::{Service, Team, TeamConfig};
use coiommu_pin::{DmaMapper, Pinner, PinnerConfig, Policy, RamRegion, SharedSlots};
use coiommu_vfio::{DmaFault, SoftIommu};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap};

/// Guest memory, which changes as a whole: RAM comes and goes.
pub(crate) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Your VMM's side: one of these a guest.
pub(crate) struct Vmm {
    /// The PCI function. Locked while an access is carried out, so that commands take effect one after the other.
    device: Mutex<Device>,
    /// To be rung without that lock.
    doorbells: Doorbells,
    /// The threads that pin and unpin, and what they share: the pinner and the notify map.
    pub(crate) team: Team<Memory, SharedSlots<GuestMemoryMmap>>,
    /// The device that is passed through. Its bus mastering is yours to hold.
    pub(crate) endpoint: Endpoint,
}

impl Vmm {
    /// For a guest with this RAM and so many vCPUs. `memory` is where its tables and requests are looked for.
    pub(crate) fn new(
        ram: &Arc<GuestRegionMmap>,
        memory: &Memory,
        bar2: &Arc<GuestMemoryMmap>,
        nic: Bdf,
        vcpus: usize,
    ) -> Result<Self, Box<dyn Error>> {
        // The IOMMU: here in software, else VFIO's type1 container.
        let iommu = Arc::new(SoftIommu::new());
        let policy: Policy = "extent=run,unpin_policy=lru,unpin_interval=1".parse()?;
        let mapper = Arc::clone(&iommu) as Arc<dyn DmaMapper>;
        let pinner = Pinner::new(memory.clone(), mapper, PinnerConfig::new(policy, vec![nic]))?;
        // What may be pinned. Hotplug calls this too, and `remove_region` before memory goes.
        pinner.add_region(RamRegion::from_vm_memory(Arc::clone(ram))?)?;
        let service = Arc::new(Service::new(pinner, SharedSlots::new(Arc::clone(bar2), vcpus)?)?);
        let team = Team::spawn(&service, &TeamConfig::default())?;
        let device = Device::new(&DeviceConfig::new(vcpus, vec![nic]))?;
        let endpoint = Endpoint { iommu, is_bus_master: RwLock::new(false) };
        Ok(Self { doorbells: device.doorbells(), device: Mutex::new(device), team, endpoint })
    }

    /// A vCPU writes to BAR 0. (With KVM, give `team.doorbell(vcpu)` to an ioeventfd at `doorbells.offset(vcpu)`: then those
    /// writes do not even come here.)
    pub(crate) fn write_bar0(&self, offset: u64, data: &[u8]) {
        if let Some(vcpu) = self.doorbells.at(offset) {
            return self.ring(vcpu);
        }
        let mut device = self.device.lock().unwrap();
        let outcome = device.write_bar(Bar::Registers, offset, data);
        self.carry_out(outcome);
    }

    pub(crate) fn read_bar(&self, bar: Bar, offset: u64, data: &mut [u8]) {
        self.device.lock().unwrap().read_bar(bar, offset, data);
    }

    pub(crate) fn write_config(&self, offset: usize, data: &[u8]) {
        let mut device = self.device.lock().unwrap();
        let outcome = device.write_config(offset, data);
        self.carry_out(outcome);
    }

    /// Does what an access means. It is done when this returns, and so may the guest's access be.
    fn carry_out(&self, outcome: Outcome) {
        let pinner = self.team.service().pinner();
        match outcome {
            Outcome::Nothing => {}
            Outcome::Activate { root, levels } => {
                self.endpoint.stop();
                // If the guest lied, the pinner has logged it, as rarely as a guest's lies may be.
                if pinner.activate(root, levels).is_ok() {
                    self.endpoint.start();
                }
            }
            Outcome::Deactivate => self.drain(Drain::Deactivate),
            Outcome::Reset => self.drain(Drain::Reset),
            Outcome::Park => pinner.park(),
            Outcome::Unpark => pinner.unpark(),
            Outcome::Doorbell { vcpu } => self.ring(vcpu),
            // A reset moves them away, too. Your bus maps BAR 2 at `device.bar_address(Bar::Notify)`, and traps the others at
            // theirs.
            Outcome::MemorySpace => {}
        }
    }

    fn ring(&self, vcpu: usize) {
        // It fails only if it rings already.
        let _rings = self.team.doorbell(vcpu).map(|doorbell| doorbell.write(1));
    }

    /// First no device can do DMA, then nothing is mapped for one.
    fn drain(&self, drain: Drain) {
        self.endpoint.stop();
        // If the IOMMU refused, the pinner has logged it; what is stuck keeps its memory.
        let _nothing_left = self.team.service().pinner().deactivate(drain);
    }

    /// The guest's machine is reset.
    pub(crate) fn reset(&self) {
        let mut device = self.device.lock().unwrap();
        let outcome = device.reset();
        self.carry_out(outcome);
    }

    /// The guest is gone.
    pub(crate) fn shut_down(&self) -> Result<(), DrainError> {
        self.endpoint.stop();
        self.team.stop(Drain::Reset)
    }
}

/// A device in software that does DMA. Its driver tells it what to do, as through registers of its own.
pub(crate) struct Endpoint {
    pub(crate) iommu: Arc<SoftIommu>,
    /// Whether it may do DMA. Held while it does, so that none is under way when it was switched off.
    is_bus_master: RwLock<bool>,
}

impl Endpoint {
    fn stop(&self) {
        *self.is_bus_master.write().unwrap() = false;
    }

    fn start(&self) {
        *self.is_bus_master.write().unwrap() = true;
    }

    /// Does something by DMA, if it may.
    pub(crate) fn dma<T>(&self, dma: impl FnOnce(&SoftIommu) -> Result<T, DmaFault>) -> Result<T, Box<dyn Error>> {
        let is_bus_master = self.is_bus_master.read().unwrap();
        if *is_bus_master { Ok(dma(&self.iommu)?) } else { Err("bus mastering is off".into()) }
    }
}
