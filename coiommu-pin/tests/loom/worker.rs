//! Workers: what is asked in a slot is done when the slot says so, whoever else is at work, and everything is answered.

use std::mem;
use std::sync::atomic::Ordering::{AcqRel, Acquire};

use coiommu_dtt::memory::Word64;
use coiommu_pin::NotifyMap;
use coiommu_pin::worker::{Polled, SlotServer};
use loom::thread;

use crate::check::check;
use crate::host::{Host, NOW, together};

/// Serves the slots of some vCPUs until the service is closed.
fn serve(host: &Host, vcpus: &[usize]) {
    let mut server = SlotServer::new(host.service.clone(), vcpus.iter().copied()).unwrap();
    while server.poll_once(&NOW) != Polled::Closed {
        thread::yield_now();
    }
    // It would answer what it missed.
    mem::forget(server);
}

fn wait_for_answer(host: &Host, vcpu: usize) {
    while !host.service.notify().slots().is_answered(vcpu).unwrap() {
        thread::yield_now();
    }
}

/// The guest maps a page by asking in its slot, has a device use it, and unmaps it.
fn dma_by_slot(host: &Host, vcpu: usize, page: u64) {
    let ask = |missing: &[u64]| {
        host.service.notify().slots().post(vcpu, host.word(missing)).unwrap();
        wait_for_answer(host, vcpu);
    };
    assert!(host.map_by(&[page], ask), "nothing refuses it");
    host.iommu.access(page);
    host.unmap(&[page]);
}

#[test]
fn what_is_answered_is_pinned() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4);
        let guest = |host: &Host| {
            dma_by_slot(host, 0, 0);
            host.service.close();
        };
        together(host, [|host| serve(host, &[0]), guest]);
    });
}

/// A tick takes the page while it is asked for.
#[test]
fn what_is_answered_is_pinned_whatever_is_taken_back() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4).with_idle(0..1);
        let guest = |host: &Host| {
            dma_by_slot(host, 0, 0);
            host.service.close();
        };
        together(host, [|host| serve(host, &[0]), |host| _ = host.pinner().tick(None), guest]);
    });
}

/// A guest that gave up on a request and put another in its place gets an answer to that.
#[test]
fn a_request_in_the_place_of_another_is_answered() {
    check(None, || {
        let host = Host::new("", &[0, 1]).with_ram(0..4);
        let guest = |host: &Host| {
            let ([first, second], slots) = ([0, 1].map(|page| host.word(&[page])), host.service.notify());
            slots.slots().post(0, first).unwrap();
            // A guest just writes. But loom does not know that what it writes comes after an answer that it overwrites.
            if slots[0].compare_exchange(first.raw(), second.raw(), AcqRel, Acquire).is_err() {
                slots.slots().post(0, second).unwrap();
            }
            wait_for_answer(host, 0);
            assert!(host.is_pinned(1));
            host.service.close();
        };
        together(host, [|host| serve(host, &[0]), guest]);
    });
}

/// Whatever is asked before the end is answered by it, whether the service was all right until then or not.
fn ask_and_close(is_refusing: bool) {
    check(None, move || {
        let host = Host::new("", &[0]).with_ram(0..4);
        if is_refusing {
            host.service.refuse();
        }
        let guest = |host: &Host| {
            host.service.notify().slots().post(0, host.word(&[0])).unwrap();
            host.service.close();
            wait_for_answer(host, 0);
        };
        together(host, [|host| serve(host, &[0]), guest]);
    });
}

#[test]
fn what_is_asked_as_the_service_closes_is_answered() {
    ask_and_close(false);
}

#[test]
fn what_is_asked_as_a_service_that_refuses_closes_is_answered() {
    ask_and_close(true);
}
