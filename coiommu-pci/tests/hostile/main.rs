//! Guests that mean harm, against a complete device with its workers' threads: no panic, no wait past its bound, no growth,
//! few logs, and nothing mapped at the end.
//!
//! `COIOMMU_STRESS_SECONDS` says how long the storm lasts (3 unless set).

mod host;
#[path = "../../examples/vmm/vmm.rs"]
#[allow(dead_code, reason = "this guest has no use for its endpoint")]
mod vmm;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use coiommu_dtt::PAGE_SIZE;
use coiommu_pci::Bar;
use fastrand::Rng;
use host::{Host, MOVING, VCPUS, logged, resident};

/// A request is answered within 4 s of being taken; the rest is for a machine that is busy.
const ANSWER: Duration = Duration::from_secs(10);

#[test]
fn parks_without_end_delay_a_forced_unpin_and_nothing_else() {
    let host = Host::new();
    host.activate_honestly();
    assert!(host.map(0, 0x900));
    let before = resident();
    for _ in 0..1 << 20 {
        host.command(2);
    }
    host.unmap(0x900);
    let start = Instant::now();
    let (report, hold) = host.unpin(0x900, 1);
    assert_eq!((report.parked, hold.is_none()), (1, true));
    assert!(start.elapsed() < ANSWER);
    assert!(host.map(1, 0x901), "pins go on");
    host.command(0);
    assert_eq!(host.vmm.endpoint.iommu.mappings(), 0, "a drain ignores parks");
    host.activate_honestly();
    assert!(host.map(0, 0x900));
    host.unmap(0x900);
    assert!(host.unpin(0x900, 1).0.may_be_taken(), "and ends them");
    assert!(resident() < before + (8 << 20));
}

#[test]
fn batches_that_cannot_be_are_answered() {
    let host = Host::new();
    host.activate_honestly();
    for pages in [u64::MAX, u64::MAX / 8, 1 << 48, 1 << 32] {
        // The list is as long as RAM goes, then nothing.
        host.write(0x80_0000, &[0x28, pages].map(u64::to_le_bytes).concat());
        let start = Instant::now();
        host.ask(2, 1 << 63 | 0x80_0000);
        assert!(start.elapsed() < ANSWER, "{pages} pages");
    }
    for word in [1 << 63, u64::MAX, 1, 0x28, 0xffff_ffff_ffff_0028 & !(1 << 63)] {
        host.ask(3, word);
    }
    host.command(0);
    assert_eq!(host.vmm.endpoint.iommu.mappings(), 0);
}

#[test]
fn tables_that_lead_nowhere_or_in_circles_pin_nothing() {
    let host = Host::new();
    const ROOT: u64 = 0x10_0000;
    // Where there is nothing, and where there is something, but no table.
    let entries = [(0, true), (0x7000_0000, true), (0xf_ffff_ffff_f000, true), (ROOT, false), (ROOT + 8, false)];
    for (entry, is_nowhere) in entries {
        host.write(ROOT, &(entry | 1).to_le_bytes().repeat(512));
        host.activate(ROOT, 4);
        for page in [0x900, 0x1000, MOVING.start, 1 << 35] {
            host.ask(0, page << 16 | 0x28);
            assert!(!is_nowhere || host.vmm.endpoint.iommu.mappings() == 0, "entries of {entry:#x}");
        }
        host.command(2);
        host.command(1);
        host.command(0);
        assert_eq!(host.vmm.endpoint.iommu.mappings(), 0, "entries of {entry:#x}");
    }
    for (root, levels) in [(0, 4), (ROOT + 1, 4), (ROOT, 0), (ROOT, 6), (ROOT, u64::MAX), (!0xfff, 4)] {
        host.activate(root, levels);
        assert!(!host.vmm.team.service().pinner().is_active(), "{root:#x}, {levels} levels");
        host.ask(0, 0x900 << 16 | 0x28);
    }
}

/// What PINNED says is the guest's own trouble: the host goes by its books.
#[test]
fn pinned_bits_that_lie_leave_nothing_mapped() {
    const PAGES: std::ops::Range<u64> = 0x900..0x940;
    const BOTH: std::ops::Range<u64> = PAGES.start..PAGES.end + 0x40;
    let (host, bytes) = (Host::new(), (BOTH.end - BOTH.start) * PAGE_SIZE);
    host.activate_honestly();
    assert!(PAGES.into_iter().all(|page| host.map(0, page)));
    // Cleared where pages are pinned, set where none are.
    for page in PAGES.step_by(2) {
        host.set_leaf(page, 1 << 30 | 1);
        host.set_leaf(page + 0x40, 1 << 31);
    }
    let (report, hold) = host.unpin(BOTH.start, 0x80);
    assert_eq!((report.busy, report.not_pinned, hold.is_none()), (0x40, 0x40, true), "what is counted is in use");
    assert!(host.map(1, PAGES.start), "it still is");
    BOTH.for_each(|page| host.set_leaf(page, 1 << 31));
    let (report, hold) = host.unpin(BOTH.start, 0x80);
    assert!(report.may_be_taken() && hold.is_some());
    assert_eq!(host.vmm.endpoint.iommu.mapped_bytes_in(BOTH.start * PAGE_SIZE, bytes), 0);
    drop(hold);
    assert!(host.map(2, PAGES.start), "that its leaf says PINNED helps nobody");
    assert!(host.vmm.endpoint.iommu.is_mapped(PAGES.start * PAGE_SIZE, PAGE_SIZE));
    host.set_leaf(PAGES.start, 0);
    host.command(0);
    assert_eq!(host.vmm.endpoint.iommu.mappings(), 0);
}

/// Doorbells ring at their offsets, at every width, and nothing else does.
#[test]
fn doorbells_ring_where_they_are() {
    let host = Host::new();
    host.activate_honestly();
    assert!(host.map(0, 0x900));
    for width in [1, 2, 4, 8, 3] {
        for offset in 0x18..Bar::SIZE {
            host.vmm.write_bar0(offset, &[0xff; 8][..width]);
        }
    }
    assert!(host.map(3, 0x901), "it goes on");
    assert_eq!(host.vmm.team.service().failure(), None);
    host.command(0);
    assert_eq!(host.vmm.endpoint.iommu.mappings(), 0);
}

/// Everything at once: each vCPU writes what it likes into slots, tables, batches and registers, while the host takes pages
/// back and RAM comes and goes.
#[test]
fn a_storm_leaves_nothing_behind() {
    let seconds = std::env::var("COIOMMU_STRESS_SECONDS").map_or(3, |text| text.parse().expect("a number of seconds"));
    let host = Host::new();
    host.activate_honestly();
    let (over, start) = (AtomicBool::new(false), Instant::now());
    let (mut before, mut peak) = (0, 0);
    thread::scope(|scope| {
        for vcpu in 0..VCPUS {
            let (host, over) = (&host, &over);
            scope.spawn(move || {
                let mut rng = Rng::new();
                while !over.load(Relaxed) {
                    host.harm(vcpu, &mut rng);
                }
            });
        }
        let mut rng = Rng::new();
        while start.elapsed() < Duration::from_secs(seconds) {
            let (_report, _hold) = host.unpin(rng.u64(0..0x4000), rng.u64(1..0x800));
            host.move_ram(&mut rng);
            // Once all memory was touched.
            if start.elapsed() > Duration::from_secs(seconds) / 3 {
                if before == 0 {
                    before = resident();
                }
                peak = peak.max(resident());
            }
        }
        over.store(true, Relaxed);
    });
    host.wait_for_silence(ANSWER);
    assert_eq!(host.vmm.team.service().failure(), None);
    let counters = host.vmm.team.service().pinner().counters();
    println!("{} B, then {} B at most; {} log lines; {counters:?}", before, peak, logged());
    host.command(0);
    assert_eq!(host.vmm.endpoint.iommu.mappings(), 0);
    assert!(peak < before + (16 << 20), "from {before} to {peak} bytes");
    // Each kind is told of at powers of two.
    assert!(logged() < 500, "{} log lines", logged());
    assert_eq!(counters.anomalies, 0);
}
