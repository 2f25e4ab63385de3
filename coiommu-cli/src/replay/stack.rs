//! One policy's stack: the guest's side of the DTT, the pinner, and an IOMMU in software, in virtual time.
//!
//! After each map and before each unmap, the device looks whether it reaches every page. If it does not, that is an
//! error of ours, and counted as a fault.

use std::cell::Cell;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use coiommu_dtt::guest::{GuestDtt, TablePages, write_batch};
use coiommu_dtt::leaf::Mapped;
use coiommu_dtt::{Bdf, Gfn, Gpa, LeafTable, Levels, PAGE_SIZE, RequestWord};
use coiommu_pin::pinner::TickReport;
use coiommu_pin::request::Scratch;
use coiommu_pin::stats::Counters;
use coiommu_pin::{DmaMapper, Pinner, PinnerConfig, Policy, TableSpace};
use coiommu_vfio::{Access, SoftIommu};
use vm_memory::GuestMemoryMmap;

use super::driver::{CPUS, endpoints};
use super::meter::Meter;
use super::space::{Space, TableArea};

/// Tables of four levels reach far beyond any RAM here.
const LEVELS: u64 = 4;

/// A guest with one policy.
#[derive(Debug)]
pub(super) struct Stack {
    memory: Arc<GuestMemoryMmap>,
    batch: Gpa,
    pages: BumpPages,
    guest: GuestDtt,
    iommu: Arc<SoftIommu>,
    pinner: Pinner<Arc<GuestMemoryMmap>>,
    scratch: Scratch,
    /// Pages of the call at hand that are not pinned.
    missing: Vec<Gfn>,
    now: Duration,
    ticks: Option<Ticks>,
    pinned: Meter,
    peak_mappings: u64,
    requests: u64,
    failed_pins: u64,
    faults: u64,
}

/// When the pinner looks for idle pages.
#[derive(Debug)]
struct Ticks {
    interval: Duration,
    next: Option<Duration>,
    /// Rounds in a row, since the guest last did something, that found nothing to do.
    fruitless: u32,
    /// After how many of them every block was looked at, those that rest too.
    all_looked_at: u32,
}

/// Pages for tables, one after the other.
#[derive(Debug)]
struct BumpPages {
    next: Cell<u64>,
    end: u64,
}

impl TablePages for BumpPages {
    fn alloc(&self) -> Option<Gpa> {
        let page = self.next.get();
        self.next.set(page + PAGE_SIZE);
        (page < self.end).then_some(Gpa::new(page))
    }

    fn free(&self, _page: Gpa) {}
}

impl Stack {
    /// A guest that has just told its device where its table is. `curve`: whether to keep the curve of pinned pages.
    ///
    /// # Errors
    ///
    /// No memory for it.
    pub(super) fn new(policy: Policy, space: &Space, curve: bool) -> anyhow::Result<Self> {
        let TableArea { memory, batch, tables } = space.tables()?;
        let memory = Arc::new(memory);
        let pages = BumpPages { next: Cell::new(tables.start), end: tables.end };
        let guest = GuestDtt::new(&*memory, &pages, Levels::new(LEVELS)?, CPUS)?;
        let iommu = Arc::new(SoftIommu::new());
        let ticks = policy.tick_interval().map(|interval| Ticks {
            interval,
            next: None,
            fruitless: 0,
            all_looked_at: policy.unpin_gen_threshold.saturating_add(1),
        });
        let config = PinnerConfig::new(policy, endpoints().collect());
        let pinner = Pinner::new(Arc::clone(&memory), Arc::clone(&iommu) as Arc<dyn DmaMapper>, config)?;
        pinner.activate(guest.dtt().root(), LEVELS)?;
        Ok(Self {
            memory,
            batch: Gpa::new(batch.0),
            pages,
            guest,
            iommu,
            pinner,
            scratch: Scratch::default(),
            missing: Vec::new(),
            now: Duration::ZERO,
            ticks,
            pinned: Meter::new(curve),
            peak_mappings: 0,
            requests: 0,
            failed_pins: 0,
            faults: 0,
        })
    }

    /// Time comes to `now`; ticks that are due by then take place.
    pub(super) fn advance(&mut self, now: Duration) {
        if let Some(ticks) = &mut self.ticks {
            let mut next = *ticks.next.get_or_insert(now.saturating_add(ticks.interval));
            while next <= now {
                if ticks.fruitless >= ticks.all_looked_at {
                    // Until the guest does something, no tick finds anything: they only count.
                    next = ticks.skip(next, now, &self.pinner);
                    break;
                }
                self.pinned.advance(next);
                let report = self.pinner.tick(self.pinner.policy().unpin_limit.map(NonZeroU64::get));
                self.pinned.set(self.pinner.pinned_pages());
                ticks.note(report);
                next = next.saturating_add(ticks.interval);
            }
            ticks.next = Some(next);
        }
        self.now = now;
        self.pinned.advance(now);
    }

    /// The guest does something: ticks may find something again.
    fn act(&mut self) {
        if let Some(ticks) = &mut self.ticks {
            ticks.fruitless = 0;
        }
    }

    /// The guest maps some runs of gfns for a device; false if it could not, as a pin failed. The RAM that `space`
    /// added for them is there from now on.
    ///
    /// # Errors
    ///
    /// What cannot go wrong did: the guest's own table, or RAM that is refused.
    pub(super) fn map(&mut self, bdf: Bdf, runs: &[Range<u64>], space: &Space) -> anyhow::Result<bool> {
        for region in space.added() {
            self.pinner.add_region(region?)?;
        }
        self.act();
        self.count(runs)?;
        let pinned = self.missing.is_empty() || self.request(bdf)?;
        if pinned {
            self.check(runs);
        } else {
            self.failed_pins += 1;
            self.uncount(runs)?;
        }
        self.pinned.set(self.pinner.pinned_pages());
        self.peak_mappings = self.peak_mappings.max(self.pinner.mappings());
        Ok(pinned)
    }

    /// The guest gives back what it mapped.
    ///
    /// # Errors
    ///
    /// The guest's table does not have it.
    pub(super) fn unmap(&mut self, runs: &[Range<u64>]) -> anyhow::Result<()> {
        self.act();
        self.check(runs);
        self.uncount(runs)
    }

    /// Counts each page, and notes those that are not pinned.
    fn count(&mut self, runs: &[Range<u64>]) -> anyhow::Result<()> {
        let mut missing = std::mem::take(&mut self.missing);
        missing.clear();
        for gfns in runs.iter().flat_map(by_leaf_table) {
            let table = self.table(&gfns)?;
            for gfn in gfns.filter_map(Gfn::new) {
                if table.leaf(gfn).guest_map(self.guest.count_limit())? == Mapped::NeedsPin {
                    missing.push(gfn);
                }
            }
        }
        self.missing = missing;
        Ok(())
    }

    fn uncount(&self, runs: &[Range<u64>]) -> anyhow::Result<()> {
        for gfns in runs.iter().flat_map(by_leaf_table) {
            let table = self.table(&gfns)?;
            for gfn in gfns.filter_map(Gfn::new) {
                table.leaf(gfn).guest_unmap()?;
            }
        }
        Ok(())
    }

    fn table(&self, gfns: &Range<u64>) -> anyhow::Result<LeafTable<'_, std::sync::atomic::AtomicU32>> {
        let first = Gfn::new(gfns.start).context("a gfn beyond RAM")?;
        Ok(self.guest.leaf_table(&*self.memory, &self.pages, first)?)
    }

    /// Asks for the pages that are not pinned; whether all of them are now.
    fn request(&mut self, bdf: Bdf) -> anyhow::Result<bool> {
        self.requests += 1;
        let single = match *self.missing {
            [gfn] => RequestWord::page(gfn, bdf),
            _ => None,
        };
        let word = match single {
            Some(word) => word,
            None => write_batch(&*self.memory, self.batch, bdf, &self.missing)?,
        };
        // The result is the device's business; a guest looks at its table.
        let _result = self.pinner.pin(word, &mut self.scratch, &self.now);
        for &gfn in &self.missing {
            if !self.guest.is_pinned(&*self.memory, gfn)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The device looks whether it reaches each page.
    fn check(&mut self, runs: &[Range<u64>]) {
        for gfn in runs.iter().cloned().flatten() {
            self.faults += u64::from(self.iommu.translate(gfn * PAGE_SIZE, Access::Write).is_err());
        }
    }

    pub(super) const fn policy(&self) -> &Policy {
        self.pinner.policy()
    }

    pub(super) const fn pinned(&self) -> &Meter {
        &self.pinned
    }

    pub(super) const fn peak_mappings(&self) -> u64 {
        self.peak_mappings
    }

    pub(super) const fn requests(&self) -> u64 {
        self.requests
    }

    pub(super) const fn failed_pins(&self) -> u64 {
        self.failed_pins
    }

    pub(super) const fn faults(&self) -> u64 {
        self.faults
    }

    pub(super) fn counters(&self) -> Counters {
        self.pinner.counters()
    }
}

impl Ticks {
    fn note(&mut self, report: TickReport) {
        let found_nothing = report.full_round && report.unpinned_pages == 0 && report.aged_pages == 0;
        self.fruitless = match found_nothing {
            false => 0,
            // Every block was looked at.
            true if report.resting == 0 => self.all_looked_at,
            true => self.fruitless.saturating_add(1),
        };
    }

    /// Passes over the ticks from `next` to `now`; when the one after is due.
    fn skip<S: TableSpace>(&self, next: Duration, now: Duration, pinner: &Pinner<S>) -> Duration {
        let interval = self.interval.as_nanos();
        let skipped = now.saturating_sub(next).as_nanos() / interval + 1;
        // A pinner counts rounds in 32 bits, wrapping.
        pinner.skip_rounds(u32::try_from(skipped & u128::from(u32::MAX)).unwrap_or(0));
        let ahead = skipped.saturating_mul(interval);
        let seconds = u64::try_from(ahead / 1_000_000_000).unwrap_or(u64::MAX);
        let nanoseconds = u32::try_from(ahead % 1_000_000_000).unwrap_or(0);
        next.saturating_add(Duration::new(seconds, nanoseconds))
    }
}

/// A run of gfns in pieces that each lie in one leaf table.
fn by_leaf_table(run: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    const LEAVES: u64 = coiommu_dtt::geometry::LEAF_ENTRIES as u64;
    let run = run.clone();
    (run.start / LEAVES..run.end.div_ceil(LEAVES))
        .map(move |table| run.start.max(table * LEAVES)..run.end.min((table + 1) * LEAVES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_cut_where_leaf_tables_end() {
        let pieces = |run: Range<u64>| by_leaf_table(&run).collect::<Vec<_>>();
        assert_eq!(pieces(1000..3000), [1000..1024, 1024..2048, 2048..3000]);
        assert_eq!(pieces(1024..2048).len(), 1);
    }

    fn stack(policy: &str, space: &Space) -> Stack {
        Stack::new(policy.parse().unwrap(), space, false).unwrap()
    }

    #[test]
    fn a_page_that_stays_idle_is_unpinned_after_two_ticks() {
        let mut space = Space::new(1);
        let mut stack = stack("unpin_policy=lru,unpin_interval=1", &space);
        let (bdf, runs) = (Bdf::new(1).unwrap(), [Range { start: 7, end: 9 }]);
        let at = Duration::from_millis;
        stack.advance(at(0));
        space.reach(&runs).unwrap();
        assert!(stack.map(bdf, &runs, &space).unwrap());
        stack.unmap(&runs).unwrap();
        stack.advance(at(1999));
        assert_eq!(stack.pinner.pinned_pages(), 2, "the first tick finds the pages accessed");
        stack.advance(at(2000));
        assert_eq!(stack.pinner.pinned_pages(), 0);
        assert_eq!((stack.requests(), stack.failed_pins(), stack.faults()), (1, 0, 0));
    }

    #[test]
    fn a_gap_of_years_is_passed_at_once_and_ticks_go_on_after_it() {
        let mut space = Space::new(1);
        let mut stack = stack("unpin_policy=lru,unpin_interval=0.001", &space);
        let (bdf, runs) = (Bdf::new(1).unwrap(), [Range { start: 7, end: 9 }]);
        space.reach(&runs).unwrap();
        for year in [1, 2, 500] {
            let now = Duration::from_secs(year * 31_557_600);
            stack.advance(now);
            assert!(stack.map(bdf, &runs, &space).unwrap());
            stack.unmap(&runs).unwrap();
            assert_eq!(stack.pinner.pinned_pages(), 2);
            stack.advance(now + Duration::from_millis(1));
            stack.advance(now + Duration::from_millis(2));
            assert_eq!(stack.pinner.pinned_pages(), 0, "year {year}");
            space.announced(&runs);
        }
        assert_eq!(stack.requests(), 3);
    }

    #[test]
    fn looking_at_the_clock_more_often_changes_nothing() {
        let (bdf, runs) = (Bdf::new(1).unwrap(), [Range { start: 7, end: 9 }]);
        let mean = |step: u64, rounds: u32| {
            let mut space = Space::new(1);
            let policy = format!("unpin_policy=lru,unpin_interval=1,unpin_gen_threshold={rounds}");
            let mut stack = stack(&policy, &space);
            space.reach(&runs).unwrap();
            stack.advance(Duration::from_secs(1));
            assert!(stack.map(bdf, &runs, &space).unwrap());
            for now in (2..37).step_by(usize::try_from(step).unwrap()) {
                stack.advance(Duration::from_secs(now));
            }
            stack.advance(Duration::from_millis(36_500));
            stack.unmap(&runs).unwrap();
            for now in (37..=80).step_by(usize::try_from(step).unwrap()) {
                stack.advance(Duration::from_secs(now));
            }
            stack.advance(Duration::from_secs(80));
            stack.pinned().mean()
        };
        for rounds in [0, 1, 3, 10, 1000] {
            assert_eq!(mean(1, rounds), mean(1000, rounds), "{rounds} rounds");
        }
    }

    #[test]
    fn a_map_that_does_not_fit_the_quota_fails_and_leaves_nothing_counted() {
        let mut space = Space::new(1);
        let mut stack = stack("quota=8k", &space);
        let (bdf, runs) = (Bdf::new(1).unwrap(), [Range { start: 7, end: 10 }]);
        space.reach(&runs).unwrap();
        assert!(!stack.map(bdf, &runs, &space).unwrap());
        assert_eq!((stack.failed_pins(), stack.faults()), (1, 0));
        assert!(stack.uncount(&runs).is_err(), "the guest has undone its counts");
    }

    #[test]
    fn a_page_taken_behind_our_back_is_a_fault() {
        let mut space = Space::new(1);
        let mut stack = stack("", &space);
        let (bdf, runs) = (Bdf::new(1).unwrap(), [Range { start: 7, end: 10 }]);
        space.reach(&runs).unwrap();
        assert!(stack.map(bdf, &runs, &space).unwrap());
        stack.iommu.unmap(7 * PAGE_SIZE, 3 * PAGE_SIZE).unwrap();
        stack.unmap(&runs).unwrap();
        assert_eq!(stack.faults(), 3);
    }
}
