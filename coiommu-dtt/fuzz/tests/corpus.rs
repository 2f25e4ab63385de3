//! The inputs in `corpus/` pass, and those written by hand are there.

use coiommu_dtt_fuzz::corpus::{Seeds, check_seeds, run_all};
use coiommu_dtt_fuzz::walk;

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/walk");

#[test]
fn every_input_passes() {
    run_all(CORPUS, walk, SEEDS);
}

/// `SEEDS=write cargo test -p coiommu-dtt-fuzz` writes them.
#[test]
fn seeds_are_in_the_corpus() {
    check_seeds(CORPUS, SEEDS);
}

// The pieces of inputs; `src/walk.rs` reads them. Pages go by their number in `PAGES`.
const QUIET: &[u8] = &[0x3f, 0];
const SCRIBBLED: &[u8] = &[0x3f, 1];
/// Host, 4 levels from page 0, gfn 5: set PINNED, age, unpin, clear, look.
const LOOK: &[u8] = &[3, 0, 4, 0, 0x50, 0, 0, 0, 0, 0, 0, 0x1f];
/// The same by the guest.
const MAP: &[u8] = &[5, 0, 4, 0, 0x50, 0, 0, 0, 0, 0, 0];
/// Entry 0 of page 0, 1, 2 leads to the next.
const TABLES: &[u8] = &[0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 2, 1, 0, 2, 0, 0, 3, 1];
/// Leaf 5 of page 3 is not counted, and has all that is reserved.
const LEAF: &[u8] = &[2, 3, 5, 0, 0, 0, 0xff, 0xbf];

const SEEDS: Seeds = &[
    ("honest", &[QUIET, TABLES, LEAF, LOOK, MAP]),
    ("honest-scribbled", &[SCRIBBLED, TABLES, LEAF, LOOK, MAP, LOOK, MAP, LOOK]),
    ("empty", &[QUIET, LOOK, MAP]),
    ("to-itself", &[QUIET, &[0, 0, 0, 0, 0, 1], LOOK, MAP]),
    ("to-itself-and-on-scribbled", &[SCRIBBLED, &[0, 0, 0, 0, 0, 1], LOOK, TABLES, LOOK, MAP]),
    ("to-no-memory", &[QUIET, &[0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 15, 1], LOOK, MAP]),
    ("to-no-memory-scribbled", &[SCRIBBLED, TABLES, LOOK, &[0, 1, 0, 0, 15, 1], LOOK, MAP, LOOK]),
    ("to-half-a-page", &[QUIET, &[0, 0, 0, 0, 4, 1], LOOK, &[0, 0, 0, 0, 6, 1], LOOK, MAP]),
    ("to-the-last-page", &[QUIET, &[0, 0, 0, 0, 9, 1], LOOK, MAP]),
    // All bits but present; then all bits.
    ("not-present", &[QUIET, &[1, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], LOOK, MAP]),
    ("all-bits", &[QUIET, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], LOOK, MAP]),
    // Entry 0 leads to page 1, with every bit that means nothing.
    ("ignored-bits", &[QUIET, &[1, 0, 0, 0, 0xff, 0x2f, 0, 0, 0, 0, 0xf0, 0xff], LOOK, MAP]),
    // The root alone, and five levels for a gfn that needs them.
    ("one-level", &[QUIET, &[3, 0, 1, 0, 0x50, 0, 0, 0, 0, 0, 0, 0x1f, 5, 0, 1, 0, 0, 0x50, 0, 0, 0, 0, 0]]),
    ("five-levels", &[QUIET, &[5, 0, 5, 0, 0, 0, 0, 0, 0xff, 0x03, 0, 3, 0, 5, 0, 0, 0, 0, 0, 0xff, 0x03, 0, 0x1f]]),
    (
        "roots",
        &[QUIET, &[6, 0, 0x10, 0, 0, 0, 0, 0, 0, 4, 6, 0, 0, 0, 0, 0, 0, 0x10, 0, 4, 6, 1, 0x10, 0, 0, 0, 0, 0, 0, 6]],
    ),
    // Over the end of a region into the next, and where nothing is.
    ("batches", &[QUIET, &[7, 0, 0xf8, 0x3f, 0, 0, 0, 0, 0, 0, 9, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 9, 0]]),
    ("words", &[QUIET, &[7, 1, 8, 0, 1, 0, 0, 0, 0, 0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 7, 1, 1, 2, 3, 4, 5, 6, 7, 0x80]]),
];
