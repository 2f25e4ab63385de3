//! `SoftIommu` against a model: a list of ranges, looked through from end to end, in numbers that cannot wrap.

// Mapping memory is unsafe; the block says why it is sound.
#![allow(unsafe_code)]

use std::ops::RangeInclusive;
use std::ptr::NonNull;

use coiommu_vfio::{Access, Backing, DmaFault, DmaMapper, MapError, SoftIommu};
use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory};

const PAGE: u64 = 4096;

/// Pages that a run plays on: several times the 512 that the table keeps together.
const PAGES: u64 = 1100;

/// The end of how many steps a run has, and of which pages are compared at its end every how many. Miri is slow.
const STEPS: usize = if cfg!(miri) { 20 } else { 120 };
const STRIDE: usize = if cfg!(miri) { 37 } else { 1 };

/// Pages of memory that mappings begin at. They share them, so that one write shows at several IOVAs.
const MEMORY_PAGES: u64 = 64;

/// The page after which one IOVA range ends and the next begins, without a gap.
const SEAM: u64 = 700;

/// Pages, counted from the start of the play, that no mapping may have.
const GAP: RangeInclusive<u64> = 900..=903;

#[derive(Clone, Debug)]
enum Op {
    Map { iova: u64, len: u64, memory: u64 },
    Unmap { iova: u64, len: u64 },
    Translate { iova: u64, access: Access },
    Read { iova: u64, len: usize },
    Write { iova: u64, len: usize, byte: u8 },
    EntryLimit(Option<u64>),
    PinnedLimit(Option<u64>),
    FailMaps(u64, MapError),
    FailUnmaps(u64, MapError),
}

/// Sizes in pages: mostly small ones, for many mappings; some that cover a good part of the play.
fn pages() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 1..4u64, 2 => 1..64u64, 1 => 1..PAGES, 1 => Just(512)]
}

/// A range in bytes: of pages most of the time, with the places where something happens more often than others.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let start = prop_oneof![
        4 => 0..24u64,
        2 => 0..PAGES,
        1 => 505..520u64,
        1 => SEAM - 3..SEAM + 3,
        1 => GAP.start() - 3..GAP.end() + 3,
        1 => PAGES - 4..PAGES + 2
    ];
    let odd = prop_oneof![20 => Just((0, 0)), 1 => (1..PAGE, Just(0)), 1 => (Just(0), 1..PAGE)];
    let len = prop_oneof![20 => pages(), 1 => Just(0), 1 => Just(PAGES), 1 => u64::MAX / PAGE - 4..u64::MAX / PAGE];
    (start, len, odd).prop_map(|(start, len, odd)| (start * PAGE + odd.0, len * PAGE + odd.1))
}

fn limit(most: u64) -> impl Strategy<Value = Option<u64>> {
    prop_oneof![1 => Just(None), 2 => (0..most).prop_map(Some)]
}

fn error() -> impl Strategy<Value = MapError> {
    prop_oneof![Just(MapError::NoMemory), Just(MapError::Exists), Just(MapError::Other(5))]
}

fn access() -> impl Strategy<Value = Access> {
    prop_oneof![Just(Access::Read), Just(Access::Write)]
}

fn op() -> impl Strategy<Value = Op> {
    let byte = || prop_oneof![3 => 0..24 * PAGE, 1 => 0..PAGES * PAGE];
    let len = || prop_oneof![3 => 0..64usize, 1 => 0..20_000usize];
    prop_oneof![
        8 => (range(), 0..MEMORY_PAGES).prop_map(|((iova, len), memory)| Op::Map { iova, len, memory }),
        4 => range().prop_map(|(iova, len)| Op::Unmap { iova, len }),
        3 => (byte(), access()).prop_map(|(iova, access)| Op::Translate { iova, access }),
        2 => (byte(), len()).prop_map(|(iova, len)| Op::Read { iova, len }),
        2 => (byte(), len(), any::<u8>()).prop_map(|(iova, len, byte)| Op::Write { iova, len, byte }),
        1 => limit(24).prop_map(Op::EntryLimit),
        1 => limit(PAGES * PAGE).prop_map(Op::PinnedLimit),
        1 => (0..3u64, error()).prop_map(|(calls, error)| Op::FailMaps(calls, error)),
        1 => (0..3u64, error()).prop_map(|(calls, error)| Op::FailUnmaps(calls, error)),
    ]
}

/// What is mapped at [first, end): memory from `memory` on, in bytes.
#[derive(Clone, Copy, Debug)]
struct Range {
    first: u128,
    end: u128,
    memory: u128,
}

impl Range {
    fn new(iova: u64, len: u64, memory: u64) -> Self {
        Self { first: iova.into(), end: u128::from(iova) + u128::from(len), memory: memory.into() }
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.first < other.end && other.first < self.end
    }

    fn len(&self) -> u128 {
        self.end - self.first
    }
}

struct Model {
    base: u64,
    hva: usize,
    ranges: Vec<Range>,
    memory: Vec<u8>,
    entry_limit: Option<u64>,
    pinned_limit: Option<u64>,
    fail_maps: (u64, MapError),
    fail_unmaps: (u64, MapError),
    faults: Vec<DmaFault>,
}

impl Model {
    fn iova_ranges(base: u64) -> [RangeInclusive<u64>; 3] {
        let at = |page| base + page * PAGE;
        [base..=at(SEAM) - 1, at(SEAM)..=at(*GAP.start()) - 1, at(GAP.end() + 1)..=at(PAGES - 1) + (PAGE - 1)]
    }

    fn map(&mut self, iova: u64, len: u64, memory: u64) -> Result<(), MapError> {
        if self.fail_maps.0 > 0 {
            self.fail_maps.0 -= 1;
            return Err(self.fail_maps.1);
        }
        let new = Range::new(iova, len, memory * PAGE);
        let hva_end = self.hva as u128 + new.memory + new.len();
        if len == 0 || !iova.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || new.end > 1 << 64 || hva_end > 1 << 64
        {
            return Err(MapError::Invalid);
        }
        if self.ranges.iter().any(|range| range.overlaps(&new)) {
            return Err(MapError::Exists);
        }
        if self.entry_limit.is_some_and(|limit| self.ranges.len() as u64 >= limit) {
            return Err(MapError::NoEntries);
        }
        let allowed = |range: &RangeInclusive<u64>| {
            u128::from(*range.start()) <= new.first && new.end <= u128::from(*range.end()) + 1
        };
        if !Self::iova_ranges(self.base).iter().any(allowed) {
            return Err(MapError::Invalid);
        }
        if self.pinned_limit.is_some_and(|limit| self.mapped_bytes() + new.len() > limit.into()) {
            return Err(MapError::NoMemory);
        }
        self.ranges.push(new);
        Ok(())
    }

    fn unmap(&mut self, iova: u64, len: u64) -> Result<u64, MapError> {
        if self.fail_unmaps.0 > 0 {
            self.fail_unmaps.0 -= 1;
            return Err(self.fail_unmaps.1);
        }
        let gone = Range::new(iova, len, 0);
        if len == 0 || !iova.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || gone.end > 1 << 64 {
            return Err(MapError::Invalid);
        }
        let touched = self.ranges.iter().filter(|range| range.overlaps(&gone));
        if touched.clone().any(|range| range.first < gone.first || range.end > gone.end) {
            return Err(MapError::Invalid);
        }
        let bytes: u128 = touched.map(Range::len).sum();
        self.ranges.retain(|range| !range.overlaps(&gone));
        Ok(u64::try_from(bytes).unwrap())
    }

    fn mapped_bytes(&self) -> u128 {
        self.ranges.iter().map(Range::len).sum()
    }

    /// Where a byte leads: in memory, and how far on from there.
    fn find(&self, iova: u64) -> Option<(usize, u64)> {
        let iova = iova.into();
        let range = self.ranges.iter().find(|range| (range.first..range.end).contains(&iova))?;
        let memory = usize::try_from(range.memory + iova - range.first).unwrap();
        Some((memory, u64::try_from(range.end - iova).unwrap()))
    }

    /// Where the bytes of an access lead, up to the first that leads nowhere.
    fn access(&mut self, iova: u64, len: usize, access: Access) -> (Vec<usize>, Result<(), DmaFault>) {
        let mut places = Vec::new();
        if u128::from(iova) + len as u128 > 1 << 64 {
            return (places, self.fault(iova, access));
        }
        while places.len() < len {
            let at = iova + places.len() as u64;
            let Some((memory, left)) = self.find(at) else {
                return (places, self.fault(at, access));
            };
            let piece = left.min((len - places.len()) as u64);
            places.extend(memory..memory + usize::try_from(piece).unwrap());
        }
        (places, Ok(()))
    }

    fn fault(&mut self, iova: u64, access: Access) -> Result<(), DmaFault> {
        self.faults.push(DmaFault { iova, access });
        Err(DmaFault { iova, access })
    }
}

/// The IOMMU, its memory and the model of both.
struct Pair {
    /// Goes before what it has mapped.
    iommu: SoftIommu,
    region: MmapRegion<()>,
    /// Where the memory begins in the region: at a page, which Miri's regions do not.
    start: usize,
    model: Model,
}

impl Pair {
    fn new(base: u64) -> Self {
        // So that what begins in the first pages lies in the memory.
        let len = usize::try_from((MEMORY_PAGES + PAGES) * PAGE).unwrap();
        let page = usize::try_from(PAGE).unwrap();
        let region = MmapRegion::<()>::new(len + page).unwrap();
        let start = region.as_ptr().align_offset(page);
        let mut bytes = vec![0; len];
        bytes.chunks_mut(512).zip(1u32..).for_each(|(chunk, n)| chunk[..4].copy_from_slice(&n.to_le_bytes()));
        region.get_slice(start, len).unwrap().write_slice(&bytes, 0).unwrap();
        let model = Model {
            base,
            hva: region.as_ptr().addr() + start,
            ranges: Vec::new(),
            memory: bytes,
            entry_limit: Some(65_535),
            pinned_limit: None,
            fail_maps: (0, MapError::Invalid),
            fail_unmaps: (0, MapError::Invalid),
            faults: Vec::new(),
        };
        Self { region, start, iommu: SoftIommu::builder().iova_ranges(Model::iova_ranges(base)).build(), model }
    }

    fn map(&self, iova: u64, len: u64, memory: u64) -> Result<(), MapError> {
        let offset = usize::try_from(memory * PAGE).unwrap();
        let hva = NonNull::new(self.region.as_ptr().wrapping_add(self.start + offset)).unwrap();
        // SAFETY: the region lives as long as the IOMMU and is touched through vm-memory only. Every mapping that lies
        // within the IOVA ranges (others are refused) has at most PAGES pages, and so lies in the region.
        unsafe { self.iommu.map(iova, Backing { hva, file: None }, len) }
    }

    fn play(&mut self, op: Op) -> Result<(), TestCaseError> {
        let base = self.model.base;
        let at = |iova: u64| base.wrapping_add(iova);
        match op {
            Op::Map { iova, len, memory } => {
                prop_assert_eq!(self.map(at(iova), len, memory), self.model.map(at(iova), len, memory));
            }
            Op::Unmap { iova, len } => {
                prop_assert_eq!(self.iommu.unmap(at(iova), len), self.model.unmap(at(iova), len));
            }
            Op::Translate { iova, access } => {
                let got = self.iommu.translate(at(iova), access);
                let got = got.map(|found| (found.hva.addr().get() - self.model.hva, found.len));
                let wanted = self.model.find(at(iova)).ok_or(DmaFault { iova: at(iova), access });
                self.model.faults.extend(wanted.err());
                prop_assert_eq!(got, wanted);
            }
            Op::Read { iova, len } => {
                let mut got = vec![0xee; len];
                let result = self.iommu.read(at(iova), &mut got);
                let (places, wanted) = self.model.access(at(iova), len, Access::Read);
                let mut bytes: Vec<u8> = places.into_iter().map(|place| self.model.memory[place]).collect();
                bytes.resize(len, 0xee);
                prop_assert_eq!(result, wanted);
                prop_assert!(got == bytes, "other bytes were read");
            }
            Op::Write { iova, len, byte } => {
                let bytes: Vec<u8> = (byte..=u8::MAX).cycle().take(len).collect();
                let result = self.iommu.write(at(iova), &bytes);
                let (places, wanted) = self.model.access(at(iova), len, Access::Write);
                places.into_iter().zip(bytes).for_each(|(place, byte)| self.model.memory[place] = byte);
                prop_assert_eq!(result, wanted);
            }
            Op::EntryLimit(limit) => {
                self.iommu.set_entry_limit(limit);
                self.model.entry_limit = limit;
            }
            Op::PinnedLimit(limit) => {
                self.iommu.set_pinned_limit(limit);
                self.model.pinned_limit = limit;
            }
            Op::FailMaps(calls, error) => {
                self.iommu.fail_next_maps(calls, error);
                (self.model.fail_maps, self.model.fail_unmaps.0) = ((calls, error), 0);
            }
            Op::FailUnmaps(calls, error) => {
                self.iommu.fail_next_unmaps(calls, error);
                (self.model.fail_unmaps, self.model.fail_maps.0) = ((calls, error), 0);
            }
        }
        self.compare_counts()
    }

    fn compare_counts(&self) -> Result<(), TestCaseError> {
        let mappings = self.model.ranges.len() as u64;
        prop_assert_eq!(self.iommu.mappings(), mappings);
        prop_assert_eq!(u128::from(self.iommu.mapped_bytes()), self.model.mapped_bytes());
        let left = self.model.entry_limit.map(|limit| limit.saturating_sub(mappings));
        prop_assert_eq!(self.iommu.limits().mappings_left, left);
        prop_assert_eq!(self.iommu.fault_count(), self.model.faults.len() as u64);
        Ok(())
    }

    fn compare_all(&self) -> Result<(), TestCaseError> {
        let mut mappings: Vec<(u128, u128)> =
            self.model.ranges.iter().map(|range| (range.first, range.len())).collect();
        mappings.sort_unstable();
        let snapshot = self.iommu.snapshot();
        let snapshot: Vec<(u128, u128)> = snapshot.iter().map(|&(iova, len)| (iova.into(), len.into())).collect();
        prop_assert_eq!(snapshot, mappings);
        for first in (0..PAGES).step_by(STRIDE) {
            let pages = 1 + first % 7;
            let iova = self.model.base + first * PAGE;
            let mapped =
                (0..pages).filter(|n| iova.checked_add(n * PAGE).is_some_and(|iova| self.model.find(iova).is_some()));
            let mapped = mapped.count() as u64;
            prop_assert_eq!(self.iommu.mapped_bytes_in(iova, pages * PAGE), mapped * PAGE);
            prop_assert_eq!(self.iommu.is_mapped(iova, pages * PAGE), mapped == pages);
        }
        let mut memory = vec![0; self.model.memory.len()];
        self.region.get_slice(self.start, memory.len()).unwrap().read_slice(&mut memory, 0).unwrap();
        prop_assert!(memory == self.model.memory, "a device wrote something else");
        prop_assert_eq!(self.iommu.faults(), &self.model.faults[..]);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn soft_iommu_is_a_list_of_ranges(
        base in prop_oneof![Just(0), Just(300 * PAGE), Just((PAGES * PAGE).wrapping_neg())],
        ops in vec(op(), 1..STEPS),
    ) {
        let mut pair = Pair::new(base);
        for op in ops {
            pair.play(op)?;
        }
        pair.compare_all()?;
    }
}
