//! The leaf entry: the one word that guest and host share for each page.
//!
//! [`LeafEntry`] is the word's value, [`Leaf`] the shared atomic, with one method for each step of the protocol. All that
//! makes the protocol sound is that both sides change the *same* word, each in one atomic read-modify-write, so every
//! change has a place in one order that both sides agree on:
//!
//! | bits | name | who writes | with |
//! | --- | --- | --- | --- |
//! | 31 | PINNED | host: on when the page is mapped for the endpoints, off before it is unmapped | [`Leaf::set_pinned`], [`Leaf::try_unpin`], [`Leaf::clear_pinned`] |
//! | 30 | ACCESSED | guest: on at each map; host: off, to age the page | [`Leaf::guest_map`], [`Leaf::clear_accessed`] |
//! | 29:16 | reserved | nobody: each step keeps them, none looks at them | |
//! | 15:0 | map count | guest: +1 a map, -1 an unmap | [`Leaf::guest_map`], [`Leaf::guest_unmap`] |
//!
//! If the guest's +1 comes first, the host's swap from "PINNED, count 0" fails and the page stays mapped. If the swap
//! comes first, the guest sees PINNED clear and asks. There is no third case.
//!
//! Memory orders only carry what is *outside* the word: PINNED is set with release and read with acquire, so whoever
//! sees it sees the mapping it stands for; the count goes down with release and is taken at 0 with acquire, so whoever
//! takes the page comes after all that its users did. Everything else is relaxed, for the reason its method gives.

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::memory::Word32;

/// The value of a leaf entry. Any 32 bits are one: guests can write anything.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    zerocopy::FromBytes,
    zerocopy::IntoBytes,
    zerocopy::Immutable,
    zerocopy::KnownLayout,
)]
#[repr(transparent)]
pub struct LeafEntry(u32);

bitflags::bitflags! {
    impl LeafEntry: u32 {
        /// The page is pinned and mapped for the endpoints.
        const PINNED = 1 << 31;
        /// The guest mapped the page since the host last aged it.
        const ACCESSED = 1 << 30;
        /// The map count and the reserved bits.
        const _ = !0;
    }
}

impl LeafEntry {
    /// The bits of the map count.
    pub const COUNT: u32 = 0xffff;

    /// How many times the guest has the page mapped now, as it says.
    #[must_use]
    pub const fn count(self) -> u32 {
        self.bits() & Self::COUNT
    }

    /// Whether the page has no user and had none since it was last aged: what the host may unpin. PINNED and the
    /// reserved bits do not matter.
    #[must_use]
    pub const fn is_idle(self) -> bool {
        self.bits() & (Self::COUNT | Self::ACCESSED.bits()) == 0
    }
}

/// What a guest finds when it maps a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a page that is not pinned must be asked for before a device may use it"]
pub enum Mapped {
    /// The page is pinned: the device may use it until the guest's unmap.
    Pinned,
    /// The page is counted but not pinned: ask the host, then look with [`Leaf::is_pinned`].
    NeedsPin,
}

/// The map count cannot go further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the page is mapped {count} times, more are refused")]
pub struct CountLimit {
    /// What the count is.
    pub count: u32,
}

/// The guest's count is 0: there is nothing to unmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the page is not mapped")]
pub struct NotMapped;

/// A leaf entry in shared memory.
#[derive(Debug)]
pub struct Leaf<'a, W>(&'a W);

impl<W> Clone for Leaf<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W> Copy for Leaf<'_, W> {}

impl<'a, W: Word32> Leaf<'a, W> {
    /// How often the host tries to swap PINNED away.
    const MOST_TRIES: u32 = 64;

    /// The leaf entry in this word.
    pub const fn new(word: &'a W) -> Self {
        Self(word)
    }

    /// The value now.
    ///
    /// Called by the host to choose what to try, by tests to look. Races with every other method: the value may be old
    /// before it is returned, so nothing is decided by it. Relaxed: a decision is made by the swap of
    /// [`try_unpin`](Self::try_unpin), which reads the word again.
    #[must_use]
    pub fn load(self) -> LeafEntry {
        LeafEntry::from_bits_retain(self.0.load(Relaxed))
    }

    /// Guest: one more map of the page; sets ACCESSED and tells whether it is pinned, all in one step.
    ///
    /// Called by a guest's CPU that is about to give the page to a device. Races with the same on other CPUs, where the
    /// count adds up, and with the host's [`try_unpin`](Self::try_unpin): if this step is first, that one sees the count
    /// and fails; if it was first, this one returns [`Mapped::NeedsPin`]. Acquire pairs with the release of
    /// [`set_pinned`](Self::set_pinned): a guest that finds PINNED finds the mapping made.
    ///
    /// `limit` is the highest count, [`guest::count_limit`](crate::guest::count_limit) of the guest's CPUs.
    ///
    /// # Errors
    ///
    /// [`CountLimit`] if the count is at the limit; nothing was changed.
    pub fn guest_map(self, limit: u32) -> Result<Mapped, CountLimit> {
        let mut old = self.0.load(Relaxed);
        loop {
            let count = LeafEntry(old).count();
            if count >= limit.min(LeafEntry::COUNT) {
                return Err(CountLimit { count });
            }
            let new = (old + 1) | LeafEntry::ACCESSED.bits();
            match self.0.compare_exchange_weak(old, new, Acquire, Relaxed) {
                Ok(_) if LeafEntry(old).contains(LeafEntry::PINNED) => return Ok(Mapped::Pinned),
                Ok(_) => return Ok(Mapped::NeedsPin),
                Err(now) => old = now,
            }
        }
    }

    /// Guest: one map of the page less. PINNED and ACCESSED stay: unpinning is lazy, and the host's to do.
    ///
    /// Called by a guest's CPU once the device is done with the page, or to undo a map whose pin failed. Races with the
    /// same on other CPUs and with [`try_unpin`](Self::try_unpin), which fails as long as the count is not 0. Release
    /// pairs with that swap's acquire: who takes the page at count 0 comes after all that was done with it.
    ///
    /// # Errors
    ///
    /// [`NotMapped`] if the count is 0: a count that wraps would keep the page for ever.
    pub fn guest_unmap(self) -> Result<(), NotMapped> {
        let mut old = self.0.load(Relaxed);
        loop {
            if LeafEntry(old).count() == 0 {
                return Err(NotMapped);
            }
            match self.0.compare_exchange_weak(old, old - 1, Release, Relaxed) {
                Ok(_) => return Ok(()),
                Err(now) => old = now,
            }
        }
    }

    /// Whether the page is pinned. A guest asks after its request was answered: while it counts the page, the answer yes
    /// stays true until its unmap. The host asks under the page's block lock, to spare itself a
    /// [`set_pinned`](Self::set_pinned).
    ///
    /// Races with [`set_pinned`](Self::set_pinned): not yet set reads as a failed pin, so guests look only after the
    /// slot reads 0. Acquire, as in [`guest_map`](Self::guest_map).
    #[must_use]
    pub fn is_pinned(self) -> bool {
        LeafEntry(self.0.load(Acquire)).contains(LeafEntry::PINNED)
    }

    /// Host: the page is mapped for the endpoints.
    ///
    /// Called under the page's block lock, after the mapping exists and the pin map has it; also to take a
    /// [`try_unpin`](Self::try_unpin) back. Races with the guest's steps, which keep the bit. Release pairs with the
    /// acquire of [`guest_map`](Self::guest_map) and [`is_pinned`](Self::is_pinned): the mapping is seen by whoever sees
    /// the bit.
    pub fn set_pinned(self) {
        self.0.fetch_or(LeafEntry::PINNED.bits(), Release);
    }

    /// Host: clears PINNED if the page [is idle](LeafEntry::is_idle), in one step; the value that refused otherwise. An
    /// idle page that is not PINNED (its guest cleared the bit) counts as done.
    ///
    /// Called under the page's block lock, before the page is unmapped. Races with [`guest_map`](Self::guest_map): one
    /// of the two is first, see there. Acquire pairs with the release of [`guest_unmap`](Self::guest_unmap): the unmap,
    /// and whoever is then given the memory, come after everything its last user did.
    ///
    /// # Errors
    ///
    /// The entry as it was when it refused: counted or accessed, or changing so fast that the swap never came through,
    /// which no honest guest does to an idle page. Nothing was changed.
    pub fn try_unpin(self) -> Result<(), LeafEntry> {
        // A first look with acquire, because it alone decides where PINNED is already clear.
        let mut old = self.0.load(Acquire);
        // A guest that keeps writing the word must not keep the host here.
        for _ in 0..Self::MOST_TRIES {
            let entry = LeafEntry(old);
            if !entry.is_idle() {
                return Err(entry);
            }
            if !entry.contains(LeafEntry::PINNED) {
                return Ok(());
            }
            match self.0.compare_exchange_weak(old, old & !LeafEntry::PINNED.bits(), Acquire, Acquire) {
                Ok(_) => return Ok(()),
                Err(now) => old = now,
            }
        }
        Err(LeafEntry(old))
    }

    /// Host: clears ACCESSED, so that the page may go next time if nobody maps it until then.
    ///
    /// Called under the page's block lock. Races with [`guest_map`](Self::guest_map), which sets the bit again: whichever
    /// is last stands, and both are right, as the page is counted then. Relaxed: the bit speaks of nothing outside the
    /// word.
    pub fn clear_accessed(self) {
        self.0.fetch_and(!LeafEntry::ACCESSED.bits(), Relaxed);
    }

    /// Host: clears PINNED whatever the count says.
    ///
    /// Called under the page's block lock for pages that go even if they are in use: when the device is deactivated,
    /// bus mastering off, and when RAM that was away does not come back. Races with the guest's steps, which keep the
    /// rest of the word. Relaxed: the host takes nothing from the bit being clear, and a guest that sees it clear asks.
    pub fn clear_pinned(self) {
        self.0.fetch_and(!LeafEntry::PINNED.bits(), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::AtomicU32;

    use proptest::prelude::*;

    use super::*;

    const PINNED: u32 = LeafEntry::PINNED.bits();
    const ACCESSED: u32 = LeafEntry::ACCESSED.bits();
    const RESERVED: u32 = 0x3fff_0000;

    /// A step of the protocol with what it must do to a word, spelt out bit by bit.
    fn expected(step: u8, word: u32, limit: u32) -> u32 {
        let count = word & 0xffff;
        match step {
            0 if count < limit.min(0xffff) => (word & !0xffff) | (count + 1) | ACCESSED,
            1 if count > 0 => (word & !0xffff) | (count - 1),
            2 => word | PINNED,
            3 if count == 0 && word & ACCESSED == 0 => word & !PINNED,
            4 => word & !ACCESSED,
            5 => word & !PINNED,
            _ => word,
        }
    }

    proptest! {
        #[test]
        fn each_step_changes_its_bits_and_no_others(
            word in prop_oneof![any::<u32>(), any::<u32>().prop_map(|w| w & !0xffff), any::<u32>().prop_map(|w| w | 0xfffe)],
            step in 0_u8..6,
            limit in prop_oneof![Just(0xffff), Just(u32::MAX), any::<u32>()],
        ) {
            let shared = AtomicU32::new(word);
            let leaf = Leaf::new(&shared);
            let done = match step {
                0 => leaf.guest_map(limit).is_ok_and(|found| (found == Mapped::Pinned) == (word & PINNED != 0)),
                1 => leaf.guest_unmap().is_ok(),
                2 => { leaf.set_pinned(); true }
                3 => leaf.try_unpin().is_ok(),
                4 => { leaf.clear_accessed(); true }
                _ => { leaf.clear_pinned(); true }
            };
            let now = leaf.load().bits();
            prop_assert_eq!(now, expected(step, word, limit));
            prop_assert_eq!(now & RESERVED, word & RESERVED);
            prop_assert!(done || now == word);
            prop_assert_eq!(leaf.is_pinned(), now & PINNED != 0);
        }
    }

    #[test]
    fn a_counted_or_accessed_page_refuses_to_be_unpinned_and_says_why() {
        for busy in [PINNED | 1, PINNED | ACCESSED, PINNED | ACCESSED | 7, 1, ACCESSED] {
            let shared = AtomicU32::new(busy | RESERVED);
            assert_eq!(Leaf::new(&shared).try_unpin(), Err(LeafEntry(busy | RESERVED)));
        }
    }
}
