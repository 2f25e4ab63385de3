//! Serving a request and looking for idle pages allocate nothing, once the books of the blocks exist.
//!
//! Unsafe is needed here: an allocator that counts is an allocator.
#![allow(unsafe_code)]

mod rig;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use coiommu_pin::pinner::PinResult;
use rig::{Rig, TestClock};

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

fn unmap_extents_that_are_idle(rig: &Rig) {
    // The first tick ages what was accessed; nothing was, so each takes all there is.
    while rig.pinner.pinned_pages() > 0 {
        assert!(rig.pinner.tick(None).unpinned_pages > 0);
    }
}

#[test]
fn counts_allocations() {
    assert_eq!(allocations(|| drop(Box::new(1))), 1);
}

#[test]
fn nothing_is_allocated_once_blocks_exist() {
    for extent in ["page", "run", "aligned=64k", "aligned=2m"] {
        let mut rig = Rig::new(&format!("extent={extent},unpin_policy=lru,unpin_gen_threshold=0"));
        for time in ["warm-up", "first", "second"] {
            let clock = TestClock::default();
            for pages in REQUESTS {
                let word = rig.word(pages);
                let serve = || assert_eq!(rig.pinner.pin(word, &mut rig.scratch, &clock), PinResult::Pinned);
                let count = allocations(serve);
                assert!(count == 0 || time == "warm-up", "extent={extent}, {time}: {count} allocations for {pages:?}");
            }
            let again = rig.word(REQUESTS[3]);
            assert_eq!(
                allocations(|| assert_eq!(rig.pinner.pin(again, &mut rig.scratch, &clock), PinResult::Pinned)),
                0
            );
            let count = allocations(|| unmap_extents_that_are_idle(&rig));
            assert!(count == 0 || time == "warm-up", "extent={extent}, {time}: {count} allocations in a tick");
        }
    }
}
