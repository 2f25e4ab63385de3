//! Pages, addresses and levels: how a gfn finds its leaf entry.

use core::fmt;

/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes of a page, of a table, and of the memory that one leaf entry speaks of.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Entries of a leaf table: 32-bit words.
pub const LEAF_ENTRIES: usize = 1 << LEAF_BITS;
/// Entries of a directory: 64-bit words.
pub const DIRECTORY_ENTRIES: usize = 1 << DIRECTORY_BITS;

const LEAF_BITS: u32 = 10;
const DIRECTORY_BITS: u32 = 9;

/// A guest physical address, in bytes. Any value: whether memory is there is for the memory to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(u64);

impl Gpa {
    /// The address with this value.
    #[must_use]
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The address in bytes.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The address `bytes` further on, if there is one.
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(raw) => Some(Self(raw)),
            None => None,
        }
    }

    /// Whether a page begins here.
    #[must_use]
    pub const fn is_page_aligned(self) -> bool {
        self.0.is_multiple_of(PAGE_SIZE)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A guest page frame number: a guest physical address without its 12 low bits, so always below 2^52.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gfn(u64);

impl Gfn {
    /// The last frame of a 64-bit address space.
    pub const MAX: Self = Self(u64::MAX >> PAGE_SHIFT);

    /// The frame with this number; `None` if no address is in it.
    #[must_use]
    pub const fn new(raw: u64) -> Option<Self> {
        if raw <= Self::MAX.0 { Some(Self(raw)) } else { None }
    }

    /// The frame that an address is in.
    #[must_use]
    pub const fn containing(gpa: Gpa) -> Self {
        Self(gpa.raw() >> PAGE_SHIFT)
    }

    /// The frame's number.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The address at which the frame begins.
    #[must_use]
    pub const fn gpa(self) -> Gpa {
        Gpa(self.0 << PAGE_SHIFT)
    }

    /// The frame's entry in its leaf table, below [`LEAF_ENTRIES`].
    #[must_use]
    pub const fn leaf_index(self) -> usize {
        low_bits(self.0, LEAF_BITS)
    }

    /// The place of the frame's leaf table among all leaf tables.
    pub(crate) const fn leaf_table(self) -> u64 {
        self.0 >> LEAF_BITS
    }

    /// The place of the directory of the frame's leaf table among all such directories.
    pub(crate) const fn leaf_directory(self) -> u64 {
        self.0 >> (LEAF_BITS + DIRECTORY_BITS)
    }

    /// The frame's entry in its directory at `level` (2 or more), below [`DIRECTORY_ENTRIES`].
    pub(crate) const fn directory_index(self, level: u32) -> usize {
        low_bits(self.0 >> (LEAF_BITS + DIRECTORY_BITS * (level - 2)), DIRECTORY_BITS)
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The low `bits` of a number as an index; `bits` is one of the two constants above.
#[allow(clippy::cast_possible_truncation, reason = "at most ten bits are left")]
const fn low_bits(raw: u64, bits: u32) -> usize {
    (raw & ((1 << bits) - 1)) as usize
}

/// How many levels of tables a DTT has, the leaf table among them: 1 to 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Levels(u8);

/// A number of levels that no DTT has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a table of {0} levels: there are 1 to 5")]
pub struct LevelsError(pub u64);

impl Levels {
    /// The most levels that a DTT can have.
    pub const MAX: Self = Self(5);

    /// This many levels.
    ///
    /// # Errors
    ///
    /// [`LevelsError`] unless it is 1 to 5.
    pub const fn new(levels: u64) -> Result<Self, LevelsError> {
        match levels {
            1 => Ok(Self(1)),
            2 => Ok(Self(2)),
            3 => Ok(Self(3)),
            4 => Ok(Self(4)),
            5 => Ok(Self(5)),
            _ => Err(LevelsError(levels)),
        }
    }

    /// The number of levels.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Whether a table of so many levels has an entry for `gfn`: `n` levels tell 10 + 9(n - 1) bits of a gfn apart.
    #[must_use]
    pub fn cover(self, gfn: Gfn) -> bool {
        let bits = LEAF_BITS + DIRECTORY_BITS * (u32::from(self.0) - 1);
        gfn.raw() >> bits == 0
    }

    /// Whether there is anything above the leaf tables.
    pub(crate) const fn have_directories(self) -> bool {
        self.0 > 1
    }

    /// The directories on the way to `gfn`, from the root down: each one's level and the index of the entry to follow.
    pub(crate) fn path(self, gfn: Gfn) -> impl Iterator<Item = (u8, usize)> {
        (2..=self.0).rev().map(move |level| (level, gfn.directory_index(u32::from(level))))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::ToString;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_one_to_five_levels_exist() {
        assert!((1..=5).all(|n| Levels::new(n).is_ok()));
        for bad in [0, 6, 256, 257, u64::MAX] {
            assert_eq!(Levels::new(bad), Err(LevelsError(bad)));
        }
    }

    #[test]
    fn levels_cover_what_the_contract_says() {
        for (levels, bits) in [(1, 10), (2, 19), (3, 28), (4, 37), (5, 46)] {
            let levels = Levels::new(levels).unwrap();
            assert!(levels.cover(Gfn::new((1 << bits) - 1).unwrap()));
            assert!(!levels.cover(Gfn::new(1 << bits).unwrap()));
        }
    }

    #[test]
    fn addresses_are_shown_in_hex() {
        assert_eq!(
            (Gpa::new(0xfee0_0000).to_string(), Gfn::MAX.to_string()),
            ("0xfee00000".into(), "0xfffffffffffff".into())
        );
    }

    proptest! {
        /// The indexes along a path are the digits of the gfn: put together again they are the gfn.
        #[test]
        fn a_path_spells_the_gfn(raw in 0_u64..1 << 46) {
            let gfn = Gfn::new(raw).unwrap();
            let digits: Vec<_> = Levels::MAX.path(gfn).collect();
            prop_assert_eq!(digits.iter().map(|d| d.0).collect::<Vec<_>>(), [5, 4, 3, 2]);
            let spelt = digits.iter().fold(0, |sum, d| sum * DIRECTORY_ENTRIES + d.1) * LEAF_ENTRIES + gfn.leaf_index();
            prop_assert_eq!(spelt as u64, raw);
        }

        #[test]
        fn a_gfn_never_passes_the_address_space(raw in prop_oneof![any::<u64>(), 0..=Gfn::MAX.raw()], inside in 0..PAGE_SIZE) {
            match Gfn::new(raw) {
                Some(gfn) => {
                    prop_assert_eq!(gfn.gpa().raw(), raw * PAGE_SIZE);
                    prop_assert_eq!(Gfn::containing(Gpa::new(raw * PAGE_SIZE + inside)), gfn);
                    prop_assert!(gfn.gpa().is_page_aligned());
                    prop_assert_eq!(Gpa::new(raw * PAGE_SIZE + inside).is_page_aligned(), inside == 0);
                }
                None => prop_assert!(raw > u64::MAX / PAGE_SIZE),
            }
        }
    }
}
