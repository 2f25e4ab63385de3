//! A guest's memory as the host sees it: the table in which the guest counts.

use std::ops::Range;

use coiommu_dtt::walk::Walker;
use coiommu_dtt::{Dtt, Gfn, Gpa, LeafEntry, PAGE_SIZE};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::server::file_of;

/// The memory and the table of a guest that has all of its RAM in one piece, from 0 on.
pub(super) struct View {
    memory: GuestMemoryMmap,
    dtt: Dtt,
    pages: u64,
}

impl View {
    /// Of the emulator that is a process.
    pub(super) fn of(process: u32, mib: u32, root: u64, levels: u64) -> anyhow::Result<Self> {
        let bytes = usize::try_from(mib)? << 20;
        let file = FileOffset::new(file_of(process, "memory-backend-memfd")?, 0);
        let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), bytes, Some(file))])?;
        let dtt = Dtt::new(&memory, Gpa::new(root), levels)?;
        Ok(Self { memory, dtt, pages: bytes as u64 / PAGE_SIZE })
    }

    /// The entries of pages that the guest has mapped, or that the host says are pinned, in ascending order.
    pub(super) fn entries(&self) -> Vec<(u64, LeafEntry)> {
        let mut walker = Walker::new(self.dtt, &self.memory);
        let mut entries = Vec::new();
        for page in 0..self.pages {
            let gfn = Gfn::new(page).and_then(|gfn| Some((gfn, walker.leaf_table(gfn).ok()?)));
            let Some((gfn, table)) = gfn else { continue };
            let entry = table.leaf(gfn).load();
            if entry.count() > 0 || entry.contains(LeafEntry::PINNED) {
                entries.push((page, entry));
            }
        }
        entries
    }
}

/// Whether a page is in one of some ranges of bytes.
pub(super) fn is_in(ranges: &[Range<u64>], page: u64) -> bool {
    let at = page * PAGE_SIZE;
    let after = ranges.partition_point(|range| range.end <= at);
    ranges.get(after).is_some_and(|range| range.start <= at)
}
