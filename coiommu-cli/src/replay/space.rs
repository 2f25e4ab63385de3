//! The guest's memory in a replay.
//!
//! RAM appears where a trace first maps some, in blocks of 2 MiB, reserved but never touched: no page of it is ever
//! there. All policies share it. A policy's DTT is real memory, above the RAM, one table page for 4 MiB of RAM at best;
//! how many there may be is fixed, so that a trace cannot make memory grow without bound.

use std::ops::Range;
use std::sync::Arc;

use anyhow::Context;
use coiommu_dtt::PAGE_SIZE;
use coiommu_pin::RamRegion;
use rustc_hash::{FxHashMap, FxHashSet};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

/// RAM is below this address.
pub(super) const RAM_END: u64 = 1 << 46;
/// Pages of a block.
pub(super) const BLOCK_PAGES: u64 = 512;
/// The same, for arrays.
pub(super) const BLOCK_LEN: usize = 512;
/// Table pages of all policies together: 1 GiB.
const TABLE_PAGES: u64 = 1 << 18;
/// The longest batch that a guest can send: 4 MiB of gfns, less the header.
pub(super) const BATCH_PAGES: u64 = ((4 << 20) - 16) / 8;

/// The RAM that a trace has used.
#[derive(Debug)]
pub(super) struct Space {
    /// Hashed fast: the space for tables bounds how many a trace can make collide.
    blocks: FxHashMap<u64, Arc<GuestRegionMmap>>,
    /// Blocks that were added since [`announced`](Self::announced).
    added: Vec<u64>,
    tables: TableCount,
    most_tables: u64,
    highest: u64,
}

/// How many table pages a four-level DTT of the RAM takes.
#[derive(Debug, Default)]
struct TableCount {
    by_level: [FxHashSet<u64>; 3],
}

impl TableCount {
    /// Bits of gfn that one table of each level covers, leaf tables first. The root is there anyway.
    const COVERS: [u32; 3] = [10, 19, 28];

    fn needed(&self, block: u64) -> u64 {
        let gfn = block * BLOCK_PAGES;
        self.by_level.iter().zip(Self::COVERS).filter(|(tables, bits)| !tables.contains(&(gfn >> bits))).count() as u64
    }

    fn add(&mut self, block: u64) {
        for (tables, bits) in self.by_level.iter_mut().zip(Self::COVERS) {
            tables.insert((block * BLOCK_PAGES) >> bits);
        }
    }

    fn pages(&self) -> u64 {
        1 + self.by_level.iter().map(|tables| tables.len() as u64).sum::<u64>()
    }
}

impl Space {
    /// No RAM yet, for a replay of so many policies.
    pub(super) fn new(policies: usize) -> Self {
        let most_tables = TABLE_PAGES / policies.max(1) as u64;
        Self { blocks: FxHashMap::default(), added: Vec::new(), tables: TableCount::default(), most_tables, highest: 0 }
    }

    /// Makes sure that there is RAM under some runs of gfns, all below [`RAM_END`]; false if that would be too much.
    ///
    /// # Errors
    ///
    /// The system reserves no more memory.
    pub(super) fn reach(&mut self, runs: &[Range<u64>]) -> anyhow::Result<bool> {
        for run in runs {
            for block in run.start / BLOCK_PAGES..run.end.div_ceil(BLOCK_PAGES) {
                if self.blocks.contains_key(&block) {
                    continue;
                }
                if self.tables.pages() + self.tables.needed(block) > self.most_tables {
                    return Ok(false);
                }
                self.tables.add(block);
                let gpa = GuestAddress(block * BLOCK_PAGES * PAGE_SIZE);
                let ram = GuestRegionMmap::from_range(gpa, 2 << 20, None).context("cannot reserve guest memory")?;
                self.blocks.insert(block, Arc::new(ram));
                self.added.push(block);
            }
        }
        Ok(true)
    }

    /// Runs that were reached are in use: all stacks know the RAM that was [`added`](Self::added). RAM of a call that
    /// is not played waits for the next.
    pub(super) fn announced(&mut self, runs: &[Range<u64>]) {
        self.added.clear();
        let end = runs.iter().map(|run| run.end * PAGE_SIZE).max().unwrap_or(0);
        self.highest = self.highest.max(end);
    }

    /// The RAM that is new.
    pub(super) fn added(&self) -> impl Iterator<Item = anyhow::Result<RamRegion>> {
        self.added
            .iter()
            .filter_map(|block| self.blocks.get(block))
            .map(|ram| Ok(RamRegion::from_vm_memory(Arc::clone(ram))?))
    }

    /// Memory for the tables and the batches of one policy.
    ///
    /// # Errors
    ///
    /// The system reserves no more memory.
    pub(super) fn tables(&self) -> anyhow::Result<TableArea> {
        let batch = GuestAddress(RAM_END);
        let first = RAM_END + (4 << 20);
        let bytes = usize::try_from((4 << 20) + self.most_tables * PAGE_SIZE).context("this machine is too small")?;
        let memory = GuestMemoryMmap::from_ranges(&[(batch, bytes)]).context("cannot reserve memory for tables")?;
        Ok(TableArea { memory, batch, tables: first..first + self.most_tables * PAGE_SIZE })
    }

    /// The end of the highest page that was in use, in bytes.
    pub(super) const fn highest(&self) -> u64 {
        self.highest
    }
}

/// Where a policy's guest keeps its tables.
#[derive(Debug)]
pub(super) struct TableArea {
    pub(super) memory: GuestMemoryMmap,
    /// Room for a batch of [`BATCH_PAGES`].
    pub(super) batch: GuestAddress,
    /// Addresses of pages for tables.
    pub(super) tables: Range<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_grows_where_it_is_reached_and_is_counted_once() {
        let mut space = Space::new(1);
        assert!(space.reach(&[511..513, 0..1]).unwrap());
        assert_eq!(space.added, [0, 1]);
        assert_eq!(space.added().count(), 2);
        space.announced(&[0..1, 511..513]);
        assert_eq!(space.highest(), 513 * PAGE_SIZE);
        assert!(space.reach(&[0..1024]).unwrap());
        assert_eq!(space.added, [0_u64; 0]);
        assert_eq!(space.tables.pages(), 4, "root, two directories, one leaf table");
    }

    #[test]
    fn ram_ends_where_its_tables_would_be_too_many() {
        let mut space = Space::new(1);
        space.most_tables = 10;
        // Each in a 1 TiB of its own: three tables.
        for (far, fits) in [(0, true), (1, true), (2, true), (3, false), (0, true)] {
            assert_eq!(space.reach(&[far << 28..(far << 28) + 1]).unwrap(), fits, "{far}");
        }
    }
}
