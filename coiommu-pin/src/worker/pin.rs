//! A worker that serves slots when their doorbells ring.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::events::Events;
use super::window::Window;
use super::{Polled, Service, SlotServer};
use crate::notify_map::NotifyMap;
use crate::pinner::{Clock, SystemClock};
use crate::space::TableSpace;

/// The longest that a worker keeps looking before it sleeps, unless told otherwise.
pub const LOOK: Duration = Duration::from_micros(100);

/// How long a request that waits for RAM waits between two looks.
const MOMENT: Duration = Duration::from_millis(1);

/// Serves the slots of some vCPUs when their doorbells ring.
///
/// In a thread of its own ([`run`](Self::run)) it keeps looking at the slots for a little while after it served a request,
/// if the last ones came in quick succession, as a wake-up takes longer than a pin. In somebody else's event loop it is
/// readable when there is something to do, and [`handle_event`](Self::handle_event) does a piece of it.
pub struct PinWorker<S: TableSpace, N: NotifyMap> {
    server: SlotServer<S, N>,
    events: Events,
    window: Window,
}

impl<S: TableSpace, N: NotifyMap> PinWorker<S, N> {
    /// A worker for the slots of these vCPUs, with a doorbell for each.
    ///
    /// # Errors
    ///
    /// A vCPU has no slot, or it has a worker already ([`SlotsError`](super::service::SlotsError), as invalid input), or the
    /// system has no file descriptor left.
    pub fn new(service: Arc<Service<S, N>>, vcpus: impl IntoIterator<Item = usize>) -> io::Result<Self> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
        let server = SlotServer::new(service, vcpus).map_err(invalid)?;
        let events = Events::new(server.vcpus().count(), server.service().closing_fd())?;
        Ok(Self { server, events, window: Window::new(LOOK) })
    }

    /// Never keeps looking for longer than this; 0: sleeps at once.
    #[must_use]
    pub fn with_look(self, most: Duration) -> Self {
        Self { window: Window::new(most), ..self }
    }

    /// The doorbell of a vCPU, for an ioeventfd or to be written to when the guest's access is trapped; `None` if this
    /// worker does not serve it.
    #[must_use]
    pub fn doorbell(&self, vcpu: usize) -> Option<&EventFd> {
        self.shared_doorbell(vcpu).map(Arc::as_ref)
    }

    pub(super) fn shared_doorbell(&self, vcpu: usize) -> Option<&Arc<EventFd>> {
        self.events.bell(self.server.vcpus().position(|served| served == vcpu)?)
    }

    /// The vCPUs that it serves, in ascending order.
    pub fn vcpus(&self) -> impl Iterator<Item = usize> {
        self.server.vcpus()
    }

    /// Looks at the slots once, whether or not a doorbell rang; see [`SlotServer::poll_once`].
    pub fn poll_once(&mut self) -> Polled {
        self.server.poll_once(&SystemClock)
    }

    /// Serves a piece or some: to be called whenever the worker is readable, which it is until there is nothing left to do.
    /// Takes as long as [`SlotServer::poll_once`].
    ///
    /// # Errors
    ///
    /// Those of waiting for events, none of which is to be expected.
    pub fn handle_event(&mut self) -> io::Result<Polled> {
        self.events.wait(Some(Duration::ZERO))?;
        let polled = self.poll_once();
        match polled {
            Polled::More => self.events.wake_after(Duration::ZERO)?,
            Polled::Wait => self.events.wake_after(MOMENT)?,
            Polled::Idle | Polled::Closed => {}
        }
        Ok(polled)
    }

    /// Serves until the service is closed.
    ///
    /// # Errors
    ///
    /// As [`handle_event`](Self::handle_event).
    pub fn run(&mut self) -> io::Result<()> {
        let mut idle: Option<Idle> = None;
        loop {
            match self.poll_once() {
                Polled::More => {
                    if let Some(Idle { since, ended }) = idle.take() {
                        self.window.adapt(ended - since);
                    }
                }
                Polled::Wait => self.events.wait(Some(MOMENT))?,
                Polled::Idle => {
                    let since = idle.map_or_else(|| SystemClock.now(), |idle| idle.since);
                    if !self.look(since) {
                        self.events.wait(None)?;
                    }
                    idle = Some(Idle { since, ended: SystemClock.now() });
                }
                Polled::Closed => return Ok(()),
            }
        }
    }

    /// Keeps looking for a while, if that pays; whether there is something.
    fn look(&self, since: Duration) -> bool {
        let until = since + self.window.length();
        while SystemClock.now() < until {
            if self.server.has_new_request() {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }
}

/// A time in which there was nothing to do.
#[derive(Clone, Copy)]
struct Idle {
    since: Duration,
    ended: Duration,
}

/// Readable when there is something to do, and for good once the service is closed.
impl<S: TableSpace, N: NotifyMap> AsRawFd for PinWorker<S, N> {
    fn as_raw_fd(&self) -> RawFd {
        self.events.as_raw_fd()
    }
}

impl<S: TableSpace, N: NotifyMap> std::fmt::Debug for PinWorker<S, N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PinWorker").field("server", &self.server).field("window", &self.window).finish_non_exhaustive()
    }
}
