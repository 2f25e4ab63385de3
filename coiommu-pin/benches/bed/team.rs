//! Threads that work in blocks of their own, on one pinner.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{AcqRel, Acquire};
use std::thread;
use std::time::{Duration, Instant};

use coiommu_dtt::{Gpa, PAGE_SIZE};
use coiommu_pin::Pinner;
use coiommu_pin::pinner::UnpinStep;

use super::contest::Contender;
use super::nothing::Nothing;
use super::ours::{self, Worker};
use super::{Batch, Bed, PINNED, Space};

/// Blocks that nobody else works in: what to pin there, and where they are.
pub(crate) struct Share {
    pub(crate) batches: Vec<Batch>,
    pub(crate) gfns: Range<u64>,
}

/// What is timed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Job {
    Pin,
    /// On demand, range by range.
    Unpin,
}

/// Does the same work, whatever the number of threads.
pub(crate) struct Team {
    bed: &'static Bed,
    shares: &'static [Share],
    threads: usize,
    job: Job,
    pinner: Pinner<Space>,
    took: Duration,
}

impl Team {
    pub(crate) fn new(bed: &'static Bed, shares: &'static [Share], threads: usize, job: Job) -> Self {
        let pinner = ours::pinner(bed, Arc::new(Nothing), "extent=run");
        Self { bed, shares, threads, job, pinner, took: Duration::ZERO }
    }

    fn batches(&self) -> impl Iterator<Item = &'static Batch> {
        self.shares.iter().flat_map(|share| &share.batches)
    }

    fn pages(&self) -> u64 {
        self.batches().map(|batch| batch.gfns.len() as u64).sum()
    }

    /// One thread's part. It begins when all are there, and tells from when to when it worked.
    fn work_through(&self, shares: &[Share], here: &AtomicUsize) -> (Instant, Instant) {
        let mut worker = Worker::default();
        here.fetch_add(1, AcqRel);
        while here.load(Acquire) < self.threads {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        for share in shares {
            match self.job {
                Job::Pin => share.batches.iter().for_each(|batch| worker.pin(&self.pinner, batch.word)),
                Job::Unpin => unpin(&self.pinner, &share.gfns, &worker),
            }
        }
        (start, Instant::now())
    }
}

impl Contender for Team {
    fn prepare(&mut self) {
        if self.job == Job::Unpin {
            let mut worker = Worker::default();
            self.batches().for_each(|batch| worker.pin(&self.pinner, batch.word));
        }
    }

    fn work(&mut self) {
        let (here, team) = (&AtomicUsize::new(0), &*self);
        let times: Vec<_> = thread::scope(|scope| {
            let each = team.shares.len() / team.threads;
            let part = |shares| scope.spawn(move || team.work_through(shares, here));
            let threads: Vec<_> = team.shares.chunks(each).map(part).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        let start = times.iter().map(|(start, _)| *start).min();
        let end = times.iter().map(|(_, end)| *end).max();
        self.took = end.zip(start).map(|(end, start)| end - start).expect("a thread at least");
    }

    fn finish(&mut self) {
        let (pages, entry) = if self.job == Job::Pin { (self.pages(), PINNED) } else { (0, 0) };
        assert_eq!(self.pinner.pinned_pages(), pages);
        self.batches().for_each(|batch| self.bed.check(batch.gfns.iter().copied(), entry));
        ours::empty(&self.pinner, self.bed);
        self.batches().for_each(|batch| self.bed.clear(batch));
    }

    /// From when the first thread begins until the last is done, by the clock on the wall.
    fn time(&mut self) -> Duration {
        self.prepare();
        self.work();
        self.finish();
        self.took
    }
}

fn unpin(pinner: &Pinner<Space>, gfns: &Range<u64>, worker: &Worker) {
    let bytes = (gfns.end - gfns.start) * PAGE_SIZE;
    let mut unpin = pinner.begin_unpin(Gpa::new(gfns.start * PAGE_SIZE), bytes, worker.clock());
    loop {
        unpin = match pinner.step_unpin(unpin, worker.clock()) {
            UnpinStep::More(unpin) => unpin,
            UnpinStep::Done(report, _) if report.may_be_taken() => return,
            other => panic!("{other:?}"),
        };
    }
}
