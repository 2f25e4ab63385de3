//! What a guest's start costs: time and memory, with each setting, beside QEMU alone.

use std::collections::BTreeMap;

use anyhow::Context as _;

use super::bed::Bed;
use crate::qemu_test::nothing;

/// In turn, so that whatever else the machine does is everybody's. A guest is at its login when its drivers are up.
const JOB: &str = "
now() { cut -d' ' -f1 /proc/uptime | tr -d .; }
# Says the most that is locked, until told not to: the kernel keeps no such figure.
peak() {
    most=0
    while [ -e /tmp/peak ]; do
        set -- $(memory_of $1) $1
        if [ $1 -gt $most ]; then most=$1; fi
        echo $most >/tmp/most
        set -- $5
        sleep 0.1
    done
}
begins() {
    rm -f /tmp/debugcon
    mkfifo /tmp/debugcon
    (
        exec 6</tmp/debugcon
        head -c 1 <&6 >/dev/null
        now >/tmp/first
        cat <&6 >/dev/null
    ) &
    start_time=$(now)
    start \"$@\" -chardev file,id=debugcon,path=/tmp/debugcon -device isa-debugcon,iobase=0x402,chardev=debugcon
}
measure() {
    setting=$1
    locker=
    case $setting in
        plain) begins $(plain) ;;
        *)
            serve --policy unpin_policy=lru,unpin_interval=1 --without-driver $setting
            locker=$server
            begins $(tracked)
            ;;
    esac
    touch /tmp/peak
    peak ${locker:-$qemu} &
    peaks=$!
    up
    if [ $setting != plain ]; then inner coiommu_up; fi
    inner 'nvme_up; net_up e1000e'
    login=$(now)
    set -- $(memory_of $qemu) $(memory_of ${locker:-none})
    rm /tmp/peak
    wait $peaks
    echo cost $memory $setting $(($(cat /tmp/first) - start_time)) $((login - start_time)) $(cat /tmp/most) $3 $7
    end KILL $qemu
    if [ $setting != plain ]; then gone $server; fi
}
for memory in 256 1024; do
    for run in 1 2 3 4 5; do
        for setting in plain pin-all hold refuse; do measure $setting; done
    done
done
";

/// What is measured of each, in the order in which it is said.
const MEASURED: [&str; 5] = ["first byte, s", "login, s", "pinned, MiB", "QEMU's RSS, MiB", "server's RSS, MiB"];

pub(super) fn run(bed: &Bed<'_>) -> anyhow::Result<()> {
    let ended = bed.boot(JOB, &nothing)?;
    let runs = Runs::of(&ended.lines)?;
    print!("{}", runs.table());
    bed.judge(&ended, &runs.complaints(), "starts cost this much")
}

/// By memory in MiB and setting: what was measured, a list a figure.
struct Runs(BTreeMap<(u32, String), [Vec<u64>; 5]>);

impl Runs {
    fn of(lines: &[String]) -> anyhow::Result<Self> {
        let mut runs = BTreeMap::<_, [Vec<u64>; 5]>::new();
        for line in lines {
            let Some(run) = line.strip_prefix("cost ") else { continue };
            let mut words = run.split(' ');
            let mut next = || words.next().with_context(|| format!("not all is there: {line}"));
            let (memory, setting) = (next()?.parse()?, next()?.to_owned());
            for figures in runs.entry((memory, setting)).or_default() {
                figures.push(next()?.parse()?);
            }
        }
        runs.values_mut().flatten().for_each(|figures| figures.sort_unstable());
        Ok(Self(runs))
    }

    fn complaints(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        for memory in [256, 1024] {
            for setting in ["plain", "pin-all", "hold", "refuse"] {
                let runs = self.0.get(&(memory, setting.to_owned())).map_or(0, |figures| figures[0].len());
                if runs != 5 {
                    complaints.push(format!("{runs} runs of {setting} with {memory} MiB, not 5"));
                }
            }
        }
        complaints
    }

    /// The medians.
    fn table(&self) -> String {
        let mut text = format!("medians, least and most; memory, setting: {}\n", MEASURED.join("; "));
        for ((memory, setting), figures) in &self.0 {
            let cells = figures.iter().zip(MEASURED).map(|(figures, what)| {
                let per = if what.ends_with(" s") { 100 } else { 1024 };
                let show = |at: usize| figures.get(at).map_or_else(|| "-".to_owned(), |figure| fixed(*figure, per));
                let last = figures.len().saturating_sub(1);
                format!("{:>8} ({}..{})", show(figures.len() / 2), show(0), show(last))
            });
            text += &format!("{memory:5} {setting:8} {}\n", cells.collect::<Vec<_>>().join(" "));
        }
        text
    }
}

/// A figure of `per`ths, to the tenth.
fn fixed(figure: u64, per: u64) -> String {
    format!("{}.{}", figure / per, figure % per * 10 / per)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_of_all_runs() {
        let run = |first: u64| format!("cost 256 plain {first} 1250 262144 358400 0");
        let lines = [30, 10, 50, 20, 40].map(run);
        let runs = Runs::of(&lines).unwrap();
        let row = runs.table();
        let row = row.lines().nth(1).unwrap();
        assert!(row.contains("0.3 (0.1..0.5)") && row.contains("12.5 (12.5..12.5)"), "{row}");
        assert!(row.contains("256.0 (256.0..256.0)") && row.contains("350.0 (350.0..350.0)"), "{row}");
        assert_eq!(runs.complaints().len(), 7, "of eight settings one was measured");
        assert!(Runs::of(&["cost 256 plain 10".to_owned()]).is_err());
    }
}
