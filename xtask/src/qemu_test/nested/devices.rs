//! The devices that inner guests are given, and whether they have done what they should.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::qemu_test::data;

/// What inner guests write to the nvme, in MiB: the first bytes of the source.
pub(super) const WRITTEN: u64 = 50;
/// What they download by each network card.
pub(super) const DOWNLOAD: u64 = 16;
/// What they read of the disk behind the USB controller.
const STICK: u64 = 4;
/// The outer VM's image of the nvme.
pub(super) const NVME: &str = "nvme.img";

/// How often each vector of the USB controller is to interrupt (`linux-guest/tests/vectors.c`).
const VECTORS: [&str; 4] = ["vector-0", "vector-1", "vector-2", "vector-3"];
const TIMES: u64 = 10;

/// What the job of inner guests has to know: shell variables.
pub(super) fn variables() -> String {
    format!("written={WRITTEN}\ndownload={DOWNLOAD}\nstick={STICK}\n")
}

/// What is wrong with what an inner guest has done with all of them, by what it said.
pub(super) fn complaints(lines: &[String]) -> anyhow::Result<Vec<String>> {
    let mut complaints = Vec::new();
    for (device, mib) in [("nvme", WRITTEN), ("e1000e", DOWNLOAD), ("e1000", DOWNLOAD), ("usb", STICK)] {
        complaints.extend(wrong_sums(lines, device, mib, 1)?);
    }
    complaints.extend(data::wrong_bytes(NVME, 0, WRITTEN << 20)?);
    complaints.extend(Interrupts::of(lines).complaints());
    Ok(complaints)
}

/// What is wrong with the sums of what came by a device, so many times.
pub(super) fn wrong_sums(lines: &[String], device: &str, mib: u64, times: usize) -> anyhow::Result<Option<String>> {
    let sum = format!("sum {device} {}", data::sum(mib)?);
    let right = lines.iter().filter(|line| **line == sum).count();
    Ok((right != times).then(|| format!("{mib} MiB by the {device} were right {right} times, not {times}: '{sum}'")))
}

/// How often devices have interrupted: by their kind and address, then by who was interrupted.
#[derive(Debug, Default)]
pub(super) struct Interrupts(BTreeMap<&'static str, BTreeMap<String, u64>>);

/// The kinds, in words of /proc/interrupts.
const KINDS: [(&str, &str); 4] = [
    ("nvme by MSI-X", "PCI-MSIX-0000:00:03.0 "),
    ("e1000e by MSI-X", "PCI-MSIX-0000:00:05.0 "),
    ("usb by MSI", "PCI-MSI-0000:00:07.0 "),
    ("e1000 by INTx", "-fasteoi eth0"),
];

impl Interrupts {
    /// The most that were counted of each, as drivers come and go.
    pub(super) fn of(lines: &[String]) -> Self {
        let mut all = Self::default();
        for line in lines {
            let Some((count, what)) = line.strip_prefix("irq ").and_then(|line| line.split_once(' ')) else { continue };
            let Some((kind, _)) = KINDS.iter().find(|(_, words)| what.contains(words)) else { continue };
            let who = what.rsplit(' ').next().unwrap_or_default().to_owned();
            let most = all.0.entry(*kind).or_default().entry(who).or_default();
            *most = count.parse().map_or(*most, |count| (*most).max(count));
        }
        all
    }

    fn count(&self, kind: &str, who: &str) -> u64 {
        self.0.get(kind).and_then(|kind| kind.get(who)).copied().unwrap_or(0)
    }

    fn complaints(&self) -> Vec<String> {
        let wanted = [("e1000e by MSI-X", "eth0-rx-0"), ("e1000e by MSI-X", "eth0-tx-0"), ("usb by MSI", "xhci_hcd")];
        let wanted = wanted.into_iter().chain([("e1000 by INTx", "eth0"), ("nvme by MSI-X", "nvme0q0")]);
        let mut complaints: Vec<_> = wanted
            .filter(|(kind, who)| self.count(kind, who) == 0)
            .map(|(kind, who)| format!("{who} had no interrupts of the {kind}"))
            .collect();
        if self.count("nvme by MSI-X", "nvme0q1") + self.count("nvme by MSI-X", "nvme0q2") == 0 {
            complaints.push("no queue of the nvme had interrupts".to_owned());
        }
        for vector in VECTORS {
            let count = self.count("usb by MSI", vector);
            if count != TIMES {
                complaints.push(format!("the usb has interrupted {count} times by {vector}, not {TIMES}"));
            }
        }
        complaints
    }

    /// A line each kind.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        for (kind, counts) in &self.0 {
            let counts: Vec<_> = counts.iter().map(|(who, count)| format!("{who} {count}")).collect();
            let _infallible = writeln!(text, "{kind:16} {}", counts.join(", "));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = "irq 12 IR-PCI-MSIX-0000:00:03.0 0-edge nvme0q0
irq 5 IR-PCI-MSIX-0000:00:03.0 2-edge nvme0q2
irq 9 PCI-MSIX-0000:00:05.0 0-edge eth0-rx-0
irq 700 PCI-MSIX-0000:00:05.0 0-edge eth0-rx-0
irq 20 PCI-MSIX-0000:00:05.0 1-edge eth0-tx-0
irq 14 IO-APIC 22-fasteoi eth0
irq 3 IO-APIC 9-fasteoi acpi
irq 8 PCI-MSI-0000:00:07.0 0-edge xhci_hcd
irq 10 PCI-MSI-0000:00:07.0 0-edge vector-0
irq 10 PCI-MSI-0000:00:07.0 1-edge vector-1
irq 10 PCI-MSI-0000:00:07.0 2-edge vector-2
irq 10 PCI-MSI-0000:00:07.0 3-edge vector-3";

    fn complaints_without(what: &str) -> Vec<String> {
        let lines: Vec<_> = LINES.lines().filter(|line| !line.contains(what)).map(String::from).collect();
        Interrupts::of(&lines).complaints()
    }

    #[test]
    fn each_device_has_to_interrupt() {
        assert_eq!(complaints_without("nothing"), [""; 0]);
        for who in ["nvme0q2", "nvme0q0", "eth0-tx-0", "22-fasteoi", "xhci_hcd", "vector-3"] {
            assert_eq!(complaints_without(who).len(), 1, "{who}");
        }
        assert_eq!(complaints_without("vector-").len(), 4);
        let of_all = Interrupts::of(&LINES.lines().map(String::from).collect::<Vec<_>>());
        assert!(of_all.table().contains("e1000e by MSI-X  eth0-rx-0 700, eth0-tx-0 20\n"), "{}", of_all.table());
    }
}
