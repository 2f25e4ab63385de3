//! What `SoftIommu` does beyond the contract of mappers: the kernel's order of checks, limits, the device's side, calls
//! that are made to fail.

// Mapping memory is unsafe; the block says why it is sound.
#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use coiommu_vfio::{Access, Backing, Call, Calls, DmaFault, DmaMapper, FAULTS_KEPT, MapError, SoftIommu};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, VolatileMemory};

const PAGE: u64 = 0x1000;
const MIB: u64 = 1 << 20;

#[cfg(not(miri))]
fn mapping(len: usize) -> MmapRegion<()> {
    MmapRegion::new(len).unwrap()
}

/// Under Miri vm-memory does not map: it allocates, and not by pages. So this does, and never frees.
#[cfg(miri)]
fn mapping(len: usize) -> MmapRegion<()> {
    let layout = std::alloc::Layout::from_size_align(len, 4096).unwrap();
    // SAFETY: the size is not 0.
    let memory = unsafe { std::alloc::alloc_zeroed(layout) };
    let builder = vm_memory::mmap::MmapRegionBuilder::new(len);
    // SAFETY: `len` bytes are there, and stay.
    let builder = unsafe { builder.with_raw_mmap_pointer(memory) };
    builder.build().unwrap()
}

/// Guest memory and the IOMMU over it. Byte n of the memory is n % 251.
struct Guest {
    /// Goes before what it has mapped.
    iommu: Arc<SoftIommu>,
    memory: MmapRegion<()>,
}

impl Guest {
    fn new(iommu: SoftIommu) -> Self {
        let len = usize::try_from(4 * MIB).unwrap();
        let memory = mapping(len);
        // Copied, not counted: Miri counts slowly.
        let bytes = (0..=250).collect::<Vec<u8>>().repeat(len.div_ceil(251));
        memory.get_slice(0, len).unwrap().write_slice(&bytes[..len], 0).unwrap();
        Self { memory, iommu: Arc::new(iommu) }
    }

    fn plain() -> Self {
        Self::new(SoftIommu::new())
    }

    fn map(&self, iova: u64, offset: u64, len: u64) -> Result<(), MapError> {
        let hva = self.memory.as_ptr().addr() + usize::try_from(offset).unwrap();
        self.map_hva(iova, hva, len)
    }

    /// Any address: what is not the guest's is to be refused.
    fn map_hva(&self, iova: u64, hva: usize, len: u64) -> Result<(), MapError> {
        let start = NonNull::new(self.memory.as_ptr()).unwrap();
        let backing = Backing { hva: start.with_addr(NonZeroUsize::new(hva).unwrap()), file: None };
        // SAFETY: the tests touch what they map through vm-memory only, and only while the guest is there.
        unsafe { self.iommu.map(iova, backing, len) }
    }

    fn byte(offset: u64) -> u8 {
        u8::try_from(offset % 251).unwrap()
    }

    fn bytes(offset: u64, len: u64) -> Vec<u8> {
        (offset..offset + len).map(Self::byte).collect()
    }
}

fn fault<T>(iova: u64, access: Access) -> Result<T, DmaFault> {
    Err(DmaFault { iova, access })
}

mod checks {
    use super::*;

    /// Of two things that are wrong with a map, the kernel names the one that it looks at first.
    #[test]
    fn come_in_the_kernels_order() {
        const NULL: usize = 0x8000;
        let iommu = SoftIommu::builder().iova_ranges([0..=0xf_ffff]).entry_limit(Some(2)).build();
        let guest = Guest::new(iommu);
        let hva = guest.memory.as_ptr().addr();
        guest.map(0, 0, PAGE).unwrap();

        assert_eq!(guest.map_hva(0, hva + 1, PAGE), Err(MapError::Invalid), "shape before overlap");
        assert_eq!(guest.map_hva(0, NULL, PAGE), Err(MapError::Exists), "overlap before address");
        assert_eq!(guest.map_hva(0x10_0000, NULL, PAGE), Err(MapError::Invalid), "iova range before address");

        guest.map(PAGE, 0, PAGE).unwrap();
        assert_eq!(guest.map(0, 0, PAGE), Err(MapError::Exists), "overlap before entries");
        assert_eq!(guest.map(0xf_f000, 0, 2 * PAGE), Err(MapError::NoEntries), "entries before iova range");
        assert_eq!(guest.map_hva(2 * PAGE, NULL, PAGE), Err(MapError::NoEntries), "entries before address");

        guest.iommu.set_entry_limit(None);
        guest.iommu.set_pinned_limit(Some(2 * PAGE));
        assert_eq!(guest.map(0x10_0000, 0, PAGE), Err(MapError::Invalid), "iova range before memory");
        assert_eq!(guest.map_hva(2 * PAGE, NULL, PAGE), Err(MapError::Fault), "a page before the room for it");
        assert_eq!(guest.iommu.snapshot(), [(0, PAGE), (PAGE, PAGE)], "what fails changes nothing");
    }

    /// The kernel pins page by page, so it is the first obstacle that counts.
    #[test]
    fn of_memory_stop_at_the_first_obstacle() {
        const USER_END: usize = 1 << 56;
        let guest = Guest::plain();
        let two_pages_left = USER_END - 0x2000;
        for (limit, error) in [(PAGE, MapError::NoMemory), (2 * PAGE, MapError::Fault), (3 * PAGE, MapError::Fault)] {
            guest.iommu.set_pinned_limit(Some(limit));
            assert_eq!(guest.map_hva(0, two_pages_left, 3 * PAGE), Err(error), "limit {limit:#x}");
        }
    }

    #[test]
    fn know_all_64_bits() {
        let guest = Guest::plain();
        let last = PAGE.wrapping_neg();
        assert_eq!(guest.map(last, PAGE, PAGE), Ok(()));
        assert_eq!(guest.map(last - PAGE, 0, 2 * PAGE), Err(MapError::Exists));
        assert_eq!(guest.map(last, 0, 2 * PAGE), Err(MapError::Invalid));
        assert_eq!(guest.iommu.unmap(last, 2 * PAGE), Err(MapError::Invalid));
        assert!(guest.iommu.is_mapped(last, PAGE));
        assert_eq!(guest.iommu.mapped_bytes_in(last, 2 * PAGE), PAGE, "nothing is mapped past the end");
        let found = guest.iommu.translate(u64::MAX, Access::Write).unwrap();
        assert_eq!(found.hva.addr().get(), guest.memory.as_ptr().addr() + 0x1fff);
        assert_eq!(found.len, 1);
        assert_eq!(guest.iommu.unmap(PAGE, last), Ok(PAGE), "all but the first page");
    }

    #[test]
    fn want_one_iova_range_around_a_mapping() {
        let guest = Guest::new(SoftIommu::builder().iova_ranges([0x2000..=0x2fff, 0..=0x1fff]).build());
        assert_eq!(guest.iommu.limits().iova_ranges, [0..=0x1fff, 0x2000..=0x2fff], "sorted");
        assert_eq!(guest.map(0x1000, 0, 2 * PAGE), Err(MapError::Invalid));
        assert_eq!(guest.map(0x1000, 0, PAGE), Ok(()));
        assert_eq!(guest.map(0x2000, 0, PAGE), Ok(()));
        assert_eq!(guest.iommu.unmap(0x1000, 2 * PAGE), Ok(2 * PAGE), "an unmap does not look at them");
        assert_eq!(guest.iommu.unmap(0x8000, PAGE), Ok(0));
    }

    /// A range may be wider than there are mappings to look at, and have mappings on either side.
    #[test]
    fn of_wide_ranges_stay_within_them() {
        let guest = Guest::plain();
        for iova in [0, 1 << 30, (1 << 30) + PAGE, 1 << 40, 1 << 50] {
            guest.map(iova, 0, PAGE).unwrap();
        }
        assert_eq!(guest.map(1 << 20, 0, 4 * MIB), Ok(()), "between mappings");
        let (from, len) = (PAGE, (1 << 45) - PAGE);
        assert_eq!(guest.iommu.mapped_bytes_in(from, len), 4 * MIB + 3 * PAGE);
        assert_eq!(guest.iommu.mapped_bytes_in((1 << 30) + PAGE, 1 << 30), PAGE);
        assert_eq!(guest.iommu.unmap((1 << 30) + PAGE, 1 << 39), Ok(PAGE));
        assert_eq!(guest.iommu.unmap(from, len), Ok(4 * MIB + 2 * PAGE));
        assert_eq!(guest.iommu.snapshot(), [(0, PAGE), (1 << 50, PAGE)]);
    }

    #[test]
    fn allow_all_where_no_range_is_named() {
        let guest = Guest::new(SoftIommu::builder().iova_ranges([]).build());
        assert_eq!(guest.iommu.limits().iova_ranges, [0..=u64::MAX]);
        assert_eq!(guest.map(1 << 60, 0, PAGE), Ok(()));
    }
}

mod limits {
    use super::*;

    #[test]
    fn may_be_lowered_below_what_is_used() {
        let guest = Guest::plain();
        (0..4).for_each(|n| guest.map(n * PAGE, 0, PAGE).unwrap());
        guest.iommu.set_entry_limit(Some(3));
        assert_eq!(guest.iommu.limits().mappings_left, Some(0));
        guest.iommu.unmap(0, PAGE).unwrap();
        assert_eq!(guest.map(0, 0, PAGE), Err(MapError::NoEntries), "three of three are left");
        guest.iommu.unmap(PAGE, PAGE).unwrap();
        assert_eq!(guest.map(0, 0, PAGE), Ok(()));
    }

    #[test]
    fn of_mappings_are_as_the_kernels_or_none() {
        let guest = Guest::plain();
        assert_eq!(guest.iommu.limits().mappings_left, Some(65_535));
        guest.iommu.set_entry_limit(None);
        assert_eq!(guest.iommu.limits().mappings_left, None);
    }

    #[test]
    fn of_memory_count_a_page_each_time_it_is_mapped() {
        let guest = Guest::new(SoftIommu::builder().pinned_limit(Some(3 * PAGE)).build());
        assert_eq!(guest.map(0, 0, 2 * PAGE), Ok(()));
        assert_eq!(guest.map(4 * PAGE, 0, 2 * PAGE), Err(MapError::NoMemory));
        assert_eq!(guest.map(4 * PAGE, 0, PAGE), Ok(()));
        assert_eq!(guest.iommu.mapped_bytes(), 3 * PAGE);
        guest.iommu.set_pinned_limit(Some(PAGE));
        guest.iommu.unmap(0, 2 * PAGE).unwrap();
        assert_eq!(guest.map(0, 0, PAGE), Err(MapError::NoMemory));
        guest.iommu.set_pinned_limit(None);
        assert_eq!(guest.map(0, 0, 2 * PAGE), Ok(()));
    }
}

mod device {
    use super::*;

    #[test]
    fn crosses_from_mapping_to_mapping() {
        let guest = Guest::plain();
        // Small and large ones, and memory in another order than IOVAs.
        guest.map(4 * MIB - PAGE, 0x5000, PAGE).unwrap();
        guest.map(4 * MIB, 0x10_0000, 3 * MIB).unwrap();
        guest.map(7 * MIB, 0x2000, PAGE).unwrap();
        let first = [Guest::bytes(0x5ffe, 2), Guest::bytes(0x10_0000, 3)].concat();
        let second = [Guest::bytes(4 * MIB - 2, 2), Guest::bytes(0x2000, 3)].concat();
        for (iova, wanted) in [(4 * MIB - 2, first), (7 * MIB - 2, second)] {
            let mut got = [0; 5];
            assert_eq!(guest.iommu.read(iova, &mut got), Ok(()));
            assert_eq!(got, wanted[..]);
            assert_eq!(guest.iommu.write(iova, &[1, 2, 3, 4, 5]), Ok(()));
            assert_eq!(guest.iommu.read(iova, &mut got), Ok(()));
            assert_eq!(got, [1, 2, 3, 4, 5]);
        }
        let memory: [u8; 4] = guest.memory.get_slice(0x5ffd, 4).unwrap().read_obj(0).unwrap();
        assert_eq!(memory, [Guest::byte(0x5ffd), 1, 2, Guest::byte(0x6000)]);
    }

    #[test]
    fn moves_no_byte_from_the_fault_on() {
        let guest = Guest::plain();
        guest.map(PAGE, 0, PAGE).unwrap();
        guest.map(3 * PAGE, PAGE, PAGE).unwrap();
        let len = usize::try_from(3 * PAGE).unwrap();
        let mapped = usize::try_from(PAGE).unwrap();

        let mut got = vec![0xee; len];
        assert_eq!(guest.iommu.read(PAGE, &mut got), fault(2 * PAGE, Access::Read));
        assert_eq!(got[..mapped], Guest::bytes(0, PAGE));
        assert!(got[mapped..].iter().all(|byte| *byte == 0xee), "the page behind the hole was read");

        assert_eq!(guest.iommu.write(PAGE, &vec![0xdd; len]), fault(2 * PAGE, Access::Write));
        let mut memory = vec![0; 2 * mapped];
        guest.memory.get_slice(0, memory.len()).unwrap().read_slice(&mut memory, 0).unwrap();
        assert!(memory[..mapped].iter().all(|byte| *byte == 0xdd), "the page before the hole was not written");
        assert_eq!(memory[mapped..], Guest::bytes(PAGE, PAGE), "the page behind the hole was written");
    }

    #[test]
    fn moves_nothing_past_the_last_iova() {
        let guest = Guest::plain();
        guest.map(PAGE.wrapping_neg(), 0, PAGE).unwrap();
        guest.map(0, PAGE, PAGE).unwrap();
        let mut got = [0xee; 3];
        assert_eq!(guest.iommu.read(u64::MAX - 1, &mut got), fault(u64::MAX - 1, Access::Read));
        assert_eq!(got, [0xee; 3]);
        assert_eq!(guest.iommu.read(u64::MAX - 2, &mut got), Ok(()));
        assert_eq!(got, Guest::bytes(PAGE - 3, 3)[..]);
    }

    #[test]
    fn moves_no_bytes_anywhere_without_a_fault() {
        let guest = Guest::plain();
        assert_eq!(guest.iommu.read(0x5000, &mut []), Ok(()));
        assert_eq!(guest.iommu.write(u64::MAX, &[]), Ok(()));
        assert_eq!(guest.iommu.fault_count(), 0);
    }

    #[test]
    fn faults_are_kept_the_newest_only() {
        let guest = Guest::plain();
        let extra = 10;
        let faults: Vec<_> = (0..FAULTS_KEPT as u64 + extra)
            .map(|n| guest.iommu.translate(n, if n % 2 == 0 { Access::Read } else { Access::Write }).unwrap_err())
            .collect();
        let newest = &faults[faults.len() - FAULTS_KEPT..];
        assert_eq!(guest.iommu.faults(), newest);
        assert_eq!(guest.iommu.take_faults(), newest);
        assert_eq!(guest.iommu.take_faults(), []);
        assert_eq!(guest.iommu.fault_count(), FAULTS_KEPT as u64 + extra);
        let fault = guest.iommu.write(0xabc_d000, &[0]).unwrap_err();
        assert_eq!(guest.iommu.faults(), [fault]);
        assert_eq!(fault.to_string(), "nothing is mapped at iova 0xabcd000 for a device's write");
    }
}

mod injection {
    use super::*;

    #[test]
    fn sees_each_call_as_it_was_made() {
        let guest = Guest::plain();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let hook_seen = seen.clone();
        guest.iommu.inject(move |call| {
            hook_seen.lock().unwrap().push(*call);
            None
        });
        assert_eq!(guest.map(0x1000, 0, PAGE), Ok(()));
        assert_eq!(guest.map(0x1001, 0, 7), Err(MapError::Invalid));
        assert_eq!(guest.iommu.unmap(0, 0), Err(MapError::Invalid));
        let wanted = [
            Call::Map { iova: 0x1000, len: PAGE },
            Call::Map { iova: 0x1001, len: 7 },
            Call::Unmap { iova: 0, len: 0 },
        ];
        assert_eq!(*seen.lock().unwrap(), wanted);
        assert_eq!(guest.iommu.calls(), Calls { map: 2, unmap: 1 });
    }

    #[test]
    fn fails_calls_and_changes_nothing() {
        let guest = Guest::plain();
        guest.map(0, 0, PAGE).unwrap();
        guest.iommu.inject(|call| match call {
            Call::Map { iova: 0x5000, .. } => Some(MapError::Other(5)),
            Call::Map { .. } => None,
            Call::Unmap { .. } => Some(MapError::NoMemory),
        });
        assert_eq!(guest.map(0x5000, 0, PAGE), Err(MapError::Other(5)));
        assert_eq!(guest.map(0x5000, 0, 0), Err(MapError::Other(5)), "the hook comes before all checks");
        assert_eq!(guest.map(0x6000, 0, PAGE), Ok(()));
        assert_eq!(guest.iommu.unmap(0, 8 * PAGE), Err(MapError::NoMemory));
        assert_eq!(guest.iommu.snapshot(), [(0, PAGE), (0x6000, PAGE)]);
        guest.iommu.inject_nothing();
        assert_eq!(guest.iommu.unmap(0, 8 * PAGE), Ok(2 * PAGE));
        assert_eq!(guest.iommu.calls(), Calls { map: 4, unmap: 2 });
    }

    #[test]
    fn counts_calls_of_its_kind_only() {
        let guest = Guest::plain();
        guest.iommu.fail_next_maps(2, MapError::NoEntries);
        assert_eq!(guest.map(0, 0, PAGE), Err(MapError::NoEntries));
        assert_eq!(guest.iommu.unmap(0, PAGE), Ok(0));
        assert_eq!(guest.map(0, 0, PAGE), Err(MapError::NoEntries));
        assert_eq!(guest.map(0, 0, PAGE), Ok(()));
        guest.iommu.fail_next_unmaps(1, MapError::Invalid);
        assert_eq!(guest.map(PAGE, 0, PAGE), Ok(()));
        assert_eq!(guest.iommu.unmap(0, PAGE), Err(MapError::Invalid));
        assert_eq!(guest.iommu.unmap(0, PAGE), Ok(PAGE));
    }

    #[test]
    fn lets_a_device_in_before_the_call() {
        let guest = Guest::plain();
        guest.map(0, 0, PAGE).unwrap();
        let iommu = Arc::downgrade(&guest.iommu);
        guest.iommu.inject(move |call| {
            let iommu = iommu.upgrade()?;
            let mut byte = [0];
            let read = iommu.read(7, &mut byte);
            assert_eq!((read.is_ok(), byte[0]), (iommu.is_mapped(0, 1), if read.is_ok() { 7 } else { 0 }));
            assert!(format!("{iommu:?} {call:?}").contains("mappings"));
            None
        });
        assert_eq!(guest.iommu.unmap(0, PAGE), Ok(PAGE));
        assert_eq!(guest.iommu.unmap(0, PAGE), Ok(0));
        assert_eq!(guest.iommu.faults(), [DmaFault { iova: 7, access: Access::Read }]);
    }

    #[test]
    fn survives_a_hook_that_panics() {
        let guest = Guest::plain();
        guest.iommu.inject(|_| panic!("a hook's own affair"));
        let unmap = std::panic::AssertUnwindSafe(|| guest.iommu.unmap(0, PAGE));
        assert!(std::panic::catch_unwind(unmap).is_err());
        guest.iommu.inject_nothing();
        assert_eq!(guest.map(0, 0, PAGE), Ok(()));
    }
}
