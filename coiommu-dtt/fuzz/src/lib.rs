//! Fuzzing the tables: what a guest can write into them, and change while they are walked.
//!
//! A target is a plain function from bytes, [`walk`]: a fuzzer calls it with what it makes up (`cargo xtask fuzz walk`), a
//! test with the inputs in `corpus/`. The [`Arena`] that the tables lie in, the [`Scribbler`] that writes there meanwhile,
//! and what reads inputs and runs a [`corpus`] are the fuzz targets' of the crates above, too.

pub mod corpus;

mod arena;
mod input;
mod scribbler;
mod walk;

pub use arena::Arena;
pub use input::number;
pub use scribbler::{Scribbler, Scribbling, Write};
pub use walk::{PAGES, PLACES, walk};
