//! Bytes to steps. All numbers are little-endian, and zero after the end of the input.
//!
//! First a policy (one byte), then flags (one byte): a second CPU writes all along; there is a table with leaves for the
//! gfns below 2048; time passes at every look at the clock. Then steps until the end.

use std::time::Duration;

use arbitrary::Unstructured;
use coiommu_dtt::PAGE_SIZE;
use coiommu_dtt_fuzz::{Write, number};
use coiommu_pin::MapError;
use coiommu_pin::pinner::Drain;

use crate::space::{BAR2, RAM, VCPUS};

/// The policies an input can choose from.
const POLICIES: [&str; 8] = [
    "",
    "extent=page",
    "extent=aligned=64k",
    "extent=aligned=2m",
    "extent=page,quota=32k",
    "extent=run,quota=64k,unpin_gen_threshold=0",
    "extent=aligned=64k,quota=128k,unpin_gen_threshold=2",
    "extent=run,unpin_gen_threshold=1",
];

/// The guest's endpoint.
pub(crate) const BDF: u16 = 0x18;

const ERRORS: [MapError; 4] = [MapError::NoEntries, MapError::NoMemory, MapError::Fault, MapError::Other(5)];

/// What an input describes.
#[derive(Debug)]
pub(crate) struct Script {
    pub(crate) policy: &'static str,
    pub(crate) has_second_cpu: bool,
    pub(crate) has_table: bool,
    /// What passes at each look at the clock.
    pub(crate) haste: Duration,
    pub(crate) steps: Vec<Step>,
}

/// One thing that happens.
#[derive(Debug)]
#[allow(missing_docs, reason = "fields are what the calls they become take")]
pub enum Step {
    /// The guest writes.
    Write(Write),
    /// The guest writes a batch's header, and gfns in a row after it.
    Batch {
        at: u64,
        bdf: u16,
        claims: u64,
        first: u64,
        gfns: u16,
    },
    /// A request is taken from a slot and served to its end.
    Request(u64),
    /// A request is taken, and served later.
    Begin(u64),
    /// The next piece of a request that was begun.
    Serve(u8),
    /// The guest puts something into a slot, whatever was in it.
    Post {
        vcpu: usize,
        word: u64,
    },
    /// The slots are looked at once.
    Poll,
    /// The reclaim worker is asked for a range.
    Ask {
        gpa: u64,
        bytes: u64,
    },
    /// It does a piece of its work.
    Reclaim,
    Tick(Option<u64>),
    Park,
    Unpark,
    /// A forced unpin begins.
    Force {
        gpa: u64,
        bytes: u64,
    },
    /// The forced unpin that began first goes on.
    GoOn,
    /// A hold is dropped, or a forced unpin given up.
    LetGo,
    Remove(usize),
    Add {
        place: usize,
        other: bool,
    },
    Activate {
        root: u64,
        levels: u64,
    },
    Deactivate(Drain),
    /// The next calls of the mapper: fail as the bits say, and the guest writes while each is under way.
    Calls {
        fail: u8,
        error: MapError,
        meanwhile: Write,
    },
    /// The mapper has room for so many mappings, and so many pages.
    Room {
        mappings: u8,
        pages: u8,
    },
    Pass(Duration),
}

impl Script {
    pub(crate) fn read(input: &[u8], mut read: impl FnMut(&mut Unstructured<'_>) -> Step) -> Self {
        let mut input = Unstructured::new(input);
        let policy = POLICIES[usize::from(number::<u8>(&mut input) % 8)];
        let flags: u8 = number(&mut input);
        let mut steps = Vec::new();
        while !input.is_empty() {
            steps.push(read(&mut input));
        }
        Self {
            policy,
            has_second_cpu: flags & 1 != 0,
            has_table: flags & 2 == 0,
            haste: Duration::from_millis(if flags & 4 == 0 { 0 } else { 7 }),
            steps,
        }
    }

    /// All that the guest writes, for its second CPU.
    pub(crate) fn writes(&self) -> Vec<Write> {
        let write = |step: &Step| match *step {
            Step::Write(write) | Step::Calls { meanwhile: write, .. } => Some(write),
            Step::Post { vcpu, word } => Some(post(vcpu, word)),
            _ => None,
        };
        self.steps.iter().filter_map(write).collect()
    }

    /// Whether there can ever be something in a slot.
    pub(crate) fn has_posts(&self) -> bool {
        let is_batch = |step: &Step| matches!(step, Step::Batch { at, .. } if *at > BAR2 / 2);
        self.writes().into_iter().any(|write| write.at() >= BAR2) || self.steps.iter().any(is_batch)
    }
}

impl Step {
    /// The next step of an input.
    pub fn read(input: &mut Unstructured<'_>) -> Self {
        match number::<u8>(input) % 31 {
            0..=2 => Step::Write(write(input)),
            3 => Step::Batch {
                at: page(input) + u64::from(number::<u8>(input)),
                bdf: if number::<u8>(input) & 7 == 7 { number(input) } else { BDF },
                claims: if number::<u8>(input) & 7 == 7 { number(input) } else { number::<u16>(input).into() },
                first: gfn(input),
                gfns: number::<u16>(input) % 600,
            },
            4 | 5 => Step::Request(word(input)),
            6 => Step::Begin(word(input)),
            7 => Step::Serve(number(input)),
            8 => Step::Tick(Some(number::<u8>(input)).filter(|&pages| pages != 0).map(u64::from)),
            9 => Step::Park,
            10 => Step::Unpark,
            11 => Step::Force { gpa: gfn(input).wrapping_mul(PAGE_SIZE), bytes: u64::from(number::<u16>(input)) * 512 },
            12 => Step::Force { gpa: number(input), bytes: number(input) },
            13 => Step::GoOn,
            14 => Step::LetGo,
            15 => Step::Remove(usize::from(number::<u8>(input)) % RAM.len()),
            16 | 17 => {
                let choice: u8 = number(input);
                Step::Add { place: usize::from(choice >> 1) % RAM.len(), other: choice & 1 == 1 }
            }
            18 => Step::Activate { root: page(input), levels: u64::from(number::<u8>(input) % 8) },
            19 => Step::Deactivate(if number::<u8>(input) & 1 == 0 { Drain::Deactivate } else { Drain::Reset }),
            20 | 21 => Step::Calls {
                fail: number(input),
                error: ERRORS[usize::from(number::<u8>(input) % 4)],
                meanwhile: write(input),
            },
            22 => Step::Room { mappings: number(input), pages: number(input) },
            24 | 25 => Step::Post { vcpu: number::<u8>(input).into(), word: word(input) },
            26 | 27 => Step::Poll,
            28 => Step::Ask { gpa: gfn(input).wrapping_mul(PAGE_SIZE), bytes: u64::from(number::<u16>(input)) * 512 },
            29 => Step::Reclaim,
            _ => Step::Pass(Duration::from_millis(u64::from(number::<u8>(input)) * 8)),
        }
    }
}

/// The guest puts a word into a slot.
pub(crate) fn post(vcpu: usize, word: u64) -> Write {
    Write::U64(BAR2 + (vcpu % VCPUS) as u64 * 8, word)
}

/// A word of a slot: mostly one that could be meant.
fn word(input: &mut Unstructured<'_>) -> u64 {
    match number::<u8>(input) % 4 {
        0 => number(input),
        1 => 1 << 63 | (page(input) + u64::from(number::<u8>(input))),
        _ => gfn(input) << 16 | u64::from(BDF),
    }
}

/// A gfn: mostly one where RAM may be.
fn gfn(input: &mut Unstructured<'_>) -> u64 {
    match number::<u8>(input) {
        255 => number::<u64>(input) >> 12,
        254 => number::<u16>(input).into(),
        n => [0, 490, 1036][usize::from(n % 3)] + u64::from(n / 3),
    }
}

/// The address of a page, mostly in the RAM that tables fit into.
fn page(input: &mut Unstructured<'_>) -> u64 {
    match number::<u8>(input) {
        // Something is added to it.
        255 => number::<u64>(input) >> 1,
        n => PAGE_SIZE * [u64::from(n % 32), 496 + u64::from(n % 40)][usize::from(n > 127)],
    }
}

/// A guest's write: a directory's entry, a leaf, a request, or anything.
fn write(input: &mut Unstructured<'_>) -> Write {
    let kind: u8 = number(input);
    match kind % 4 {
        _ if kind >= 0xf0 => post(kind.into(), word(input)),
        0 => {
            let at = page(input) + u64::from(number::<u16>(input) % 512) * 8;
            Write::U64(at, page(input) | u64::from(number::<u8>(input) & 1))
        }
        1 => Write::U64(page(input) + u64::from(number::<u16>(input) % 512) * 8, number(input)),
        2 => Write::U32(page(input) + u64::from(number::<u16>(input) % 1024) * 4, number(input)),
        // A leaf as honest guests have them, in the table that is there from the start.
        _ => {
            let leaf: u32 = match number::<u8>(input) % 4 {
                0 => 0,
                1 => 1 << 31,
                2 => 3 << 30 | 1,
                _ => 1 << 30 | 1,
            };
            Write::U32(crate::world::LEAVES + gfn(input) % 2048 * 4, leaf)
        }
    }
}
