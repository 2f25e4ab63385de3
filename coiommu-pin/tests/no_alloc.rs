//! Serving a request and looking for idle pages allocate nothing, once the books of the blocks exist. What is left of a piece
//! when its time is over, when there is no room or RAM is away, is kept in memory that is allocated then: here time stands
//! still.
//!
//! Unsafe is needed here: an allocator that counts is an allocator, and a mapper's map call a promise about memory.
#![allow(unsafe_code)]

mod rig;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::hint::black_box;
use std::sync::Arc;

use coiommu_dtt::leaf::Mapped;
use coiommu_pin::RamRegion;
use coiommu_pin::pinner::{PinResult, Pinner, PinnerConfig};
use coiommu_pin::request::Scratch;
use rig::nothing::Nothing;
use rig::{Rig, Space, TestClock, gfn};

/// The system's allocator; counts what each thread asks for.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing, as the counter is a constant
// without a destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above; it came from there.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

/// Single pages, a run, a run over two blocks, and scattered pages out of order with one twice.
const REQUESTS: [&[u64]; 4] = [&[7], &[20, 21, 22, 23], &[510, 511, 512, 513], &[2000, 40, 900, 1600, 41, 900, 0]];

/// A pinner for a rig's guest, without the rig's mapper.
fn pinner(rig: &Rig, policy: &str) -> Pinner<Space> {
    let config = PinnerConfig::new(policy.parse().unwrap(), vec![rig.bdf]);
    let pinner = Pinner::new(Arc::clone(&rig.memory), Arc::new(Nothing), config).unwrap();
    for region in &rig.ram {
        pinner.add_region(RamRegion::from_vm_memory(Arc::clone(region)).unwrap()).unwrap();
    }
    pinner.activate(rig.guest.dtt().root(), 4).unwrap();
    pinner
}

#[test]
fn counts_allocations() {
    assert_eq!(allocations(|| drop(black_box(Box::new(1)))), 1);
}

#[test]
fn nothing_is_allocated_once_blocks_exist() {
    let rig = Rig::new("");
    let (mut scratch, clock) = (Scratch::default(), TestClock::default());
    for extent in ["page", "run", "aligned=64k", "aligned=2m"] {
        let pinner = pinner(&rig, &format!("extent={extent},unpin_policy=lru,unpin_gen_threshold=0"));
        for time in ["warm-up", "first", "second"] {
            let check = |count, what| {
                assert!(count == 0 || time == "warm-up", "extent={extent}, {time}: {count} allocations, {what}");
            };
            // Each is asked for twice: to pin, and when all is pinned.
            for pages in REQUESTS.into_iter().chain(REQUESTS) {
                let word = rig.word(pages);
                let mut result = None;
                check(allocations(|| result = Some(pinner.pin(word, &mut scratch, &clock))), "to pin");
                assert_eq!(result, Some(PinResult::Pinned));
            }
            // One in use, so that a block is looked at and keeps something.
            assert_eq!(rig.guest.map(&*rig.memory, &rig.pages, gfn(7)).unwrap(), Mapped::Pinned);
            check(allocations(|| _ = pinner.tick(None)), "to unpin what is idle");
            rig.guest.unmap(&*rig.memory, gfn(7)).unwrap();
            assert!(pinner.pinned_pages() > 0);
            check(allocations(|| _ = pinner.tick(None)), "to age");
            check(allocations(|| _ = pinner.tick(None)), "to unpin the last");
            assert_eq!(pinner.pinned_pages(), 0);
        }
    }
}
