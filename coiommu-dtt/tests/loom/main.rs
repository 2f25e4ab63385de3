//! Every interleaving, and every value that the memory orders allow, of what guest and host do to shared words.
//!
//! Run by `cargo xtask loom`. Each model runs the production code on loom's atomics, through the traits that lend out
//! words. [`watched::Watched`] stands for everything that lies outside a word and that the word's order must carry along.
//! The arena and what it is made of serve the models of `coiommu-pin` too.
#![cfg(loom)]
#![allow(unreachable_pub, reason = "rooms of one test, some of them of two")]

#[allow(dead_code, reason = "the models of coiommu-pin use all of it")]
mod arena;
mod check;
mod leaf;
mod notify;
mod slot;
mod table;
mod watched;
