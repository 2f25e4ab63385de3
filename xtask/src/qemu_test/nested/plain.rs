//! Devices given to a guest by a stock QEMU and the kernel's VFIO alone: the bed works, and the rival is known.

use super::bed::Bed;
use super::devices::{self, Interrupts};
use crate::qemu_test::nothing;

const JOB: &str = "
start $remapped $(plain)
up
inner use_nvme
inner use_net e1000e
inner use_net e1000
inner use_usb
off
";

pub(super) fn run(bed: &Bed<'_>) -> anyhow::Result<()> {
    let ended = bed.boot(JOB, &nothing)?;
    print!("{}", Interrupts::of(&ended.lines).table());
    bed.judge(&ended, &devices::complaints(&ended.lines)?, "plain passthrough works")
}
