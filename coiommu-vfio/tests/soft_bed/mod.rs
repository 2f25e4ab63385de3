//! A bed for the contract: memory of its own, and `SoftIommu` with a device that goes through it.

use std::fmt::{self, Debug};
use std::num::NonZeroU64;
use std::ops::RangeInclusive;
use std::ptr::NonNull;
use std::sync::Arc;

use coiommu_pin::contract::{Bed, Device, MIN_MEMORY, Memory, Rig};
use coiommu_vfio::{Backing, DEFAULT_ENTRY_LIMIT, DmaMapper, SoftIommu};
use vm_memory::mmap::MmapRegion;

/// The ranges of a PC: a hole for interrupts, and an IOMMU of 39 bits.
const PC_RANGES: [RangeInclusive<u64>; 2] = [0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff];

/// The largest page that a bed can be used with.
const ALIGNMENT: usize = 0x1_0000;

pub(crate) struct SoftBed {
    /// Longer than needed by [`ALIGNMENT`].
    memory: MmapRegion<()>,
    page_sizes: NonZeroU64,
    /// What is tested, given the IOMMU that the device goes through.
    mapper: Box<dyn Fn(Arc<SoftIommu>) -> Arc<dyn DmaMapper>>,
}

impl SoftBed {
    pub(crate) fn new(mapper: impl Fn(Arc<SoftIommu>) -> Arc<dyn DmaMapper> + 'static) -> Self {
        Self {
            memory: MmapRegion::new(usize::try_from(MIN_MEMORY).unwrap() + ALIGNMENT).unwrap(),
            page_sizes: NonZeroU64::new(0x1000).unwrap(),
            mapper: Box::new(mapper),
        }
    }

    #[allow(dead_code, reason = "not every test that has this room uses it")]
    pub(crate) fn with_page_sizes(self, page_sizes: NonZeroU64) -> Self {
        Self { page_sizes, ..self }
    }
}

impl Debug for SoftBed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftBed").field("memory", &self.memory).finish_non_exhaustive()
    }
}

// SAFETY: the region is the bed's alone and lives as long. Rigs are the cases', which drop them before the bed goes.
unsafe impl Bed for SoftBed {
    fn rig(&self) -> Rig {
        self.rig_with_entries(DEFAULT_ENTRY_LIMIT).unwrap()
    }

    fn rig_with_entries(&self, entries: u64) -> Option<Rig> {
        let builder = SoftIommu::builder().page_sizes(self.page_sizes).iova_ranges(PC_RANGES);
        let iommu = Arc::new(builder.entry_limit(Some(entries)).build());
        let mapper = (self.mapper)(iommu.clone());
        Some(Rig { mapper, device: Some(Arc::new(SoftDevice(iommu))) })
    }

    fn memory(&self) -> Memory<'_> {
        let start = self.memory.as_ptr();
        let hva = start.wrapping_add(start.align_offset(ALIGNMENT));
        Memory { backing: Backing { hva: NonNull::new(hva).unwrap(), file: None }, len: MIN_MEMORY }
    }

    fn iova(&self) -> u64 {
        0x1_0000_0000
    }
}

#[derive(Debug)]
struct SoftDevice(Arc<SoftIommu>);

impl Device for SoftDevice {
    fn read(&self, iova: u64) -> Option<u8> {
        let mut byte = [0];
        self.0.read(iova, &mut byte).ok().map(|()| byte[0])
    }

    fn write(&self, iova: u64, byte: u8) -> bool {
        self.0.write(iova, &[byte]).is_ok()
    }
}
