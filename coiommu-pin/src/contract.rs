//! The contract of [`DmaMapper`] as cases that any implementation can run.
//!
//! A pin map is right only as long as its mapper keeps the rules it was written for, and mappers differ in what is behind
//! them: a table in memory, a kernel, a device in a VM. So the rules are tests that know nothing of what is behind:
//! an implementation makes a [`Bed`] and calls [`run_all`]. A case that fails panics, and says which rule was broken.
//!
//! A bed need not be able to do everything. A case that needs more is skipped with its reason, and the caller decides
//! whether that is all right: a software mapper skips nothing, a kernel's may lack a device to look through.
//!
//! Cases use the smallest page of [`Limits`](crate::Limits), and the bed's memory at the bed's IOVAs. Each leaves the
//! mapper as empty as it found it.

// Mapping memory is unsafe by nature; the promise that makes it sound here is that of `Bed`.
#![allow(unsafe_code)]

mod field;
mod limits;
mod map;
mod threads;
mod unmap;

use std::fmt::{self, Debug};
use std::sync::Arc;
use std::thread;

use crate::{Backing, DmaMapper};

/// The least memory a bed has, in bytes.
pub const MIN_MEMORY: u64 = 4 << 20;

/// What the cases run on: mappers, memory to map and IOVAs to map it at.
///
/// # Safety
///
/// [`Bed::memory`] is the same memory each time, and until the bed and all mappers that it handed out are gone:
///
/// * it is one mapping of this process, readable and writable;
/// * nothing in it is borrowed as a Rust reference to anything but atomics, and nobody but the cases and the bed's
///   devices touches it.
pub unsafe trait Bed {
    /// A mapper without mappings. At most one rig of a bed is in use at a time, so a bed may hand out the same one again.
    fn rig(&self) -> Rig;

    /// A mapper without mappings that can hold `entries` of them (where that takes a setting of the system, make it).
    /// `None`: cannot be had.
    fn rig_with_entries(&self, entries: u64) -> Option<Rig> {
        let _ = entries;
        None
    }

    /// Memory to map.
    fn memory(&self) -> Memory<'_>;

    /// The first of the IOVAs that the cases map at, in bytes. As many as [`Bed::memory`] is long are free, and within
    /// one of the mapper's IOVA ranges.
    fn iova(&self) -> u64;
}

/// A mapper, and a device that goes through it.
#[derive(Clone, Debug)]
pub struct Rig {
    /// What is tested.
    pub mapper: Arc<dyn DmaMapper>,
    /// The outside view: whether what was mapped can be reached. `None`: no device is at hand.
    pub device: Option<Arc<dyn Device>>,
}

/// A device that does DMA through the mapper of its [`Rig`].
pub trait Device: Debug + Send + Sync {
    /// The device reads a byte at `iova`. `None`: the access was stopped.
    fn read(&self, iova: u64) -> Option<u8>;

    /// The device writes a byte at `iova`. False: the access was stopped.
    fn write(&self, iova: u64, byte: u8) -> bool;
}

/// Memory of this process that cases may map.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    /// Where it is; on a boundary of the mapper's smallest page.
    pub backing: Backing<'a>,
    /// Bytes, [`MIN_MEMORY`] at least.
    pub len: u64,
}

/// A rule, or a few that belong together, and the test of it.
#[derive(Clone, Copy)]
pub struct Case {
    /// What is tested, in the form of a test's name.
    pub name: &'static str,
    /// Runs the case: panics where a rule is broken, and fails where the bed cannot do what it needs.
    pub run: fn(&dyn Bed) -> Result<(), Skip>,
}

impl Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Case").field(&self.name).finish()
    }
}

/// Why a case did not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skip(pub &'static str);

/// A case that did not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Its name.
    pub case: &'static str,
    /// What the bed cannot do.
    pub reason: &'static str,
}

macro_rules! cases {
    ($($room:ident::$case:ident,)*) => {
        &[$(Case { name: concat!(stringify!($room), "::", stringify!($case)), run: $room::$case },)*]
    };
}

/// All cases.
pub const CASES: &[Case] = cases![
    map::makes_every_byte_reachable,
    map::reaches_the_backing_it_was_given,
    map::takes_the_same_memory_twice,
    map::refuses_any_overlap,
    map::takes_neighbours,
    map::refuses_what_is_not_pages,
    map::refuses_iovas_outside_the_ranges,
    map::refuses_memory_that_is_not_there,
    unmap::ends_access,
    unmap::of_a_hole_is_no_error,
    unmap::covers_mappings_and_holes,
    unmap::never_cuts,
    unmap::refuses_what_is_not_pages,
    unmap::makes_room_to_map_again,
    limits::are_sane,
    limits::count_every_mapping,
    limits::count_a_big_mapping_once,
    limits::end_in_no_entries_and_recover,
    threads::keep_out_of_each_others_ranges,
    threads::that_race_have_one_winner,
    threads::see_no_access_after_unmap,
];

/// Runs all cases and returns those that could not run.
///
/// # Panics
///
/// If a rule is broken; the message names it.
#[must_use = "a skipped case has tested nothing"]
pub fn run_all(bed: &dyn Bed) -> Vec<Skipped> {
    let skipped = |case: &Case| {
        let _said = NameIfPanicking(case.name);
        let reason = (case.run)(bed).err()?.0;
        Some(Skipped { case: case.name, reason })
    };
    CASES.iter().filter_map(skipped).collect()
}

/// A panic in the mapper itself does not know the case.
struct NameIfPanicking(&'static str);

impl Drop for NameIfPanicking {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("in case {} of the contract", self.0);
        }
    }
}
