//! The guest's side: building a DTT and counting maps in it.
//!
//! This is what a guest driver does, for guests in user space: tests, replays, models, and VMMs that do DMA of their
//! own. Nothing here is used by a host.
//!
//! A guest maps a page for DMA in three steps: [`GuestDtt::map`]; if that says [`Mapped::NeedsPin`], a request in its
//! slot ([`RequestWord::page`] or [`write_batch`]) and its doorbell, until the slot reads 0; then
//! [`GuestDtt::is_pinned`], and if it is not, [`GuestDtt::unmap`] and an error for the driver.

use core::sync::atomic::Ordering::{AcqRel, Acquire};

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U64};

use crate::bdf::Bdf;
use crate::geometry::{Gfn, Gpa, Levels};
use crate::leaf::{CountLimit, Leaf, LeafEntry, Mapped, NotMapped};
use crate::memory::{MemoryError, TableMemory, Word64};
use crate::notify::{BatchHeader, RequestWord};
use crate::walk::{Directory, DirectoryEntry, Dtt, DttError, LeafTable, WalkError};

/// Where a guest gets pages for its tables.
pub trait TablePages {
    /// A page of zeros in guest memory that nobody else uses; `None` if there is none left.
    fn alloc(&self) -> Option<Gpa>;

    /// Takes back a page that was not needed: still zeros.
    fn free(&self, page: Gpa);
}

/// Why a guest cannot count a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GuestError {
    /// No page for a table.
    #[error("no page left for a table")]
    NoTablePage,
    /// A directory entry holds something that leads nowhere.
    #[error("a directory entry holds {0:#x}, which is no table")]
    BadDirectory(u64),
    /// The count is as high as it goes.
    #[error(transparent)]
    CountLimit(#[from] CountLimit),
    /// The count is 0.
    #[error(transparent)]
    NotMapped(#[from] NotMapped),
    /// The table has no place for the page, or cannot be read.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// The root's page is no table.
    #[error(transparent)]
    Root(#[from] DttError),
}

impl From<MemoryError> for GuestError {
    fn from(error: MemoryError) -> Self {
        Self::Walk(WalkError::Unreadable(error))
    }
}

/// The highest map count that a guest with so many possible CPUs goes to: each of them may be in the middle of one more
/// when it looks.
#[must_use]
pub const fn count_limit(cpus: u16) -> u32 {
    LeafEntry::COUNT - cpus as u32
}

/// A DTT as its guest sees it. Safe to use from many threads.
#[derive(Clone, Copy, Debug)]
pub struct GuestDtt {
    dtt: Dtt,
    limit: u32,
}

impl GuestDtt {
    /// An empty table of so many levels, for a guest of `cpus` CPUs; its root goes into the device's registers.
    ///
    /// # Errors
    ///
    /// [`GuestError::NoTablePage`], or [`GuestError::Root`] if the page is not memory.
    pub fn new<M: TableMemory + ?Sized>(
        mem: &M,
        pages: &impl TablePages,
        levels: Levels,
        cpus: u16,
    ) -> Result<Self, GuestError> {
        let root = pages.alloc().ok_or(GuestError::NoTablePage)?;
        let dtt = Dtt::new(mem, root, u64::from(levels.get()))?;
        Ok(Self { dtt, limit: count_limit(cpus) })
    }

    /// What the guest tells the device: root and levels.
    #[must_use]
    pub const fn dtt(&self) -> Dtt {
        self.dtt
    }

    /// The highest count of a page, for [`Leaf::guest_map`].
    #[must_use]
    pub const fn count_limit(&self) -> u32 {
        self.limit
    }

    /// The leaf table of `gfn`; tables that are missing on the way are made.
    ///
    /// # Errors
    ///
    /// [`GuestError::NoTablePage`] or [`GuestError::Walk`].
    pub fn leaf_table<'m, M: TableMemory + ?Sized>(
        &self,
        mem: &'m M,
        pages: &impl TablePages,
        gfn: Gfn,
    ) -> Result<LeafTable<'m, M::U32>, GuestError> {
        let levels = self.dtt.levels();
        if !levels.cover(gfn) {
            return Err(WalkError::Beyond { gfn, levels }.into());
        }
        let mut table = self.dtt.root();
        for (_, index) in levels.path(gfn) {
            let word = Directory::at(mem, table)?.word(index);
            table = match DirectoryEntry::read(word).table() {
                Some(next) => next,
                None => enter_table(word, pages)?,
            };
        }
        Ok(LeafTable::at(mem, table)?)
    }

    /// Counts one more map of a page.
    ///
    /// # Errors
    ///
    /// [`GuestError`]; nothing was counted.
    pub fn map<M: TableMemory + ?Sized>(
        &self,
        mem: &M,
        pages: &impl TablePages,
        gfn: Gfn,
    ) -> Result<Mapped, GuestError> {
        Ok(self.leaf_table(mem, pages, gfn)?.leaf(gfn).guest_map(self.limit)?)
    }

    /// Counts one map of a page less.
    ///
    /// # Errors
    ///
    /// [`GuestError::NotMapped`], or [`GuestError::Walk`] if the page was never mapped.
    pub fn unmap<M: TableMemory + ?Sized>(&self, mem: &M, gfn: Gfn) -> Result<(), GuestError> {
        Ok(self.leaf(mem, gfn)?.guest_unmap()?)
    }

    /// Whether a page is pinned, after its request was answered.
    ///
    /// # Errors
    ///
    /// [`WalkError`] if the page was never mapped.
    pub fn is_pinned<M: TableMemory + ?Sized>(&self, mem: &M, gfn: Gfn) -> Result<bool, WalkError> {
        Ok(self.leaf(mem, gfn)?.is_pinned())
    }

    fn leaf<'m, M: TableMemory + ?Sized>(&self, mem: &'m M, gfn: Gfn) -> Result<Leaf<'m, M::U32>, WalkError> {
        Ok(self.dtt.leaf_table(mem, gfn)?.leaf(gfn))
    }
}

/// Puts a new table into a directory's empty entry, or takes the one that another CPU put there meanwhile.
fn enter_table<W: Word64>(word: &W, pages: &impl TablePages) -> Result<Gpa, GuestError> {
    let page = pages.alloc().ok_or(GuestError::NoTablePage)?;
    // Release: the page's zeros are seen by whoever follows the entry. Acquire: so are the other CPU's.
    match word.compare_exchange(0, DirectoryEntry::to(page).raw(), AcqRel, Acquire) {
        Ok(_) => Ok(page),
        Err(raw) => {
            pages.free(page);
            DirectoryEntry::from_raw(raw).table().ok_or(GuestError::BadDirectory(raw))
        }
    }
}

/// Writes a batch at `at` and gives the word that asks for it.
///
/// # Errors
///
/// [`MemoryError::Absent`] if there is no memory for all of it, which is so for any address that does not fit into a
/// request (63 bits).
pub fn write_batch<M: TableMemory + ?Sized>(
    mem: &M,
    at: Gpa,
    bdf: Bdf,
    gfns: &[Gfn],
) -> Result<RequestWord, MemoryError> {
    const AT_ONCE: usize = 64;
    let absent = MemoryError::Absent { at, bytes: size_of::<BatchHeader>() + size_of_val(gfns) };
    let header = BatchHeader { bdf: U16::new(bdf.raw()), pad: [U16::ZERO; 3], nr_pages: U64::new(gfns.len() as u64) };
    mem.write(at, header.as_bytes())?;
    let mut next = at.checked_add(size_of_val(&header) as u64);
    for piece in gfns.chunks(AT_ONCE) {
        let to = next.ok_or(absent)?;
        let mut words = [U64::ZERO; AT_ONCE];
        for (word, gfn) in words.iter_mut().zip(piece) {
            word.set(gfn.raw());
        }
        let bytes = size_of_val(piece);
        mem.write(to, words.as_bytes().get(..bytes).ok_or(absent)?)?;
        next = to.checked_add(bytes as u64);
    }
    RequestWord::batch(at).ok_or(absent)
}
