//! Guests, emulators and servers that end before their time.

use std::cell::RefCell;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use super::bed::{Bed, Counters, Guest, NO_END, compare, of_server};
use super::files::E1000E;
use crate::vm::{Answer, Ended, console};

/// How often the guest reboots.
const REBOOTS: usize = 3;

/// Once as one should, once as if the button was pressed, and once with a driver that has gone before.
const REBOOTING: &str = "
everything_up
load
sleep 3
ask boot
case $answer in
    0) rest; umount /mnt; reboot -f ;;
    1) echo b >/proc/sysrq-trigger ;;
    2) rest; umount /mnt; rmmod nvme; rmmod e1000e; rmmod coiommu; reboot -f ;;
esac
# One that is to reboot does not come further.
if [ $answer != 3 ]; then sleep 60; exit 1; fi
rest
counters
ask compare
";

/// A guest that reboots in the same emulator is served anew.
pub(super) fn reboots(bed: &Bed<'_>) -> anyhow::Result<()> {
    let server = bed.serve(&[])?;
    let pinned = RefCell::new(Vec::new());
    let devices = vec![server.device(), E1000E.to_owned()];
    let guest = Guest { job: REBOOTING, devices, may_reboot: true, ..Guest::default() };
    let (ended, stats) = bed.boot_and_compare(guest, &server, &|line, _| match line {
        "boot" => {
            let mut pinned = pinned.borrow_mut();
            pinned.push(of_server(&server.stats()?, "pinned_bytes")?);
            Ok(Answer::Say((pinned.len() - 1).to_string()))
        }
        _ => Ok(Answer::Nothing),
    })?;
    let (pinned, stats) = (pinned.take(), stats.context(NO_END)?);
    println!("pinned bytes in each boot: {pinned:?}");
    let mut complaints = failures(&Counters::of(&ended.lines))?;
    if pinned.len() != REBOOTS + 1 {
        complaints.push(format!("it was booted {} times, not {}", pinned.len(), REBOOTS + 1));
    }
    // What a boot had pinned is not there in the next.
    if pinned.iter().max() > pinned.first().map(|first| first * 2).as_ref() {
        complaints.push("more and more is pinned from boot to boot".to_owned());
    }
    for name in ["requests_failed", "requests_timed_out", "anomalies"] {
        if of_server(&stats, name)? > 0 {
            complaints.push(format!("the server's {name}: {}", stats[name]));
        }
    }
    bed.judge(&ended, &complaints, "served again after each reboot")
}

/// What a guest that has all it asked for should not have counted.
fn failures(guest: &Counters) -> anyhow::Result<Vec<String>> {
    let mut complaints = Vec::new();
    for name in ["failures", "timeouts", "underflows"] {
        let count = guest.get(name)?;
        if count > 0 {
            complaints.push(format!("the guest's {name}: {count}"));
        }
    }
    Ok(complaints)
}

const UNDER_LOAD: &str = "
everything_up
load
sleep 5
ask loaded
rest
everything_down
counters
ask compare
";

/// An emulator that is killed, and started again for the same server.
pub(super) fn restart(bed: &Bed<'_>) -> anyhow::Result<()> {
    let server = bed.serve(&[])?;
    let guest = || Guest { job: UNDER_LOAD, devices: vec![server.device(), E1000E.to_owned()], ..Guest::default() };
    let killed = bed.boot(guest(), &|line, _| Ok(if line == "loaded" { Answer::Kill } else { Answer::Nothing }))?;
    ensure!(killed.exit.is_none() && killed.has_begun, "the first guest was not killed under load");
    let start = Instant::now();
    // Nobody is connected once everything is unpinned.
    while server.stats().is_ok() {
        ensure!(start.elapsed() < Duration::from_secs(60), "the server still has a guest that was killed");
        thread::sleep(Duration::from_millis(50));
    }
    ensure!(!server.has_ended()?, "the server has ended with the first emulator");
    let (ended, stats) = bed.boot_and_compare(guest(), &server, &|line, _| {
        Ok(if line == "loaded" { Answer::Say("go on".to_owned()) } else { Answer::Nothing })
    })?;
    let stats = stats.context(NO_END)?;
    bed.judge(&ended, &compare(&Counters::of(&ended.lines), &stats)?, "served after an emulator that was killed")
}

/// The file system is not asked to be unmounted: its device has gone.
const ORPHANED: &str = "
everything_up
load
sleep 5
ask loaded
since=$(cut -d. -f1 /proc/uptime)
fails() { ! dd if=/dev/nvme0n1 of=/dev/null bs=64k count=64 iflag=direct; }
await fails
echo failed after $(($(cut -d. -f1 /proc/uptime) - since))
rm -f /tmp/busy
wait $disk_load
# Nobody tells a connection that its network has gone.
killall nc 2>/dev/null || true
wait $net_load
counters
rmmod e1000e
echo gone: $(cat /sys/kernel/debug/coiommu/*/endpoints | tr '\\n' ' ')
";

/// How long I/O may take to fail, in the guest's seconds: 5 that a request is waited for, and those that a slow machine takes.
const LIMIT: u64 = 30;

/// A server that is killed under load: I/O fails, and nothing hangs.
pub(super) fn orphan(bed: &Bed<'_>) -> anyhow::Result<()> {
    // QEMU 11.1 has an assertion that fails now and then when a server goes (util/error.c, an error that is set twice).
    const TRIES: usize = 5;
    const ABORTED: i32 = 6;
    for _ in 0..TRIES {
        let server = bed.serve(&[])?;
        let guest = Guest { job: ORPHANED, devices: vec![server.device(), E1000E.to_owned()], ..Guest::default() };
        let ended = bed.boot(guest, &|line, _| {
            if line != "loaded" {
                return Ok(Answer::Nothing);
            }
            server.kill()?;
            Ok(Answer::Say("go on".to_owned()))
        })?;
        if ended.signal == Some(ABORTED) && console::complaints(&ended.console).is_empty() {
            eprintln!("QEMU has aborted as its server went: once more");
            continue;
        }
        return bed.judge(&ended, &orphan_complaints(&ended), "without its server, I/O fails and nothing hangs");
    }
    bail!("QEMU has ended with its server, {TRIES} times")
}

/// What is wrong with a guest whose server was killed.
fn orphan_complaints(ended: &Ended) -> Vec<String> {
    let said = |word: &str| ended.lines.iter().find_map(|line| line.strip_prefix(word));
    let mut complaints = Vec::new();
    match said("failed after ").and_then(|seconds| seconds.parse::<u64>().ok()) {
        None => complaints.push("I/O did not come to fail".to_owned()),
        Some(seconds) if seconds > LIMIT => complaints.push(format!("I/O failed only after {seconds} s")),
        Some(_) => {}
    }
    if said("gone: ") != Some("0000:00:03.0 unbound 0000:00:05.0 unbound") {
        complaints.push(format!("the endpoints were not disconnected: {:?}", said("gone: ")));
    }
    if !Counters::of(&ended.lines).get("timeouts").is_ok_and(|timeouts| timeouts > 0) {
        complaints.push("no request timed out".to_owned());
    }
    complaints
}
