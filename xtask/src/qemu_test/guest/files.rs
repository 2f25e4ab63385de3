//! Files and downloads have the right bytes, and the counters of both sides agree.

use super::bed::{Bed, Counters, DOWNLOAD, Guest, NO_END, ROUNDS, compare, of_server, wrong_download, wrong_read};
use crate::qemu_test::data::SOURCE;
use crate::qemu_test::nothing;

/// In the first round every page is new, in the second some are; in the third, hardly one.
const JOB: &str = "
everything_up
for round in 0 1 2; do
    echo round $round: writing and reading SOURCE MiB, and downloading
    dd if=/dev/vda of=/mnt/file bs=1M 2>/dev/null
    sync
    forget
    dd if=/mnt/file of=/dev/vdb bs=1M seek=$((round * SOURCE)) conv=fsync 2>/dev/null
    download | dd of=/dev/vdc bs=64k seek=$((round * DOWNLOADS)) iflag=fullblock conv=fsync 2>/dev/null
    if [ $round = 1 ]; then counters cold_; fi
done
# While the drivers have their rings mapped.
counters busy_
everything_down
counters
ask compare
";

/// Of which q35 has 1 GiB above 4 GiB: only there can a device be unable to reach memory.
const MEMORY: u32 = 3072;

pub(super) fn run(bed: &Bed<'_>) -> anyhow::Result<()> {
    let server = bed.serve(&[])?;
    let job = JOB.replace("DOWNLOADS", &(DOWNLOAD * 16).to_string()).replace("SOURCE", &SOURCE.to_string());
    let devices = vec![server.device(), E1000E.to_owned()];
    let guest = Guest { job: &job, memory: MEMORY, devices, ..Guest::default() };
    let (ended, stats) = bed.boot_and_compare(guest, &server, &nothing)?;
    let mut complaints = Vec::new();
    match stats {
        None => complaints.push(NO_END.to_owned()),
        Some(stats) => {
            let guest = Counters::of(&ended.lines);
            complaints.extend(compare(&guest, &stats)?);
            if guest.get("busy_swiotlb")? + guest.get("swiotlb")? > 0 {
                complaints.push("a device that reaches all of the memory uses bounce slots".to_owned());
            }
            for round in 0..ROUNDS {
                complaints.extend(wrong_read(round)?);
                complaints.extend(wrong_download(round)?);
            }
            // What came in the last round.
            let pages = guest.get("pages")? - guest.get("cold_pages")?;
            let hits = guest.get("hits")? - guest.get("cold_hits")?;
            println!(
                "once warm, {hits} of {pages} page maps hit; in all {} requests for {} pages; pinned {} KiB of {} MiB",
                guest.get("requests")?,
                guest.get("requested_pages")?,
                of_server(&stats, "pinned_bytes")? / 1024,
                of_server(&stats, "guest_memory_bytes")? >> 20
            );
            if hits * 100 < pages * 95 {
                complaints.push(format!("{hits} of {pages} page maps found the page pinned: less than 95 %"));
            }
        }
    }
    bed.judge(&ended, &complaints, "all bytes right, counters agree")
}

pub(super) const E1000E: &str = "-device e1000e,netdev=net,addr=05.0";
