//! Counters, and how long requests took.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

pub use hdrhistogram;
use hdrhistogram::Histogram;

use crate::sync::Mutex;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What was counted since the pinner was made. Each number is right; two of them may be of different moments.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Counters { $($(#[$doc])* pub $name: u64,)* }

        /// The counters while they count. Relaxed throughout: they speak of nothing but themselves.
        #[derive(Debug, Default)]
        pub(crate) struct Counts { $(pub(crate) $name: Count,)* }

        impl Counts {
            pub(crate) fn read(&self) -> Counters {
                Counters { $($name: self.$name.0.load(Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Requests after which every page asked for was pinned.
    requests_pinned,
    /// Requests after which some page was not.
    requests_failed,
    /// Requests that were not looked at: malformed, of an unknown endpoint, or while not active.
    requests_refused,
    /// Requests that took too long and were cut off.
    requests_timed_out,
    /// Tables that were to be activated and are none.
    activations_refused,
    /// Pages asked for, duplicates within a piece left out.
    pages_asked,
    /// Pages asked for that stayed without PINNED.
    pages_failed,
    /// Pages mapped, speculative and repeated ones too.
    pages_pinned,
    /// Pages unmapped, whatever the reason.
    pages_unpinned,
    /// Pages unmapped by ticks.
    pages_unpinned_idle,
    /// Pages unmapped to make room.
    pages_unpinned_for_room,
    /// Pages unmapped on demand, those too that were mapped with one that was wanted.
    pages_unpinned_forced,
    /// Calls of the mapper's map.
    map_calls,
    /// Those that failed.
    map_failures,
    /// Calls of the mapper's unmap.
    unmap_calls,
    /// Those that failed.
    unmap_failures,
    /// Drains after which something was still mapped.
    drain_failures,
    /// Leaf entries that were looked at to find idle pages.
    leaves_looked_at,
    /// Times room was made.
    reclaims,
    /// Times the IOMMU and the pin map disagreed, and were brought together again.
    anomalies,
    /// Pages that were mapped when their RAM went and are not since RAM came back: it was other RAM, or the mapper
    /// refused.
    pages_lost,
}

/// One counter.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Counts `n` more. How many that makes, if it came to another power of two: so often may be told what a guest may be
    /// able to bring about.
    pub(crate) fn add_and_tell(&self, n: u64) -> Option<u64> {
        let before = self.0.fetch_add(n, Relaxed);
        let now = before.wrapping_add(n);
        (now.leading_zeros() < before.leading_zeros()).then_some(now)
    }
}

/// How long requests took, from being taken to their answer, in microseconds.
pub(crate) struct Latency(Mutex<Histogram<u64>>);

impl Latency {
    /// One minute; requests end after 4 s.
    const MOST: u64 = 60_000_000;

    pub(crate) fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, Self::MOST, 2);
        Self(Mutex::new(histogram.expect("the bounds are constants, and good ones")))
    }

    pub(crate) fn record(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(Self::MOST);
        self.0.lock().saturating_record(micros);
    }

    pub(crate) fn read(&self) -> Histogram<u64> {
        self.0.lock().clone()
    }
}

impl fmt::Debug for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Latency({} requests)", self.0.lock().len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_told_when_it_comes_to_a_power_of_two() {
        let count = Count::default();
        let told: Vec<_> = [1, 1, 1, 1, 0, 3, 9, 100].map(|n| count.add_and_tell(n)).into();
        assert_eq!(told, [Some(1), Some(2), None, Some(4), None, None, Some(16), Some(116)]);
    }
}
