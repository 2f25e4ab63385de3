//! Locks for the model checker, made of loom's mutex.
//!
//! Two things that loom's own locks leave out matter here:
//!
//! * A try that fails. Loom takes a lock's release for part of what follows, so it need never let another thread come
//!   just before it. [`Mutex`] and [`RwLock`] make the release an event of its own, for tries only.
//! * A writer that waits keeps new readers out, as std's may. So a thread that reads twice, one read inside the other,
//!   can deadlock. And two readers do not disturb each other, which loom's lock explores as if they did. [`RwLock`] is a
//!   mutex for each thread: a reader takes its own, a writer takes all.
//!
//! What is large is in a box: the size of the pin map's books is asserted.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use loom::sync;
use loom::sync::atomic::AtomicBool;

pub(crate) use loom::sync::atomic;

#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(Box<Locked<T>>);

#[derive(Debug, Default)]
struct Locked<T> {
    value: sync::Mutex<T>,
    /// Loaded by who releases, compared by who tries: those two do not commute, all else does. Never changes.
    released: AtomicBool,
}

#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T> {
    value: sync::MutexGuard<'a, T>,
    released: &'a AtomicBool,
}

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Box::new(Locked { value: sync::Mutex::new(value), released: AtomicBool::new(false) }))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        let Locked { value, released } = &*self.0;
        MutexGuard { value: value.lock().expect("loom's locks have no poison"), released }
    }

    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let Locked { value, released } = &*self.0;
        released.compare_exchange(true, true, Relaxed, Relaxed).expect_err("it is always false");
        Some(MutexGuard { value: value.try_lock().ok()?, released })
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

/// The lock itself is released right after, with the field.
impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.released.load(Relaxed);
        }
    }
}

/// The most threads that a model can have.
const THREADS: usize = 4;

pub(crate) struct RwLock<T>(Box<Shared<T>>);

struct Shared<T> {
    /// One for each thread.
    seats: [sync::Mutex<()>; THREADS],
    /// Whose they are, in the order in which they came to read. No part of the model.
    threads: std::sync::Mutex<Vec<loom::thread::ThreadId>>,
    /// As in [`Locked`], of writers.
    released: AtomicBool,
    /// Never waited for: the seats see to that.
    value: std::sync::RwLock<T>,
}

#[derive(Debug)]
pub(crate) struct RwLockReadGuard<'a, T> {
    value: std::sync::RwLockReadGuard<'a, T>,
    _seat: sync::MutexGuard<'a, ()>,
}

#[derive(Debug)]
pub(crate) struct RwLockWriteGuard<'a, T> {
    value: std::sync::RwLockWriteGuard<'a, T>,
    released: &'a AtomicBool,
    _seats: [sync::MutexGuard<'a, ()>; THREADS],
}

impl<T> RwLock<T> {
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
        let seat = self.0.seats[self.seat()].lock().expect("loom's locks have no poison");
        RwLockReadGuard { value: self.0.value.try_read().expect("no writer has my seat"), _seat: seat }
    }

    pub(crate) fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        self.0.released.compare_exchange(true, true, Relaxed, Relaxed).expect_err("it is always false");
        let seat = self.0.seats[self.seat()].try_lock().ok()?;
        Some(RwLockReadGuard { value: self.0.value.try_read().expect("no writer has my seat"), _seat: seat })
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
        let Shared { seats, released, value, .. } = &*self.0;
        let seats = seats.each_ref().map(|seat| seat.lock().expect("loom's locks have no poison"));
        RwLockWriteGuard { value: value.try_write().expect("no reader has a seat"), released, _seats: seats }
    }

    fn seat(&self) -> usize {
        let me = loom::thread::current().id();
        let mut threads = self.0.threads.lock().expect("nothing panics with it");
        threads.iter().position(|&thread| thread == me).unwrap_or_else(|| {
            threads.push(me);
            threads.len() - 1
        })
    }
}

impl<T: Default> Default for RwLock<T> {
    fn default() -> Self {
        Self(Box::new(Shared {
            seats: Default::default(),
            threads: Default::default(),
            released: AtomicBool::new(false),
            value: Default::default(),
        }))
    }
}

/// The seats are released right after, with the field.
impl<T> Drop for RwLockWriteGuard<'_, T> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.released.load(Relaxed);
        }
    }
}

impl<T> fmt::Debug for RwLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RwLock")
    }
}

impl<T> Deref for RwLockReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> Deref for RwLockWriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for RwLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

/// A value that is made once. Loom has none; std's would make it behind loom's back.
#[derive(Debug)]
pub(crate) struct OnceLock<T>(Box<Once<T>>);

#[derive(Debug)]
struct Once<T> {
    value: std::sync::OnceLock<T>,
    is_made: AtomicBool,
    making: sync::Mutex<()>,
}

impl<T> OnceLock<T> {
    pub(crate) fn new() -> Self {
        let (is_made, making) = (AtomicBool::new(false), sync::Mutex::new(()));
        Self(Box::new(Once { value: std::sync::OnceLock::new(), is_made, making }))
    }

    pub(crate) fn get(&self) -> Option<&T> {
        if self.0.is_made.load(Acquire) { self.0.value.get() } else { None }
    }

    pub(crate) fn get_or_init(&self, make: impl FnOnce() -> T) -> &T {
        if let Some(value) = self.get() {
            return value;
        }
        let _one_at_a_time = self.0.making.lock().expect("loom's locks have no poison");
        let value = self.0.value.get_or_init(make);
        self.0.is_made.store(true, Release);
        value
    }
}
