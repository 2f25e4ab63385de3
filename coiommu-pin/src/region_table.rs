//! The regions that are there, each with its books, and what is remembered of those that went.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::pin_map::Books;
use crate::region::{FileIdentity, RamRegion};

/// A region and the books of what is mapped of it.
#[derive(Clone, Debug)]
pub(crate) struct Bank {
    pub(crate) region: Arc<RamRegion>,
    pub(crate) books: Arc<Books>,
}

impl Bank {
    pub(crate) fn new(region: RamRegion) -> Self {
        let books = Arc::new(Books::new(region.gfns()));
        Self { region: Arc::new(region), books }
    }
}

/// The regions that are there, and what is remembered of those that went. No two banks have a page in common.
#[derive(Debug, Default)]
pub(crate) struct Regions {
    present: BTreeMap<u64, Bank>,
    absent: Vec<AbsentRegion>,
}

/// RAM that went away.
#[derive(Debug)]
pub(crate) struct AbsentRegion {
    pub(crate) gfns: Range<u64>,
    pub(crate) identity: Option<FileIdentity>,
    /// What was mapped when it went, in gfns: the guest still sees PINNED there.
    pub(crate) extents: Vec<Range<u64>>,
    /// The whole region, as long as something of it may still be mapped.
    bank: Option<Bank>,
}

/// How many places that were RAM once are known. A guest that moves RAM around makes new ones; the oldest are forgotten.
const MOST_ABSENT: usize = 1024;

impl Regions {
    /// The region that a page is in.
    pub(crate) fn find(&self, gfn: u64) -> Option<&Bank> {
        let (_, bank) = self.present.range(..=gfn).next_back()?;
        bank.region.gfns().contains(&gfn).then_some(bank)
    }

    /// Those that have pages in a range, in ascending order.
    pub(crate) fn touching(&self, gfns: &Range<u64>) -> impl Iterator<Item = &Bank> {
        let start = gfns.start;
        let before = self.present.range(..start).next_back().map(|(_, bank)| bank);
        let before = before.filter(|bank| bank.region.gfns().end > start && !gfns.is_empty());
        let inside = start..gfns.end.max(start);
        before.into_iter().chain(self.present.range(inside).map(|(_, bank)| bank))
    }

    /// Where the first region above a page begins.
    pub(crate) fn next_start(&self, gfn: u64) -> Option<u64> {
        self.present.range(gfn.saturating_add(1)..).next().map(|(&start, _)| start)
    }

    /// Whether a page was RAM once and may be again.
    pub(crate) fn is_absent(&self, gfn: u64) -> bool {
        self.absent.iter().any(|region| region.gfns.contains(&gfn))
    }

    pub(crate) fn any_absent(&self) -> bool {
        !self.absent.is_empty()
    }

    /// How many pages of a range were mapped when their RAM went, and will be again when it returns.
    pub(crate) fn remembered(&self, gfns: &Range<u64>) -> u64 {
        let extents = self.absent.iter().flat_map(|absent| &absent.extents);
        extents.filter_map(|extent| intersection(extent, gfns)).map(|pages| pages.end - pages.start).sum()
    }

    /// All banks of which something may be mapped.
    pub(crate) fn banks(&self) -> impl Iterator<Item = &Bank> {
        self.present.values().chain(self.leaving())
    }

    /// Those that went, while something of them may still be mapped.
    pub(crate) fn leaving(&self) -> impl Iterator<Item = &Bank> {
        self.absent.iter().filter_map(|absent| absent.bank.as_ref())
    }

    /// The first books with a page at or after `from` of which something may be mapped.
    pub(crate) fn next_books(&self, from: u64) -> Option<Arc<Books>> {
        let around = self.present.range(..=from).next_back().filter(|(_, bank)| bank.region.gfns().end > from);
        let present = around.or_else(|| self.present.range(from..).next()).map(|(_, bank)| bank);
        let leaving = self.leaving().filter(|bank| bank.region.gfns().end > from);
        let next = present.into_iter().chain(leaving).min_by_key(|bank| bank.region.gfns().start);
        next.map(|bank| Arc::clone(&bank.books))
    }

    /// Enters a region and gives what was remembered of its place, cut to it. What was remembered beyond stays. Also gives
    /// what had to be forgotten for it.
    pub(crate) fn add(&mut self, bank: Bank) -> (Vec<AbsentRegion>, Vec<Range<u64>>) {
        let gfns = bank.region.gfns();
        let mut returning = Vec::new();
        let mut staying = Vec::new();
        for absent in self.absent.drain(..) {
            let [before, inside, after] = absent.cut(&gfns);
            returning.extend(inside);
            staying.extend(before.into_iter().chain(after));
        }
        self.absent = staying;
        self.present.insert(gfns.start, bank);
        (returning, self.forget_oldest())
    }

    /// Takes out the region that is exactly there; its memory is kept until [`let_go`](Self::let_go). Gives what had to be
    /// forgotten for it.
    pub(crate) fn remove(&mut self, gfns: &Range<u64>) -> Option<Vec<Range<u64>>> {
        self.present.get(&gfns.start).filter(|bank| bank.region.gfns() == *gfns)?;
        let bank = self.present.remove(&gfns.start)?;
        let identity = bank.region.file_identity();
        self.absent.push(AbsentRegion { gfns: gfns.clone(), identity, extents: Vec::new(), bank: Some(bank) });
        Some(self.forget_oldest())
    }

    /// Keeps what is remembered within bounds; what was mapped in the places that are forgotten.
    fn forget_oldest(&mut self) -> Vec<Range<u64>> {
        let mut forgotten = Vec::new();
        while self.absent.len() > MOST_ABSENT {
            let Some(oldest) = self.absent.iter().position(|absent| absent.bank.is_none()) else { break };
            forgotten.extend(self.absent.remove(oldest).extents);
        }
        forgotten
    }

    /// Remembers what was mapped in regions that went.
    pub(crate) fn remember(&mut self, extents: Vec<Range<u64>>) {
        for extent in extents {
            // The last that went are the last.
            if let Some(absent) = self.absent.iter_mut().rev().find(|absent| absent.gfns.contains(&extent.start)) {
                absent.extents.push(extent);
            }
        }
    }

    /// Nothing of a region that went is mapped any more: its memory may go.
    #[must_use = "it is dropped with no lock held"]
    pub(crate) fn let_go(&mut self, gfns: &Range<u64>) -> Option<Bank> {
        let absent = self.absent.iter_mut();
        absent.filter_map(|absent| absent.bank.take_if(|bank| bank.region.gfns() == *gfns)).last()
    }

    /// Nothing is mapped any more: the memory of all regions that went may go.
    #[must_use = "it is dropped with no lock held"]
    pub(crate) fn let_all_go(&mut self) -> Vec<Bank> {
        self.absent.iter_mut().filter_map(|absent| absent.bank.take()).collect()
    }

    /// Forgets what was mapped anywhere, and gives it; the places stay known as RAM that may return.
    pub(crate) fn forget_extents(&mut self) -> Vec<Range<u64>> {
        self.absent.iter_mut().flat_map(|absent| absent.extents.drain(..)).collect()
    }
}

impl AbsentRegion {
    /// What of it lies before, in and after a range.
    fn cut(&self, at: &Range<u64>) -> [Option<Self>; 3] {
        [0..at.start, at.clone(), at.end..u64::MAX].map(|part| {
            let gfns = intersection(&self.gfns, &part)?;
            let extents = self.extents.iter().filter_map(|extent| intersection(extent, &gfns)).collect();
            Some(Self { gfns, identity: self.identity, extents, bank: self.bank.clone() })
        })
    }
}

/// What two ranges have in common, if anything.
pub(crate) fn intersection(a: &Range<u64>, b: &Range<u64>) -> Option<Range<u64>> {
    let common = a.start.max(b.start)..a.end.min(b.end);
    (!common.is_empty()).then_some(common)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::test_region;

    fn bank(gfns: Range<u64>, origin: Option<u64>) -> Bank {
        Bank::new(test_region(gfns, origin))
    }

    #[test]
    fn a_region_is_found_by_its_pages_and_no_others() {
        let mut regions = Regions::default();
        regions.add(bank(16..32, None));
        regions.add(bank(64..65, None));
        let found = |gfn: u64| regions.find(gfn).map(|bank| bank.region.gfns());
        for gfn in [0, 15, 32, 63, 65] {
            assert_eq!(found(gfn), None);
        }
        assert_eq!(found(16), Some(16..32));
        assert_eq!(found(31), Some(16..32));
        assert_eq!(found(64), Some(64..65));
        for (range, touches) in
            [(0..16, 0), (0..17, 1), (31..40, 1), (32..64, 0), (33..100, 1), (65..70, 0), (20..65, 2), (20..20, 0)]
        {
            assert_eq!(regions.touching(&range).count(), touches, "{range:?}");
        }
        assert_eq!([0, 16, 63, 64].map(|gfn| regions.next_start(gfn)), [Some(16), Some(64), Some(64), None]);
    }

    #[test]
    fn books_come_in_ascending_order_also_those_of_regions_that_are_leaving() {
        let mut regions = Regions::default();
        for gfns in [0..10, 10..20, 30..40] {
            regions.add(bank(gfns, None));
        }
        regions.remove(&(10..20)).unwrap();
        let next = |regions: &Regions, from| regions.next_books(from).map(|books| books.gfns().start);
        let starts = [0, 9, 10, 19, 20, 39, 40].map(|from| next(&regions, from));
        assert_eq!(starts, [Some(0), Some(0), Some(10), Some(10), Some(30), Some(30), None]);
        assert!(regions.let_go(&(10..20)).is_some());
        assert_eq!(next(&regions, 10), Some(30));
    }

    #[test]
    fn what_went_is_remembered_and_comes_back_in_pieces() {
        let mut regions = Regions::default();
        regions.add(bank(0..64, Some(0)));
        assert!(regions.remove(&(0..32)).is_none(), "no region ends there");
        assert!(regions.remove(&(0..64)).is_some());
        regions.remember(vec![4..6, 30..36, 40..41]);
        assert!(regions.any_absent() && regions.is_absent(63));
        let (back, forgotten) = regions.add(bank(0..32, Some(0)));
        assert_eq!(forgotten, []);
        assert_eq!(back.len(), 1);
        assert_eq!(back[0].extents, [4..6, 30..32]);
        assert!(!regions.is_absent(31));
        let (back, _) = regions.add(bank(32..33, None));
        assert_eq!(back[0].extents.first(), Some(&(32..33)));
        let (back, _) = regions.add(bank(33..64, None));
        assert_eq!(back[0].extents, [33..36, 40..41]);
        assert!(!regions.any_absent());
    }

    #[test]
    #[cfg_attr(miri, ignore = "thousands of places, and nothing unsafe")]
    fn the_oldest_place_is_forgotten_when_there_is_no_room_for_another() {
        let mut regions = Regions::default();
        let mut go = |place: u64| {
            let gfns = 2 * place..2 * place + 1;
            regions.add(bank(gfns.clone(), None));
            let forgotten = regions.remove(&gfns).unwrap();
            assert!(regions.let_go(&gfns).is_some());
            regions.remember(vec![gfns]);
            (forgotten, regions.absent.len())
        };
        for place in 0..MOST_ABSENT {
            assert_eq!(go(place as u64), (vec![], place + 1));
        }
        let place = MOST_ABSENT as u64;
        assert_eq!(go(place), (vec![0..1], MOST_ABSENT));
        assert_eq!(go(place + 1), (vec![2..3], MOST_ABSENT));
    }

    #[test]
    #[cfg_attr(miri, ignore = "thousands of places, and nothing unsafe")]
    fn places_that_were_ram_once_are_bounded() {
        let mut regions = Regions::default();
        let mut forgotten = 0;
        // A large place that went, cut up by what comes and goes inside.
        regions.add(bank(0..1 << 20, None));
        regions.remove(&(0..1 << 20)).unwrap();
        assert!(regions.let_go(&(0..1 << 20)).is_some());
        regions.remember((0..1 << 20).step_by(100).map(|gfn| gfn..gfn + 1).collect());
        for gfn in (50..4 * MOST_ABSENT as u64).step_by(2) {
            forgotten += regions.add(bank(gfn..gfn + 1, None)).1.len();
            forgotten += regions.remove(&(gfn..gfn + 1)).unwrap().len();
            assert!(regions.let_go(&(gfn..gfn + 1)).is_some());
            assert!(regions.absent.len() <= MOST_ABSENT);
        }
        assert!(forgotten > 0);
    }
}
