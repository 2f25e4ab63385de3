//! Where a case plays: pages counted from the bed's first IOVA and the first byte of its memory.

use std::fmt::Debug;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU8, Ordering};

use super::{Bed, Device, MIN_MEMORY, Memory, Rig, Skip};
use crate::{Backing, DmaMapper, FileBacking, MapError};

/// The pages that cases use, unless they need all memory.
pub(super) const PAGES: u64 = 16;

/// A bed made ready: a mapper without mappings, and memory whose pages can be told apart.
#[derive(Debug)]
pub(super) struct Field<'a> {
    pub(super) mapper: Arc<dyn DmaMapper>,
    device: Option<Arc<dyn Device>>,
    /// Bytes of a page.
    pub(super) page: u64,
    /// Pages of memory.
    pub(super) pages: u64,
    first_iova: u64,
    /// An atomic because threads share the field, and a bare pointer cannot be shared.
    hva: AtomicPtr<u8>,
    file: Option<FileBacking<'a>>,
    /// What the mapper said before the case.
    mappings_left: Option<u64>,
}

impl<'a> Field<'a> {
    pub(super) fn new(bed: &'a dyn Bed) -> Self {
        Self::on_rig(bed, bed.rig())
    }

    pub(super) fn with_entries(bed: &'a dyn Bed, entries: u64) -> Result<Self, Skip> {
        let rig = bed.rig_with_entries(entries).ok_or(Skip("the number of mappings cannot be limited"))?;
        Ok(Self::on_rig(bed, rig))
    }

    fn on_rig(bed: &'a dyn Bed, Rig { mapper, device }: Rig) -> Self {
        let Memory { backing, len } = bed.memory();
        assert!(len >= MIN_MEMORY, "a bed needs {MIN_MEMORY:#x} bytes of memory, and has {len:#x}");
        let limits = mapper.limits();
        assert_ne!(limits.page_sizes, 0, "limits: an IOMMU has a page size");
        let page = 1 << limits.page_sizes.trailing_zeros();
        let field = Self {
            mapper,
            device,
            page,
            pages: len / page,
            first_iova: bed.iova(),
            hva: AtomicPtr::new(backing.hva.as_ptr()),
            file: backing.file,
            mappings_left: limits.mappings_left,
        };
        assert!(field.pages >= PAGES, "a bed needs {PAGES} pages of {page:#x} bytes");
        field.fill();
        field
    }

    /// A device to look through.
    pub(super) fn device(&self) -> Result<&dyn Device, Skip> {
        self.device.as_deref().ok_or(Skip("no device to look through"))
    }

    /// The limit of mappings, for those that have one.
    pub(super) fn counted(&self) -> Result<u64, Skip> {
        self.mappings_left.ok_or(Skip("the number of mappings has no limit"))
    }

    pub(super) fn iova(&self, page: u64) -> u64 {
        self.first_iova + page * self.page
    }

    /// Maps `pages` pages from page `at` on, onto the memory at the same place.
    pub(super) fn map(&self, at: u64, pages: u64) -> Result<(), MapError> {
        self.map_onto(at, pages, at)
    }

    /// Maps `pages` pages from page `at` on, onto the memory from page `onto` on.
    pub(super) fn map_onto(&self, at: u64, pages: u64, onto: u64) -> Result<(), MapError> {
        self.map_bytes(self.iova(at), onto * self.page, pages * self.page)
    }

    /// Maps what the caller says, right or wrong, onto the memory from byte `offset` on, which is inside.
    pub(super) fn map_bytes(&self, iova: u64, offset: u64, len: u64) -> Result<(), MapError> {
        let file = self.file.map(|file| FileBacking { offset: file.offset + offset, ..file });
        let backing = Backing { hva: self.at(offset), file };
        // SAFETY: the memory keeps to the contract of `map` as long as the mapper lives (`Bed`). Where `len` says more
        // than there is, the range is one that a mapper must refuse.
        unsafe { self.mapper.map(iova, backing, len) }
    }

    /// Maps memory that is not there: at `hva` nothing of any process can be.
    pub(super) fn map_nothing_at(&self, hva: NonZeroUsize) -> Result<(), MapError> {
        let backing = Backing { hva: NonNull::without_provenance(hva), file: None };
        // SAFETY: nobody's memory is there: a mapper that takes the address has nothing to reach, and the case fails.
        unsafe { self.mapper.map(self.iova(0), backing, self.page) }
    }

    pub(super) fn unmap(&self, at: u64, pages: u64) -> Result<u64, MapError> {
        self.mapper.unmap(self.iova(at), pages * self.page)
    }

    /// How many bytes there are from the start of the bed's memory to the end of the address space.
    pub(super) fn to_the_last_address(&self) -> u64 {
        (self.at(0).addr().get() as u64).wrapping_neg()
    }

    /// What page `page` of the memory holds at its first and last byte.
    pub(super) fn tag(page: u64) -> u8 {
        // Never 0, and not the same for pages near each other.
        (page % 0x80) as u8 | 0x80
    }

    /// What the process sees in its memory.
    pub(super) fn byte(&self, offset: u64) -> &AtomicU8 {
        // SAFETY: the byte is in the bed's memory (`at` checks), which is mapped as long as the bed, and is borrowed as
        // atomics only (`Bed`).
        unsafe { AtomicU8::from_ptr(self.at(offset).as_ptr()) }
    }

    /// Ends a case: checks that exactly these mappings (first page, pages, first page of memory) are there, each on its
    /// own, and takes them away. `rule` says what it means if they are not.
    #[track_caller]
    pub(super) fn holds_exactly(&self, mappings: &[(u64, u64, u64)], rule: &str) {
        self.check_count(mappings.len() as u64, rule);
        if let Some(device) = &self.device {
            self.check_view(&**device, mappings, rule);
        }
        for &(at, pages, _) in mappings {
            check(rule, self.unmap(at, pages), Ok(pages * self.page));
        }
        check(rule, self.unmap(0, self.pages), Ok(0));
        self.check_count(0, "unmapping gives the mappings back");
    }

    #[track_caller]
    fn check_count(&self, mappings: u64, rule: &str) {
        let left = self.mappings_left.map(|left| left.saturating_sub(mappings));
        check(&format!("{rule} (mappings left)"), self.mapper.limits().mappings_left, left);
    }

    /// The device sees each page that is mapped, at its first and its last byte, and no other.
    #[track_caller]
    fn check_view(&self, device: &dyn Device, mappings: &[(u64, u64, u64)], rule: &str) {
        for page in 0..PAGES {
            let mapping = mappings.iter().find(|(at, pages, _)| (*at..at + pages).contains(&page));
            let wanted = mapping.map(|(at, _, onto)| Self::tag(onto + page - at));
            let rule = format!("{rule} (page {page} as a device sees it)");
            check(&rule, device.read(self.iova(page)), wanted);
            check(&rule, device.read(self.iova(page) + self.page - 1), wanted);
        }
    }

    fn fill(&self) {
        for page in 0..self.pages {
            self.byte(page * self.page).store(Self::tag(page), Ordering::SeqCst);
            self.byte((page + 1) * self.page - 1).store(Self::tag(page), Ordering::SeqCst);
        }
    }

    fn at(&self, offset: u64) -> NonNull<u8> {
        assert!(offset < self.pages * self.page, "offset {offset:#x} is not in the bed's memory");
        let offset = usize::try_from(offset).expect("an offset in memory is a usize");
        let hva = self.hva.load(Ordering::Relaxed).wrapping_add(offset);
        NonNull::new(hva).expect("an address in memory is not null")
    }
}

/// Panics with the rule that was broken.
#[track_caller]
pub(super) fn check<T: PartialEq + Debug>(rule: &str, got: T, wanted: T) {
    assert!(got == wanted, "broken: {rule}: got {got:x?}, wanted {wanted:x?}");
}
