//! An endpoint that reaches 4 GiB only, in a guest that has more.

use anyhow::Context as _;

use super::bed::{Bed, Counters, DOWNLOAD, Guest, NO_END, wrong_download};
use super::server::Server;
use crate::qemu_test::nothing;

/// The kernel takes memory from above 4 GiB first.
const JOB: &str = "
coiommu_up
net_up pcnet32
download | dd of=/dev/vdc bs=64k iflag=fullblock conv=fsync 2>/dev/null
counters busy_
ip link set dev eth0 down
counters
ask compare
";

/// Of which q35 has 2 GiB below 4.
const MEMORY: u32 = 6144;

pub(super) fn run(bed: &Bed<'_>) -> anyhow::Result<()> {
    let server = Server::start(bed.program, &["--endpoint=00:05.0"])?;
    let devices = vec![server.device(), "-device pcnet,netdev=net,addr=05.0".to_owned()];
    let guest = Guest { job: JOB, memory: MEMORY, devices, ..Guest::default() };
    let (ended, stats) = bed.boot_and_compare(guest, &server, &nothing)?;
    let stats = stats.context(NO_END)?;
    let guest = Counters::of(&ended.lines);
    let mut complaints = Vec::from_iter(wrong_download(0)?);
    let slots = guest.get("busy_swiotlb")?;
    println!("{DOWNLOAD} MiB by {} maps, through up to {slots} bounce slots at once", guest.get("maps")?);
    if slots == 0 {
        complaints.push("nothing was bounced: it could reach all of the memory".to_owned());
    }
    for (what, count) in [("failures", guest.get("failures")?), ("pages", u64::from(guest.get("pages")? == 0))] {
        if count > 0 {
            complaints.push(format!("the guest's {what}: {count}"));
        }
    }
    if stats["requests_pinned"].as_u64() != Some(guest.get("requests")?) {
        complaints.push("the server has not pinned what was requested".to_owned());
    }
    bed.judge(&ended, &complaints, "a device of 32 bits gets right bytes, its bounce slots tracked")
}
