//! The pinner under loom: every interleaving of a guest, its devices, and everything that takes pages back.
//!
//! Run by `cargo xtask loom`. Two threads are explored in full; models of three name their bound. The models use the public
//! API alone, so they outlive what is behind it. What they look for, throughout:
//!
//! * Between the guest's map that returned success and its unmap, a device access never faults ([`iommu::Iommu::access`]).
//! * Whoever takes memory after it was unpinned comes after all its users ([`watched::Watched`]).
//! * PINNED never outlives its mapping, but while the page's RAM is away ([`host::Host::check_at_rest`]).
//! * While a hold lives nothing in its range is mapped.
//! * Nothing deadlocks, on locks whose writers, waiting, keep readers out.
//! * The IOMMU and the books never disagree.
#![cfg(loom)]
#![allow(unreachable_pub, reason = "rooms of one test, some of them of two")]

#[path = "../../../coiommu-dtt/tests/loom/arena.rs"]
mod arena;
#[path = "../../../coiommu-dtt/tests/loom/check.rs"]
mod check;
mod cut_off;
mod drain;
mod forced;
mod host;
mod idle;
mod iommu;
mod pin;
mod pin_all;
mod ram;
mod room;
mod shrinker;
#[path = "../../../coiommu-dtt/tests/loom/slot.rs"]
mod slot;
#[path = "../../../coiommu-dtt/tests/loom/watched.rs"]
mod watched;
mod worker;
