//! What runs in the guest: a driver for the device, as a struct that calls the exits as functions.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use coiommu_dtt::guest::{GuestDtt, TablePages, write_batch};
use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::{Bdf, Gfn, Gpa, Levels, PAGE_SIZE, RequestWord};
use coiommu_pci::Bar;
use coiommu_pin::{NotifyMap, SharedSlots};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::vmm::{Memory, Vmm};

/// The guest's driver. All of its vCPUs may call it at once, each with its own number.
pub(crate) struct Driver {
    vmm: Arc<Vmm>,
    /// Guest memory, and BAR 2, which the VMM has mapped into the guest.
    pub(crate) memory: Memory,
    bar2: SharedSlots<GuestMemoryMmap>,
    pub(crate) table: GuestDtt,
    table_pages: TablePagesInOrder,
    nic: Bdf,
    /// How often the host was asked, and for how many pages in all.
    pub(crate) requests: AtomicU64,
    pub(crate) pages_asked: AtomicU64,
}

/// Pages for tables and batches, from 1 MiB up. A real driver asks its kernel.
struct TablePagesInOrder(AtomicU64);

const TABLES: u64 = 1 << 20;
/// Where each vCPU has room for a batch.
const BATCHES: u64 = 512 << 10;
const BATCH_BYTES: u64 = 64 << 10;

impl TablePages for TablePagesInOrder {
    fn alloc(&self) -> Option<Gpa> {
        Some(Gpa::new(self.0.fetch_add(PAGE_SIZE, Ordering::Relaxed)))
    }

    fn free(&self, _page: Gpa) {}
}

impl Driver {
    /// Finds its endpoint, builds a table, and switches the device on.
    pub(crate) fn probe(
        vmm: &Arc<Vmm>,
        memory: &Memory,
        bar2: &Arc<GuestMemoryMmap>,
        vcpus: usize,
    ) -> Result<Self, Box<dyn Error>> {
        // Memory space on.
        vmm.write_config(0x04, &0b010_u16.to_le_bytes());
        let mut topology = [0; 4];
        vmm.read_bar(Bar::Topology, 0, &mut topology);
        let [1, 0, low, high] = topology else { return Err("there is one endpoint".into()) };
        let nic = Bdf::new(u16::from_le_bytes([low, high])).ok_or("no endpoint")?;
        let table_pages = TablePagesInOrder(AtomicU64::new(TABLES));
        let table = GuestDtt::new(&*memory.memory(), &table_pages, Levels::new(4)?, u16::try_from(vcpus)?)?;
        // Root, levels, ACTIVATE.
        vmm.write_bar0(0x00, &table.dtt().root().raw().to_le_bytes());
        vmm.write_bar0(0x10, &4_u64.to_le_bytes());
        vmm.write_bar0(0x08, &1_u64.to_le_bytes());
        let bar2 = SharedSlots::new(Arc::clone(bar2), vcpus)?;
        Ok(Self {
            vmm: Arc::clone(vmm),
            memory: memory.clone(),
            bar2,
            table,
            table_pages,
            nic,
            requests: AtomicU64::new(0),
            pages_asked: AtomicU64::new(0),
        })
    }

    /// Maps pages for the device: two atomics for each that is pinned, one request for all that are not.
    pub(crate) fn dma_map(&self, vcpu: usize, pages: &[Gfn]) -> Result<(), Box<dyn Error>> {
        let (memory, mut missing) = (self.memory.memory(), Vec::new());
        for &page in pages {
            if self.table.map(&*memory, &self.table_pages, page)? == Mapped::NeedsPin {
                missing.push(page);
            }
        }
        if !missing.is_empty() {
            self.ask(vcpu, &missing)?;
        }
        // PINNED is the only answer there is.
        for &page in &missing {
            if !self.table.is_pinned(&*memory, page)? {
                self.dma_unmap(pages)?;
                return Err(format!("the host could not pin {page}").into());
            }
        }
        Ok(())
    }

    /// One atomic a page.
    pub(crate) fn dma_unmap(&self, pages: &[Gfn]) -> Result<(), Box<dyn Error>> {
        let memory = self.memory.memory();
        for &page in pages {
            self.table.unmap(&*memory, page)?;
        }
        Ok(())
    }

    /// Asks for pages: writes the request into this vCPU's slot, rings its doorbell, and waits until the slot is 0.
    fn ask(&self, vcpu: usize, pages: &[Gfn]) -> Result<(), Box<dyn Error>> {
        let request = match *pages {
            [page] => RequestWord::page(page, self.nic).ok_or("a gfn of more than 47 bits")?,
            _ => write_batch(&*self.memory.memory(), Gpa::new(BATCHES + vcpu as u64 * BATCH_BYTES), self.nic, pages)?,
        };
        let slots = self.bar2.slots();
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.pages_asked.fetch_add(pages.len() as u64, Ordering::Relaxed);
        slots.post(vcpu, request)?;
        self.vmm.write_bar0(0x18 + vcpu as u64, &[1]);
        while !slots.is_answered(vcpu)? {
            std::hint::spin_loop();
        }
        Ok(())
    }

    /// DEACTIVATE.
    pub(crate) fn remove(self) {
        self.vmm.write_bar0(0x08, &0_u64.to_le_bytes());
    }
}
