//! Serves the slots of some vCPUs: on their doorbells, piece by piece, each in turn.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::Duration;

use coiommu_dtt::RequestWord;
use coiommu_dtt::notify::Answered;
use coiommu_pin::PinRequest;
use coiommu_pin::pinner::{Clock as _, PinResult, Step};
use coiommu_pin::request::Scratch;

use crate::machine::Machine;
use crate::tally::Did;
use crate::watch::{Doing, Post};

pub(crate) fn run(machine: &Machine, post: &Post, doorbells: &Receiver<usize>) {
    let mut scratch = Scratch::default();
    let mut requests: Vec<(usize, PinRequest)> = Vec::new();
    loop {
        post.is(Doing::WaitingForDoorbell);
        let first = if requests.is_empty() { doorbells.recv_timeout(Duration::from_millis(10)).ok() } else { None };
        for vcpu in first.into_iter().chain(doorbells.try_iter()) {
            requests.extend(take(machine, vcpu).map(|request| (vcpu, request)));
        }
        if requests.is_empty() && machine.is_closed() {
            return;
        }
        post.is(Doing::Serving);
        let mut waits = false;
        requests.retain_mut(|(vcpu, request)| match machine.pinner.step(request, &mut scratch, &machine.clock) {
            Step::More => true,
            Step::Wait => {
                waits = true;
                true
            }
            Step::Done(result) => {
                answer(machine, *vcpu, request.word(), result);
                false
            }
        });
        if waits {
            post.is(Doing::WaitingForRam);
            thread::sleep(Duration::from_micros(200));
        }
    }
}

fn take(machine: &Machine, vcpu: usize) -> Option<PinRequest> {
    let word = machine.slots().take(vcpu).unwrap().expect("a guest rings once it has asked");
    match machine.pinner.begin(word, machine.clock.now()) {
        Ok(request) => Some(request),
        Err(refusal) => {
            answer(machine, vcpu, word, PinResult::Refused(refusal));
            None
        }
    }
}

fn answer(machine: &Machine, vcpu: usize, word: RequestWord, result: PinResult) {
    let did = match result {
        PinResult::Pinned => Did::Pinned,
        PinResult::Failed => Did::Failed,
        PinResult::TimedOut => Did::TimedOut,
        PinResult::Refused(_) => Did::Refused,
    };
    machine.tally.add(did, 1);
    machine.served[vcpu].store(u8::from(result == PinResult::Pinned), Relaxed);
    assert_eq!(machine.slots().answer(vcpu, word).unwrap(), Answered::Yes);
}
