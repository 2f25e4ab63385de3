//! The traced drivers' view: which mappings are open, and what the trace says of them. The same for every policy.
//!
//! What cannot be played is skipped here, for all policies alike: addresses beyond the guest's address space, calls
//! larger than a guest could ask for, and more of anything than is kept. So memory is bounded whatever the trace holds.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::iter;
use std::ops::Range;
use std::time::Duration;

use coiommu_dtt::guest::count_limit;
use coiommu_dtt::{Bdf, PAGE_SIZE};
use rustc_hash::FxHashMap;

use super::space::{BATCH_PAGES, BLOCK_LEN, BLOCK_PAGES, RAM_END, Space};
use crate::trace::{Event, Family, Segment};

/// How many CPUs the guest has: what its counts stop short of.
pub(super) const CPUS: u16 = 1024;
/// Open mappings are kept up to so many runs of pages, all together; drivers keep some thousands.
const MOST_OPEN_RUNS: usize = 1 << 20;
/// Endpoints of a guest, as the ABI has it.
const MOST_DEVICES: u16 = 4095;

/// What was counted of a trace.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) events: u64,
    pub(super) map_calls: u64,
    pub(super) unmap_calls: u64,
    pub(super) unmatched_unmaps: u64,
    pub(super) distinct_pages: u64,
    pub(super) mapped_pages: u64,
    pub(super) peak_mapped_pages: u64,
    /// Events that were understood but cannot be played.
    pub(super) skipped: u64,
}

/// Whether an event could be played.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Played {
    Yes,
    Skipped,
}

/// Tells open mappings apart: device, family, key.
type Key = (Bdf, Family, u64);

/// The drivers of a trace.
#[derive(Debug)]
pub(super) struct Drivers {
    space: Space,
    devices: HashMap<String, Bdf>,
    /// The device of the last call: most often that of the next.
    last_device: Option<(String, Bdf)>,
    /// The newest last.
    open: HashMap<Key, Vec<Closed>>,
    open_runs: usize,
    /// Map counts by block and page, summed over devices.
    pages: FxHashMap<u64, Box<BlockCounts>>,
    counts: Counts,
    start: Option<Duration>,
    now: Duration,
    /// The map call at hand: its runs of gfns.
    runs: Vec<Range<u64>>,
}

/// Map counts of a block's pages; `None`: never mapped.
type BlockCounts = [Option<u16>; BLOCK_LEN];

/// A mapping that was given back.
#[derive(Debug)]
pub(super) struct Closed {
    /// What was mapped, in gfns.
    pub(super) runs: Box<[Range<u64>]>,
    /// The policies, as bits, under which its pin failed.
    pub(super) failed: u64,
}

impl Drivers {
    /// Nothing seen yet; for a replay of so many policies.
    pub(super) fn new(policies: usize) -> Self {
        Self {
            space: Space::new(policies),
            devices: HashMap::new(),
            last_device: None,
            open: HashMap::new(),
            open_runs: 0,
            pages: FxHashMap::default(),
            counts: Counts::default(),
            start: None,
            now: Duration::ZERO,
            runs: Vec::new(),
        }
    }

    pub(super) const fn space(&self) -> &Space {
        &self.space
    }

    pub(super) const fn counts(&self) -> Counts {
        self.counts
    }

    /// Trace time comes to `time`, in ns; it does not go back.
    pub(super) fn see(&mut self, time: u64) {
        self.now = self.now.max(Duration::from_nanos(time));
        self.start.get_or_insert(self.now);
    }

    pub(super) const fn now(&self) -> Duration {
        self.now
    }

    /// From the first event to the last.
    pub(super) fn span(&self) -> Duration {
        self.now - self.start.unwrap_or_default()
    }

    pub(super) fn count(&mut self, event: &Event<'_>) {
        self.counts.events += 1;
        match event {
            Event::Map { .. } | Event::MapResource => self.counts.map_calls += 1,
            Event::Unmap { .. } | Event::UnmapResource => self.counts.unmap_calls += 1,
            Event::Sync | Event::Failed => {}
        }
    }

    /// A map call, ready to be played: RAM is under its pages, and their counts can take it. What is mapped is then
    /// [`runs`](Self::runs), for the endpoint that is returned. `None`: it cannot be played.
    ///
    /// # Errors
    ///
    /// No more memory can be reserved.
    pub(super) fn map(&mut self, device: &str, segments: &[Segment]) -> anyhow::Result<Option<Bdf>> {
        self.runs.clear();
        for segment in segments {
            if segment.last() >= RAM_END {
                return Ok(None);
            }
            self.runs.push(segment.addr() / PAGE_SIZE..segment.last() / PAGE_SIZE + 1);
        }
        let pages = self.runs.iter().fold(0_u64, |sum, run| sum.saturating_add(run.end - run.start));
        if pages > BATCH_PAGES || self.open_runs + self.runs.len() > MOST_OPEN_RUNS {
            return Ok(None);
        }
        let Some(bdf) = self.device(device) else {
            return Ok(None);
        };
        if !self.space.reach(&self.runs)? || !self.count_up() {
            return Ok(None);
        }
        Ok(Some(bdf))
    }

    /// What the map call at hand maps, in gfns.
    pub(super) fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// The map call at hand was played; `failed`: the policies, as bits, under which its pin failed.
    pub(super) fn opened(&mut self, bdf: Bdf, family: Family, key: u64, failed: u64) {
        self.open_runs += self.runs.len();
        let mapping = Closed { runs: self.runs.as_slice().into(), failed };
        self.open.entry((bdf, family, key)).or_default().push(mapping);
        self.space.announced(&self.runs);
    }

    /// The mapping that an unmap call gives back, the newest of its address; `None` if there is none.
    pub(super) fn unmap(&mut self, device: &str, family: Family, key: u64) -> Option<Closed> {
        let closed = self.close(device, family, key);
        match &closed {
            Some(closed) => self.count_down(&closed.runs),
            None => self.counts.unmatched_unmaps += 1,
        }
        closed
    }

    fn close(&mut self, device: &str, family: Family, key: u64) -> Option<Closed> {
        let bdf = self.known_device(device)?;
        let Entry::Occupied(mut place) = self.open.entry((bdf, family, key)) else { return None };
        let closed = place.get_mut().pop()?;
        if place.get().is_empty() {
            place.remove();
        }
        self.open_runs -= closed.runs.len();
        Some(closed)
    }

    /// An event that was understood cannot be played.
    pub(super) fn count_skipped(&mut self) {
        self.counts.skipped += 1;
    }

    /// The endpoint that stands for a device: any will do, as a DTT is for all of them. `None`: there are too many.
    fn device(&mut self, name: &str) -> Option<Bdf> {
        if let Some(bdf) = self.known_device(name) {
            return Some(bdf);
        }
        let bdf = endpoints().nth(self.devices.len())?;
        self.devices.insert(name.to_owned(), bdf);
        Some(bdf)
    }

    fn known_device(&mut self, name: &str) -> Option<Bdf> {
        match &self.last_device {
            Some((last, bdf)) if last == name => Some(*bdf),
            _ => {
                let bdf = *self.devices.get(name)?;
                self.last_device = Some((name.to_owned(), bdf));
                Some(bdf)
            }
        }
    }

    /// Counts the pages of the call at hand; not at all if one of them cannot be counted further.
    fn count_up(&mut self) -> bool {
        for (at, run) in self.runs.iter().enumerate() {
            for gfn in run.clone() {
                let count = page_count(&mut self.pages, gfn);
                if u32::from(count.unwrap_or(0)) == count_limit(CPUS) {
                    let done: Vec<_> = self.runs[..at].iter().cloned().chain(iter::once(run.start..gfn)).collect();
                    self.count_down(&done);
                    return false;
                }
                self.counts.distinct_pages += u64::from(count.is_none());
                self.counts.mapped_pages += u64::from(count.unwrap_or(0) == 0);
                *count = Some(count.unwrap_or(0) + 1);
            }
        }
        self.counts.peak_mapped_pages = self.counts.peak_mapped_pages.max(self.counts.mapped_pages);
        true
    }

    fn count_down(&mut self, runs: &[Range<u64>]) {
        for gfn in runs.iter().cloned().flatten() {
            if let Some(count) = page_count(&mut self.pages, gfn) {
                *count = count.saturating_sub(1);
                self.counts.mapped_pages -= u64::from(*count == 0);
            }
        }
    }
}

/// All endpoints that a guest can have.
pub(super) fn endpoints() -> impl Iterator<Item = Bdf> {
    (1..=MOST_DEVICES).filter_map(Bdf::new)
}

fn page_count(pages: &mut FxHashMap<u64, Box<BlockCounts>>, gfn: u64) -> &mut Option<u16> {
    let block = pages.entry(gfn / BLOCK_PAGES).or_insert_with(|| Box::new([None; BLOCK_LEN]));
    // The remainder is an index of the array.
    &mut block[usize::try_from(gfn % BLOCK_PAGES).unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(page: u64, pages: u64) -> Segment {
        Segment::new(page * PAGE_SIZE + 8, pages * PAGE_SIZE - 8).unwrap()
    }

    fn map(drivers: &mut Drivers, device: &str, key: u64, segments: &[Segment]) -> bool {
        let Some(bdf) = drivers.map(device, segments).unwrap() else {
            return false;
        };
        drivers.opened(bdf, Family::Single, key, 0);
        true
    }

    fn figures(drivers: &Drivers) -> [u64; 4] {
        let counts = drivers.counts();
        [counts.distinct_pages, counts.peak_mapped_pages, counts.mapped_pages, counts.unmatched_unmaps]
    }

    #[test]
    fn pages_are_counted_over_devices_and_mappings_closed_newest_first() {
        let mut drivers = Drivers::new(1);
        assert!(map(&mut drivers, "a", 1, &[segment(0, 2)]));
        assert!(map(&mut drivers, "b", 1, &[segment(1, 2)]));
        assert!(map(&mut drivers, "a", 1, &[segment(600, 1), segment(600, 1)]));
        assert_eq!(figures(&drivers), [4, 4, 4, 0]);
        assert_eq!(*drivers.unmap("a", Family::Single, 1).unwrap().runs, [600..601, 600..601]);
        assert_eq!(*drivers.unmap("a", Family::Single, 1).unwrap().runs, [0..2]);
        assert_eq!(figures(&drivers), [4, 4, 2, 0]);
        for (device, family, key) in
            [("a", Family::Single, 1), ("b", Family::Coherent, 1), ("b", Family::Single, 2), ("c", Family::Single, 1)]
        {
            assert!(drivers.unmap(device, family, key).is_none());
        }
        assert!(drivers.unmap("b", Family::Single, 1).is_some());
        assert_eq!(figures(&drivers), [4, 4, 0, 4]);
        assert_eq!(drivers.open_runs, 0);
    }

    #[test]
    fn what_no_guest_could_ask_for_is_not_played() {
        let mut drivers = Drivers::new(1);
        for bad in [
            Segment::new(RAM_END - 1, 2),
            Segment::new(u64::MAX, 1),
            Segment::new(0, RAM_END),
            Segment::new(0, BATCH_PAGES * PAGE_SIZE + 1),
        ] {
            assert!(!map(&mut drivers, "a", 0, &[bad.unwrap()]));
        }
        assert_eq!(figures(&drivers), [0; 4]);
        assert!(map(&mut drivers, "a", 0, &[segment(0, BATCH_PAGES)]));
    }

    #[test]
    fn a_page_is_counted_as_far_as_a_guest_counts() {
        let mut drivers = Drivers::new(1);
        let limit = u64::from(count_limit(CPUS));
        for key in 0..limit {
            assert!(map(&mut drivers, "a", key, &[segment(5, 1)]));
        }
        assert!(!map(&mut drivers, "a", limit, &[segment(9, 1), segment(4, 2)]));
        assert_eq!(drivers.counts().mapped_pages, 1, "nothing is left of the call that failed");
        assert!(drivers.unmap("a", Family::Single, 0).is_some());
        assert!(map(&mut drivers, "a", limit, &[segment(4, 2)]));
    }

    #[test]
    fn there_are_only_so_many_devices() {
        let mut drivers = Drivers::new(1);
        for n in 0..MOST_DEVICES {
            assert!(map(&mut drivers, &n.to_string(), 0, &[segment(1, 1)]));
        }
        assert!(!map(&mut drivers, "one more", 0, &[segment(1, 1)]));
        assert!(map(&mut drivers, "17", 1, &[segment(1, 1)]));
    }

    #[test]
    fn time_does_not_go_back() {
        let mut drivers = Drivers::new(1);
        for time in [5_000, 9_000, 2_000] {
            drivers.see(time);
        }
        assert_eq!((drivers.now(), drivers.span()), (Duration::from_micros(9), Duration::from_micros(4)));
    }
}
