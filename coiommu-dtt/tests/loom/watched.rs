//! Memory that is no atomic: loom reports two accesses, one of them a write, of which neither comes before the other.
//!
//! Unsafe is needed to share it between threads, which is what it is for.
#![allow(unsafe_code)]

use loom::cell::UnsafeCell;

/// Stands for memory that somebody uses and somebody else takes. Holds nothing.
#[derive(Debug, Default)]
pub struct Watched(UnsafeCell<()>);

// SAFETY: the cell holds nothing, and no pointer to it is ever followed.
unsafe impl Sync for Watched {}

impl Watched {
    /// It is in use.
    pub fn used(&self) {
        self.0.with(|_| ());
    }

    /// It is taken, or made anew: whoever used it must be done, and who uses it next must know.
    pub fn taken(&self) {
        self.0.with_mut(|_| ());
    }
}
