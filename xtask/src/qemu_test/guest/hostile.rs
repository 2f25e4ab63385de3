//! A guest that writes random bytes to the device, while its drivers work.

use std::cell::{Cell, RefCell};

use anyhow::ensure;

use super::bed::{Bed, Guest};
use super::files::E1000E;
use crate::qemu_test::driver;
use crate::vm::Answer;

/// What the drivers get is what it brings upon them: I/O that fails, a device that is dead, and a system that does not end.
const JOB: &str = "
everything_up
load
sleep 5
ask 'memory: before'
for n in 1 2 3 4 5 6; do
    scribble 0000:00:04.0 10
    ask 'memory: after'
done
ask done
";

/// How much the server's memory may grow, in KiB: allocators keep some of what they had.
const GROWTH: u64 = 16 << 10;

pub(super) fn run(bed: &Bed<'_>) -> anyhow::Result<()> {
    let server = bed.serve(&["--policy", "unpin_policy=lru,unpin_interval=1"])?;
    let program = driver::build_test(bed.tree, "scribble")?;
    let memory = RefCell::new(Vec::new());
    let is_done = Cell::new(false);
    let guest = Guest {
        job: JOB,
        devices: vec![server.device(), E1000E.to_owned()],
        programs: vec![(program, "bin/scribble")],
        append: "iomem=relaxed",
        ..Guest::default()
    };
    let _killed = bed.boot(guest, &|line, _| {
        if line.starts_with("memory: ") {
            memory.borrow_mut().push(server.resident_kib()?);
            return Ok(Answer::Say("go on".to_owned()));
        }
        if line == "done" {
            // The emulator, too, is there to the end: it has passed that on.
            is_done.set(!server.has_ended()? && server.stats().is_ok());
            return Ok(Answer::Kill);
        }
        Ok(Answer::Nothing)
    })?;
    let memory = memory.take();
    println!("the server's own memory in KiB, before and every 10 s: {memory:?}");
    ensure!(is_done.get(), "the guest, the emulator or the server did not come to the end");
    if let [_, first, .., last] = memory[..] {
        ensure!(last <= first + GROWTH, "the server's memory grew by {} KiB", last - first);
    }
    eprintln!("qemu-test: Linux {}: server and emulator survive", bed.kernel.version());
    Ok(())
}
