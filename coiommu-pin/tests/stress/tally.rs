//! What was done in a run, by all threads together.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! did {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Did { $($(#[$doc])* $name,)* }

        impl Did {
            const ALL: &[Self] = &[$(Self::$name,)*];
        }

        /// How often each was done. Relaxed: a tally must not order the threads that are tested.
        #[derive(Debug, Default)]
        pub(crate) struct Tally([AtomicU64; [$(Did::$name,)*].len()]);
    };
}

did! {
    /// A guest found a page pinned that it counted.
    Grant,
    /// A guest counted a page down again because it was not pinned.
    Denial,
    /// A device read or wrote where it must be able to.
    Dma,
    /// The same, in RAM that comes and goes.
    DmaInMoving,
    /// A device's access failed because RAM had gone.
    ExcusedFault,
    /// A guest set PINNED itself, and its request was served all the same.
    Lie,
    /// Requests by how they ended.
    Pinned,
    Failed,
    TimedOut,
    Refused,
    Tick,
    /// Pages that ticks say they took back.
    TickedPage,
    /// A range was unpinned by force, and taken.
    Take,
    /// A range could not be taken.
    NoTake,
    /// Pages that forced unpins say they took back.
    ForcedPage,
    /// A device was made to try where it must not be able to.
    Probe,
    Park,
    /// RAM went.
    Removal,
    /// It came back: the same memory at the same address, the same at another, or other memory.
    SameBack,
    RemappedBack,
    OtherBack,
    /// The guest's drain, one that leaves the table alone, and one by a second ACTIVATE.
    Deactivation,
    Reset,
    Reactivation,
    /// The IOMMU and the pin map disagreed.
    Anomaly,
}

impl Tally {
    pub(crate) fn add(&self, did: Did, times: u64) {
        self.0[did as usize].fetch_add(times, Relaxed);
    }

    pub(crate) fn of(&self, did: Did) -> u64 {
        self.0[did as usize].load(Relaxed)
    }

    /// What did not happen yet, of that which happens sooner or later.
    pub(crate) fn never(&self) -> Vec<Did> {
        // Time may not run out; a park may make no difference; the rest of a request may always be served.
        let may_not_be = [Did::ExcusedFault, Did::TimedOut, Did::Refused, Did::Anomaly, Did::Failed];
        let never = |did: &&Did| self.of(**did) == 0 && !may_not_be.contains(did);
        Did::ALL.iter().filter(never).copied().collect()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut between = "";
        for &did in Did::ALL {
            write!(f, "{between}{did:?} {}", self.of(did))?;
            between = ", ";
        }
        Ok(())
    }
}
