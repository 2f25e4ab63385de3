//! Walking a DTT: from its root to a leaf table.
//!
//! The tables are the guest's, so each walk takes them as they are at that moment: every directory entry is read once,
//! atomically, masked and checked; what it names is looked up as memory again; and the way is as long as the levels say,
//! whatever the tables point to.

use core::fmt;
use core::sync::atomic::Ordering::Acquire;

use crate::geometry::{DIRECTORY_ENTRIES, Gfn, Gpa, LEAF_ENTRIES, Levels, LevelsError, PAGE_SIZE};
use crate::leaf::Leaf;
use crate::memory::{MemoryError, TableMemory, Word32, Word64};

/// An entry of a directory, as it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirectoryEntry(u64);

impl DirectoryEntry {
    const PRESENT: u64 = 1;
    /// Bits 51:12.
    const TABLE: u64 = ((1 << 52) - 1) & !(PAGE_SIZE - 1);

    /// The entry that leads to a table.
    pub(crate) const fn to(table: Gpa) -> Self {
        Self(table.raw() & Self::TABLE | Self::PRESENT)
    }

    pub(crate) const fn raw(self) -> u64 {
        self.0
    }

    /// The entry with this value.
    pub(crate) const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// Reads an entry once. Acquire pairs with the release by which a guest enters a table it has zeroed.
    pub(crate) fn read<W: Word64>(word: &W) -> Self {
        Self(word.load(Acquire))
    }

    /// The table it leads to; `None` if it is not present. Bits that mean nothing are ignored.
    pub(crate) const fn table(self) -> Option<Gpa> {
        if self.0 & Self::PRESENT == 0 { None } else { Some(Gpa::new(self.0 & Self::TABLE)) }
    }
}

/// The root and levels of a DTT that were found to be usable: what ACTIVATE checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dtt {
    root: Gpa,
    levels: Levels,
}

/// Why there is no DTT at a root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DttError {
    /// A number of levels that does not exist.
    #[error(transparent)]
    Levels(#[from] LevelsError),
    /// No root was given, or it is no page that a table can be at.
    #[error("{0} is not the address of a table: it must be a page in the low 2^52 bytes, and not 0")]
    Root(Gpa),
    /// The root is not in RAM.
    #[error("the root table cannot be read: {0}")]
    Absent(#[from] MemoryError),
}

/// Why a leaf table cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalkError {
    /// The gfn needs more levels than the table has.
    #[error("gfn {gfn} is beyond the {} levels of the table", levels.get())]
    Beyond {
        /// The page.
        gfn: Gfn,
        /// The table's levels.
        levels: Levels,
    },
    /// A directory has nothing for that gfn: nobody can have mapped the page.
    #[error("the level {level} directory has no entry for gfn {gfn}")]
    NotPresent {
        /// The page.
        gfn: Gfn,
        /// The directory's level, 2 to 5.
        level: u8,
    },
    /// A table is where there is no RAM, now or ever.
    #[error("a table cannot be read: {0}")]
    Unreadable(#[from] MemoryError),
}

impl Dtt {
    /// Checks what a guest wrote into the registers.
    ///
    /// # Errors
    ///
    /// [`DttError`] says what is wrong with it.
    pub fn new<M: TableMemory + ?Sized>(mem: &M, root: Gpa, levels: u64) -> Result<Self, DttError> {
        let levels = Levels::new(levels)?;
        if root.raw() == 0 || root.raw() & !DirectoryEntry::TABLE != 0 {
            return Err(DttError::Root(root));
        }
        // A leaf table and a directory are one page both.
        mem.words64(root, DIRECTORY_ENTRIES)?;
        Ok(Self { root, levels })
    }

    /// Where the first table is.
    #[must_use]
    pub const fn root(self) -> Gpa {
        self.root
    }

    /// How many levels of tables there are.
    #[must_use]
    pub const fn levels(self) -> Levels {
        self.levels
    }

    /// The leaf table that holds the entry of `gfn`.
    ///
    /// Whoever calls this keeps the guest from freeing the table while it is in use: the host by a request of the guest's
    /// that it has not answered, or by the page's block lock and the park guard; the guest by its own table lock.
    ///
    /// # Errors
    ///
    /// [`WalkError`] says where the way ended.
    pub fn leaf_table<'m, M: TableMemory + ?Sized>(
        &self,
        mem: &'m M,
        gfn: Gfn,
    ) -> Result<LeafTable<'m, M::U32>, WalkError> {
        Walker::new(*self, mem).leaf_table(gfn)
    }
}

/// Walks to one leaf table after the other, and remembers what it last found on the way: a table that follows costs one
/// directory entry, the same table nothing.
///
/// What it remembers grows old. So it is for as long as the guest frees no table, as it does not while a request of its own
/// waits for an answer; who has no such promise walks anew each time, with [`Dtt::leaf_table`].
pub struct Walker<'m, M: TableMemory + ?Sized> {
    dtt: Dtt,
    mem: &'m M,
    /// The last directory of leaf tables, and its place among such directories.
    directory: Option<(u64, Directory<'m, M::U64>)>,
    /// The last leaf table, and its place among leaf tables.
    leaves: Option<(u64, LeafTable<'m, M::U32>)>,
    /// The memory that a leaf table was last found in, and where it begins.
    piece: Option<(u64, &'m [M::U32])>,
}

/// What it remembers is guest memory, which is not printed.
impl<M: TableMemory + ?Sized> fmt::Debug for Walker<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walker").field("dtt", &self.dtt).finish_non_exhaustive()
    }
}

impl<'m, M: TableMemory + ?Sized> Walker<'m, M> {
    /// Remembers nothing yet.
    pub const fn new(dtt: Dtt, mem: &'m M) -> Self {
        Self { dtt, mem, directory: None, leaves: None, piece: None }
    }

    /// The leaf table that holds the entry of `gfn`.
    ///
    /// # Errors
    ///
    /// [`WalkError`] says where the way ended.
    // The call would cost a third as much as the walk.
    #[inline(always)]
    pub fn leaf_table(&mut self, gfn: Gfn) -> Result<LeafTable<'m, M::U32>, WalkError> {
        let place = gfn.leaf_table();
        if let Some((_, table)) = self.leaves.filter(|(last, _)| *last == place) {
            return Ok(table);
        }
        let at = match self.directory(gfn)? {
            Some(directory) => {
                directory.table(gfn.directory_index(2)).ok_or(WalkError::NotPresent { gfn, level: 2 })?
            }
            None => self.dtt.root,
        };
        let table = self.leaves_at(at)?;
        self.leaves = Some((place, table));
        Ok(table)
    }

    /// The leaf table in a page.
    #[inline]
    fn leaves_at(&mut self, at: Gpa) -> Result<LeafTable<'m, M::U32>, WalkError> {
        const WORD: u64 = size_of::<u32>() as u64;
        if let Some((start, words)) = self.piece {
            let first = usize::try_from(at.raw().wrapping_sub(start) / WORD).unwrap_or(usize::MAX);
            if let Some(entries) = words.get(first..).and_then(|words| words.first_chunk()) {
                return Ok(LeafTable { entries });
            }
        }
        let (words, first) = self.mem.piece32(at, LEAF_ENTRIES)?;
        self.piece = at.raw().checked_sub(first as u64 * WORD).map(|start| (start, words));
        LeafTable::of(words.get(first..).unwrap_or_default(), at)
    }

    /// The directory of the leaf table of `gfn`; `None` if the root is the only leaf table.
    #[inline]
    fn directory(&mut self, gfn: Gfn) -> Result<Option<Directory<'m, M::U64>>, WalkError> {
        let place = gfn.leaf_directory();
        match self.directory {
            Some((last, directory)) if last == place => Ok(Some(directory)),
            _ => self.walk_to_directory(gfn),
        }
    }

    fn walk_to_directory(&mut self, gfn: Gfn) -> Result<Option<Directory<'m, M::U64>>, WalkError> {
        let levels = self.dtt.levels;
        if !levels.cover(gfn) {
            return Err(WalkError::Beyond { gfn, levels });
        }
        if !levels.have_directories() {
            return Ok(None);
        }
        let mut directory = Directory::at(self.mem, self.dtt.root)?;
        for (level, index) in levels.path(gfn).filter(|(level, _)| *level > 2) {
            let table = directory.table(index).ok_or(WalkError::NotPresent { gfn, level })?;
            directory = Directory::at(self.mem, table)?;
        }
        self.directory = Some((gfn.leaf_directory(), directory));
        Ok(Some(directory))
    }
}

/// A directory, looked up once.
#[derive(Debug)]
pub(crate) struct Directory<'m, W>(&'m [W; DIRECTORY_ENTRIES]);

impl<W> Clone for Directory<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for Directory<'_, W> {}

impl<'m, W: Word64> Directory<'m, W> {
    /// The directory in this page.
    pub(crate) fn at<M: TableMemory<U64 = W> + ?Sized>(mem: &'m M, table: Gpa) -> Result<Self, MemoryError> {
        let words = mem.words64(table, DIRECTORY_ENTRIES)?;
        let absent = MemoryError::Absent { at: table, bytes: size_of_val(words) };
        Ok(Self(words.try_into().map_err(|_| absent)?))
    }

    /// The word of an entry.
    pub(crate) fn word(self, index: usize) -> &'m W {
        &self.0[index % DIRECTORY_ENTRIES]
    }

    /// The table that an entry leads to, if it does.
    fn table(self, index: usize) -> Option<Gpa> {
        DirectoryEntry::read(self.word(index)).table()
    }
}

/// A leaf table, looked up once: the entries of 1024 pages in a row.
pub struct LeafTable<'m, W> {
    entries: &'m [W; LEAF_ENTRIES],
}

impl<W> Clone for LeafTable<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for LeafTable<'_, W> {}

/// Its entries are guest memory, which is not printed.
impl<W> fmt::Debug for LeafTable<'_, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeafTable").finish_non_exhaustive()
    }
}

impl<'m, W: Word32> LeafTable<'m, W> {
    /// The leaf table in this page.
    pub(crate) fn at<M: TableMemory<U32 = W> + ?Sized>(mem: &'m M, table: Gpa) -> Result<Self, WalkError> {
        Self::of(mem.words32(table, LEAF_ENTRIES)?, table)
    }

    /// The leaf table that some words of memory begin with.
    fn of(words: &'m [W], at: Gpa) -> Result<Self, WalkError> {
        let absent = MemoryError::Absent { at, bytes: LEAF_ENTRIES * size_of::<u32>() };
        Ok(Self { entries: words.first_chunk().ok_or(absent)? })
    }

    /// The entry of `gfn`. That the table is the one of `gfn` is the caller's to see to: only the gfn's low bits count.
    #[must_use]
    pub fn leaf(self, gfn: Gfn) -> Leaf<'m, W> {
        // The index is masked to the array's length.
        Leaf::new(&self.entries[gfn.leaf_index()])
    }

    /// All entries, in the order of their gfns, for those that look at many.
    #[must_use]
    pub fn words(self) -> &'m [W; LEAF_ENTRIES] {
        self.entries
    }
}
