//! Scenes and contenders, and the time that a contender takes.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Contenders at the same work.
pub(crate) struct Scene {
    /// What happens in it.
    pub(crate) what: &'static str,
    /// What one unit of time is told for, and how many of them there are in the work.
    pub(crate) unit: &'static str,
    pub(crate) units: u64,
    /// How often the work is timed.
    pub(crate) rounds: usize,
    pub(crate) contenders: Vec<(&'static str, Box<dyn Contender>)>,
}

/// Somebody who does a scene's work. All but the work is untimed.
pub(crate) trait Contender {
    /// Makes everything as it must be before the work.
    fn prepare(&mut self) {}

    /// What is timed.
    fn work(&mut self);

    /// Panics unless the work was done, and clears up.
    fn finish(&mut self) {}

    /// Does the work once, and tells what it took: the CPU time of this thread, the kernel's part too. What other programs
    /// have of the CPU meanwhile says nothing about the contender.
    fn time(&mut self) -> Duration {
        self.prepare();
        let start = cpu_time();
        self.work();
        let took = cpu_time() - start;
        self.finish();
        took
    }

    /// How often the mapper was called in the last work, where that is of interest: map, unmap.
    fn calls(&self) -> Option<(u64, u64)> {
        None
    }
}

fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).expect("the time since the thread began")
}
