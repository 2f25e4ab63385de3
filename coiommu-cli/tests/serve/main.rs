//! `coiommu serve` as a program: started, spoken to by a VMM and its guest, asked by `coiommu ctl`, and ended.
//!
//! | file | what |
//! | --- | --- |
//! | `server.rs` | the program, running |
//! | `wire.rs` | a VMM's end of vfio-user |
//! | `guest.rs` | a VMM with a guest in it: RAM, a table, requests |
//! | `lines.rs` | the control socket's other end |
//! | `lifecycle.rs` | arguments, sockets, VMMs that come and go, signals |
//! | `device.rs` | the device that the guest sees, and what it does |
//! | `memory.rs` | RAM that comes and goes |
//! | `control.rs` | the control socket |
//! | `ctl.rs` | `coiommu ctl`, `coiommu top` |
//! | `metrics.rs` | what Prometheus reads |
//! | `logs.rs` | how much is logged, and how it looks |
//!
//! Whatever waits here waits for as long as a slow machine may need, and not for any time that should pass.

#[path = "../common/mod.rs"]
mod common;

mod control;
mod ctl;
mod device;
mod guest;
mod lifecycle;
mod lines;
mod logs;
mod memory;
mod metrics;
mod server;
mod wire;

use std::time::{Duration, Instant};

/// Longer than anything takes, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until something is there.
#[track_caller]
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < PATIENCE, "{what} does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}
