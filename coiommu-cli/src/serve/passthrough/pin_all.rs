//! The thread that pins all of a guest's memory, for devices that are used by who does not count, and lets go of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use coiommu_dtt::PAGE_SIZE;
use coiommu_pin::MapError;
use coiommu_pin::pinner::{PinAll, PinAllError, SystemClock};

use super::gate::{Gate, Work};
use crate::serve::watch::Served;

/// How long it works before it looks whether that is still wanted.
const STEP: Duration = Duration::from_millis(20);
/// How long it waits for memory that is being taken from the guest, and when it says so.
const MOMENT: Duration = Duration::from_millis(10);
const LONG: Duration = Duration::from_secs(1);
/// What one mapping covers at most.
const EXTENT: u64 = 2 << 20;

/// The thread, which ends when the guest's VMM [goes](Gate::guest_goes).
#[derive(Debug)]
pub(crate) struct AllPinner(JoinHandle<()>);

impl AllPinner {
    /// For a guest whose VMM has come.
    pub(crate) fn spawn(served: Arc<Served>) -> io::Result<Self> {
        let run = move || {
            let ends = Ends(&served.gate);
            Worker { served: &served, said: String::new() }.run();
            drop(ends);
        };
        Ok(Self(thread::Builder::new().name("coiommu-pin-all".into()).spawn(run)?))
    }

    /// Waits for its end.
    pub(crate) fn join(self) {
        if self.0.join().is_err() {
            tracing::error!(
                "the thread that pins all memory ended in a panic: devices without the guest's driver do no DMA"
            );
        }
    }
}

/// Nobody waits for a thread that has panicked.
struct Ends<'a>(&'a Gate);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.worker_ends();
    }
}

struct Worker<'a> {
    served: &'a Served,
    /// Why it failed the last time: once is enough, while firmware moves memory around.
    said: String,
}

impl Worker<'_> {
    fn run(&mut self) {
        let gate = &self.served.gate;
        let mut last = None;
        loop {
            match gate.next_work(last) {
                Work::Pin(round) => self.pin(round),
                Work::Look => {
                    let pinner = self.served.workers.service().pinner();
                    let asked = gate.uncounted().into_iter().filter(|bdf| pinner.has_asked(*bdf));
                    asked.for_each(|bdf| gate.has_asked(bdf));
                    last = Some(Instant::now());
                }
                Work::Release => {
                    self.release();
                    last = Some(Instant::now());
                }
                Work::End => return,
            }
        }
    }

    /// Pins all RAM, for as long as that is wanted.
    fn pin(&mut self, round: u64) {
        let (gate, pinner, start) = (&self.served.gate, self.served.workers.service().pinner(), Instant::now());
        if let Some(why) = self.obstacle() {
            gate.pinned(round, false);
            return self.say(why);
        }
        pinner.keep_all();
        let (mut next, mut is_held, mut has_said) = (0, false, false);
        while gate.is_current(round) {
            match pinner.pin_all(next, &SystemClock, STEP) {
                PinAll::More(after) => next = after,
                PinAll::Held(after) => (next, is_held) = (after, true),
                PinAll::Done if is_held => {
                    (next, is_held) = (0, false);
                    if start.elapsed() > LONG && !has_said {
                        tracing::warn!("devices wait for memory that is held through the control socket: resume it");
                        has_said = true;
                    }
                    thread::sleep(MOMENT);
                }
                PinAll::Done => {
                    if gate.pinned(round, true) {
                        let mib = pinner.pinned_pages().saturating_mul(PAGE_SIZE) >> 20;
                        let took = start.elapsed().as_millis();
                        tracing::info!(
                            "all of the guest's memory is pinned, {mib} MiB in {took} ms, for devices that are started \
                             without its driver"
                        );
                    }
                    self.said.clear();
                    return;
                }
                PinAll::Failed(error) => {
                    // Before what is mapped goes, no device does DMA.
                    gate.pinned(round, false);
                    pinner.give_up_all();
                    return self.say(format!("{error}; {}", remedy(&error)));
                }
                // Somebody drains: what is wanted then is another time's.
                PinAll::Over => return,
            }
        }
    }

    /// What is known beforehand to keep all RAM from being pinned: to begin would take the room from those that ask.
    fn obstacle(&self) -> Option<String> {
        let (pinner, ram) = (self.served.workers.service().pinner(), self.served.ram.load(Relaxed));
        if ram == 0 {
            return Some("its VMM has told of none".to_owned());
        }
        if let Some(quota) = pinner.policy().quota.filter(|quota| *quota < ram) {
            return Some(format!("it has {ram} bytes, and the quota of --policy is {quota}: raise it"));
        }
        let (needed, there) = (ram.div_ceil(EXTENT), pinner.mappings());
        let left = self.served.mapper.limits().mappings_left?.saturating_add(there);
        (left < needed).then(|| {
            format!("it takes {needed} mappings, and there are {left}: raise dma_entry_limit of vfio_iommu_type1")
        })
    }

    fn say(&mut self, why: String) {
        if self.said != why {
            tracing::error!(
                "devices that are started without the guest's driver do no DMA, as not all memory can be pinned: {why}"
            );
            self.said = why;
        }
    }

    /// Goes once over what was kept.
    fn release(&self) {
        let (gate, pinner) = (&self.served.gate, self.served.workers.service().pinner());
        pinner.let_all_age();
        let (mut next, mut left) = (Some(0), 0);
        while let Some(from) = next.filter(|_| gate.is_leaving()) {
            let released = pinner.release_idle(from, &SystemClock, STEP);
            next = released.next;
            left += released.left;
        }
        if next.is_none() && left == 0 {
            tracing::info!("what was pinned for devices without the guest's driver is let go");
            gate.released();
        }
    }
}

fn remedy(error: &PinAllError) -> &'static str {
    match error.error {
        MapError::NoMemory => "raise the limit of locked memory (ulimit -l, LimitMEMLOCK=)",
        MapError::NoEntries => "raise dma_entry_limit of vfio_iommu_type1",
        _ => "dmesg may say why",
    }
}

#[cfg(test)]
mod tests;
