//! The thread that pins all of a guest's memory, for devices that are used by who does not count, and lets go of it.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use coiommu_dtt::PAGE_SIZE;
use coiommu_pin::MapError;
use coiommu_pin::pinner::{PinAll, PinAllError, SystemClock};

use super::gate::{Gate, Work};
use crate::serve::watch::Served;

/// How long it pins before it looks whether that is still wanted.
const STEP: Duration = Duration::from_millis(20);
/// How long it waits for memory that is being taken from the guest.
const MOMENT: Duration = Duration::from_millis(10);

/// The thread, which ends when the guest's VMM [goes](Gate::guest_goes).
#[derive(Debug)]
pub(crate) struct AllPinner(JoinHandle<()>);

impl AllPinner {
    /// For a guest whose VMM has come.
    pub(crate) fn spawn(served: Arc<Served>, gate: Arc<Gate>) -> io::Result<Self> {
        let run = move || {
            let ends = Ends(&gate);
            work(&served, &gate);
            drop(ends);
        };
        Ok(Self(thread::Builder::new().name("coiommu-pin-all".into()).spawn(run)?))
    }

    /// Waits for its end.
    pub(crate) fn join(self) {
        if self.0.join().is_err() {
            tracing::error!("the thread that pins all memory ended in a panic");
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

fn work(served: &Served, gate: &Gate) {
    let pinner = served.workers.service().pinner();
    let mut last = None;
    loop {
        match gate.next_work(last) {
            Work::Pin(round) => pin(served, gate, round),
            Work::Look => {
                gate.uncounted().into_iter().filter(|bdf| pinner.has_asked(*bdf)).for_each(|bdf| gate.has_asked(bdf));
                last = Some(Instant::now());
            }
            Work::Release => {
                pinner.let_all_age();
                if pinner.release_idle() == 0 {
                    tracing::info!("what was pinned for a guest without the driver is let go");
                    gate.released();
                }
                last = Some(Instant::now());
            }
            Work::End => return,
        }
    }
}

/// Pins all RAM, for as long as that is wanted.
fn pin(served: &Served, gate: &Gate, round: u64) {
    let pinner = served.workers.service().pinner();
    let start = Instant::now();
    pinner.keep_all();
    let mut next = 0;
    while gate.is_current(round) {
        match pinner.pin_all(next, &SystemClock, STEP) {
            PinAll::More(after) => next = after,
            PinAll::Held(at) => {
                next = at;
                thread::sleep(MOMENT);
            }
            PinAll::Done => {
                if gate.pinned(round, true) {
                    let mib = pinner.pinned_pages().saturating_mul(PAGE_SIZE) >> 20;
                    let took = start.elapsed().as_millis();
                    tracing::info!(
                        "all of the guest's memory is pinned, {mib} MiB in {took} ms, for devices that are started without \
                         its driver"
                    );
                }
                return;
            }
            PinAll::Failed(error) => {
                // Before what is mapped goes, no device does DMA.
                gate.pinned(round, false);
                pinner.give_up_all();
                tracing::error!(
                    "devices that are started without the guest's driver do no DMA, as not all memory can be pinned: {error}; \
                     {}",
                    remedy(&error)
                );
                return;
            }
        }
    }
}

fn remedy(error: &PinAllError) -> &'static str {
    match error.error {
        MapError::NoMemory => "raise the quota of --policy, or the limit of locked memory (ulimit -l, LimitMEMLOCK=)",
        MapError::NoEntries => "raise dma_entry_limit of vfio_iommu_type1",
        _ => "dmesg may say why",
    }
}
