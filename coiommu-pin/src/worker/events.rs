//! What wakes a worker that sleeps.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

/// Some bells, a timer, and the end of the service: as one file descriptor, readable when any of them is.
pub(super) struct Events {
    epoll: Epoll,
    bells: Vec<Arc<EventFd>>,
    timer: TimerFd,
}

/// Not the index of a bell.
const TIMER: u64 = u64::MAX;
const CLOSING: u64 = u64::MAX - 1;

impl Events {
    /// So many bells; `closing` is readable when the service is closed, and stays so.
    pub(super) fn new(bells: usize, closing: RawFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let bells = (0..bells).map(|_| Ok(Arc::new(eventfd()?))).collect::<io::Result<Vec<_>>>()?;
        let timer = TimerFd::new()?;
        let add = |fd, id| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, id));
        for (bell, id) in bells.iter().zip(0..) {
            add(bell.as_raw_fd(), id)?;
        }
        add(timer.as_raw_fd(), TIMER)?;
        add(closing, CLOSING)?;
        Ok(Self { epoll, bells, timer })
    }

    pub(super) fn bell(&self, at: usize) -> Option<&Arc<EventFd>> {
        self.bells.get(at)
    }

    /// Waits until something happens, at most so long, and takes note of it: bells are silent again.
    pub(super) fn wait(&mut self, at_most: Option<Duration>) -> io::Result<()> {
        // A worker of a thousand vCPUs comes again for the rest.
        let mut events = [EpollEvent::default(); 64];
        let millis = at_most.map_or(-1, |time| i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        let count = match self.epoll.wait(millis, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            result => result?,
        };
        for event in events.iter().take(count) {
            match event.data() {
                TIMER => _ = self.timer.wait()?,
                CLOSING => {}
                // Silent already, if somebody else reads it.
                at => _ = usize::try_from(at).ok().and_then(|at| self.bells.get(at)).map(|bell| bell.read()),
            }
        }
        Ok(())
    }

    /// Is readable again after so long, whatever happens.
    pub(super) fn wake_after(&mut self, time: Duration) -> io::Result<()> {
        // A timer set to 0 is switched off; one that wakes too early does no harm.
        Ok(self.timer.reset(time.clamp(Duration::from_nanos(1), Duration::from_hours(1)), None)?)
    }
}

/// One that nobody waits for when it is read, and that children do not get.
pub(super) fn eventfd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}
