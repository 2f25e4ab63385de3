//! How guests come to rest. A reset comes with the endpoints' bus mastering off, so no device may be at work then.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use crate::machine::VCPUS;
use crate::watch::{Doing, Post};

/// No lock: guests that pass through one would come one after the other, in ThreadSanitizer's eyes too.
#[derive(Debug, Default)]
pub(crate) struct Pause {
    wanted: AtomicBool,
    running: [AtomicBool; VCPUS],
}

impl Pause {
    /// A guest is about to map pages.
    pub(crate) fn enter(&self, vcpu: usize, post: &Post) {
        loop {
            // Sequentially consistent: of this and `guests`, one sees the other.
            self.running[vcpu].store(true, SeqCst);
            if !self.wanted.load(SeqCst) {
                return;
            }
            self.running[vcpu].store(false, SeqCst);
            post.is(Doing::Pausing);
            thread::sleep(Duration::from_micros(50));
        }
    }

    /// A guest has nothing mapped.
    pub(crate) fn leave(&self, vcpu: usize) {
        self.running[vcpu].store(false, SeqCst);
    }

    /// Does something while no guest has anything mapped.
    pub(crate) fn guests(&self, post: &Post, during: impl FnOnce()) {
        self.wanted.store(true, SeqCst);
        post.is(Doing::WaitingForGuests);
        while self.running.iter().any(|running| running.load(SeqCst)) {
            thread::yield_now();
        }
        post.is(Doing::Resetting);
        during();
        self.wanted.store(false, SeqCst);
    }
}
