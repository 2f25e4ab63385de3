//! The time that the work of a contender takes.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::Contender;

/// Has a contender do its work once, and tells what it took: the CPU time of this thread, in the kernel too, as the time
/// that other programs have the CPU says nothing about the contender.
pub(crate) fn time(contender: &mut dyn Contender) -> Duration {
    contender.prepare();
    let start = cpu_time();
    contender.work();
    let took = cpu_time() - start;
    contender.finish();
    took
}

fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).expect("the time since the thread began")
}
