//! All of CoIOMMU in a VMM, as short as it can be: what your exits call, what you carry out, who does the work.
//!
//! `Vmm` is yours: its methods are what your bus calls when a vCPU exits. `Driver` is what runs in the guest; here it is a
//! struct that calls the exits as functions. The endpoint is a device in software that does DMA through `SoftIommu`; yours
//! is behind VFIO.
//!
//! `cargo run -p coiommu-pci --example vmm`

use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use coiommu_dtt::guest::{GuestDtt, TablePages};
use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::{Bdf, Gfn, Gpa, Levels, PAGE_SIZE, RequestWord};
use coiommu_pci::{Bar, Device, DeviceConfig, Doorbells, Outcome};
use coiommu_pin::pinner::Drain;
use coiommu_pin::worker::team::TeamConfig;
use coiommu_pin::worker::{Service, Team};
use coiommu_pin::{DmaMapper, NotifyMap, Pinner, PinnerConfig, Policy, RamRegion, SharedSlots};
use coiommu_vfio::SoftIommu;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

type Memory = Arc<GuestMemoryMmap>;

/// Your VMM's side: one of these a guest.
struct Vmm {
    /// The PCI function. Locked while an access is carried out, so that commands take effect one after the other.
    device: Mutex<Device>,
    /// To be rung without that lock.
    doorbells: Doorbells,
    /// The threads that pin and unpin, and what they share: the pinner and the notify map.
    team: Team<Memory, SharedSlots<GuestMemoryMmap>>,
    /// The device that is passed through. Its bus mastering is yours to hold.
    endpoint: Endpoint,
}

impl Vmm {
    fn new(ram: &Arc<GuestRegionMmap>, bar2: &Memory, nic: Bdf, vcpus: usize) -> Result<Self, Box<dyn Error>> {
        // The IOMMU: here in software, else VFIO's type1 container.
        let iommu = Arc::new(SoftIommu::new());
        // Guest memory, for tables and requests. `GuestMemoryAtomic`, if yours changes.
        let memory = Arc::new(GuestMemoryMmap::from_arc_regions(vec![Arc::clone(ram)])?);
        let policy: Policy = "extent=run,unpin_policy=lru,unpin_interval=1".parse()?;
        let mapper = Arc::clone(&iommu) as Arc<dyn DmaMapper>;
        let pinner = Pinner::new(memory, mapper, PinnerConfig::new(policy, vec![nic]))?;
        // What may be pinned. Hotplug calls this too, and `remove_region` before memory goes.
        pinner.add_region(RamRegion::from_vm_memory(Arc::clone(ram))?)?;
        let service = Arc::new(Service::new(pinner, SharedSlots::new(Arc::clone(bar2), vcpus)?)?);
        let team = Team::spawn(&service, &TeamConfig::default())?;
        let device = Device::new(&DeviceConfig::new(vcpus, vec![nic]))?;
        let endpoint = Endpoint { iommu, is_bus_master: AtomicBool::new(true) };
        Ok(Self { doorbells: device.doorbells(), device: Mutex::new(device), team, endpoint })
    }

    /// A vCPU writes to BAR 0. (With KVM, give `team.doorbell(vcpu)` to an ioeventfd at `doorbells.offset(vcpu)`: then those
    /// writes do not even come here.)
    fn write_bar0(&self, offset: u64, data: &[u8]) {
        if let Some(vcpu) = self.doorbells.at(offset) {
            return self.ring(vcpu);
        }
        let mut device = self.device.lock().unwrap();
        let outcome = device.write_bar(Bar::Registers, offset, data);
        self.carry_out(outcome);
    }

    fn read_bar(&self, bar: Bar, offset: u64, data: &mut [u8]) {
        self.device.lock().unwrap().read_bar(bar, offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
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
                match pinner.activate(root, levels) {
                    Ok(()) => self.endpoint.start(),
                    Err(error) => eprintln!("the guest's table is no table: {error}"),
                }
            }
            Outcome::Deactivate => self.drain(Drain::Deactivate),
            Outcome::Reset => self.drain(Drain::Reset),
            Outcome::Park => pinner.park(),
            Outcome::Unpark => pinner.unpark(),
            Outcome::Doorbell { vcpu } => self.ring(vcpu),
            // Your bus maps BAR 2 at `device.bar_address(Bar::Notify)`, and traps the others at theirs.
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
        if let Err(error) = self.team.service().pinner().deactivate(drain) {
            eprintln!("{error}");
        }
    }
}

/// A network card that sends what it finds in memory, and receives the same in capitals.
struct Endpoint {
    iommu: Arc<SoftIommu>,
    is_bus_master: AtomicBool,
}

impl Endpoint {
    fn stop(&self) {
        self.is_bus_master.store(false, Ordering::SeqCst);
    }

    fn start(&self) {
        self.is_bus_master.store(true, Ordering::SeqCst);
    }

    fn echo(&self, iova: u64, len: usize) -> Result<(), Box<dyn Error>> {
        if !self.is_bus_master.load(Ordering::SeqCst) {
            return Err("bus mastering is off".into());
        }
        let mut packet = vec![0; len];
        self.iommu.read(iova, &mut packet)?;
        packet.make_ascii_uppercase();
        Ok(self.iommu.write(iova, &packet)?)
    }
}

/// The guest's driver, on vCPU 0.
struct Driver<'v> {
    vmm: &'v Vmm,
    /// Guest memory, and BAR 2, which the VMM has mapped into the guest.
    memory: &'v GuestMemoryMmap,
    bar2: SharedSlots<GuestMemoryMmap>,
    table: GuestDtt,
    table_pages: FromOneMiB,
    nic: Bdf,
}

/// Table pages from 1 MiB up.
struct FromOneMiB(AtomicU64);

impl TablePages for FromOneMiB {
    fn alloc(&self) -> Option<Gpa> {
        Some(Gpa::new((1 << 20) + self.0.fetch_add(PAGE_SIZE, Ordering::Relaxed)))
    }

    fn free(&self, _page: Gpa) {}
}

impl<'v> Driver<'v> {
    /// Finds its endpoint, builds a table, and switches the device on.
    fn probe(vmm: &'v Vmm, memory: &'v GuestMemoryMmap, bar2: &Memory) -> Result<Self, Box<dyn Error>> {
        vmm.write_config(0x04, &0b010_u16.to_le_bytes());
        let mut topology = [0; 4];
        vmm.read_bar(Bar::Topology, 0, &mut topology);
        let [1, 0, low, high] = topology else { return Err("there is one endpoint".into()) };
        let nic = Bdf::new(u16::from_le_bytes([low, high])).ok_or("no endpoint")?;
        let table_pages = FromOneMiB(AtomicU64::new(0));
        let table = GuestDtt::new(memory, &table_pages, Levels::new(4)?, 1)?;
        vmm.write_bar0(0x00, &table.dtt().root().raw().to_le_bytes());
        vmm.write_bar0(0x10, &4_u64.to_le_bytes());
        vmm.write_bar0(0x08, &1_u64.to_le_bytes());
        Ok(Self { vmm, memory, bar2: SharedSlots::new(Arc::clone(bar2), 1)?, table, table_pages, nic })
    }

    /// A driver's dma_map: two atomics if the page is pinned, a request if it is not.
    fn dma_map(&self, page: Gfn) -> Result<(), Box<dyn Error>> {
        if self.table.map(self.memory, &self.table_pages, page)? == Mapped::Pinned {
            return Ok(());
        }
        self.bar2.slots().post(0, RequestWord::page(page, self.nic).ok_or("a gfn of more than 47 bits")?)?;
        self.vmm.write_bar0(0x18, &[1]);
        while !self.bar2.slots().is_answered(0)? {
            std::hint::spin_loop();
        }
        if self.table.is_pinned(self.memory, page)? {
            return Ok(());
        }
        self.table.unmap(self.memory, page)?;
        Err("the host could not pin the page".into())
    }

    /// A driver's dma_unmap: one atomic.
    fn dma_unmap(&self, page: Gfn) -> Result<(), Box<dyn Error>> {
        Ok(self.table.unmap(self.memory, page)?)
    }

    fn remove(self) {
        self.vmm.write_bar0(0x08, &0_u64.to_le_bytes());
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let ram = Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), 64 << 20, None)?);
    // BAR 2. Over a memfd in real life, as the guest maps it too.
    let bar2 = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x2000)])?);
    let vmm = Vmm::new(&ram, &bar2, "00:05.0".parse()?, 1)?;

    let memory = GuestMemoryMmap::from_arc_regions(vec![ram])?;
    let driver = Driver::probe(&vmm, &memory, &bar2)?;
    let buffer = Gpa::new(0x200_0000);
    for text in ["hello", "again"] {
        memory.write_slice(text.as_bytes(), GuestAddress(buffer.raw()))?;
        driver.dma_map(Gfn::containing(buffer))?;
        vmm.endpoint.echo(buffer.raw(), text.len())?;
        driver.dma_unmap(Gfn::containing(buffer))?;
        let mut echo = vec![0; text.len()];
        memory.read_slice(&mut echo, GuestAddress(buffer.raw()))?;
        println!("{text} -> {}", String::from_utf8_lossy(&echo));
        assert_eq!(echo, text.to_uppercase().into_bytes());
    }
    let pinner = vmm.team.service().pinner();
    println!("pinned {} of {} pages, by {} request", pinner.pinned_pages(), (64 << 20) / PAGE_SIZE, {
        pinner.counters().requests_pinned
    });
    assert_eq!((pinner.pinned_pages(), pinner.counters().requests_pinned), (1, 1));

    driver.remove();
    assert_eq!(vmm.endpoint.iommu.mappings(), 0);
    let Vmm { team, endpoint, .. } = vmm;
    endpoint.stop();
    Ok(team.stop(Drain::Reset)?)
}
