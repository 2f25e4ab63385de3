//! std's locks, without poison.
//!
//! A panic while a lock is held is a bug of ours. Whoever runs the pinner catches it and fails closed, which means that
//! everything must still be drained: a lock that refuses would turn one bug into memory that a device reaches for ever.

use std::sync::{self, PoisonError, TryLockError, TryLockResult};

pub(crate) use std::sync::{MutexGuard, OnceLock, atomic};

#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        unless_taken(self.0.try_lock())
    }
}

#[derive(Debug, Default)]
pub(crate) struct RwLock<T>(sync::RwLock<T>);

impl<T> RwLock<T> {
    pub(crate) fn read(&self) -> sync::RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` if somebody writes or waits to.
    pub(crate) fn try_read(&self) -> Option<sync::RwLockReadGuard<'_, T>> {
        unless_taken(self.0.try_read())
    }

    pub(crate) fn write(&self) -> sync::RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unless_taken<G>(tried: TryLockResult<G>) -> Option<G> {
    match tried {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}
