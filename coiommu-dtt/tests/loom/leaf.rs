//! The leaf: what the order of each of its steps carries along.
//!
//! Explored in full, but for the one with three threads.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::memory::Word32;
use coiommu_dtt::{Leaf, LeafEntry};
use loom::sync::atomic::{AtomicBool, AtomicU32};
use loom::thread;

use crate::check::check;
use crate::watched::Watched;

const PINNED: u32 = LeafEntry::PINNED.bits();
const LIMIT: u32 = LeafEntry::COUNT;

/// A leaf entry, alone.
#[derive(Debug)]
struct Word(AtomicU32);

impl Word32 for Word {
    fn load(&self, order: std::sync::atomic::Ordering) -> u32 {
        self.0.load(order)
    }

    fn fetch_or(&self, bits: u32, order: std::sync::atomic::Ordering) -> u32 {
        self.0.fetch_or(bits, order)
    }

    fn fetch_and(&self, bits: u32, order: std::sync::atomic::Ordering) -> u32 {
        self.0.fetch_and(bits, order)
    }

    fn compare_exchange_weak(
        &self,
        current: u32,
        new: u32,
        success: std::sync::atomic::Ordering,
        failure: std::sync::atomic::Ordering,
    ) -> Result<u32, u32> {
        self.0.compare_exchange_weak(current, new, success, failure)
    }
}

/// A page as guest, host and device see it.
#[derive(Debug)]
struct Page {
    word: Word,
    /// Whether the IOMMU has it. No order of its own: it is seen by whoever the word tells.
    mapped: AtomicBool,
    memory: Watched,
}

impl Page {
    fn new(word: u32) -> Arc<Self> {
        let mapped = AtomicBool::new(word & PINNED != 0);
        Arc::new(Self { word: Word(AtomicU32::new(word)), mapped, memory: Watched::default() })
    }

    fn leaf(&self) -> Leaf<'_, Word> {
        Leaf::new(&self.word)
    }

    fn host_pins(&self) {
        self.mapped.store(true, Relaxed);
        self.leaf().set_pinned();
    }

    /// Unpins if nobody uses the page; whoever takes it then comes after all who used it.
    fn host_unpins(&self) -> bool {
        let unpinned = self.leaf().try_unpin().is_ok();
        if unpinned {
            self.mapped.store(false, Relaxed);
            self.memory.taken();
        }
        unpinned
    }

    fn device_uses(&self) {
        assert!(self.mapped.load(Relaxed), "the device faults");
        self.memory.used();
    }
}

/// A guest that maps a page while the host pins it, and looks once more after: PINNED, when seen, stands for a mapping.
#[test]
fn who_sees_pinned_sees_the_mapping() {
    check(None, || {
        let page = Page::new(0);
        let host = thread::spawn({
            let page = Arc::clone(&page);
            move || page.host_pins()
        });
        if page.leaf().guest_map(LIMIT) == Ok(Mapped::Pinned) || page.leaf().is_pinned() {
            page.device_uses();
        }
        host.join().unwrap();
    });
}

/// Two CPUs map and unmap a pinned page while the host ages it and tries to take it. At most 3 preemptions.
#[test]
fn a_counted_page_is_not_taken_and_a_taken_one_has_no_users() {
    check(Some(3), || {
        let page = Page::new(PINNED);
        let cpu = |page: &Page| {
            if page.leaf().guest_map(LIMIT) == Ok(Mapped::Pinned) {
                page.device_uses();
            }
            page.leaf().guest_unmap().unwrap();
        };
        let other = thread::spawn({
            let page = Arc::clone(&page);
            move || cpu(&page)
        });
        let host = thread::spawn({
            let page = Arc::clone(&page);
            move || {
                if !page.host_unpins() {
                    page.leaf().clear_accessed();
                    page.host_unpins();
                }
            }
        });
        cpu(&page);
        other.join().unwrap();
        host.join().unwrap();
        assert_eq!(page.leaf().load().count(), 0);
        assert_eq!(page.leaf().is_pinned(), page.mapped.load(Relaxed));
    });
}

/// The same for a page that is taken and given back, which a host does when a later page of the same extent refuses.
#[test]
fn an_unpin_that_is_taken_back_was_never_there() {
    check(None, || {
        let page = Page::new(PINNED);
        let host = thread::spawn({
            let page = Arc::clone(&page);
            move || {
                if page.leaf().try_unpin().is_ok() {
                    page.leaf().set_pinned();
                }
            }
        });
        // Found clear, it would be asked for.
        if page.leaf().guest_map(LIMIT) == Ok(Mapped::Pinned) {
            page.device_uses();
        }
        page.leaf().guest_unmap().unwrap();
        host.join().unwrap();
        assert!(page.leaf().is_pinned());
    });
}

/// A guest that counts as it should, but clears bits that are the host's before it unmaps. The host may then decide by its
/// first look at the word, by a swap that finds the old value again, or by one that fails: whichever it is, it comes after
/// the users.
fn a_guest_that_clears(bits: u32, first_map_is_over: bool) {
    check(None, move || {
        let page = Page::new(if first_map_is_over { 1 } else { PINNED });
        let host = thread::spawn({
            let page = Arc::clone(&page);
            move || page.host_unpins()
        });
        if first_map_is_over || page.leaf().guest_map(LIMIT) == Ok(Mapped::Pinned) {
            page.memory.used();
        }
        page.word.fetch_and(!bits, Relaxed);
        page.leaf().guest_unmap().unwrap();
        host.join().unwrap();
    });
}

#[test]
fn a_page_that_is_idle_and_not_pinned_at_first_sight_has_no_users() {
    // PINNED is gone already, so the first look decides.
    a_guest_that_clears(PINNED, true);
}

#[test]
fn a_page_that_looks_as_before_has_no_users() {
    // The word goes from PINNED to PINNED, so a swap may be based on a look at the older one.
    a_guest_that_clears(LeafEntry::ACCESSED.bits(), false);
}

#[test]
fn a_page_whose_pinned_went_during_the_swap_has_no_users() {
    // The word goes from PINNED to 0, so a swap may fail and find it done.
    a_guest_that_clears(PINNED | LeafEntry::ACCESSED.bits(), false);
}
