//! What is pinned over time, beside what it is when QEMU pins it all; and the kernel's books agree with the server's.

use std::fmt::Write as _;

use anyhow::{Context as _, bail};

use super::bed::Bed;
use crate::qemu_test::nothing;

/// A guest's life, once with each. Who measures at rest reads the server's figures again after, until they stay.
const JOB: &str = "
memory=1024
live() {
    echo phase boot
    up
    echo phase drivers
    if [ $1 = tracked ]; then inner coiommu_up; fi
    echo phase load
    inner load_devices
    sleep 20
    inner rest
    echo phase rest
    sleep 10
}
at_rest() {
    for n in $(seq 20); do
        before=$(figures pinned_bytes)
        set -- $(memory_of $server)
        if [ $before = $(figures pinned_bytes) ]; then break; fi
    done
    echo at rest $before $1 $2
}

serve --policy unpin_policy=lru,unpin_interval=1 --without-driver hold
start $(tracked)
samples_begin
live tracked
at_rest
inner net_down e1000e
off
samples_end
gone $server

echo whole plain
start $(plain)
samples_begin
live plain
off
samples_end
";

/// Of 1 GiB, how much a guest with CoIOMMU may have pinned under load, at most: a quarter.
const MOST: u64 = 256 << 20;

pub(super) fn run(bed: &Bed<'_>) -> anyhow::Result<()> {
    let ended = bed.boot(JOB, &nothing)?;
    let begin = ended.lines.iter().position(|line| line == "whole plain").unwrap_or(ended.lines.len());
    let (tracked, plain) = ended.lines.split_at(begin);
    let (tracked, plain) = (Sample::of(tracked)?, Sample::of(plain)?);
    let mut complaints = Vec::new();
    for phase in ["boot", "drivers", "load", "rest"] {
        print!("{}", table(phase, &tracked, &plain));
    }
    for phase in ["load", "rest"] {
        let most = in_phase(&tracked, phase).map(|sample| sample.pinned).max();
        match most {
            Some(most) if (1..=MOST).contains(&most) => {}
            other => complaints.push(format!("pinned bytes at {phase}: {other:?}, not up to {MOST}")),
        }
    }
    let whole = in_phase(&plain, "load").map(|sample| sample.locked[1]).min();
    if whole.is_none_or(|kib| kib < 1 << 20) {
        complaints.push(format!("QEMU alone has only locked {whole:?} KiB"));
    }
    complaints.extend(at_rest(&ended.lines)?);
    bed.judge(&ended, &complaints, "what is pinned is what is used, and the kernel counts as much")
}

/// What there is at a moment.
#[derive(Debug, PartialEq, Eq)]
struct Sample {
    phase: String,
    /// In hundredths of a second.
    at: u64,
    /// In bytes.
    pinned: u64,
    mappings: u64,
    /// What the kernel counts as locked by the server and by QEMU, in KiB.
    locked: [u64; 2],
}

impl Sample {
    /// Those among a job's lines.
    fn of(lines: &[String]) -> anyhow::Result<Vec<Self>> {
        let (mut phase, mut samples) = ("", Vec::new());
        for line in lines {
            if let Some(begins) = line.strip_prefix("phase ") {
                phase = begins;
            } else if let Some(sample) = line.strip_prefix("sample ") {
                samples.push(Self::read(phase, sample).with_context(|| format!("no sample: {line}"))?);
            }
        }
        Ok(samples)
    }

    fn read(phase: &str, line: &str) -> Option<Self> {
        let (at, rest) = line.split_once(' ')?;
        let numbers = rest.split(' ').map(|word| word.parse().ok()).collect::<Option<Vec<u64>>>()?;
        let &[pinned, mappings, locked, _, _, _, of_qemu, _, _, _] = &numbers[..] else { return None };
        Some(Self {
            phase: phase.to_owned(),
            at: at.replace('.', "").parse().ok()?,
            pinned,
            mappings,
            locked: [locked, of_qemu],
        })
    }
}

fn in_phase<'a>(samples: &'a [Sample], phase: &'a str) -> impl Iterator<Item = &'a Sample> {
    samples.iter().filter(move |sample| sample.phase == phase)
}

/// A phase of both lives, side by side.
fn table(phase: &str, tracked: &[Sample], plain: &[Sample]) -> String {
    let mut text = format!("{phase:8} s  pinned KiB  mappings  VmLck KiB | QEMU alone: VmLck KiB\n");
    let start = in_phase(tracked, phase).next().map_or(0, |sample| sample.at);
    let start_of_plain = in_phase(plain, phase).next().map_or(0, |sample| sample.at);
    for sample in in_phase(tracked, phase) {
        let since = sample.at - start;
        // As long after the phase's begin.
        let other = in_phase(plain, phase).filter(|other| other.at - start_of_plain <= since).last();
        let other = other.map_or_else(|| "-".to_owned(), |other| other.locked[1].to_string());
        let Sample { pinned, mappings, locked, .. } = sample;
        let _infallible =
            writeln!(text, "{:10} {:11} {mappings:9} {:10} | {other:>21}", since / 100, pinned / 1024, locked[0],);
    }
    text
}

/// What is wrong with the kernel's books of a server at rest.
fn at_rest(lines: &[String]) -> anyhow::Result<Vec<String>> {
    let line = lines.iter().find_map(|line| line.strip_prefix("at rest ")).context("it did not come to rest")?;
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let &[pinned, locked, pin] = &numbers[..] else { bail!("at rest it has said {line}") };
    println!("at rest: {pinned} bytes pinned; VmLck {locked} KiB, VmPin {pin} KiB");
    let is_same = pinned > 0 && pinned == locked << 10;
    Ok((!is_same).then(|| format!("VmLck is {locked} KiB where {pinned} bytes are pinned")).into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(String::from).collect()
    }

    #[test]
    fn two_lives_are_side_by_side() {
        let tracked = lines(
            "phase boot\nsample 7.50 0 0 0 0 0 0 0 0 0 0\nphase load\nsample 9.00 8192 2 8 0 1 2 9 0 3 4\nof the guest\n\
             sample 10.25 12288 3 12 0 1 2 9 0 3 4",
        );
        let plain = lines("phase load\nsample 31.00 0 0 0 0 0 0 500 0 3 4\nsample 32.20 0 0 0 0 0 0 600 0 3 4");
        let (tracked, plain) = (Sample::of(&tracked).unwrap(), Sample::of(&plain).unwrap());
        assert_eq!(tracked.len(), 3);
        let table = table("load", &tracked, &plain);
        let rows: Vec<Vec<_>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["0", "8", "2", "8", "|", "500"]);
        assert_eq!(rows[2], ["1", "12", "3", "12", "|", "600"]);
        assert!(Sample::of(&lines("sample 7.50 0 0")).is_err());
    }

    #[test]
    fn the_kernel_counts_what_the_server_does() {
        let complaints = |line: &str| at_rest(&lines(line)).unwrap().len();
        assert_eq!(complaints("at rest 8192 8 0"), 0);
        assert_eq!(complaints("at rest 8192 12 0"), 1);
        assert_eq!(complaints("at rest 0 0 0"), 1, "nothing was pinned, so nothing was shown");
        assert!(at_rest(&lines("at rest 8192")).is_err());
    }
}
