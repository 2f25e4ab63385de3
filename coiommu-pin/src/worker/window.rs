//! How long a worker that has nothing to do keeps looking before it sleeps.

use std::time::Duration;

/// Polling pays when the next request comes sooner than a sleep and a wake-up would take; whether it does, the last ones
/// tell. While they come soon after each other the window grows, until it finds them or is as large as it may be and has
/// not; then there is none, as when one comes late.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    most: Duration,
    now: Duration,
}

impl Window {
    /// What it starts with: about what it costs to sleep and be woken.
    const FIRST: Duration = Duration::from_micros(10);
    /// Where a wake-up takes long, requests that come one after the other look farther apart than they are.
    const WITH_A_WAKE_UP: u32 = 3;

    /// A window that never gets larger than this; with 0, there is none.
    pub(super) const fn new(most: Duration) -> Self {
        Self { most, now: Duration::ZERO }
    }

    /// How long to look.
    pub(super) const fn length(self) -> Duration {
        self.now
    }

    /// The next request came so long after the last was done, a wake-up included if there was one.
    pub(super) fn adapt(&mut self, gap: Duration) {
        if gap <= self.now {
            return;
        }
        let is_soon = gap <= self.most * Self::WITH_A_WAKE_UP;
        self.now = if is_soon && self.now < self.most {
            (self.now * 2).clamp(Self::FIRST.min(self.most), self.most)
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn micros(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    #[test]
    fn it_grows_while_requests_follow_each_other_and_goes_when_one_does_not() {
        let mut window = Window::new(micros(70));
        let mut lengths = Vec::new();
        for gap in [900, 210, 60, 60, 60, 60, 5, 211, 70] {
            window.adapt(micros(gap));
            lengths.push(window.length().as_micros());
        }
        assert_eq!(lengths, [0, 10, 20, 40, 70, 70, 70, 0, 10]);
    }

    #[test]
    fn it_goes_when_it_is_as_large_as_it_may_be_and_finds_nothing() {
        let mut window = Window::new(micros(70));
        let lengths = [(); 6].map(|()| {
            window.adapt(micros(100));
            window.length().as_micros()
        });
        assert_eq!(lengths, [10, 20, 40, 70, 0, 10]);
    }

    #[test]
    fn there_is_none_if_none_is_wanted() {
        let mut window = Window::new(Duration::ZERO);
        for gap in [0, 1, 100] {
            window.adapt(micros(gap));
            assert_eq!(window.length(), Duration::ZERO);
        }
    }
}
