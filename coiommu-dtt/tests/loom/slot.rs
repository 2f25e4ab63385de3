//! The words of notify slots, as loom's.

use std::sync::atomic::Ordering;

use coiommu_dtt::memory::Word64;
use loom::sync::atomic::AtomicU64;

/// A word of the notify map.
#[derive(Debug, Default)]
pub struct Word(AtomicU64);

impl Word64 for Word {
    fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, order);
    }

    fn compare_exchange(&self, current: u64, new: u64, success: Ordering, failure: Ordering) -> Result<u64, u64> {
        self.0.compare_exchange(current, new, success, failure)
    }
}
