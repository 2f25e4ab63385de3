//! Guest memory that is made once and used for every input.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

/// Pieces of guest memory, each of which is there or not, as an input wants it.
#[derive(Debug)]
pub struct Arena {
    regions: Vec<Arc<GuestRegionMmap>>,
    zeros: Vec<u8>,
    /// The pieces that were shown since they were zeros.
    used: AtomicU64,
}

impl Arena {
    /// Memory at these addresses, of these sizes in bytes, over these files.
    ///
    /// # Panics
    ///
    /// If the system has no memory, or the places are impossible.
    #[must_use]
    pub fn new(places: impl IntoIterator<Item = (u64, usize, Option<FileOffset>)>) -> Self {
        let regions: Vec<_> = places
            .into_iter()
            .map(|(gpa, bytes, file)| GuestRegionMmap::from_range(GuestAddress(gpa), bytes, file).expect("memory"))
            .map(Arc::new)
            .collect();
        let largest = regions.iter().map(|region| region.size()).max().unwrap_or(0);
        Self { regions, zeros: vec![0; largest], used: AtomicU64::new(0) }
    }

    /// The pieces, in the order of their places.
    #[must_use]
    pub fn regions(&self) -> &[Arc<GuestRegionMmap>] {
        &self.regions
    }

    /// Makes all of it zeros.
    ///
    /// # Panics
    ///
    /// Never: the zeros are as many as the largest piece.
    pub fn wipe(&self) {
        for region in self.pieces(self.used.swap(0, Relaxed)) {
            region.write_slice(&self.zeros[..region.size()], MemoryRegionAddress(0)).expect("it fits");
        }
    }

    /// Memory of the pieces whose bit is set.
    #[must_use]
    pub fn show(&self, pieces: u64) -> GuestMemoryMmap {
        self.used.fetch_or(pieces, Relaxed);
        // Without any, there is no memory at all.
        GuestMemoryMmap::from_arc_regions(self.pieces(pieces).cloned().collect()).unwrap_or_default()
    }

    fn pieces(&self, bits: u64) -> impl Iterator<Item = &Arc<GuestRegionMmap>> {
        self.regions.iter().enumerate().filter(move |(n, _)| bits >> n & 1 == 1).map(|(_, region)| region)
    }
}

/// Where `[gpa, gpa + bytes)` is in this process, if it is memory in one piece.
pub(crate) fn host_address(memory: &GuestMemoryMmap, gpa: u64, bytes: usize) -> Option<usize> {
    let (region, start) = memory.to_region_addr(GuestAddress(gpa))?;
    let slice = region.get_slice(start, bytes).ok()?;
    Some(slice.ptr_guard().as_ptr().addr())
}
