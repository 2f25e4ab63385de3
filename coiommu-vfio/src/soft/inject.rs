//! Calls that are made to fail.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use coiommu_pin::MapError;

use crate::sync;

/// A call of the mapper, as its caller made it: the arguments are not checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// [`DmaMapper::map`](coiommu_pin::DmaMapper::map).
    Map {
        /// First IOVA, in bytes.
        iova: u64,
        /// Bytes.
        len: u64,
    },
    /// [`DmaMapper::unmap`](coiommu_pin::DmaMapper::unmap).
    Unmap {
        /// First IOVA, in bytes.
        iova: u64,
        /// Bytes.
        len: u64,
    },
}

type Hook = Box<dyn FnMut(&Call) -> Option<MapError> + Send>;

/// The hook that is asked before every call, if there is one.
#[derive(Default)]
pub(crate) struct Injector {
    /// Whether there is a hook; spares calls the lock while there is none.
    armed: AtomicBool,
    hook: Mutex<Option<Hook>>,
}

impl Injector {
    pub(crate) fn set(&self, hook: Option<Hook>) {
        let mut place = sync::lock(&self.hook);
        self.armed.store(hook.is_some(), Ordering::Release);
        let old = std::mem::replace(&mut *place, hook);
        // The lock first: what the old hook owns, and so what its drop does, is the embedder's.
        drop(place);
        drop(old);
    }

    pub(crate) fn ask(&self, call: &Call) -> Result<(), MapError> {
        if !self.armed.load(Ordering::Acquire) {
            return Ok(());
        }
        match sync::lock(&self.hook).as_mut().and_then(|hook| hook(call)) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}
