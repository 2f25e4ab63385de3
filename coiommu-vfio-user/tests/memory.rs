//! How much memory a client makes a session hold, whatever it sends, and whatever it does not take.
//!
//! The allocator counts what the test's thread holds; unsafe is needed to be one.
#![allow(unsafe_code)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use coiommu_vfio_user::{Limits, Request, Session};
use common::*;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

fn count(bytes: isize) {
    // A thread that ends has no counter any more.
    let held = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        held.get()
    });
    if let Ok(held) = held {
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held)));
    }
}

// SAFETY: it is the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size.cast_signed() - layout.size().cast_signed());
        // SAFETY: as the caller promises.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The most that was held at once in a call, beyond what was held before.
fn peak(call: impl FnOnce()) -> isize {
    let before = HELD.get();
    PEAK.set(before);
    call();
    PEAK.get() - before
}

const KIB: isize = 1 << 10;

fn negotiated(limits: Limits) -> Session {
    let mut session = Session::new(limits);
    feed(&mut session, &version(), Vec::new(), usize::MAX).1.unwrap();
    sent(&mut session);
    session
}

#[test]
fn a_message_that_is_only_announced_costs_little() {
    for command in [REGION_WRITE, DMA_MAP, 99, !0] {
        for size in [17, 1 << 20, u32::MAX] {
            let mut session = negotiated(Limits::default().max_data_xfer_size(64 << 20));
            let announced = header(1, command, size, 0, 0, &[]);
            let held = peak(|| {
                feed(&mut session, &announced, Vec::new(), usize::MAX).1.unwrap();
                assert!(!session.space().is_empty());
            });
            assert!(held < 80 * KIB, "{command} {size}: {held}");
        }
    }
}

#[test]
fn a_message_that_is_skipped_costs_little_however_long_it_is() {
    let mut session = negotiated(Limits::default());
    feed(&mut session, &header(1, 99, u32::MAX, 0, 0, &[]), Vec::new(), usize::MAX).1.unwrap();
    let junk = vec![7; 1 << 20];
    let held = peak(|| {
        for _ in 0..100 {
            feed(&mut session, &junk, Vec::new(), usize::MAX).1.unwrap();
        }
    });
    assert!(held < 80 * KIB, "{held}");
}

#[test]
fn a_message_costs_no_more_than_twice_what_came() {
    let mut session = negotiated(Limits::default());
    let size = 16 + 16 + (1 << 20);
    let body = [access(0, 0, 1 << 20), vec![7; 1 << 20]].concat();
    feed(&mut session, &header(1, REGION_WRITE, size, 0, 0, &[]), Vec::new(), usize::MAX).1.unwrap();
    let half = body.len() / 2;
    let held = peak(|| assert!(feed(&mut session, &body[..half], Vec::new(), 100).1.unwrap().is_none()));
    assert!(held < 1200 * KIB, "{held}");
    let held = peak(|| drop(feed(&mut session, &body[half..], Vec::new(), 100).1.unwrap().unwrap()));
    assert!(held < 2400 * KIB, "{held}");
}

#[test]
fn a_client_that_takes_no_answers_makes_few() {
    // Errors are the shortest messages, and each has a reply.
    let errors = message(1, 99, 0, &[]).repeat(100_000);
    let mut session = negotiated(Limits::default());
    let held = peak(|| {
        let (taken, event) = feed(&mut session, &errors, Vec::new(), usize::MAX);
        assert!(taken < errors.len() && matches!(event, Ok(None)));
    });
    assert!(held < 160 * KIB, "{held}");

    // And reads the longest: one that is answered may be long, then there is no other.
    let mut session = negotiated(Limits::default());
    let reads = message(1, REGION_READ, 0, &access(0, 0, 1 << 20)).repeat(100);
    let mut at = 0;
    let held = peak(|| {
        while let (taken @ 1.., event) = feed(&mut session, &reads[at..], Vec::new(), usize::MAX) {
            at += taken;
            let Ok(Some(Request::RegionRead(_, ticket))) = event else { panic!() };
            let data = ticket.buffer();
            session.answer(ticket, Ok(data));
        }
    });
    assert!(held < 1200 * KIB, "{held}");
}

#[test]
fn capabilities_cost_little() {
    for data in ["[".repeat(4092), "[0,".repeat(1364), "{\"a\":".repeat(800), format!("[{}0]", "0,".repeat(2040))] {
        let hello = message(0, VERSION, 0, &[&[0; 4], data.as_bytes()].concat());
        let held = peak(|| {
            let mut session = Session::new(Limits::default());
            feed(&mut session, &hello, Vec::new(), usize::MAX).1.unwrap_err();
        });
        assert!(held < 300 * KIB, "{held}");
    }
    // What is not read is kept, as long as it is read.
    let data = format!(r#"{{"a":[{}0]}}"#, "0,".repeat(2030));
    let hello = message(0, VERSION, 0, &[&[0; 4], data.as_bytes()].concat());
    let held = peak(|| assert!(feed(&mut Session::new(Limits::default()), &hello, Vec::new(), usize::MAX).1.is_ok()));
    assert!(held < 300 * KIB, "{held}");
}
