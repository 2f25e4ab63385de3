//! An eventfd, and how often it was signalled.

use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

#[derive(Debug)]
pub(crate) struct Signal(OwnedFd);

impl Signal {
    pub(crate) fn new() -> Self {
        Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap())
    }

    pub(crate) fn several(number: usize) -> Vec<Self> {
        (0..number).map(|_| Self::new()).collect()
    }

    /// To be given away.
    pub(crate) fn fd(&self) -> Option<OwnedFd> {
        Some(self.0.try_clone().unwrap())
    }

    pub(crate) fn fds(signals: &[Self]) -> Vec<Option<OwnedFd>> {
        signals.iter().map(Self::fd).collect()
    }

    /// How often it was signalled since it was asked the last time.
    pub(crate) fn count(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.0, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(Errno::AGAIN) => 0,
            Err(error) => panic!("an eventfd cannot be read: {error}"),
        }
    }

    pub(crate) fn counts(signals: &[Self]) -> Vec<u64> {
        signals.iter().map(Self::count).collect()
    }

    /// The same, when it is signalled: interrupts come when they come.
    pub(crate) fn wait(&self) -> u64 {
        let start = Instant::now();
        loop {
            match self.count() {
                0 => assert!(start.elapsed() < Duration::from_secs(60), "it is never signalled"),
                count => return count,
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Signals it.
    pub(crate) fn send(&self) {
        rustix::io::write(&self.0, &1_u64.to_ne_bytes()).unwrap();
    }
}
