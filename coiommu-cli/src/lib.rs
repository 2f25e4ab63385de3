//! The `coiommu` program, as a library for its own tests and fuzzers.
//!
//! Thin: it parses arguments, puts the crates together and reports. `coiommu replay` plays a kernel's DMA trace through
//! the production stack and tells what would have been pinned.
//!
//! | module | what is there |
//! | --- | --- |
//! | [`cli`] | arguments in, exit code out |
//! | [`serve`] | `coiommu serve`: the device for a VMM, over vfio-user |
//! | [`ctl`], [`top`] | asking a server, and watching it |
//! | `control` | what is said on a control socket |
//! | [`doctor`] | `coiommu doctor`: whether this host can do it, and what to change |
//! | `man` | manual pages |
//! | [`replay`] | `coiommu replay`, and its stack: guest, pinner, IOMMU in virtual time |
//! | [`trace`] | reading the text of the kernel's dma events, from anywhere |
//! | `host_bdf`, `units` | what people write and read: a device of the host, amounts |

pub mod cli;
mod control;
pub mod ctl;
pub mod doctor;
mod host_bdf;
mod man;
pub mod replay;
pub mod serve;
pub mod top;
pub mod trace;
mod units;
