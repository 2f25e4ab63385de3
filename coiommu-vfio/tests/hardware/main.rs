//! The kernel's VFIO, with an edu, an nvme and an xHCI behind an IOMMU. `cargo xtask qemu-test vfio` makes a machine for it.
//!
//! Every test takes the machine for itself: they run one after the other (`--test-threads=1`).

// Mapping memory is unsafe by nature; the promise is that of the contract's bed. So is mapping registers.
#![allow(unsafe_code)]

mod contract;
mod cost;
mod device;
mod edu;
mod interrupts;
mod kill;
mod machine;
mod mastering;
mod nvme;
mod open;
mod regions;
mod remap;
mod reset;
mod scattered;
mod signal;
mod storm;
mod vm;
