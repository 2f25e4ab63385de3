//! What a trace says that a driver did.

/// One event of a trace. It borrows from the reader and lives until the next one is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// When, in ns of the trace's clock (usually since boot). Text traces have µs; events may share a time, and
    /// events of different CPUs may be out of order by a little.
    pub time: u64,
    /// The device as the kernel names it: `0000:00:03.0`, or any word for devices not on PCI. Never empty, at most
    /// 256 bytes, without control characters.
    pub device: &'a str,
    /// What happened.
    pub event: Event<'a>,
}

/// What a driver did. [`Map`](Event::Map) and [`Unmap`](Event::Unmap) of one mapping have the same device, family and
/// key, and a key is free again once it is unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Memory was made reachable by the device.
    Map {
        /// Which calls undo it.
        family: Family,
        /// What the undoing call will show.
        key: u64,
        /// The addresses that the device may use, never none. The kernel shows the first 128 of a long list only
        /// ([`ReadCounts::truncated_lists`](super::ReadCounts::truncated_lists)).
        segments: &'a [Segment],
    },
    /// A mapping was given back. A trace that began in the middle has these without their map.
    Unmap {
        /// Which calls it undoes.
        family: Family,
        /// What the mapping call showed.
        key: u64,
        /// Bytes, where the kernel shows them.
        size: Option<u64>,
    },
    /// A device's registers were mapped for another device's DMA: no memory, so nothing to pin.
    MapResource,
    /// The end of [`MapResource`](Event::MapResource).
    UnmapResource,
    /// A mapped buffer changed hands between CPU and device (`dma_sync_*`).
    Sync,
    /// A map or allocation that the kernel refused: nothing was mapped.
    Failed,
}

/// Calls that belong together: what one maps, only one of the same family unmaps. Addresses of different families say
/// nothing about each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// `dma_map_page`, `dma_map_phys` and their unmaps; the key is the DMA address.
    Single,
    /// `dma_map_sg`, `dma_unmap_sg`; the key is the first physical address, all that the unmap shows.
    ScatterList,
    /// `dma_alloc`, `dma_free` (coherent memory); the key is the DMA address.
    Coherent,
    /// `dma_alloc_pages`, `dma_free_pages`; the key is the DMA address.
    Pages,
    /// `dma_alloc_sgt`, `dma_free_sgt`; the key is the first physical address.
    ScatterTable,
}

/// A range of DMA addresses that is not empty and does not wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Segment {
    addr: u64,
    size: u64,
}

impl Segment {
    /// `size` bytes from `addr`; nothing if that is empty or reaches past the last address.
    pub fn new(addr: u64, size: u64) -> Option<Self> {
        addr.checked_add(size.checked_sub(1)?)?;
        Some(Self { addr, size })
    }

    /// The first DMA address.
    pub fn addr(self) -> u64 {
        self.addr
    }

    /// The last DMA address, inclusive.
    pub fn last(self) -> u64 {
        // `new` has seen that this does not wrap.
        self.addr.wrapping_add(self.size.wrapping_sub(1))
    }

    /// Length in bytes, at least 1.
    pub fn size(self) -> u64 {
        self.size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_neither_empty_nor_wrapping() {
        assert_eq!(Segment::new(0x1000, 0), None);
        assert_eq!(Segment::new(u64::MAX, 2), None);
        assert_eq!(Segment::new(2, u64::MAX), None);
        let top = Segment::new(u64::MAX, 1).unwrap();
        assert_eq!((top.addr(), top.last(), top.size()), (u64::MAX, u64::MAX, 1));
        assert_eq!(Segment::new(0, u64::MAX).unwrap().last(), u64::MAX - 1);
    }
}
