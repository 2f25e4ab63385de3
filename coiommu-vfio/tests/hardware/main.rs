//! The kernel's VFIO, with an edu and an nvme behind an IOMMU. `cargo xtask qemu-test vfio` makes a machine for it.
//!
//! Every test takes the machine for itself: they run one after the other (`--test-threads=1`).

// Mapping memory is unsafe by nature; the promise is that of the contract's bed.
#![allow(unsafe_code)]

mod contract;
mod cost;
mod device;
mod edu;
mod kill;
mod machine;
mod nvme;
mod open;
mod remap;
mod reset;
mod scattered;
mod storm;
mod vm;
