//! What tracking costs a guest, and how long it waits for its requests.

use anyhow::Context as _;

use super::bed::{Bed, Guest, NO_END};
use super::files::E1000E;
use crate::qemu_test::nothing;
use crate::vm::Ended;

/// The nvme's driver without and with tracking, in turn: reads of 128 KiB and of 4 KiB, in hundredths of a second. The first
/// reads with tracking find nothing pinned.
const LOADS: &str = "
now() { cut -d' ' -f1 /proc/uptime | tr -d .; }
measure() {
    start=$(now)
    dd if=/dev/nvme0n1 of=/dev/null bs=$2 count=$3 iflag=direct 2>/dev/null
    echo cost $1 $2: $(($(now) - start))
}
for round in $(seq 5); do
    nvme_up
    measure none 128k 400
    measure plain 128k 1600
    measure plain 4k 8000
    rmmod nvme
    coiommu_up
    nvme_up
    measure cold 128k 400
    measure warm 128k 1600
    measure warm 4k 8000
    rmmod nvme
    rmmod coiommu
done
";

/// Each request is timed by the kernel's own tracer, from before its doorbell to its answer.
const REQUESTS: &str = "
mount -t tracefs tracefs /sys/kernel/tracing
coiommu_up
nvme_up
(
    cd /sys/kernel/tracing
    echo 16384 >buffer_size_kb
    echo coiommu_request >set_graph_function
    echo 1 >max_graph_depth
    echo function_graph >current_tracer
)
# Into memory that was not used before.
cat /dev/nvme0n1 >/dev/null
echo 0 >/sys/kernel/tracing/tracing_on
grep coiommu_request /sys/kernel/tracing/trace | awk '{ for (i = 2; i <= NF; i++) if ($i == \"us\") print $(i - 1) }' |
    sort -n >/tmp/times
count=$(wc -l </tmp/times)
echo waited: $(sed -n \"$((count / 2 + 1))p; $((count * 99 / 100 + 1))p\" /tmp/times | tr '\\n' ' ') $count
ask compare
";

pub(super) fn run(bed: &Bed<'_>) -> anyhow::Result<()> {
    let server = bed.serve(&[])?;
    let guest = Guest { job: LOADS, devices: vec![server.device(), E1000E.to_owned()], ..Guest::default() };
    let ended = bed.boot(guest, &nothing)?;
    let mut complaints = Vec::new();
    for size in ["128k", "4k"] {
        let (plain, warm) = (median(&ended, "plain", size)?, median(&ended, "warm", size)?);
        println!("reads of {size}: {plain} without tracking, {warm} with it (hundredths of a second, medians of 5)");
        if warm > 2 * plain {
            complaints.push(format!("reads of {size} take {warm} with tracking, {plain} without"));
        }
    }
    let (none, cold) = (median(&ended, "none", "128k")?, median(&ended, "cold", "128k")?);
    println!("the first reads after the driver's start: {none} without tracking, {cold} with it");
    bed.judge(&ended, &complaints, "tracking costs this much")?;
    drop(server);

    for (look, what) in [("5000", "workers that keep looking for 5 ms"), ("0", "workers that sleep at once")] {
        let server = bed.serve(&["--look", look])?;
        let guest = Guest { job: REQUESTS, devices: vec![server.device(), E1000E.to_owned()], ..Guest::default() };
        let (ended, stats) = bed.boot_and_compare(guest, &server, &nothing)?;
        let stats = stats.context(NO_END)?;
        let waited = ended.lines.iter().find_map(|line| line.strip_prefix("waited: "));
        let mut times = waited.context("the guest has not said how long it waited")?.split_whitespace();
        let mut next = || times.next().context("there were no requests");
        let (p50, p99, count) = (next()?, next()?, next()?);
        println!(
            "{what}: {count} requests, in the guest p50 {p50} us, p99 {p99} us; from the doorbell at the server to the answer p50 {} \
             us, p99 {} us",
            stats["answer_p50_us"], stats["answer_p99_us"]
        );
        bed.judge(&ended, &[], "requests wait this long")?;
    }
    Ok(())
}

/// Of what a guest has measured.
fn median(ended: &Ended, what: &str, size: &str) -> anyhow::Result<u64> {
    let prefix = format!("cost {what} {size}: ");
    let measured = ended.lines.iter().filter_map(|line| line.strip_prefix(&prefix)?.parse().ok());
    let mut measured: Vec<u64> = measured.collect();
    measured.sort_unstable();
    measured.get(measured.len() / 2).copied().with_context(|| format!("the guest has not measured {what} {size}"))
}
