//! What a CoIOMMU guest and its host share.
//!
//! A guest that runs on CoIOMMU counts its DMA mappings, page by page, in a table in its own memory: the DMA tracking
//! table, **DTT**. The host walks the same table, marks the pages that it has pinned, and takes those back that nobody
//! uses. Both sides work on one 32-bit word a page, so each step of the protocol is one atomic instruction. This crate
//! holds everything that both sides must agree on, bit by bit, and nothing else: no I/O, no threads, no allocation, no
//! std (but for the adaptor to [vm-memory], feature `vm-memory`, on by default).
//!
//! | module | what is there |
//! | --- | --- |
//! | [`bdf`] | [`Bdf`], which endpoint a request is for |
//! | [`geometry`] | pages, [`Gpa`], [`Gfn`], [`Levels`]: how a gfn finds its leaf |
//! | [`leaf`] | [`LeafEntry`], the word, and [`Leaf`], the shared atomic with one method for each step of the protocol |
//! | [`memory`] | [`TableMemory`]: what the tables lie in |
//! | [`walk`] | [`Dtt`], a validated root, [`LeafTable`], 1024 leaves looked up once, and [`Walker`], for many of them |
//! | [`notify`] | [`NotifySlots`] and the request words |
//! | [`guest`] | the guest's side: building a table, counting maps |
//!
//! Rules that hold throughout:
//!
//! 1. What a guest wrote is a claim. It is read once, atomically, and turned into a type that only a check can make.
//! 2. No reference covers guest memory but those to atomics.
//! 3. Nothing here panics on what a guest wrote, and every loop is bounded by the five levels of a table.
//!
//! [vm-memory]: https://docs.rs/vm-memory
#![no_std]

#[cfg(target_endian = "big")]
compile_error!("the words of a DTT are little-endian and shared in place: big-endian hosts are not supported");

#[cfg(feature = "vm-memory")]
extern crate std;

pub mod bdf;
pub mod geometry;
pub mod guest;
pub mod leaf;
pub mod memory;
pub mod notify;
pub mod walk;

pub use bdf::Bdf;
pub use geometry::{Gfn, Gpa, Levels, PAGE_SIZE};
pub use leaf::{Leaf, LeafEntry};
pub use memory::{MemoryError, TableMemory};
pub use notify::{NotifySlots, Request, RequestWord};
#[cfg(feature = "vm-memory")]
pub use vm_memory;
pub use walk::{Dtt, LeafTable, Walker};
