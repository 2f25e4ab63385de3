//! Guests without CoIOMMU's driver, or with others before it: they work with all memory pinned, or do no DMA.

use super::bed::Bed;
use super::devices;
use crate::qemu_test::nothing;

/// What is written and downloaded each time, in MiB: less than elsewhere, as it is so often.
const WRITTEN: u64 = 16;
const DOWNLOAD: u64 = 4;

/// Three guests, one a setting. The second and the third have nobody who counts, and no DMA, until they have the driver.
const JOB: &str = "
pinned() { figures pinned_bytes; }
mastering() { stats | grep -A 3 $(host_of $1) | grep -c '\"bus_master\": true' || true; }
all=$(((memory - 2) << 20))

echo pin-all: a disk works without the driver, and when that comes later
serve --policy unpin_policy=lru,unpin_interval=1
start $(tracked)
up
inner 'written=WRITTEN download=DOWNLOAD'
inner use_nvme
before=$(pinned)
expect 'pinned without the driver' $before -ge $all
inner 'modprobe coiommu || true'
inner 'dd if=/dev/nvme0n1 of=/dev/null bs=1M count=4 iflag=direct'
expect 'pinned while the disk is not tracked' $(pinned) -eq $before
inner 'rmmod coiommu || true'
inner 'coiommu_up rebind=1'
inner 'await test -b /dev/nvme0n1'
inner use_nvme
inner use_net e1000e
idle() { [ $(pinned) -lt $((before / 8)) ]; }
await idle
expect 'pinned in the end' $(pinned) -lt $((before / 8))
off
gone $server

for setting in hold refuse; do
    echo $setting: no device does DMA without the driver
    serve --policy unpin_policy=lru,unpin_interval=1 --without-driver $setting
    start $(tracked)
    up
    inner 'written=WRITTEN download=DOWNLOAD'
    inner 'modprobe e1000e; await ip link set dev eth0 up'
    expect 'bus mastering as the guest sees it' $(inner mastering 05) = $([ $setting = hold ] && echo on || echo off)
    expect 'bus mastering of the device' $(mastering 05) -eq 0
    expect 'pinned without the driver' $(pinned) -eq 0
    inner net_down e1000e
    inner coiommu_up
    inner use_nvme
    inner use_net e1000e
    expect 'bus mastering of the disk' $(mastering 03) -eq 1
    expect 'pinned in the end' $(pinned) -gt 0
    off
    gone $server
done
";

pub(super) fn run(bed: &Bed<'_>) -> anyhow::Result<()> {
    let job = JOB.replace("WRITTEN", &WRITTEN.to_string()).replace("DOWNLOAD", &DOWNLOAD.to_string());
    let ended = bed.boot(&job, &nothing)?;
    let mut complaints = Vec::new();
    for (device, mib, times) in [("nvme", WRITTEN, 4), ("e1000e", DOWNLOAD, 3)] {
        complaints.extend(devices::wrong_sums(&ended.lines, device, mib, times)?);
    }
    bed.judge(&ended, &complaints, "no fault without the driver, and DMA only where all is pinned")
}
