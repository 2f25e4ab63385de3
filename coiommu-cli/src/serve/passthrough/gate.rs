//! Who may do DMA: the bus mastering of the devices that are passed through, which the guest wishes and the gate holds.
//!
//! A device may do DMA only while all that it may use is pinned. For a guest whose driver counts, that is what it has asked
//! for. A firmware, or a guest without the driver, counts nothing: `--without-driver` says what becomes of its wish, and
//! until when, as a driver may have been there before the one that counts.
//!
//! | the guest's table | the endpoint | the device may do DMA |
//! | --- | --- | --- |
//! | none | any | `pin-all`: while all RAM is pinned; `hold`, `refuse`: not |
//! | in use | since it is, was seen with bus mastering off, or has asked for a page | if the guest wishes |
//! | in use | otherwise: somebody may use it who does not count | `pin-all`: while all RAM is pinned; `hold`: if the guest wishes |
//!
//! No VMM that tells of RAM, or one that is going, or everything is being drained: no device may.

use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use coiommu_dtt::Bdf;
use coiommu_vfio::type1::Device;

use crate::control::{All, Passed};

/// How long a message of the VMM may wait until all RAM is pinned: VMMs give a message 5 s.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often it is looked whether an endpoint has asked.
const LOOK: Duration = Duration::from_millis(100);
/// How often what is idle is looked for, of what was pinned for nobody in particular.
const RELEASE: Duration = Duration::from_secs(1);

/// What becomes of a guest that starts a device and does not count its DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WithoutDriver {
    /// Pin all of its memory; once it is, the device may do DMA
    PinAll,
    /// Let the guest believe that the device may; it may once the driver is active
    Hold,
    /// Let the guest see that it may not
    Refuse,
}

/// A device's bus mastering.
pub(crate) trait Master: fmt::Debug + Send + Sync {
    /// Where the host has it.
    fn address(&self) -> &str;
    fn set_bus_master(&self, on: bool) -> io::Result<()>;
    fn is_bus_master(&self) -> io::Result<bool>;
    fn reset(&self) -> io::Result<()>;
}

impl Master for Device {
    fn address(&self) -> &str {
        Self::address(self)
    }

    fn set_bus_master(&self, on: bool) -> io::Result<()> {
        Self::set_bus_master(self, on)
    }

    fn is_bus_master(&self) -> io::Result<bool> {
        Self::is_bus_master(self)
    }

    fn reset(&self) -> io::Result<()> {
        Self::reset(self)
    }
}

/// A device as the gate sees it.
#[derive(Debug)]
struct Endpoint {
    device: Arc<dyn Master>,
    bdf: Bdf,
    /// What the guest has set, and sees.
    wish: bool,
    /// What the device has.
    is_on: bool,
    /// Since a table is in use, it was seen with bus mastering off, or has asked for a page: who uses it counts.
    is_counted: bool,
}

#[derive(Debug)]
struct State {
    without_driver: WithoutDriver,
    endpoints: Vec<Endpoint>,
    /// A VMM tells of RAM.
    has_guest: bool,
    /// A table is in use.
    is_active: bool,
    /// Everything is being unpinned: until that is over, wishes are noted, and no more.
    is_draining: bool,
    all: All,
    /// Which time it is that all RAM is to be pinned. What is said of another time is of no interest any more.
    round: u64,
    /// RAM has come where all was pinned: until it is pinned too, or that takes too long, devices that are on stay on, as
    /// the guest has not been told of it yet.
    has_grace: bool,
    /// There is a thread that pins.
    has_worker: bool,
    /// It is at work.
    is_busy: bool,
}

/// Holds the bus mastering of all devices of a guest.
///
/// Its one lock protects what the guest wishes and what the devices have, so that both are of one moment. It is held while
/// config space is written, as that can change both; never while anything is pinned or unpinned.
#[derive(Debug)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// How long a message of the VMM may wait.
    patience: Duration,
}

/// What is to be done, by the thread that pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Pin all RAM; the number is this time's.
    Pin(u64),
    /// See who has asked for a page.
    Look,
    /// Let go of what is idle.
    Release,
    /// Nothing more: the VMM goes.
    End,
}

impl Gate {
    /// For devices whose bus mastering is off.
    pub(crate) fn new(
        without_driver: WithoutDriver,
        devices: impl IntoIterator<Item = (Arc<dyn Master>, Bdf)>,
    ) -> Self {
        let endpoint = |(device, bdf)| Endpoint { device, bdf, wish: false, is_on: false, is_counted: false };
        let state = State {
            without_driver,
            endpoints: devices.into_iter().map(endpoint).collect(),
            has_guest: false,
            is_active: false,
            is_draining: false,
            all: All::No,
            round: 0,
            has_grace: false,
            has_worker: false,
            is_busy: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), patience: PATIENCE }
    }

    /// Whether the guest has the bus mastering of a device on, as far as it can see.
    pub(crate) fn is_wished(&self, device: usize) -> bool {
        self.lock().endpoints.get(device).is_some_and(|endpoint| endpoint.wish)
    }

    /// The guest switches the bus mastering of a device on or off. When this returns, the device has it off, or, if that
    /// is to be and takes no more than some seconds, on.
    pub(crate) fn wish(&self, device: usize, on: bool) {
        let mut state = self.lock();
        let (is_active, without_driver, has_guest) = (state.is_active, state.without_driver, state.has_guest);
        let Some(endpoint) = state.endpoints.get_mut(device) else { return };
        let (before, address) = (endpoint.wish, endpoint.device.address());
        if on && !has_guest {
            tracing::warn!("{address} is not started: its VMM has no CoIOMMU device, which tells what is memory");
            return;
        }
        if on && !is_active && without_driver == WithoutDriver::Refuse {
            tracing::info!("{address} is not started: the guest's driver is not active (--without-driver refuse)");
            return;
        }
        endpoint.wish = on;
        if !on {
            endpoint.is_counted = is_active;
        } else if !before && state.all == All::Failed {
            // There may be room by now.
            state.all = All::No;
        }
        self.settle(&mut state);
        if on && !before {
            let is_open = |state: &State| state.endpoints.get(device).is_none_or(|endpoint| endpoint.is_on);
            drop(self.wait_for(state, self.patience, |state| state.all != All::Pinning || is_open(state)));
        }
    }

    /// Writes to a device's config space, where its bus mastering, which is given, stays as it is.
    pub(crate) fn write_config<T>(&self, device: usize, write: impl FnOnce(bool) -> T) -> T {
        let mut state = self.lock();
        let Some(endpoint) = state.endpoints.get_mut(device) else { return write(false) };
        let written = write(endpoint.is_on);
        // A device that comes back from sleep, or from a reset of its own, may have it as it was then.
        if endpoint.device.is_bus_master().is_ok_and(|is_on| is_on != endpoint.is_on) {
            endpoint.switch(endpoint.is_on);
        }
        written
    }

    /// A VMM tells of RAM from now on, and there is a thread that pins.
    pub(crate) fn guest_comes(&self) {
        let mut state = self.lock();
        (state.has_guest, state.has_worker) = (true, true);
        self.settle(&mut state);
    }

    /// The VMM goes. When this returns, no device does DMA, and nothing is being pinned for those that nobody counts for.
    pub(crate) fn guest_goes(&self) {
        self.close(|state| state.has_guest = false);
    }

    /// Everything is about to be drained. When this returns, no device does DMA, as the guest sees, and nothing is being
    /// pinned for those that nobody counts for; and so it stays until what is returned is dropped, with the drain over.
    pub(crate) fn drain(&self) -> Draining<'_> {
        self.close(|state| state.is_draining = true);
        Draining(self)
    }

    fn close(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        state.is_active = false;
        state.all = All::No;
        state.has_grace = false;
        state.round += 1;
        for endpoint in &mut state.endpoints {
            endpoint.wish = false;
            endpoint.is_counted = false;
            // The VMM has the device open, and may have switched it on behind our back.
            endpoint.stop();
        }
        self.settle(&mut state);
        // It takes steps, and looks after each whether it is still wanted.
        let idle = self.changed.wait_while(state, |state| state.is_busy);
        drop(idle.unwrap_or_else(PoisonError::into_inner));
    }

    /// A table is in use from now on.
    pub(crate) fn activated(&self) {
        let mut state = self.lock();
        state.is_active = true;
        for endpoint in &mut state.endpoints {
            endpoint.is_counted = !endpoint.wish;
        }
        self.settle(&mut state);
    }

    /// RAM has come, of which the guest is not told before this returns. Where a device may reach all RAM, this waits until it
    /// is pinned, for what is left of some seconds since the VMM's message came; the device is held then, until it is.
    pub(crate) fn ram_has_come(&self, message: Instant) {
        let mut state = self.lock();
        if state.needs_all() || matches!(state.all, All::Pinning | All::Pinned) {
            state.has_grace |= state.all == All::Pinned;
            state.all = All::Pinning;
            state.round += 1;
        }
        self.settle(&mut state);
        let left = self.patience.saturating_sub(message.elapsed());
        let mut state = self.wait_for(state, left, |state| !state.has_grace || !state.needs_all());
        if std::mem::take(&mut state.has_grace) && state.needs_all() {
            tracing::warn!("memory that has come is not pinned yet: no device does DMA until it is");
            self.settle(&mut state);
        }
    }

    /// What the thread that pins is to do next; `last` is when it was last told to look or to release.
    pub(crate) fn next_work(&self, last: Option<Instant>) -> Work {
        let mut state = self.lock();
        state.is_busy = false;
        self.changed.notify_all();
        loop {
            let (work, every) = match state.all {
                _ if !state.has_guest => return Work::End,
                All::Pinning => {
                    state.is_busy = true;
                    return Work::Pin(state.round);
                }
                _ if state.is_active && state.needs_all() => (Work::Look, LOOK),
                All::Leaving => (Work::Release, RELEASE),
                All::No | All::Pinned | All::Failed => {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
            };
            let left = last.map_or(Duration::ZERO, |last| every.saturating_sub(last.elapsed()));
            if left.is_zero() {
                state.is_busy = true;
                return work;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether all RAM is still to be pinned this time.
    pub(crate) fn is_current(&self, round: u64) -> bool {
        let state = self.lock();
        state.all == All::Pinning && state.round == round
    }

    /// Whether what is idle is still to be let go.
    pub(crate) fn is_leaving(&self) -> bool {
        self.lock().all == All::Leaving
    }

    /// All RAM is pinned, or cannot be. Whether a device may do DMA now that might not before.
    pub(crate) fn pinned(&self, round: u64, is_pinned: bool) -> bool {
        let mut state = self.lock();
        let on = |state: &State| state.endpoints.iter().filter(|endpoint| endpoint.is_on).count();
        let before = on(&state);
        if state.all == All::Pinning && state.round == round {
            state.all = if is_pinned { All::Pinned } else { All::Failed };
            self.settle(&mut state);
        }
        on(&state) > before
    }

    /// The thread that pins ends, and be it in a panic: nobody waits for it any more.
    pub(crate) fn worker_ends(&self) {
        let mut state = self.lock();
        (state.is_busy, state.has_worker) = (false, false);
        self.settle(&mut state);
    }

    /// The endpoints that somebody may use who does not count.
    pub(crate) fn uncounted(&self) -> Vec<Bdf> {
        self.lock().uncounted().map(|endpoint| endpoint.bdf).collect()
    }

    /// An endpoint has asked for a page: who uses it counts.
    pub(crate) fn has_asked(&self, bdf: Bdf) {
        let mut state = self.lock();
        let is_active = state.is_active;
        for endpoint in state.endpoints.iter_mut().filter(|endpoint| endpoint.bdf == bdf) {
            endpoint.is_counted |= is_active;
        }
        self.settle(&mut state);
    }

    /// Nothing is left of what was pinned for nobody in particular.
    pub(crate) fn released(&self) {
        let mut state = self.lock();
        if state.all == All::Leaving {
            state.all = All::No;
        }
    }

    /// What others may see.
    pub(crate) fn passed(&self) -> (All, Vec<Passed>) {
        let state = self.lock();
        let passed = |endpoint: &Endpoint| Passed {
            host: endpoint.device.address().to_owned(),
            guest: endpoint.bdf.to_string(),
            bus_master_wished: endpoint.wish,
            bus_master: endpoint.is_on,
        };
        (state.all, state.endpoints.iter().map(passed).collect())
    }

    /// Brings the devices to where the wishes and the table above have them, and tells who waits.
    fn settle(&self, state: &mut State) {
        state.decide();
        for at in 0..state.endpoints.len() {
            let may = state.may_do_dma(at);
            if let Some(endpoint) = state.endpoints.get_mut(at).filter(|endpoint| endpoint.is_on != may) {
                endpoint.switch(may);
            }
        }
        self.changed.notify_all();
    }

    fn wait_for<'a>(
        &self,
        state: MutexGuard<'a, State>,
        patience: Duration,
        is_over: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout_while(state, patience, |state| !is_over(state));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whatever happened, the bits of the devices are what `is_on` says, or are about to be switched off.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn uncounted(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.iter().filter(|endpoint| endpoint.wish && !endpoint.is_counted)
    }

    /// Whether all RAM has to be pinned, for a device that is used by who does not count.
    fn needs_all(&self) -> bool {
        let may = self.has_guest && !self.is_draining && self.without_driver == WithoutDriver::PinAll;
        may && self.uncounted().next().is_some()
    }

    /// Whether all RAM is to be pinned from now on, or not any more. Without a table in use it stays pinned for the next that
    /// may use it.
    fn decide(&mut self) {
        match (self.all, self.needs_all()) {
            (All::No | All::Leaving, true) => {
                self.all = All::Pinning;
                self.round += 1;
            }
            (All::Pinning | All::Pinned | All::Failed, false) if self.is_active => self.all = All::Leaving,
            _ => {}
        }
        if self.all == All::Pinning && !self.has_worker {
            self.all = All::Failed;
        }
        self.has_grace &= self.all == All::Pinning;
    }

    fn may_do_dma(&self, at: usize) -> bool {
        let is_open = self.has_guest && !self.is_draining;
        let Some(endpoint) = self.endpoints.get(at).filter(|endpoint| endpoint.wish && is_open) else {
            return false;
        };
        match self.without_driver {
            _ if self.is_active && endpoint.is_counted => true,
            WithoutDriver::PinAll => self.all == All::Pinned || self.has_grace && endpoint.is_on,
            WithoutDriver::Hold => self.is_active,
            WithoutDriver::Refuse => false,
        }
    }
}

/// Everything is being drained. Dropped when it is.
#[must_use = "no device does DMA while this is there"]
#[derive(Debug)]
pub(crate) struct Draining<'a>(&'a Gate);

impl Drop for Draining<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.is_draining = false;
        self.0.settle(&mut state);
    }
}

impl Endpoint {
    /// Switches it off, whatever it is said to be; a device that does not go off is reset.
    fn stop(&mut self) {
        self.switch(false);
        if !self.is_on {
            return;
        }
        let reset = self.device.reset();
        self.switch(false);
        if self.is_on {
            let reset = reset.map_or_else(|error| error.to_string(), |()| "done".to_owned());
            let address = self.device.address();
            tracing::error!("{address} cannot be stopped (reset: {reset}), and may use memory while it is unpinned");
        }
    }

    /// Switches bus mastering, and reads it back. What cannot be switched off is tried again the next time, and told.
    fn switch(&mut self, on: bool) {
        let switched = self.device.set_bus_master(on).and_then(|()| self.device.is_bus_master());
        self.is_on = switched.as_ref().map_or(self.is_on || on, |is_on| *is_on);
        if self.is_on != on || switched.is_err() {
            let (address, what) = (self.device.address(), if on { "on" } else { "off" });
            let why = switched.map_or_else(|error| error.to_string(), |_| "it reads back as it was".to_owned());
            tracing::error!("bus mastering of {address} cannot be switched {what}: {why}");
        }
    }
}

#[cfg(test)]
mod tests;
