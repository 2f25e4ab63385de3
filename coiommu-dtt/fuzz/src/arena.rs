//! Guest memory that is made once and used for every input.

use std::sync::Arc;

use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

/// Pieces of guest memory, each of which is there or not, as an input wants it.
#[derive(Debug)]
pub struct Arena {
    regions: Vec<Arc<GuestRegionMmap>>,
    zeros: Vec<u8>,
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
        Self { regions, zeros: vec![0; largest] }
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
        for region in &self.regions {
            region.write_slice(&self.zeros[..region.size()], MemoryRegionAddress(0)).expect("it fits");
        }
    }

    /// Memory of the pieces whose bit is set.
    #[must_use]
    pub fn show(&self, pieces: u64) -> GuestMemoryMmap {
        let shown = self.regions.iter().enumerate().filter(|(n, _)| pieces >> n & 1 == 1);
        // Without any, there is no memory at all.
        GuestMemoryMmap::from_arc_regions(shown.map(|(_, region)| Arc::clone(region)).collect()).unwrap_or_default()
    }
}

/// Where `[gpa, gpa + bytes)` is in this process, if it is memory in one piece.
pub(crate) fn host_address(memory: &GuestMemoryMmap, gpa: u64, bytes: usize) -> Option<usize> {
    let (region, start) = memory.to_region_addr(GuestAddress(gpa))?;
    let slice = region.get_slice(start, bytes).ok()?;
    Some(slice.ptr_guard().as_ptr().addr())
}
