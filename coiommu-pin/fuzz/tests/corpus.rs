//! The inputs in `corpus/` pass, and those written by hand are there.

use coiommu_dtt_fuzz::corpus::{Seeds, check_seeds, run_all};
use coiommu_pin_fuzz::request;

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/request");

#[test]
fn every_input_passes() {
    run_all(CORPUS, request, SEEDS);
}

/// `SEEDS=write cargo test -p coiommu-pin-fuzz` writes them.
#[test]
fn seeds_are_in_the_corpus() {
    check_seeds(CORPUS, SEEDS);
}

// The pieces of inputs; `src/script.rs` reads them. First the policy and flags: the second CPU writes, no table from the
// start, time passes at each look.
const RUN: &[u8] = &[0, 0];
const RUN_SCRIBBLED: &[u8] = &[0, 1];
const RUN_NO_TABLE: &[u8] = &[0, 2];
const RUN_HASTY: &[u8] = &[0, 4];
const PAGE_SCRIBBLED: &[u8] = &[1, 1];
const ALIGNED: &[u8] = &[3, 0];
const ALIGNED_SCRIBBLED: &[u8] = &[3, 1];
const QUOTA: &[u8] = &[4, 0];

// Gfns are written as 3 * offset + which of 0, 490 and 1036 they are counted from.
/// The guest maps gfn 500: counted, ACCESSED. Then not counted, and idle.
const MAP_500: &[u8] = &[0, 3, 3, 31];
const UNMAP_500: &[u8] = &[0, 3, 1, 31];
/// Requests for gfns 5, 500, 1040, and 300, which is no RAM.
const ASK_5: &[u8] = &[4, 2, 15];
const ASK_500: &[u8] = &[4, 2, 31];
const ASK_1040: &[u8] = &[4, 2, 14];
const ASK_NO_RAM: &[u8] = &[4, 2, 254, 44, 1];
/// A batch in page 6, of the 30 gfns from 496 on, and one that claims 65,535.
const BATCH: &[u8] = &[3, 6, 0, 0, 0, 30, 0, 19, 30, 0];
const BATCH_CLAIMS: &[u8] = &[3, 6, 0, 0, 0, 0xff, 0xff, 19, 30, 0];
const ASK_BATCH: &[u8] = &[4, 1, 6, 0];
const BEGIN_BATCH: &[u8] = &[6, 1, 6, 0];
const SERVE: &[u8] = &[7, 0];
const TICK: &[u8] = &[8, 0];
const PARK: &[u8] = &[9];
const UNPARK: &[u8] = &[10];
/// Gfns 490 to 522 and a bit.
const FORCE: &[u8] = &[11, 1, 3, 1];
const GO_ON: &[u8] = &[13];
const LET_GO: &[u8] = &[14];
/// RAM from gfn 496 on goes, returns, is replaced.
const REMOVE: &[u8] = &[15, 1];
const RETURN: &[u8] = &[16, 2];
const REPLACE: &[u8] = &[16, 3];
const ACTIVATE: &[u8] = &[18, 1, 4];
const DEACTIVATE: &[u8] = &[19, 0];
const RESET: &[u8] = &[19, 1];
/// All calls of the mapper fail: EIO, or no entry left; and the guest writes a leaf meanwhile.
const FAIL: &[u8] = &[20, 0xff, 3, 3, 0, 31];
const NO_ENTRY: &[u8] = &[20, 0xff, 0, 3, 0, 31];
/// In the next call, the guest lets its directory lead to nowhere.
const UNDO_TABLE: &[u8] = &[20, 0, 0, 0, 3, 0, 0, 30, 1];
/// The guest lets its root lead to itself, or its directory to absent RAM.
const TO_ITSELF: &[u8] = &[0, 0, 1, 0, 0, 1, 1];
const TO_ABSENT: &[u8] = &[0, 0, 3, 0, 0, 134, 1];
const ROOM_FOR_2: &[u8] = &[22, 2, 0];

const SEEDS: Seeds = &[
    ("pages", &[RUN, MAP_500, ASK_500, ASK_5, ASK_1040, ASK_NO_RAM, UNMAP_500, TICK, TICK]),
    ("batch", &[RUN, BATCH, ASK_BATCH, ASK_BATCH, TICK, TICK]),
    ("batch-claims-too-much", &[RUN, BATCH_CLAIMS, ASK_BATCH, &[3, 23, 248, 0, 7], ASK_BATCH]),
    (
        "batch-scribbled",
        &[RUN_SCRIBBLED, BATCH, &[0, 1, 6, 1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f], ASK_BATCH, ASK_BATCH],
    ),
    ("batch-in-haste", &[RUN_HASTY, BATCH, BEGIN_BATCH, SERVE, ASK_5, SERVE, SERVE, TICK]),
    ("aligned", &[ALIGNED, ASK_500, ASK_5, FORCE, GO_ON, ASK_500, LET_GO, ASK_500]),
    ("aligned-scribbled", &[ALIGNED_SCRIBBLED, MAP_500, ASK_500, UNMAP_500, TICK, ASK_500, TICK, FORCE, GO_ON]),
    ("quota", &[QUOTA, BATCH, ASK_BATCH, ASK_5, ASK_1040, TICK, ASK_BATCH]),
    ("room", &[RUN, ROOM_FOR_2, ASK_5, ASK_500, ASK_1040, NO_ENTRY, ASK_5, BATCH, ASK_BATCH]),
    ("parked", &[RUN, ASK_500, PARK, TICK, FORCE, GO_ON, GO_ON, UNPARK, GO_ON, GO_ON, ASK_500, LET_GO, ASK_500]),
    ("forced", &[RUN, MAP_500, ASK_500, FORCE, GO_ON, GO_ON, UNMAP_500, FORCE, GO_ON, GO_ON, ASK_500]),
    ("ram-returns", &[RUN, MAP_500, ASK_500, REMOVE, BEGIN_BATCH, ASK_500, RETURN, FORCE, GO_ON, TICK]),
    ("ram-is-replaced", &[RUN, MAP_500, ASK_500, REMOVE, FORCE, REPLACE, GO_ON, GO_ON, ASK_500]),
    ("ram-of-the-table-goes", &[RUN, ASK_500, &[15, 0], TICK, ASK_500, FORCE, GO_ON, &[16, 0], DEACTIVATE]),
    ("unmap-fails", &[RUN, ASK_500, FAIL, TICK, TICK, REMOVE, REPLACE, RETURN, RESET]),
    ("drain-fails", &[RUN, ASK_500, FAIL, DEACTIVATE, ACTIVATE, ASK_500, TICK]),
    ("map-fails", &[RUN, BATCH, FAIL, ASK_BATCH, ASK_BATCH]),
    ("table-goes-meanwhile", &[RUN, UNDO_TABLE, ASK_500, TICK, TICK, FORCE, GO_ON]),
    ("table-to-itself", &[RUN, TO_ITSELF, ASK_500, ASK_5, TICK, TICK, DEACTIVATE]),
    ("table-to-absent-ram", &[RUN, ASK_500, REMOVE, TO_ABSENT, ASK_5, TICK, RETURN, ASK_5, DEACTIVATE]),
    ("table-scribbled", &[PAGE_SCRIBBLED, TO_ITSELF, ASK_500, TO_ABSENT, ASK_500, TICK, BATCH, ASK_BATCH, TICK, TICK]),
    ("not-active", &[RUN_NO_TABLE, ASK_500, TICK, ACTIVATE, ASK_500, DEACTIVATE, ASK_500, &[18, 31, 4], ASK_5]),
    ("again", &[RUN, BEGIN_BATCH, ASK_500, ACTIVATE, SERVE, ASK_500, RESET, ACTIVATE, ASK_500]),
];
