//! The inputs in `corpus/` pass, and those written by hand are there.

use coiommu_dtt_fuzz::corpus::{Seeds, check_seeds, run_all};
use coiommu_pci_fuzz::{access, guest};

const OF_ACCESS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/access");
const OF_GUEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/guest");

#[test]
fn every_input_passes() {
    run_all(OF_ACCESS, access, ACCESS);
    run_all(OF_GUEST, guest, GUEST);
}

/// `SEEDS=write cargo test -p coiommu-pci-fuzz` writes them.
#[test]
fn seeds_are_in_the_corpus() {
    check_seeds(OF_ACCESS, ACCESS);
    check_seeds(OF_GUEST, GUEST);
}

// The pieces of inputs; `src/lib.rs` reads them. An access: what, where, how wide, data.
const FOUR_VCPUS: &[u8] = &[3, 0, 0];
const ALL_VCPUS: &[u8] = &[0xff, 3, 0];
const FIRST_GENERATION: &[u8] = &[3, 0, 1];
const ROOT: &[u8] = &[4, 0x00, 8, 0, 0x10, 0, 0, 0, 0, 0, 0];
const LEVELS: &[u8] = &[4, 0x10, 8, 4, 0, 0, 0, 0, 0, 0, 0];
const ROOT_IN_HALVES: &[u8] = &[4, 0x00, 4, 0, 0x10, 0, 0, 4, 0x04, 4, 1, 0, 0, 0];
const ACTIVATE: &[u8] = &[4, 0x08, 8, 1, 0, 0, 0, 0, 0, 0, 0];
const DEACTIVATE: &[u8] = &[4, 0x08, 8, 0, 0, 0, 0, 0, 0, 0, 0];
const PARK_AND_UNPARK: &[u8] = &[4, 0x08, 4, 2, 0, 0, 0, 4, 0x08, 4, 3, 0, 0, 0];
const NO_COMMAND: &[u8] = &[4, 0x08, 8, 9, 0, 0, 0, 0, 0, 0, 0, 4, 0x0c, 4, 1, 0, 0, 0];
const DOORBELLS: &[u8] = &[4, 0x18, 1, 0, 4, 0x1b, 8, 1, 2, 3, 4, 5, 6, 7, 8, 4, 0x1c, 1, 0, 4, 0x18, 0];
const LAST_DOORBELL: &[u8] = &[4, 0xf0, 0x17, 0x04, 1, 1, 4, 0xf0, 0x18, 0x04, 1, 1];
const MEMORY_ON: &[u8] = &[1, 0x04, 2, 6, 0];
const SIZE_BARS: &[u8] = &[1, 0x10, 8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0x10, 8];
const MOVE_BARS: &[u8] = &[1, 0x10, 4, 0, 0, 0xd0, 0xfe, 1, 0x1c, 4, 1, 0, 0, 0, 1, 0x21, 1, 0xe0];
const IDENTITY: &[u8] = &[1, 0x00, 16, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 0, 0xfe, 16];
const TOPOLOGY: &[u8] = &[0x22, 0, 16, 0x24, 0, 2, 9, 9, 0x22, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 4];
const NOTIFY: &[u8] = &[0x12, 0, 8, 0x14, 0, 8, 1, 1, 1, 1, 1, 1, 1, 1];
const RESET: &[u8] = &[0xff, 0, 0];

const ACCESS: Seeds = &[
    ("driver", &[FOUR_VCPUS, MEMORY_ON, ROOT, LEVELS, ACTIVATE, DOORBELLS, PARK_AND_UNPARK, DEACTIVATE]),
    ("first-generation", &[FIRST_GENERATION, ROOT, LEVELS, DOORBELLS, ROOT_IN_HALVES, RESET, LEVELS]),
    ("firmware", &[FOUR_VCPUS, SIZE_BARS, MEMORY_ON, MOVE_BARS, SIZE_BARS, RESET, MEMORY_ON]),
    ("nonsense", &[FOUR_VCPUS, IDENTITY, NO_COMMAND, TOPOLOGY, NOTIFY]),
    ("many-vcpus", &[ALL_VCPUS, LAST_DOORBELL, TOPOLOGY]),
];

// Of a guest's inputs; `src/guest.rs` and `coiommu-pin`'s target read them. A policy and flags first.
const QUIET: &[u8] = &[0, 0];
const SCRIBBLED: &[u8] = &[3, 1];
const HASTY: &[u8] = &[5, 4];
const OLD: &[u8] = &[1, 8];
/// What follows is an access.
const BY: &[u8] = &[0];
/// Pages 1 and 2 in slots 0 and 1, a batch in slot 2 where none is, all bits in slot 3.
const POST: &[u8] =
    &[1, 24, 0, 2, 3, 1, 24, 1, 2, 6, 1, 24, 2, 1, 9, 0, 1, 24, 3, 0, 255, 255, 255, 255, 255, 255, 255, 255];
/// A batch of 600 pages from gfn 0, and a request for it.
const BATCH: &[u8] = &[1, 3, 9, 0, 0, 0, 0x58, 2, 0, 0x58, 2, 1, 24, 0, 1, 9, 0];
const POLL: &[u8] = &[1, 26];
const TICK: &[u8] = &[1, 8, 0];
const FORCE: &[u8] = &[1, 11, 0, 0xff, 0xff, 1, 13];
/// By the reclaim worker.
const UNPIN: &[u8] = &[1, 28, 0, 0xff, 0xff, 1, 29, 1, 29];
const RAM_GOES: &[u8] = &[1, 15, 0];
const RAM_RETURNS: &[u8] = &[1, 16, 0];

const GUEST: Seeds = &[
    ("driver", &[QUIET, BY, ROOT, BY, LEVELS, BY, ACTIVATE, POST, POLL, TICK, POLL, FORCE, BY, DEACTIVATE]),
    ("harm", &[SCRIBBLED, BATCH, POLL, POST, RAM_GOES, POLL, RAM_RETURNS, POLL, POST]),
    ("first-generation", &[OLD, BY, ROOT, BY, LEVELS, POST, POLL, UNPIN, BY, LEVELS, POST, POLL]),
    ("haste", &[HASTY, BATCH, POLL, POST, BY, RESET, POLL]),
];
