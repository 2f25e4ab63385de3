//! Who does the work: workers that serve slots, and one that takes pages back.
//!
//! | file | who |
//! | --- | --- |
//! | [`service`] | [`Service`]: what the workers of one guest share, and how they end together |
//! | [`slots`] | [`SlotServer`]: serves the slots of some vCPUs, a piece at a time; needs no thread and no file descriptor |
//! | [`pin`] | [`PinWorker`]: a slot server that waits on doorbells |
//! | [`reclaim`] | [`ReclaimWorker`]: ticks, and unpins ranges on request; [`Reclaimer`], by which it is asked |
//! | [`team`] | [`Team`]: threads for all of them, for those who have none of their own |
//!
//! A worker can be run in three ways: `run` in a thread until its service closes; in an event loop, as it is
//! [`AsRawFd`](std::os::fd::AsRawFd): readable whenever there is something to do, and then `handle_event` does a piece of
//! it; or, for those who poll anyway, `poll_once`, which looks once and never waits.
//!
//! **A panic in a worker is caught**, and the service fails closed: whatever the guest asks for from then on is answered
//! at once, nothing more is pinned, and [`Service::failure`] says why. What is pinned stays until the device is drained.
//! This takes a program that unwinds; with `panic = "abort"` it ends.

pub mod pin;
pub mod reclaim;
pub mod service;
pub mod slots;
pub mod team;

mod events;
mod rings;
mod window;

pub use pin::PinWorker;
pub use reclaim::{ReclaimWorker, Reclaimer, UnpinError, Unpinned};
pub use service::{Service, SlotsError};
pub use slots::SlotServer;
pub use team::{Team, TeamConfig};
pub use vmm_sys_util;

/// What a worker has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[must_use = "a worker that has more to do wants to be called again"]
pub enum Polled {
    /// There is nothing to do.
    Idle,
    /// Something waits for what may come any time, as RAM that went: call again in a moment.
    Wait,
    /// Something was done, and there may be more: call again.
    More,
    /// The service is closed and everything answered: there will be nothing to do any more.
    Closed,
}
