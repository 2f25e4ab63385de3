//! Where the time comes from: [`Clock`].

use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};

/// The time, as a pinner is told it. It reads no clock of its own, so that virtual time does as well as real time.
pub trait Clock {
    /// The time since some fixed moment; it does not go back.
    fn now(&self) -> Duration;

    /// The same, but it may be some milliseconds old: asked for once a block, where a clock that is cheap to read pays.
    fn roughly(&self) -> Duration {
        self.now()
    }
}

/// A clock that stands still.
impl Clock for Duration {
    fn now(&self) -> Duration {
        *self
    }
}

/// The system's clock: the time since it was started. [`roughly`](Clock::roughly) is as of the kernel's last timer tick.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        duration(clock_gettime(ClockId::Monotonic))
    }

    fn roughly(&self) -> Duration {
        duration(clock_gettime(ClockId::MonotonicCoarse))
    }
}

/// A time of a clock that begins at 0.
fn duration(time: Timespec) -> Duration {
    let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), nanos)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn time_passes_as_everybody_elses_does() {
        let (outer, first, inner) = (Instant::now(), SystemClock.now(), Instant::now());
        std::thread::sleep(Duration::from_millis(20));
        let (inner, last, outer) = (inner.elapsed(), SystemClock.now(), outer.elapsed());
        let passed = last - first;
        assert!(inner <= passed && passed <= outer, "{inner:?} {passed:?} {outer:?}");
        let still = Duration::from_secs(3);
        assert_eq!((still.now(), still.roughly()), (still, still), "a clock that stands still");
    }

    #[test]
    fn the_rough_time_is_not_far_behind() {
        let (before, rough, after) = (SystemClock.now(), SystemClock.roughly(), SystemClock.now());
        assert!(rough <= after);
        assert!(rough + Duration::from_secs(1) > before, "{rough:?} {before:?}");
    }
}
