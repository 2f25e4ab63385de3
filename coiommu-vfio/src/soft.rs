//! An IOMMU in software: [`SoftIommu`].

mod builder;
mod chunk;
mod device;
mod host;
mod inject;
mod table;

use std::fmt::{self, Debug};
use std::num::NonZeroU64;
use std::ops::RangeInclusive;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};

use coiommu_pin::{Backing, DmaMapper, Limits, MapError};

pub use self::builder::{Builder, DEFAULT_ENTRY_LIMIT};
pub use self::device::{Access, DmaFault, FAULTS_KEPT, Translation};
pub use self::inject::Call;

use self::device::FaultLog;
use self::host::Host;
use self::inject::Injector;
use self::table::{Cut, Span, Table};
use crate::sync;

/// Nothing of a process lies below: the usual `vm.mmap_min_addr`.
const USER_FIRST: u64 = 0x1_0000;

/// Nothing of a process lies at or above, on any machine (x86-64 with five levels comes closest).
const USER_END: u64 = 1 << 56;

/// A VFIO type1 container without a kernel: it maps as the kernel maps, refuses what the kernel refuses, and software
/// devices do their DMA through it.
///
/// # For the mapper's side
///
/// [`DmaMapper`] is kept to the letter of `vfio_iommu_type1.c`, with v2 semantics. A map that has several things wrong
/// fails as it would there; the checks and their order are:
///
/// 1. `iova`, `len` and `hva` are multiples of the page size, `len` is not 0, neither range wraps: else
///    [`Invalid`](MapError::Invalid);
/// 2. no byte of the range is mapped: else [`Exists`](MapError::Exists);
/// 3. a mapping is left: else [`NoEntries`](MapError::NoEntries);
/// 4. the range lies within one of the IOVA ranges: else [`Invalid`](MapError::Invalid);
/// 5. memory is there, and may be pinned: else [`Fault`](MapError::Fault) or [`NoMemory`](MapError::NoMemory), whichever
///    a walk over the pages meets first.
///
/// A mapping is one `map` call, never merged with its neighbour. An unmap looks at alignment, size and wrapping, then
/// at mappings it would cut, and has nothing else to refuse.
///
/// Where it differs: the last page of the 64-bit address space can be mapped and unmapped (kernels before the overflow
/// fixes of October 2025 lose track there; those with them answer EOVERFLOW in place of EINVAL to a range that wraps).
/// Of bad addresses, only those that no process can have are noticed: below 64 KiB and outside user space. The backing
/// file is not looked at.
///
/// # To make it fail
///
/// [`set_entry_limit`](SoftIommu::set_entry_limit) and [`set_pinned_limit`](SoftIommu::set_pinned_limit) make it run
/// short as a kernel does; [`inject`](SoftIommu::inject) fails any call with any error.
///
/// # Cost
///
/// One table under one lock, which devices share and map and unmap have alone. A mapping that lies within 512 aligned pages
/// (2 MiB) is found, made and removed in constant time, one that is larger in logarithmic time: some 50 to 200 ns with
/// 65,000 mappings. An access that does not fault allocates nothing.
pub struct SoftIommu {
    page_sizes: NonZeroU64,
    iova_ranges: Vec<RangeInclusive<u64>>,
    table: RwLock<Table>,
    faults: Mutex<FaultLog>,
    injector: Injector,
    map_calls: AtomicU64,
    unmap_calls: AtomicU64,
}

/// How often the mapper was called, whether the calls succeeded or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Calls of [`DmaMapper::map`].
    pub map: u64,
    /// Calls of [`DmaMapper::unmap`].
    pub unmap: u64,
}

impl Debug for SoftIommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the mappings: there may be tens of thousands.
        f.debug_struct("SoftIommu")
            .field("mappings", &self.mappings())
            .field("mapped_bytes", &self.mapped_bytes())
            .field("limits", &self.limits())
            .field("calls", &self.calls())
            .field("fault_count", &self.fault_count())
            .finish_non_exhaustive()
    }
}

impl Default for SoftIommu {
    fn default() -> Self {
        Self::new()
    }
}

/// # To set up
impl SoftIommu {
    /// Pages of 4 KiB, all IOVAs from 0 to 2⁶⁴ − 1, [`DEFAULT_ENTRY_LIMIT`] mappings, no limit on pinned memory.
    #[must_use]
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// To begin with other settings.
    pub fn builder() -> Builder {
        Builder::new()
    }

    fn from_builder(builder: Builder) -> Self {
        let page_shift = builder.page_sizes.trailing_zeros();
        Self {
            page_sizes: builder.page_sizes,
            iova_ranges: builder.iova_ranges,
            table: RwLock::new(Table::new(page_shift, builder.entry_limit, builder.pinned_limit)),
            faults: Mutex::new(FaultLog::new()),
            injector: Injector::default(),
            map_calls: AtomicU64::new(0),
            unmap_calls: AtomicU64::new(0),
        }
    }

    /// Sets how many mappings there may be; `None`: any number, as with iommufd. Mappings that there are already stay,
    /// be they more.
    pub fn set_entry_limit(&self, mappings: Option<u64>) {
        sync::write(&self.table).entry_limit = mappings;
    }

    /// Sets how many bytes may be mapped, as RLIMIT_MEMLOCK does for a process that may not exceed it; `None`: any
    /// number. A page that is mapped twice counts twice. What is mapped already stays.
    pub fn set_pinned_limit(&self, bytes: Option<u64>) {
        sync::write(&self.table).pinned_limit = bytes;
    }
}

/// # To make calls fail
impl SoftIommu {
    /// Asks `hook` before each map and unmap from now on. Where it returns an error, the call fails with it and changes
    /// nothing; the arguments are not even checked. The hook before, if any, is dropped.
    ///
    /// The hook may act as a device and look at this IOMMU (it runs before the table is locked), so that it can bring
    /// about what is rare: a DMA just before an unmap. It must not map, unmap or inject: that would wait for itself.
    /// While there is a hook, calls wait for each other in it.
    pub fn inject(&self, hook: impl FnMut(&Call) -> Option<MapError> + Send + 'static) {
        self.injector.set(Some(Box::new(hook)));
    }

    /// Fails the next `calls` map calls with `error`. Takes the place of any hook.
    pub fn fail_next_maps(&self, calls: u64, error: MapError) {
        self.inject(fail_next(calls, error, |call| matches!(call, Call::Map { .. })));
    }

    /// Fails the next `calls` unmap calls with `error`. Takes the place of any hook.
    pub fn fail_next_unmaps(&self, calls: u64, error: MapError) {
        self.inject(fail_next(calls, error, |call| matches!(call, Call::Unmap { .. })));
    }

    /// Drops the hook: calls fail for their own reasons only.
    pub fn inject_nothing(&self) {
        self.injector.set(None);
    }
}

fn fail_next(mut calls: u64, error: MapError, concerns: fn(&Call) -> bool) -> impl FnMut(&Call) -> Option<MapError> {
    move |call| {
        if !concerns(call) {
            return None;
        }
        calls = calls.checked_sub(1)?;
        Some(error)
    }
}

/// # To look at
impl SoftIommu {
    /// How many mappings there are.
    #[must_use]
    pub fn mappings(&self) -> u64 {
        sync::read(&self.table).len()
    }

    /// How many bytes they have. A page that is mapped twice counts twice.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        sync::read(&self.table).bytes()
    }

    /// Whether all of the `len` bytes from `iova` on are mapped, be it by several mappings.
    #[must_use]
    pub fn is_mapped(&self, iova: u64, len: u64) -> bool {
        self.mapped_bytes_in(iova, len) == len
    }

    /// How many of the `len` bytes from `iova` on are mapped. There are none past the last IOVA.
    #[must_use]
    pub fn mapped_bytes_in(&self, iova: u64, len: u64) -> u64 {
        let len = len.min((u64::MAX - iova).saturating_add(1));
        Span::new(iova, len).map_or(0, |span| sync::read(&self.table).bytes_in(span))
    }

    /// All mappings as (iova, bytes), ascending, as of one moment.
    #[must_use]
    pub fn snapshot(&self) -> Vec<(u64, u64)> {
        let mut mappings: Vec<_> =
            sync::read(&self.table).within(Span::ALL).map(|(iova, host)| (iova, host.len() as u64)).collect();
        mappings.sort_unstable();
        mappings
    }

    /// How often the mapper was called so far.
    #[must_use]
    pub fn calls(&self) -> Calls {
        Calls { map: self.map_calls.load(Ordering::Relaxed), unmap: self.unmap_calls.load(Ordering::Relaxed) }
    }
}

impl SoftIommu {
    fn page_size(&self) -> u64 {
        1 << self.page_sizes.trailing_zeros()
    }

    /// The kernel looks for one range that holds all of the mapping.
    fn allows(&self, span: Span) -> bool {
        self.iova_ranges.iter().any(|range| *range.start() <= span.first() && span.last() <= *range.end())
    }
}

impl DmaMapper for SoftIommu {
    #[allow(unsafe_code, reason = "the trait's contract with the caller is what a `Host` stands for")]
    unsafe fn map(&self, iova: u64, backing: Backing<'_>, len: u64) -> Result<(), MapError> {
        self.map_calls.fetch_add(1, Ordering::Relaxed);
        self.injector.ask(&Call::Map { iova, len })?;
        let span = Span::of_pages(iova, len, self.page_size()).ok_or(MapError::Invalid)?;
        let hva_len = hva_len(backing.hva, len, self.page_size()).ok_or(MapError::Invalid)?;

        let mut table = sync::write(&self.table);
        if table.overlaps(span) {
            return Err(MapError::Exists);
        }
        if table.entries_left() == Some(0) {
            return Err(MapError::NoEntries);
        }
        if !self.allows(span) {
            return Err(MapError::Invalid);
        }
        check_pinning(backing.hva, len, table.bytes_left())?;
        // SAFETY: the caller keeps the contract of `DmaMapper::map` until a covering unmap has returned or the mapper is
        // gone; that is longer than the table keeps the value, which nobody else gets.
        table.insert(span, unsafe { Host::new(backing.hva, hva_len) });
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<u64, MapError> {
        self.unmap_calls.fetch_add(1, Ordering::Relaxed);
        self.injector.ask(&Call::Unmap { iova, len })?;
        let span = Span::of_pages(iova, len, self.page_size()).ok_or(MapError::Invalid)?;
        // The lock is not to be had while a device access is on its way.
        sync::write(&self.table).remove(span).map_err(|Cut| MapError::Invalid)
    }

    fn limits(&self) -> Limits {
        Limits {
            page_sizes: self.page_sizes.get(),
            iova_ranges: self.iova_ranges.clone(),
            mappings_left: sync::read(&self.table).entries_left(),
        }
    }
}

/// The length of a piece of this process's memory, if it can be one: whole pages that do not wrap.
fn hva_len(hva: NonNull<u8>, len: u64, page_size: u64) -> Option<usize> {
    Span::of_pages(address(hva), len, page_size)?;
    usize::try_from(len).ok()
}

/// The kernel pins page by page: it stops where no page is, or where the next one would pass the limit.
fn check_pinning(hva: NonNull<u8>, len: u64, bytes_left: Option<u64>) -> Result<(), MapError> {
    let bytes_there = match address(hva) {
        ..USER_FIRST => 0,
        hva => USER_END.saturating_sub(hva),
    };
    if bytes_left.is_some_and(|left| len.min(bytes_there) > left) {
        return Err(MapError::NoMemory);
    }
    if bytes_there < len {
        return Err(MapError::Fault);
    }
    Ok(())
}

fn address(hva: NonNull<u8>) -> u64 {
    hva.addr().get() as u64
}
