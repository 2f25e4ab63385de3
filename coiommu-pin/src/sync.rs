//! The locks of this crate, and those of its atomics by which threads tell each other of something else.
//!
//! They are std's, without poison. A build for the model checker (`--cfg loom`) puts loom's in their place, under the
//! same names, so that the models in `tests/loom` run the production code. Counters, totals and the number of the round
//! do not come from here: they are relaxed and speak of nothing but themselves, so they stay std's under loom too, and
//! loom has that much less to explore.

#[cfg(loom)]
#[path = "sync/modelled.rs"]
mod imp;
#[cfg(not(loom))]
#[path = "sync/native.rs"]
mod imp;

pub(crate) use imp::{Mutex, OnceLock, RwLock, atomic};
