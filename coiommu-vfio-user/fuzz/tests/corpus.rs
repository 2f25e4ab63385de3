//! The inputs in `corpus/` pass, and those written by hand are there.

use coiommu_dtt_fuzz::corpus::{Seeds, check_seeds, run_all};
use coiommu_vfio_user_fuzz::wire;

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/wire");

#[test]
fn every_input_passes() {
    run_all(CORPUS, wire, WIRE);
}

/// `SEEDS=write cargo test -p coiommu-vfio-user-fuzz` writes them.
#[test]
fn seeds_are_in_the_corpus() {
    check_seeds(CORPUS, WIRE);
}

/// A header; the id says how many file descriptors come with the message.
const fn head(id: u16, command: u16, body: usize, flags: u32) -> [u8; 16] {
    let (id, command, flags) = (id.to_le_bytes(), command.to_le_bytes(), flags.to_le_bytes());
    #[allow(clippy::cast_possible_truncation, reason = "some hundred bytes")]
    let size = (16 + body as u32).to_le_bytes();
    let (i, c, s, f) = (id, command, size, flags);
    [i[0], i[1], c[0], c[1], s[0], s[1], s[2], s[3], f[0], f[1], f[2], f[3], 0, 0, 0, 0]
}

// The pieces of inputs; `src/lib.rs` reads them. What the server takes, and how the stream is cut, first.
const USUAL: &[u8] = &[0xff, 6];
const SMALL: &[u8] = &[0, 0];

const HELLO: &[u8] =
    b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"pgsizes\":4096}}\0";
const VERSION: &[u8] = &head(0, 1, HELLO.len(), 0);
const NOBODY_SPEAKS: &[u8] = &[9, 0, 0, 0];
const NOT_THIS_VERSION: &[u8] = &head(0, 1, 4, 0);
const NO_CAPABILITIES: &[u8] = &head(0, 1, 8, 0);
const ODD: &[u8] = b"\0\0\0\0[1]\0";

/// 4 KiB at 0x1000, for reading and writing.
const RAM: &[u8] = &[32, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0];
const MAP: &[u8] = &head(1, 2, RAM.len(), 0);
const MAP_WITHOUT_FILE: &[u8] = &head(0, 2, RAM.len(), 0);
const MAP_WITH_TWO: &[u8] = &head(2, 2, RAM.len(), 0);
const MAP_WITH_LOST: &[u8] = &head(0xc1, 2, RAM.len(), 0);
const NO_RAM: &[u8] = &[24, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0];
const UNMAP: &[u8] = &head(0, 3, NO_RAM.len(), 0);
const NOTHING: &[u8] = &[24, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const UNMAP_ALL: &[u8] = &head(0, 3, NOTHING.len(), 0);

const WHICH: &[u8] = &[16, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
const DEVICE: &[u8] = &head(0, 4, WHICH.len(), 0);
const EVENTFDS: &[u8] = &head(0, 6, WHICH.len(), 0);
const IRQ: &[u8] = &head(0, 7, WHICH.len(), 0);
const SHORT_REPLY: &[u8] =
    &[32, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const LONG_REPLY: &[u8] =
    &[32, 1, 0, 0, 0, 0, 0, 0, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const REGION: &[u8] = &head(0, 5, SHORT_REPLY.len(), 0);

/// Flags, kind, first, count.
const ASSIGNED: &[u8] = &[20, 0, 0, 0, 0x24, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0];
const ASSIGN: &[u8] = &head(3, 8, ASSIGNED.len(), 0);
const UNASSIGN: &[u8] = &head(0, 8, ASSIGNED.len(), 0);
const TRIGGERED: &[u8] = &[23, 0, 0, 0, 0x22, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 1];
const TRIGGER: &[u8] = &head(0, 8, TRIGGERED.len(), 0);
const DISABLED: &[u8] = &[20, 0, 0, 0, 0x21, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const DISABLE: &[u8] = &head(0, 8, DISABLED.len(), 0);

/// Where, which region, how many bytes; and a byte for those who write.
const AT: &[u8] = &[0x18, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0];
const DATA: &[u8] = &[0xab];
const READ: &[u8] = &head(0, 9, AT.len(), 0);
const WRITE: &[u8] = &head(0, 10, AT.len() + 1, 0);
const WRITE_IN_HASTE: &[u8] = &head(0, 10, AT.len() + 1, 0x10);
const READ_LATE: &[u8] = &[0x1d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0];
const READ_DROPPED: &[u8] = &[0x1e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0];
const RESET: &[u8] = &head(0, 13, 0, 0);

const FEATURE: &[u8] = &head(1, 16, DATA.len(), 0);
const UNKNOWN: &[u8] = &head(1, 99, DATA.len(), 0);
const REPLY: &[u8] = &head(0, 13, 0, 1);
const SHORT: &[u8] = &[0, 0, 13, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// A header that is not all there, of a message that would be.
const CUT: &[u8] = &[0, 0, 13, 0, 13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// A write of more than is sent.
const LONG: &[u8] = &[0, 0, 10, 0, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

const WIRE: Seeds = &[
    (
        "boot",
        &[
            USUAL,
            VERSION,
            HELLO,
            MAP,
            RAM,
            MAP_WITHOUT_FILE,
            RAM,
            DEVICE,
            WHICH,
            REGION,
            SHORT_REPLY,
            REGION,
            LONG_REPLY,
            IRQ,
            WHICH,
            READ,
            AT,
            RESET,
            UNMAP,
            NO_RAM,
            WRITE,
            AT,
            DATA,
        ],
    ),
    (
        "interrupts",
        &[USUAL, VERSION, HELLO, ASSIGN, ASSIGNED, UNASSIGN, ASSIGNED, TRIGGER, TRIGGERED, DISABLE, DISABLED],
    ),
    (
        "answers",
        &[USUAL, VERSION, HELLO, READ, READ_LATE, READ, READ_DROPPED, WRITE_IN_HASTE, AT, DATA, EVENTFDS, WHICH],
    ),
    ("files", &[SMALL, VERSION, HELLO, MAP, RAM, MAP_WITH_TWO, RAM, MAP_WITH_LOST, RAM, ASSIGN, ASSIGNED, RESET]),
    ("not-served", &[SMALL, VERSION, HELLO, FEATURE, DATA, UNKNOWN, DATA, UNMAP_ALL, NOTHING, VERSION, HELLO, RESET]),
    ("version", &[USUAL, NOT_THIS_VERSION, NOBODY_SPEAKS, RESET]),
    ("capabilities", &[USUAL, NO_CAPABILITIES, ODD, RESET]),
    ("no-version", &[USUAL, RESET]),
    ("reply", &[USUAL, VERSION, HELLO, REPLY, RESET]),
    ("short", &[USUAL, VERSION, HELLO, SHORT, RESET]),
    ("cut", &[USUAL, VERSION, HELLO, CUT]),
    ("long", &[SMALL, VERSION, HELLO, LONG, AT, DATA]),
];
