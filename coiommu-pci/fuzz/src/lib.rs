//! Fuzzing the device: its face, and all of it.
//!
//! | target | |
//! | --- | --- |
//! | [`access`] | any accesses to config space and BARs; `src/access.rs` |
//! | [`guest`] | a guest that means harm: accesses that are carried out, and all that `coiommu-pin`'s target does besides |

mod access;
mod guest;

pub use access::access;
pub use guest::guest;
