//! A guest and its host at one table, in a few lines: the guest counts a page and asks for it, the host marks it pinned
//! and later takes it back. What a host does between (mapping the page for the device) is coiommu-pin's business.
//!
//! `cargo run -p coiommu-dtt --example guest_and_host`

use std::cell::Cell;
use std::error::Error;
use std::sync::atomic::AtomicU64;

use coiommu_dtt::guest::{GuestDtt, TablePages};
use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::{Bdf, Dtt, Gfn, Gpa, Levels, NotifySlots, Request, RequestWord};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// The guest keeps its tables in pages from 1 MiB up.
struct TablesFrom(Cell<u64>);

impl TablePages for TablesFrom {
    fn alloc(&self) -> Option<Gpa> {
        Some(Gpa::new(self.0.replace(self.0.get() + 4096)))
    }

    fn free(&self, _page: Gpa) {}
}

fn main() -> Result<(), Box<dyn Error>> {
    // What both share: the guest's memory and a slot for its only vCPU.
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4 << 20)])?;
    let notify_map = [AtomicU64::new(0)];
    let slots = NotifySlots::new(&notify_map);
    let nic: Bdf = "00:02.0".parse()?;

    // The guest builds a table and tells the device where it is.
    let tables = TablesFrom(Cell::new(1 << 20));
    let guest = GuestDtt::new(&memory, &tables, Levels::new(4)?, 1)?;
    let (root, levels) = (guest.dtt().root(), guest.dtt().levels().get());

    // It maps a buffer, finds the page not pinned, and asks.
    let buffer = Gfn::containing(Gpa::new(0x20_0000));
    assert_eq!(guest.map(&memory, &tables, buffer)?, Mapped::NeedsPin);
    slots.post(0, RequestWord::page(buffer, nic).ok_or("the gfn does not fit")?)?;

    // The host checks the registers, takes the request, pins (not shown), sets PINNED, answers.
    let host = Dtt::new(&memory, root, u64::from(levels))?;
    let taken = slots.take(0)?.ok_or("no request")?;
    let Request::Page { gfn, bdf } = taken.decode()? else {
        return Err("not a page".into());
    };
    host.leaf_table(&memory, gfn)?.leaf(gfn).set_pinned();
    assert_eq!(slots.answer(0, taken)?, coiommu_dtt::notify::Answered::Yes);
    println!("host pinned gfn {gfn} for {bdf}");

    // The guest uses the page and unmaps it: no exit. Mapping it again costs none either.
    assert!(guest.is_pinned(&memory, buffer)?);
    guest.unmap(&memory, buffer)?;
    assert_eq!(guest.map(&memory, &tables, buffer)?, Mapped::Pinned);
    guest.unmap(&memory, buffer)?;

    // The host takes idle pages back: first the page ages, then it goes.
    let leaf = host.leaf_table(&memory, buffer)?.leaf(buffer);
    assert!(leaf.try_unpin().is_err(), "it was just accessed");
    leaf.clear_accessed();
    assert!(leaf.try_unpin().is_ok());
    println!("host took gfn {buffer} back: {:?}", leaf.load());
    Ok(())
}
