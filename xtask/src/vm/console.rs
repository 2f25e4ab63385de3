//! Whether the kernel of a VM was content: no warning, no oops, no DMA fault that nobody announced.
//!
//! A test announces faults by writing `coiommu-test: faults from 0x… to 0x…` to /dev/kmsg before a device does the access:
//! any number of them may follow, from the first of these bytes to the last, until it writes
//! `coiommu-test: no more faults from 0x… to 0x…`.

use std::ops::RangeInclusive;

/// What a kernel writes when something is wrong with it.
const TROUBLE: &[&str] = &[
    "BUG: ",
    "Call Trace:",
    "INFO: rcu",
    "INFO: task ",
    "Kernel panic",
    "Oops: ",
    "general protection fault",
    "soft lockup",
];

const ANNOUNCED: &str = "coiommu-test: faults ";
const ENDED: &str = "coiommu-test: no more faults ";

/// How the kernel says that it left lines out, for there were too many of a kind.
const LEFT_OUT: &str = " callbacks suppressed";

/// The lines that a kernel should not have written.
pub(crate) fn complaints(console: &str) -> Vec<&str> {
    let mut announced = Vec::new();
    console.lines().map(str::trim_end).filter(|line| !is_fine(line, &mut announced)).collect()
}

/// Whether a line is no reason to complain, where some faults are announced.
fn is_fine(line: &str, announced: &mut Vec<RangeInclusive<u64>>) -> bool {
    if let Some((_, text)) = line.split_once(ANNOUNCED) {
        range(text).map(|range| announced.push(range)).is_some()
    } else if let Some((_, text)) = line.split_once(ENDED) {
        let ended = range(text).and_then(|range| announced.iter().position(|one| *one == range));
        ended.map(|at| announced.swap_remove(at)).is_some()
    } else if let Some(at) = fault(line) {
        at.is_some_and(|at| announced.iter().any(|range| range.contains(&at)))
    } else if line.contains(LEFT_OUT) {
        // They may have been faults.
        !announced.is_empty()
    } else {
        !is_warning(line) && !TROUBLE.iter().any(|trouble| line.contains(trouble))
    }
}

/// Whether a line is the first of a kernel's warning, in the words of 6.12, of newer kernels, or of the lock checker.
/// Others may have the word in their text.
fn is_warning(line: &str) -> bool {
    line.split_once("WARNING: ")
        .is_some_and(|(_, what)| what.starts_with("CPU: ") || what.contains(", CPU#") || what.starts_with("possible "))
}

/// The range that an announcement is about.
fn range(text: &str) -> Option<RangeInclusive<u64>> {
    Some(hex_after(text, "from 0x")?..=hex_after(text, " to 0x")?)
}

/// Where a DMA fault was, if a line tells of one; `Some(None)` if it does not say which.
fn fault(line: &str) -> Option<Option<u64>> {
    if line.contains("DMAR: [") && line.contains("fault") {
        Some(hex_after(line, "fault addr 0x"))
    } else if line.contains("AMD-Vi: Event logged [") {
        Some(hex_after(line, " address=0x"))
    } else {
        None
    }
}

/// The hexadecimal number that follows a text.
fn hex_after(line: &str, text: &str) -> Option<u64> {
    let (_, rest) = line.split_once(text)?;
    let digits = rest.split(|c: char| !c.is_ascii_hexdigit()).next()?;
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_announced_by_address() {
        let announced = "[    9.1] coiommu-test: faults from 0x80001000 to 0x80001fff\n";
        let write = "[    9.2] DMAR: [DMA Write NO_PASID] Request device [00:04.0] fault addr 0x80001000 [fault reason 0x05] \
                     PTE Write access is not set\n";
        let read = write.replace("0x80001000", "0x80001ffc").replace("Write", "Read");
        assert_eq!(
            complaints(&[announced, write, &read, "DMAR: DRHD: handling fault status reg 3\n"].concat()),
            [""; 0]
        );
        assert_eq!(complaints(&[write, announced].concat()), [write.trim_end()], "not announced before");
        let elsewhere = write.replace("0x80001000", "0x80002000");
        assert_eq!(complaints(&[announced, &elsewhere].concat()), [elsewhere.trim_end()]);
        let amd = "AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000c address=0x80001000 flags=0x0020]";
        assert_eq!(complaints(&[announced, amd].concat()), [""; 0]);
        assert_eq!(complaints(amd), [amd]);
        let unknown = "DMAR: [INTR-REMAP] Request device [00:04.0] fault index 0x1a";
        assert_eq!(complaints(&[announced, unknown].concat()), [unknown]);
    }

    #[test]
    fn an_announcement_ends() {
        let fault = "DMAR: [DMA Read NO_PASID] Request device [00:02.0] fault addr 0x1000 [fault reason 0x06]\n";
        let begin = "[    9.1] coiommu-test: faults from 0x1000 to 0x1fff\n";
        let end = "[    9.4] coiommu-test: no more faults from 0x1000 to 0x1fff\n";
        assert_eq!(complaints(&[begin, fault, fault, end].concat()), [""; 0]);
        assert_eq!(complaints(&[begin, fault, end, fault].concat()), [fault.trim_end()]);
        let [other_begin, other_end] = [begin, end].map(|line| line.replace("0x1", "0x2"));
        assert_eq!(complaints(&[begin, &other_begin, &other_end, fault, end].concat()), [""; 0]);
        assert_eq!(complaints(&[begin, &other_begin, end, fault, &other_end].concat()), [fault.trim_end()]);
        assert_eq!(complaints(&[begin, end, begin, fault, end].concat()), [""; 0]);
        // Who says it otherwise announces nothing.
        assert_eq!(complaints(end), [end.trim_end()]);
        assert_eq!(complaints(&begin.replace("to 0x1fff", "on")), ["[    9.1] coiommu-test: faults from 0x1000 on"]);
    }

    #[test]
    fn faults_that_were_left_out_were_announced() {
        let left_out = "[   10.7] dmar_fault: 1113 callbacks suppressed\n";
        let begin = "[    9.1] coiommu-test: faults from 0x1000 to 0x1fff\n";
        let end = "[   11.4] coiommu-test: no more faults from 0x1000 to 0x1fff\n";
        assert_eq!(complaints(&[begin, left_out, end].concat()), [""; 0]);
        assert_eq!(complaints(&[begin, end, left_out].concat()), [left_out.trim_end()]);
        assert_eq!(complaints(left_out), [left_out.trim_end()]);
    }

    #[test]
    fn a_kernel_in_trouble_is_heard() {
        for line in [
            "[    4.1] WARNING: drivers/vfio/vfio_iommu_type1.c:1 at vfio_unmap+0x1/0x2 [vfio], CPU#0: hardware/71",
            "[    4.1] WARNING: possible circular locking dependency detected",
            "[    4.1]  Call Trace:",
            "[    4.1] WARNING: CPU: 0 PID: 1 at drivers/vfio/vfio_iommu_type1.c:1",
            "[    4.1] BUG: kernel NULL pointer dereference, address: 0000000000000010",
            "[    4.1] Oops: 0002 [#1] PREEMPT SMP NOPTI",
            "[   64.1] INFO: task hardware:71 blocked for more than 120 seconds.",
        ] {
            assert_eq!(complaints(&format!("[ 1.0] fine\n{line}\r\n[ 5.0] fine\n")), [line]);
        }
        let fine = "PCI: Using host bridge windows from ACPI; if necessary, use \"pci=nocrs\" and report a bug\n\
                    DMAR: No RMRR found\n\
                    process 'x' set WARNING: this is deprecated\n\
                    DMAR: Intel(R) Virtualization Technology for Directed I/O\n";
        assert_eq!(complaints(fine), [""; 0]);
    }
}
