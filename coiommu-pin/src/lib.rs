//! What a CoIOMMU host has pinned for a guest's devices, and the [`Pinner`] that pins and unpins it.
//!
//! A VMM that passes a device through must pin what the device can reach, and without help that is all of the guest's
//! memory. On CoIOMMU the guest counts its DMA mappings in a shared table (see [`coiommu_dtt`]), so the host pins a page
//! when a device first needs it and takes it back once it is idle. This crate is that host, without anything around it:
//! it knows no VFIO, no PCI and no sockets. The pinner starts no threads and is told the time; workers that wait on
//! doorbells are here for those who want them.
//!
//! | module | what is there |
//! | --- | --- |
//! | [`mapper`] | [`DmaMapper`], what is needed of an IOMMU; `contract` (feature `test-util`) checks an implementation |
//! | [`region`] | [`RamRegion`], guest RAM that comes and goes |
//! | [`policy`] | [`Policy`]: what one map call covers, when pages go |
//! | [`request`] | [`PinRequest`]: decoding what a guest asks for |
//! | [`pinner`] | [`Pinner`]: pin, tick, forced unpin, park, drain, regions; [`Clock`], by which it is told the time |
//! | [`notify_map`] | [`NotifyMap`], the slots in which a guest puts its requests |
//! | [`worker`] | workers: they serve slots, tick, and unpin on request; in threads or in your event loop |
//! | [`stats`] | counters and the latency of requests |
//!
//! Three rules carry the rest:
//!
//! 1. The pin map, in host memory, says what is mapped. What the guest wrote into its table is a message.
//! 2. A page enters the pin map after its map call returned, and leaves it after its unmap call returned; PINNED is set
//!    after the first and cleared before the second.
//! 3. Every call is bounded in time and memory, whatever the guest wrote.
//!
//! `examples/own_mapper.rs` shows all that a VMM has to bring.

mod clock;
#[cfg(feature = "test-util")]
pub mod contract;
pub mod mapper;
pub mod notify_map;
mod page_set;
mod pin_map;
pub mod pinner;
pub mod policy;
mod prefetch;
pub mod region;
mod region_table;
pub mod request;
pub mod space;
pub mod stats;
mod sync;
pub mod worker;

pub use coiommu_dtt;
pub use mapper::{Backing, DmaMapper, FileBacking, Limits, MapError};
pub use notify_map::{NotifyMap, SharedSlots};
pub use pin_map::Extent;
pub use pinner::{Clock, Pinner, PinnerConfig, SystemClock};
pub use policy::Policy;
pub use region::{RamFile, RamRegion};
pub use request::PinRequest;
pub use space::TableSpace;
