//! A VM without a CPU: the CoIOMMU device with its workers and a container, and the guest's driver for it.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coiommu_dtt::guest::{GuestDtt, TablePages, write_batch};
use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::{Bdf, Gfn, Gpa, Levels, PAGE_SIZE, RequestWord};
use coiommu_pci::{Bar, DeviceConfig, Outcome};
use coiommu_pin::pinner::{Drain, Hold, UnpinReport};
use coiommu_pin::worker::{Service, Team, TeamConfig};
use coiommu_pin::{DmaMapper, NotifyMap as _, Pinner, PinnerConfig, Policy, RamRegion, SharedSlots};
use coiommu_vfio::Type1;
use coiommu_vfio::type1::{Device, Needs};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};
use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

type Space = Arc<GuestMemoryMmap>;
type Slots = SharedSlots<GuestMemoryMmap>;

/// Where the driver has room for batches, each vCPU its own.
const BATCHES: u64 = 0x10_0000;
const BATCH_BYTES: u64 = 0x1_0000;
/// Where its tables are, up to the end of the first 16 MiB.
const TABLES: u64 = 0x20_0000;
/// The first page that nothing of this is in.
pub(crate) const FREE: u64 = 0x1000;

pub(crate) struct Vm {
    pub(crate) memory: Space,
    ram: Arc<GuestRegionMmap>,
    pub(crate) container: Arc<Type1>,
    /// How many mappings it had left at first.
    mappings_left: Option<u64>,
    pci: Mutex<coiommu_pci::Device>,
    pub(crate) team: Team<Space, Slots>,
    bdf: Bdf,
    vcpus: usize,
    table: Mutex<Option<Arc<GuestDtt>>>,
    table_pages: TablesInOrder,
    pub(crate) requests: AtomicU64,
}

struct TablesInOrder(AtomicU64);

impl TablePages for TablesInOrder {
    fn alloc(&self) -> Option<Gpa> {
        Some(Gpa::new(self.0.fetch_add(PAGE_SIZE, Ordering::Relaxed)))
    }

    fn free(&self, _page: Gpa) {}
}

impl Vm {
    /// With the device at this address passed through.
    pub(crate) fn new(address: &str, policy: &str, vcpus: usize, ram: u64) -> Self {
        let mappings = policy.parse::<Policy>().unwrap().mappings_needed(ram);
        Self::with_mappings(address, policy, vcpus, ram, mappings)
    }

    /// The same, where so many mappings are enough.
    pub(crate) fn with_mappings(address: &str, policy: &str, vcpus: usize, ram: u64, mappings: u64) -> Self {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(file);
        file.set_len(ram).unwrap();
        let size = usize::try_from(ram).unwrap();
        let region = GuestRegionMmap::from_range(GuestAddress(0), size, Some(FileOffset::new(file, 0)));
        let ram_region = Arc::new(region.unwrap());
        let memory = Arc::new(GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&ram_region)]).unwrap());

        let container = Arc::new(Type1::open([address]).unwrap());
        container.prepare(&Needs { ram: vec![0..ram], pinned: ram, mappings }).unwrap();
        let bdf: Bdf = address.split_once(':').unwrap().1.parse().unwrap();
        let config = PinnerConfig::new(policy.parse().unwrap(), vec![bdf]);
        let mapper = Arc::clone(&container) as Arc<dyn DmaMapper>;
        let pinner = Pinner::new(Arc::clone(&memory), mapper, config).unwrap();
        pinner.add_region(RamRegion::from_vm_memory(Arc::clone(&ram_region)).unwrap()).unwrap();
        let bar2 = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap());
        let service = Arc::new(Service::new(pinner, SharedSlots::new(bar2, vcpus).unwrap()).unwrap());
        // Two as soon as there is something to share.
        let mut workers = TeamConfig::default();
        workers.pin_workers = NonZeroUsize::new(vcpus.min(2)).unwrap();
        let team = Team::spawn(&service, &workers).unwrap();
        let pci = Mutex::new(coiommu_pci::Device::new(&DeviceConfig::new(vcpus, vec![bdf])).unwrap());
        Self {
            memory,
            ram: ram_region,
            mappings_left: container.limits().mappings_left,
            container,
            pci,
            team,
            bdf,
            vcpus,
            table: Mutex::new(None),
            table_pages: TablesInOrder(AtomicU64::new(TABLES)),
            requests: AtomicU64::new(0),
        }
    }

    /// The device that is passed through.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.container.devices()[0]
    }

    pub(crate) fn pinner(&self) -> &Pinner<Space> {
        self.team.service().pinner()
    }

    /// The guest's driver writes to BAR 0, and the VMM carries out what it means.
    pub(crate) fn write_bar0(&self, offset: u64, value: u64) {
        let mut pci = self.pci.lock().unwrap();
        match pci.write_bar(Bar::Registers, offset, &value.to_le_bytes()) {
            Outcome::Activate { root, levels } => {
                self.device().set_bus_master(false).unwrap();
                self.pinner().activate(root, levels).unwrap();
                self.device().set_bus_master(true).unwrap();
            }
            Outcome::Deactivate => {
                self.device().set_bus_master(false).unwrap();
                self.pinner().deactivate(Drain::Deactivate).unwrap();
            }
            Outcome::Park => self.pinner().park(),
            Outcome::Unpark => self.pinner().unpark(),
            Outcome::Nothing => {}
            other => panic!("the driver did not mean {other:?}"),
        }
    }

    pub(crate) fn activate(&self) {
        let levels = Levels::new(4).unwrap();
        let vcpus = u16::try_from(self.vcpus).unwrap();
        self.table_pages.0.store(TABLES, Ordering::Relaxed);
        let table = GuestDtt::new(&*self.memory, &self.table_pages, levels, vcpus).unwrap();
        self.write_bar0(0x00, table.dtt().root().raw());
        self.write_bar0(0x10, 4);
        self.write_bar0(0x08, 1);
        *self.table.lock().unwrap() = Some(Arc::new(table));
    }

    pub(crate) fn deactivate(&self) {
        self.write_bar0(0x08, 0);
    }

    pub(crate) fn park(&self) {
        self.write_bar0(0x08, 2);
    }

    pub(crate) fn unpark(&self) {
        self.write_bar0(0x08, 3);
    }

    fn table(&self) -> Arc<GuestDtt> {
        Arc::clone(self.table.lock().unwrap().as_ref().unwrap())
    }

    /// Maps pages for the device. False: they are not all pinned, and none is mapped.
    pub(crate) fn map(&self, vcpu: usize, pages: &[u64]) -> bool {
        let missing = self.count(pages);
        if !missing.is_empty() {
            self.ask(vcpu, self.request(vcpu, &missing));
        }
        let table = self.table();
        let all = missing.iter().all(|&page| table.is_pinned(&*self.memory, page).unwrap());
        if !all {
            self.unmap(pages);
        }
        all
    }

    /// Counts a mapping of each page, and returns those that are not pinned.
    pub(crate) fn count(&self, pages: &[u64]) -> Vec<Gfn> {
        let table = self.table();
        let map = |page: &Gfn| table.map(&*self.memory, &self.table_pages, *page).unwrap() == Mapped::NeedsPin;
        pages.iter().map(|&page| Gfn::new(page).unwrap()).filter(map).collect()
    }

    /// Writes the request for some pages.
    pub(crate) fn request(&self, vcpu: usize, pages: &[Gfn]) -> RequestWord {
        match *pages {
            [page] => RequestWord::page(page, self.bdf).unwrap(),
            _ => write_batch(&*self.memory, Gpa::new(BATCHES + vcpu as u64 * BATCH_BYTES), self.bdf, pages).unwrap(),
        }
    }

    pub(crate) fn unmap(&self, pages: &[u64]) {
        let table = self.table();
        pages.iter().for_each(|&page| table.unmap(&*self.memory, Gfn::new(page).unwrap()).unwrap());
    }

    fn ask(&self, vcpu: usize, word: RequestWord) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let slots = self.team.service().notify().slots();
        slots.post(vcpu, word).unwrap();
        // As an ioeventfd would.
        self.team.doorbell(vcpu).unwrap().write(1).unwrap();
        let start = Instant::now();
        while !slots.is_answered(vcpu).unwrap() {
            assert!(start.elapsed() < Duration::from_secs(60), "vcpu {vcpu} is never answered");
            std::thread::yield_now();
        }
    }

    /// The host is about to take pages.
    pub(crate) fn unpin(&self, pages: Range<u64>) -> (UnpinReport, Option<Hold>) {
        let bytes = (pages.end - pages.start) * PAGE_SIZE;
        self.team.reclaimer().unpin_and_wait(Gpa::new(pages.start * PAGE_SIZE), bytes).unwrap()
    }

    /// Gives pages back to the system: they are empty when they are touched again.
    pub(crate) fn take(&self, pages: Range<u64>) {
        use vm_memory::GuestMemoryRegion as _;
        let file = self.ram.file_offset().unwrap().file();
        let (start, bytes) = (pages.start * PAGE_SIZE, (pages.end - pages.start) * PAGE_SIZE);
        fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, bytes).unwrap();
    }

    /// All RAM goes away.
    pub(crate) fn remove_ram(&self) {
        self.pinner().remove_region(Gpa::new(0), self.ram_bytes()).unwrap();
    }

    /// It is back.
    pub(crate) fn add_ram(&self) {
        self.pinner().add_region(RamRegion::from_vm_memory(Arc::clone(&self.ram)).unwrap()).unwrap();
    }

    fn ram_bytes(&self) -> u64 {
        use vm_memory::GuestMemoryRegion as _;
        self.ram.len()
    }

    pub(crate) fn fill(&self, page: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(page * PAGE_SIZE)).unwrap();
    }

    pub(crate) fn bytes(&self, page: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(page * PAGE_SIZE)).unwrap();
        bytes
    }

    /// The guest switches the device off: nothing is mapped then, in the kernel's eyes too.
    pub(crate) fn end(self) {
        self.deactivate();
        let counters = self.pinner().counters();
        assert_eq!((self.pinner().pinned_pages(), self.pinner().mappings()), (0, 0));
        assert_eq!(counters.pages_pinned, counters.pages_unpinned);
        assert_eq!(counters.anomalies, 0);
        assert_eq!(self.container.limits().mappings_left, self.mappings_left, "dma_avail is back");
        assert_eq!(self.container.unmap_all(), Ok(0));
        assert_eq!(self.team.service().failure(), None);
        self.team.stop(Drain::Reset).unwrap();
    }
}
