//! A complete device, as the example wires it up, under a guest of four vCPUs whose endpoint does DMA all the time, while
//! idle pages are taken back, ranges are taken by force, and the guest parks.
//!
//! `COIOMMU_STRESS_SECONDS` says how long (3 unless set).

#[path = "../../examples/vmm/driver.rs"]
mod driver;
#[path = "../../examples/vmm/vmm.rs"]
mod vmm;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use coiommu_dtt::{Gfn, Gpa, PAGE_SIZE};
use coiommu_pin::stats::Counters;
use driver::Driver;
use fastrand::Rng;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap};
use vmm::{Memory, Vmm};

const VCPUS: usize = 4;
const RAM: usize = 64 << 20;
/// Where buffers are, in gfns.
const BUFFERS: Range<u64> = 0x1000..0x3000;
/// Buffers are used from one part of it for a second, then from the next, so that idle pages go.
const PARTS: u64 = 4;
/// What the host takes is in the first parts only, or nothing would be left for that.
const TAKEN: Range<u64> = BUFFERS.start..BUFFERS.start + (BUFFERS.end - BUFFERS.start) / 2;
/// What a vCPU has of each page for itself.
const SHARE: u64 = PAGE_SIZE / VCPUS as u64;
const ACCESS: usize = 32;

/// What the guest saw.
#[derive(Default)]
struct Tally {
    granted: AtomicU64,
    denied: AtomicU64,
    accesses: AtomicU64,
    taken: AtomicU64,
    parks: AtomicU64,
}

struct Guest {
    vmm: Arc<Vmm>,
    memory: Memory,
    driver: Driver,
    tally: Tally,
    over: AtomicBool,
}

impl Guest {
    fn new() -> Self {
        let ram = Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), RAM, None).unwrap());
        let memory = Memory::new(GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&ram)]).unwrap());
        let bar2 = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap());
        let vmm = Arc::new(Vmm::new(&ram, &memory, &bar2, "00:05.0".parse().unwrap(), VCPUS).unwrap());
        let driver = Driver::probe(&vmm, &memory, &bar2, VCPUS).unwrap();
        Self { vmm, memory, driver, tally: Tally::default(), over: AtomicBool::new(false) }
    }

    fn run_vcpu(&self, vcpu: usize) {
        let (mut rng, start) = (Rng::new(), Instant::now());
        while !self.over.load(Relaxed) {
            let part = (BUFFERS.end - BUFFERS.start) / PARTS;
            let first = BUFFERS.start + start.elapsed().as_secs() % PARTS * part;
            let buffers = first..first + part;
            let hot = if rng.bool() { buffers.clone() } else { first..first + 64 };
            let mut pages: Vec<_> = match rng.u8(0..20) {
                0 => (0..rng.u64(500..2000)).map(|_| rng.u64(buffers.clone())).collect(),
                1..8 => vec![rng.u64(hot)],
                _ => (0..rng.u64(2..40)).map(|_| rng.u64(hot.clone())).collect(),
            };
            pages.sort_unstable();
            pages.dedup();
            let pages: Vec<_> = pages.into_iter().map(|page| Gfn::new(page).unwrap()).collect();
            if self.driver.dma_map(vcpu, &pages).is_err() {
                self.tally.denied.fetch_add(1, Relaxed);
                continue;
            }
            self.tally.granted.fetch_add(1, Relaxed);
            for page in &pages {
                self.use_page(vcpu, page.gpa(), &mut rng);
            }
            self.driver.dma_unmap(&pages).unwrap();
            if rng.u8(..) == 0 {
                self.park();
            }
        }
    }

    /// The CPU writes and the device reads, the device writes and the CPU reads.
    fn use_page(&self, vcpu: usize, page: Gpa, rng: &mut Rng) {
        let place = page.raw() + SHARE * vcpu as u64 + rng.u64(0..SHARE - ACCESS as u64);
        let [for_device, for_cpu] = [(); 2].map(|()| [(); ACCESS].map(|()| rng.u8(..)));
        let mut seen = [0; ACCESS];
        self.memory.memory().write_slice(&for_device, GuestAddress(place)).unwrap();
        self.vmm.endpoint.dma(|iommu| iommu.read(place, &mut seen)).unwrap();
        assert_eq!(seen, for_device, "vcpu {vcpu}: what the device reads at {place:#x}");
        self.vmm.endpoint.dma(|iommu| iommu.write(place, &for_cpu)).unwrap();
        self.memory.memory().read_slice(&mut seen, GuestAddress(place)).unwrap();
        assert_eq!(seen, for_cpu, "vcpu {vcpu}: what the CPU reads at {place:#x}");
        self.tally.accesses.fetch_add(2, Relaxed);
    }

    fn park(&self) {
        let command = |command: u64| self.vmm.write_bar0(0x08, &command.to_le_bytes());
        command(2);
        thread::yield_now();
        command(3);
        self.tally.parks.fetch_add(1, Relaxed);
    }

    /// The host takes memory, where nobody uses it.
    fn take(&self, rng: &mut Rng) {
        let first = rng.u64(TAKEN);
        let pages = rng.u64(1..100);
        let reclaimer = self.vmm.team.reclaimer();
        let (report, hold) = reclaimer.unpin_and_wait(Gpa::new(first * PAGE_SIZE), pages * PAGE_SIZE).unwrap();
        assert_eq!(report.may_be_taken(), hold.is_some());
        assert_eq!(report.released + report.not_pinned + report.busy + report.parked, pages);
        if let Some(_hold) = hold {
            for page in first..first + pages {
                assert!(
                    !self.vmm.endpoint.iommu.is_mapped(page * PAGE_SIZE, PAGE_SIZE),
                    "{page:#x} is held, and mapped"
                );
            }
            self.tally.taken.fetch_add(report.released, Relaxed);
        }
    }

    fn check_counters(&self, time: Duration) {
        let pinner = self.vmm.team.service().pinner();
        let counters = pinner.counters();
        let Tally { granted, denied, accesses, taken, parks } = &self.tally;
        let [granted, denied, accesses, taken, parks] =
            [granted, denied, accesses, taken, parks].map(|n| n.load(Relaxed));
        println!(
            "{granted} maps, {denied} denied, {accesses} accesses, {taken} pages taken, {parks} parks; {counters:?}"
        );
        assert!([granted, accesses, taken, parks].iter().all(|&n| n > 0));
        assert_eq!(counters.requests_pinned + counters.requests_failed, self.driver.requests.load(Relaxed));
        assert!(counters.pages_unpinned_idle > 0 || time < Duration::from_secs(10), "ticks found nothing");
        assert_eq!(counters.pages_asked, self.driver.pages_asked.load(Relaxed));
        // Some failed, but when the guest looked, another vCPU had got the page.
        assert!(counters.requests_failed >= denied);
        assert_eq!((counters.requests_refused, counters.requests_timed_out, counters.anomalies), (0, 0, 0));
        assert_eq!(pinner.latency().len(), self.driver.requests.load(Relaxed));
        let unpinned_adds_up = || {
            let Counters { pages_unpinned, pages_unpinned_idle, pages_unpinned_forced, .. } = pinner.counters();
            pages_unpinned == pages_unpinned_idle + pages_unpinned_forced
        };
        // A tick may be in the middle of it.
        assert!((0..1000).any(|_| unpinned_adds_up() || pause()), "{:?}", pinner.counters());
        let is_pinned = |&page: &u64| {
            let leaf = self.driver.table.is_pinned(&*self.memory.memory(), Gfn::new(page).unwrap());
            leaf.is_ok_and(|is_pinned| is_pinned)
        };
        let iommu = &self.vmm.endpoint.iommu;
        let sides_agree = || {
            let pinned = BUFFERS.filter(is_pinned).count() as u64;
            let mapped = iommu.mapped_bytes_in(0, RAM as u64) / PAGE_SIZE;
            (pinned, pinned) == (mapped, pinner.pinned_pages())
        };
        assert!((0..1000).any(|_| sides_agree() || pause()), "guest, pinner and IOMMU do not agree");
    }
}

#[test]
fn a_guest_of_four_vcpus_is_served() {
    let seconds = std::env::var("COIOMMU_STRESS_SECONDS").map_or(3, |text| text.parse().expect("a number of seconds"));
    let guest = Guest::new();
    let start = Instant::now();
    thread::scope(|scope| {
        for vcpu in 0..VCPUS {
            let guest = &guest;
            scope.spawn(move || {
                // Whoever fails ends the others.
                let over = EndOnDrop(&guest.over);
                guest.run_vcpu(vcpu);
                drop(over);
            });
        }
        let _over = EndOnDrop(&guest.over);
        let mut rng = Rng::new();
        while start.elapsed() < Duration::from_secs(seconds) && !guest.over.load(Relaxed) {
            guest.take(&mut rng);
            thread::sleep(Duration::from_millis(1));
        }
    });
    let iommu = &guest.vmm.endpoint.iommu;
    assert_eq!(iommu.fault_count(), 0);
    guest.check_counters(start.elapsed());
    let Guest { vmm, driver, .. } = guest;
    driver.remove();
    let pinner = vmm.team.service().pinner();
    assert_eq!((vmm.endpoint.iommu.mappings(), pinner.pinned_pages()), (0, 0));
    assert_eq!(pinner.counters().pages_pinned, pinner.counters().pages_unpinned);
    assert!(vmm.endpoint.dma(|iommu| iommu.read(0, &mut [0])).is_err(), "its bus mastering is off");
    assert_eq!(vmm.team.service().failure(), None);
    vmm.reset();
    vmm.shut_down().unwrap();
}

fn pause() -> bool {
    thread::sleep(Duration::from_millis(1));
    false
}

struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
