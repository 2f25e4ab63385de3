//! A VMM with a guest in it: RAM in a memfd, a table that counts, requests in the notify map, doorbells.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use coiommu_dtt::guest::{GuestDtt, TablePages, write_batch};
use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::{Bdf, Gfn, Gpa, Levels, NotifySlots, PAGE_SIZE, RequestWord, TableMemory};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::server::{ENDPOINTS, Server, VCPUS};
use crate::wait_for;
use crate::wire::{BAR0, BAR2, READ, WRITE, Wire};

/// Guest memory in a file: where the guest sees it, how much, and where it is in the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) gpa: u64,
    pub(crate) bytes: u64,
    pub(crate) offset: u64,
}

impl Place {
    /// The nth page of it.
    pub(crate) fn page(self, n: u64) -> Gfn {
        assert!(n < self.bytes / PAGE_SIZE);
        Gfn::containing(Gpa::new(self.gpa + n * PAGE_SIZE))
    }

    pub(crate) fn pages(self, n: std::ops::Range<u64>) -> Vec<Gfn> {
        n.map(|n| self.page(n)).collect()
    }
}

/// Where every guest has its tables and batches.
pub(crate) const LOW: Place = Place { gpa: 0, bytes: 4 << 20, offset: 0 };
/// Where it does DMA. Over a block's border, behind a hole.
pub(crate) const HIGH: Place = Place { gpa: 0x4010_0000, bytes: 4 << 20, offset: 4 << 20 };

const TABLES: u64 = 1 << 20;
/// Each vCPU has as much for its batch.
const BATCH: u64 = 64 << 10;

const ROOT: u64 = 0;
pub(crate) const COMMAND: u64 = 8;
const LEVELS: u64 = 16;
pub(crate) const DOORBELLS: u64 = 24;

/// What a guest writes to `COMMAND`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Command {
    Deactivate,
    Activate,
    Park,
    Unpark,
}

/// A memfd for RAM, as QEMU makes them, or without seals. Its name tells it from all others.
pub(crate) fn memory_file(name: &str, bytes: u64, is_sealed: bool) -> File {
    let file = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&file, bytes).unwrap();
    if is_sealed {
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
    }
    file.into()
}

/// A file of memory, mapped here at guest addresses.
pub(crate) fn view(file: &File, places: &[Place]) -> GuestMemoryMmap {
    let region = |place: &Place| {
        let file = FileOffset::new(file.try_clone().unwrap(), place.offset);
        GuestRegionMmap::from_range(GuestAddress(place.gpa), usize::try_from(place.bytes).unwrap(), Some(file)).unwrap()
    };
    GuestMemoryMmap::from_regions(places.iter().map(region).collect()).unwrap()
}

/// Pages for tables, one after the other.
#[derive(Debug)]
struct Pages(AtomicU64);

impl TablePages for Pages {
    fn alloc(&self) -> Option<Gpa> {
        Some(Gpa::new(self.0.fetch_add(PAGE_SIZE, Relaxed)))
    }

    fn free(&self, _page: Gpa) {}
}

/// A guest, and the VMM it runs in.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) vmm: Wire,
    pub(crate) ram: File,
    pub(crate) memory: GuestMemoryMmap,
    notify: GuestMemoryMmap,
    pub(crate) table: GuestDtt,
    pages: Pages,
}

impl Guest {
    /// A guest with RAM at [`LOW`] and [`HIGH`], whose driver is not active.
    pub(crate) fn boot(server: &Server) -> Self {
        let mut vmm = Wire::connect(&server.socket());
        let ram = memory_file("guest-ram", 8 << 20, true);
        for place in [LOW, HIGH] {
            map(&mut vmm, &ram, place).unwrap();
        }
        Self::over(vmm, ram, &[LOW], TABLES)
    }

    /// A guest that has its tables from `tables` on, in RAM at these places, which its VMM has told of.
    pub(crate) fn over(mut vmm: Wire, ram: File, places: &[Place], tables: u64) -> Self {
        let region = vmm.region(BAR2).unwrap();
        let notify = view(&region.file.unwrap(), &[Place { gpa: 0, bytes: region.size, offset: region.offset }]);
        let memory = view(&ram, places);
        let pages = Pages(AtomicU64::new(tables));
        let cpus = u16::try_from(VCPUS).unwrap();
        let table = GuestDtt::new(&memory, &pages, Levels::new(4).unwrap(), cpus).unwrap();
        Self { vmm, ram, memory, notify, table, pages }
    }

    /// The same, active.
    pub(crate) fn active(server: &Server) -> Self {
        let mut guest = Self::boot(server);
        guest.activate();
        guest
    }

    /// As a driver does: root, levels, ACTIVATE, and a read that comes back when that is done.
    pub(crate) fn activate(&mut self) {
        self.start(self.table.dtt().root().raw(), 4);
    }

    pub(crate) fn start(&mut self, root: u64, levels: u64) {
        self.vmm.write(BAR0, ROOT, &root.to_le_bytes()).unwrap();
        self.vmm.write(BAR0, LEVELS, &levels.to_le_bytes()).unwrap();
        self.command(Command::Activate);
    }

    pub(crate) fn command(&mut self, command: Command) {
        self.vmm.write(BAR0, COMMAND, &(command as u64).to_le_bytes()).unwrap();
        assert_eq!(self.vmm.read_u64(BAR0, COMMAND), 0);
    }

    pub(crate) fn map(&mut self, place: Place) -> Result<(), u32> {
        map(&mut self.vmm, &self.ram, place)
    }

    pub(crate) fn unmap(&mut self, place: Place) -> Result<(), u32> {
        self.vmm.dma_unmap(place.gpa, place.bytes)
    }

    /// Maps pages for the device, as a driver does: whether it could be done.
    pub(crate) fn dma_map(&mut self, vcpu: usize, pages: &[Gfn]) -> bool {
        let missing = self.count(pages);
        if !missing.is_empty() {
            self.ask(vcpu, &missing);
        }
        let is_mapped = missing.iter().all(|&page| self.is_pinned(page));
        if !is_mapped {
            self.dma_unmap(pages);
        }
        is_mapped
    }

    /// Counts a map of each page; those that are not pinned.
    pub(crate) fn count(&self, pages: &[Gfn]) -> Vec<Gfn> {
        let needs_pin = |&page: &Gfn| self.table.map(&self.memory, &self.pages, page).unwrap() == Mapped::NeedsPin;
        pages.iter().copied().filter(needs_pin).collect()
    }

    pub(crate) fn dma_unmap(&self, pages: &[Gfn]) {
        pages.iter().for_each(|&page| self.table.unmap(&self.memory, page).unwrap());
    }

    /// Asks for pages, and waits for the answer.
    pub(crate) fn ask(&mut self, vcpu: usize, pages: &[Gfn]) {
        let endpoint = Bdf::new(ENDPOINTS[0]).unwrap();
        let request = match *pages {
            [page] => RequestWord::page(page, endpoint).unwrap(),
            _ => self.batch(vcpu, endpoint, pages),
        };
        self.post(vcpu, request);
        self.ring(vcpu, &[1]);
        self.wait_for_answer(vcpu);
    }

    pub(crate) fn batch(&self, vcpu: usize, endpoint: Bdf, pages: &[Gfn]) -> RequestWord {
        write_batch(&self.memory, Gpa::new(BATCH * (1 + vcpu as u64)), endpoint, pages).unwrap()
    }

    pub(crate) fn post(&self, vcpu: usize, request: RequestWord) {
        self.slots(|slots| slots.post(vcpu, request).unwrap());
    }

    pub(crate) fn ring(&mut self, vcpu: usize, data: &[u8]) {
        self.vmm.write(BAR0, DOORBELLS + vcpu as u64, data).unwrap();
    }

    #[track_caller]
    pub(crate) fn wait_for_answer(&self, vcpu: usize) {
        wait_for("an answer", || self.is_answered(vcpu).then_some(()));
    }

    pub(crate) fn is_answered(&self, vcpu: usize) -> bool {
        self.slots(|slots| slots.is_answered(vcpu).unwrap())
    }

    fn slots<T>(&self, look: impl FnOnce(NotifySlots<'_, AtomicU64>) -> T) -> T {
        look(NotifySlots::new(self.notify.words64(Gpa::new(0), VCPUS).unwrap()))
    }

    pub(crate) fn is_pinned(&self, page: Gfn) -> bool {
        self.table.is_pinned(&self.memory, page).unwrap()
    }

    /// How many of them are pinned, as the table says.
    pub(crate) fn pinned(&self, pages: &[Gfn]) -> usize {
        pages.iter().filter(|&&page| self.is_pinned(page)).count()
    }
}

/// Tells of RAM.
pub(crate) fn map(vmm: &mut Wire, ram: &File, place: Place) -> Result<(), u32> {
    vmm.dma_map(place.gpa, place.bytes, READ | WRITE, Some((ram, place.offset)))
}
