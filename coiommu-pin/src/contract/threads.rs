//! Calls from many threads, and devices that do not wait for any of them. Under Miri, which is slow and looks for races by
//! itself, in few rounds.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::field::{Field, PAGES, check};
use super::{Bed, Device, Skip};
use crate::MapError;

pub(super) fn keep_out_of_each_others_ranges(bed: &dyn Bed) -> Result<(), Skip> {
    const ROUNDS: u64 = if cfg!(miri) { 10 } else { 1000 };
    let field = Field::new(bed);
    let start = Barrier::new(2);
    let work = |first: u64| {
        start.wait();
        for round in 0..ROUNDS {
            let pages = 1 + round % 3;
            for at in [first, first + 3] {
                check("a range of one's own can be mapped", field.map(at, pages), Ok(()));
            }
            // The other's turn, also where there is one processor only.
            thread::yield_now();
            let again = field.map(first, 1);
            check("a map of what one has mapped fails with `Exists`", again, Err(MapError::Exists));
            let bytes = field.unmap(first, PAGES / 2);
            check("unmap returns the bytes that one has mapped", bytes, Ok(2 * pages * field.page));
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| work(0));
        scope.spawn(|| work(PAGES / 2));
    });
    field.holds_exactly(&[], "threads leave nothing behind");
    Ok(())
}

pub(super) fn that_race_have_one_winner(bed: &dyn Bed) -> Result<(), Skip> {
    const ROUNDS: u64 = if cfg!(miri) { 10 } else { 200 };
    let field = Field::new(bed);
    for _ in 0..ROUNDS {
        let start = Barrier::new(2);
        let map = |at: u64| {
            start.wait();
            field.map(at, 2)
        };
        // The second range lies half over the first.
        let results = thread::scope(|scope| {
            let other = scope.spawn(|| map(5));
            [map(4), other.join().expect("no panic while mapping")]
        });
        let as_it_should = results.contains(&Ok(())) && results.contains(&Err(MapError::Exists));
        check("one thread wins the race for a range, the other gets `Exists`", as_it_should, true);
        check("the winner's mapping is there", field.unmap(0, PAGES), Ok(2 * field.page));
    }
    field.holds_exactly(&[], "the loser of a race leaves nothing behind");
    Ok(())
}

pub(super) fn see_no_access_after_unmap(bed: &dyn Bed) -> Result<(), Skip> {
    const ROUNDS: u64 = if cfg!(miri) { 5 } else { 20 };
    const TURNS: u64 = 5;
    const PATIENCE: Duration = Duration::from_secs(10);
    let field = Field::new(bed);
    let device = field.device()?;
    let written = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        scope.spawn(|| keep_writing(device, field.iova(0), &written, &stop));
        for _ in 0..ROUNDS {
            check("whole pages can be mapped", field.map(0, 1), Ok(()));
            let (before, since) = (written.load(Ordering::SeqCst), Instant::now());
            while written.load(Ordering::SeqCst) == before {
                check("a device writes what is mapped (within 10 s)", since.elapsed() < PATIENCE, true);
                thread::yield_now();
            }
            check("unmap returns the bytes that were mapped", field.unmap(0, 1), Ok(field.page));
            field.byte(0).store(0, Ordering::SeqCst);
            // The device's turn. What it writes stays.
            (0..TURNS).for_each(|_| thread::yield_now());
            let byte = field.byte(0).load(Ordering::SeqCst);
            check("no device access comes after unmap has returned", byte, 0);
        }
    });
    field.holds_exactly(&[], "unmap takes a mapping in use away");
    Ok(())
}

/// A device that writes without end and counts the writes that went through.
fn keep_writing(device: &dyn Device, iova: u64, written: &AtomicU64, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        if device.write(iova, 0xa5) {
            written.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Ends the device also where a check panics: the scope waits for it.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
