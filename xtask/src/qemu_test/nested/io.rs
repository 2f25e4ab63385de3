//! Devices that `coiommu serve` passes through do all that their drivers ask for, and never reach for what is not pinned.

use anyhow::Context as _;
use serde_json::Value;

use super::bed::Bed;
use super::devices::{self, Interrupts};
use crate::qemu_test::counters::{Counters, compare};
use crate::qemu_test::nothing;

/// In the end, what is pinned is unmapped behind the server's back: the disk's next transfer is a fault, and the outer kernel says so.
const JOB: &str = "
serve --policy unpin_policy=lru,unpin_interval=1
start $remapped $(tracked)
up
inner coiommu_up
inner use_nvme
inner use_net e1000e
inner use_net e1000
inner use_usb
inner counters
say_stats
! has_faults
echo no fault so far
expect_faults
coiommu ctl --control /tmp/ctl yank
inner 'dd if=/dev/nvme0n1 of=/dev/null bs=4k count=1 iflag=direct &'
await has_faults
echo a fault on purpose
end KILL $qemu
no_more_faults
";

pub(super) fn run(bed: &Bed<'_>) -> anyhow::Result<()> {
    let ended = bed.boot(JOB, &nothing)?;
    print!("{}", Interrupts::of(&ended.lines).table());
    let mut complaints = devices::complaints(&ended.lines)?;
    let stats = ended.lines.iter().rev().find_map(|line| line.strip_prefix("server "));
    let stats: Value = serde_json::from_str(stats.context("the server has not said its figures")?)?;
    complaints.extend(compare(&Counters::of(&ended.lines), &stats)?);
    for said in ["no fault so far", "a fault on purpose"] {
        if !ended.lines.iter().any(|line| line == said) {
            complaints.push(format!("it has not come to: {said}"));
        }
    }
    bed.judge(&ended, &complaints, "all bytes right, no fault but one on purpose")
}
