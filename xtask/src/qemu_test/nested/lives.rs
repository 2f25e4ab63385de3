//! Guests, emulators and servers that end before their time, under load.

use super::bed::Bed;
use crate::qemu_test::nothing;

/// Once as one should, once as if the button was pressed, and once with a driver that has gone before.
const REBOOTS: &str = "
serve --policy unpin_policy=lru,unpin_interval=1
start $(tracked)
for how in 'rest; reboot -f' 'echo b >/proc/sysrq-trigger' 'rest; net_down e1000e; rmmod nvme; rmmod coiommu; reboot -f'; do
    up
    inner coiommu_up
    inner load_devices
    sleep 5
    echo $how, with $(figures pinned_bytes) bytes pinned
    echo \"$how; sleep 60\" >&5
done
up
inner coiommu_up
inner use_nvme
expect 'pinned bytes in the end' $(figures pinned_bytes) -lt $((memory << 17))
off
gone $server
";

pub(super) fn reboots(bed: &Bed<'_>) -> anyhow::Result<()> {
    play(bed, REBOOTS, "served again after each reboot")
}

const RESTART: &str = "
serve --policy unpin_policy=lru,unpin_interval=1 --persist
start $(tracked)
up
inner coiommu_up
inner load_devices
sleep 5
end KILL $qemu
await has_no_guest
set -- $(memory_of $server)
expect 'KiB that the server has locked' $1 -eq 0
start $(tracked)
up
inner coiommu_up
inner use_nvme
off
end TERM $server
";

/// An emulator that is killed, and started again for the same server.
pub(super) fn restart(bed: &Bed<'_>) -> anyhow::Result<()> {
    play(bed, RESTART, "served after an emulator that was killed")
}

/// The emulator is stopped before, as QEMU 11.1 has an assertion that may fail when a server goes; it has the devices, stopped
/// or not.
const ORPHAN: &str = "
serve --policy unpin_policy=lru,unpin_interval=1
start $(tracked)
up
inner coiommu_up
inner load_devices
sleep 5
kill -STOP $qemu
end KILL $server
start_server --policy unpin_policy=lru,unpin_interval=1 2>/tmp/said
waits() { grep -q \"waiting: .*(qemu\\|ld-linux\\)\" /tmp/said; }
sleep 5
cat /tmp/said
! has_no_guest
echo the next one waits
end KILL $qemu
await has_no_guest
start $(tracked)
up
inner coiommu_up
inner use_nvme
off
gone $server
";

/// A server that is killed: what was pinned stays so until its emulator goes, and the next server waits for that.
pub(super) fn orphan(bed: &Bed<'_>) -> anyhow::Result<()> {
    play(bed, ORPHAN, "the next server waits for the emulator of the one that was killed")
}

/// The guest goes on asking its devices for what they cannot do.
const STOP: &str = "
serve --policy unpin_policy=lru,unpin_interval=1
start $(tracked)
up
inner coiommu_up
inner load_devices
sleep 5
end TERM $server
sleep 10
! has_faults
echo no fault
end KILL $qemu
";

/// A server that is asked to end: no device does DMA when it begins to unpin.
pub(super) fn stop(bed: &Bed<'_>) -> anyhow::Result<()> {
    play(bed, STOP, "no fault after a server that was asked to end")
}

fn play(bed: &Bed<'_>, job: &str, good: &str) -> anyhow::Result<()> {
    let ended = bed.boot(job, &nothing)?;
    bed.judge(&ended, &[], good)
}
