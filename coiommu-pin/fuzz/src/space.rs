//! The guest's memory: RAM in three places, each of which can go, come back, and be replaced by other memory; and the notify
//! map, which is no RAM.

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use coiommu_dtt::{Gpa, NotifySlots, PAGE_SIZE, TableMemory};
use coiommu_dtt_fuzz::Arena;
use coiommu_pin::{NotifyMap, TableSpace};
use vm_memory::{FileOffset, GuestMemoryMmap, GuestRegionMmap};

/// RAM, in gfns: one that a table fits into, one over a block's end, one in a block alone.
pub(crate) const RAM: [Range<u64>; 3] = [0..24, 496..530, 1040..1044];

/// Where the guest has mapped BAR 2, behind all RAM, and how many vCPUs it has.
pub(crate) const BAR2: u64 = 1 << 30;
pub(crate) const VCPUS: usize = 4;

/// Memory that is made once: for each place of [`RAM`] two pieces, which are different files, and then BAR 2.
#[derive(Debug)]
pub(crate) struct Places {
    arena: Arena,
}

impl Default for Places {
    fn default() -> Self {
        let pieces = RAM.into_iter().flat_map(|gfns| {
            let bytes = (gfns.end - gfns.start) * PAGE_SIZE;
            let len = usize::try_from(bytes).expect("it is small");
            [(); 2].map(|()| (gfns.start * PAGE_SIZE, len, Some(file(bytes))))
        });
        Self { arena: Arena::new(pieces.chain([(BAR2, 8 * VCPUS, None)])) }
    }
}

fn file(bytes: u64) -> FileOffset {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(bytes).expect("it is small");
    FileOffset::new(file, 0)
}

impl Places {
    pub(crate) fn wipe(&self) {
        self.arena.wipe();
    }

    /// The memory at a place: the first or the other.
    pub(crate) fn region(&self, place: usize, other: bool) -> &Arc<GuestRegionMmap> {
        &self.arena.regions()[2 * place + usize::from(other)]
    }

    /// Memory with these regions, `None` where there is nothing.
    pub(crate) fn show(&self, there: &[Option<bool>; RAM.len()]) -> GuestMemoryMmap {
        let pieces = there.iter().enumerate().filter_map(|(place, other)| Some(2 * place + usize::from((*other)?)));
        self.arena.show(pieces.fold(0, |bits, piece| bits | 1 << piece))
    }

    /// All that the guest can write to: the first memory at each place, and BAR 2.
    pub(crate) fn all(&self) -> GuestMemoryMmap {
        let first = (0..RAM.len()).fold(0, |bits, place| bits | 1 << (2 * place));
        self.arena.show(first | 1 << (2 * RAM.len()))
    }
}

/// What the pinner sees: memory that changes.
#[derive(Clone, Debug)]
pub(crate) struct Space(Arc<RwLock<Arc<GuestMemoryMmap>>>);

impl Space {
    pub(crate) fn new(memory: Arc<GuestMemoryMmap>) -> Self {
        Self(Arc::new(RwLock::new(memory)))
    }

    pub(crate) fn set(&self, memory: GuestMemoryMmap) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(memory);
    }
}

impl TableSpace for Space {
    type Memory = GuestMemoryMmap;
    type View = Arc<GuestMemoryMmap>;

    fn view(&self) -> Self::View {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The slots, in the guest's memory.
#[derive(Clone, Debug)]
pub(crate) struct Slots(pub(crate) Arc<GuestMemoryMmap>);

impl NotifyMap for Slots {
    type Slot = <GuestMemoryMmap as TableMemory>::U64;

    fn slots(&self) -> NotifySlots<'_, Self::Slot> {
        NotifySlots::new(self.0.words64(Gpa::new(BAR2), VCPUS).expect("it never goes"))
    }
}

/// Where a place of [`RAM`] is, and its bytes.
pub(crate) fn place(n: usize) -> (Gpa, u64) {
    let gfns = &RAM[n];
    (Gpa::new(gfns.start * PAGE_SIZE), (gfns.end - gfns.start) * PAGE_SIZE)
}
