//! All that a VMM has to bring to pin on demand: a mapper, guest memory, and a clock. The mapper here only prints; yours
//! calls VFIO or what you have.
//!
//! `cargo run -p coiommu-pin --example own_mapper`
#![allow(unsafe_code, reason = "a mapper's map call is a promise about memory")]

use std::cell::Cell;
use std::error::Error;
use std::sync::Arc;

use coiommu_dtt::guest::{GuestDtt, TablePages};
use coiommu_dtt::{Bdf, Gfn, Gpa, Levels, RequestWord};
use coiommu_pin::pinner::{Drain, PinResult, PinnerConfig, Step};
use coiommu_pin::request::Scratch;
use coiommu_pin::{Backing, Clock, DmaMapper, Limits, MapError, Pinner, Policy, RamRegion, SystemClock};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// Where VFIO_IOMMU_MAP_DMA and VFIO_IOMMU_UNMAP_DMA would be called.
#[derive(Debug)]
struct Printer;

impl DmaMapper for Printer {
    unsafe fn map(&self, iova: u64, backing: Backing<'_>, len: u64) -> Result<(), MapError> {
        println!("  map   {len:#8x} bytes at iova {iova:#x}, hva {:p}", backing.hva);
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<u64, MapError> {
        println!("  unmap {len:#8x} bytes at iova {iova:#x}");
        Ok(len)
    }

    fn limits(&self) -> Limits {
        Limits { page_sizes: 4096, iova_ranges: vec![0..=(1 << 39) - 1], mappings_left: Some(65_535) }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // Your VMM has these: guest memory (any vm-memory backend), and the guest's address of each device passed through.
    let ram = Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), 16 << 20, None)?);
    let memory = Arc::new(GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&ram)])?);
    let nic: Bdf = "00:05.0".parse()?;
    let clock = SystemClock;

    // One pinner a guest. RAM is announced when it is there, and taken back before it goes (`remove_region`).
    let policy: Policy = "extent=run,unpin_policy=lru,unpin_interval=1".parse()?;
    let pinner = Pinner::new(Arc::clone(&memory), Arc::new(Printer), PinnerConfig::new(policy, vec![nic]))?;
    pinner.add_region(RamRegion::from_vm_memory(ram)?)?;

    // The guest's driver builds its table and says ACTIVATE.
    let guest = Guest::new(&memory)?;
    pinner.activate(guest.table.dtt().root(), 4)?;

    // A doorbell rings: take the slot's word, serve it piece by piece (look at other slots in between), answer the slot.
    println!("a driver maps a page, and asks for it:");
    let page = Gfn::containing(Gpa::new(0x80_0000));
    let word = guest.map(page, nic)?;
    let mut scratch = Scratch::default();
    let mut request = pinner.begin(word, clock.now())?;
    let result = loop {
        match pinner.step(&mut request, &mut scratch, &clock) {
            Step::Done(result) => break result,
            Step::More | Step::Wait => {}
        }
    };
    assert_eq!(result, PinResult::Pinned);
    println!("pinned pages: {}", pinner.pinned_pages());

    // The driver is done. A timer ticks: the first tick ages the page, the second takes it back.
    println!("the driver unmaps it, and two ticks pass:");
    guest.table.unmap(&*memory, page)?;
    pinner.tick(None);
    pinner.tick(None);
    println!("pinned pages: {}", pinner.pinned_pages());

    // The guest is gone: bus mastering off first, then nothing stays mapped.
    pinner.deactivate(Drain::Reset)?;
    println!("{:?}", pinner.counters());
    Ok(())
}

/// The guest's driver; yours runs in the guest.
struct Guest<'m> {
    memory: &'m GuestMemoryMmap,
    pages: Pages,
    table: GuestDtt,
}

/// Table pages from 1 MiB up.
struct Pages(Cell<u64>);

impl TablePages for Pages {
    fn alloc(&self) -> Option<Gpa> {
        Some(Gpa::new(self.0.replace(self.0.get() + 4096)))
    }

    fn free(&self, _page: Gpa) {}
}

impl<'m> Guest<'m> {
    fn new(memory: &'m GuestMemoryMmap) -> Result<Self, Box<dyn Error>> {
        let pages = Pages(Cell::new(1 << 20));
        let table = GuestDtt::new(memory, &pages, Levels::new(4)?, 1)?;
        Ok(Self { memory, pages, table })
    }

    fn map(&self, page: Gfn, nic: Bdf) -> Result<RequestWord, Box<dyn Error>> {
        let _not_pinned_yet = self.table.map(self.memory, &self.pages, page)?;
        RequestWord::page(page, nic).ok_or_else(|| "the gfn does not fit into a request".into())
    }
}
