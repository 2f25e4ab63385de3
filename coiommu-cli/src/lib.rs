//! The `coiommu` program, as a library for its own tests and fuzzers.
//!
//! Thin: it parses arguments, puts the crates together and reports. `coiommu replay` plays a kernel's DMA trace through the
//! production stack and tells what would have been pinned.
//!
//! | module | what is there |
//! | --- | --- |
//! | [`cli`] | arguments in, exit code out |
//! | [`replay`] | `coiommu replay`, and its stack: guest, pinner, IOMMU in virtual time |
//! | [`trace`] | reading the text of the kernel's dma events, from anywhere |

pub mod cli;
pub mod replay;
pub mod trace;
