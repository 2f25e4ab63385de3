//! An nvme that is driven from four vCPUs, while the host takes back what it can, as often as it can.
//!
//! `COIOMMU_STRESS_SECONDS` says how long (60 unless set); `COIOMMU_STRESS_SEED` repeats the choices of a run, though not what
//! threads make of them.

use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use coiommu_dtt::PAGE_SIZE;
use fastrand::Rng;

use crate::nvme::{BLOCK, Nvme, QUEUE_BYTES, Queue};
use crate::vm::{FREE, Vm};

const VCPUS: u16 = 4;
const RAM: u64 = 256 << 20;
/// Where queues are, and buffers, of which the host takes.
const QUEUES: u64 = FREE;
const BUFFERS: std::ops::Range<u64> = FREE + 0x100..FREE + 0x4100;
const PAGE_BLOCKS: u32 = 8;
/// Pages of the namespace that a vCPU has for itself.
const PAGES_EACH: u32 = 256;
const _: () = assert!(PAGE_BLOCKS as u64 * BLOCK == PAGE_SIZE);

/// The controller with its queues, from one activation to the next deactivation.
struct Running {
    nvme: Nvme,
    admin_pages: Vec<u64>,
    queues: Vec<std::sync::Mutex<Queue>>,
}

impl Running {
    fn start(vm: &Vm) -> Self {
        vm.activate();
        let bytes = QUEUE_BYTES as u64;
        let pages: Vec<u64> = (QUEUES..QUEUES + (u64::from(VCPUS) + 1) * bytes / PAGE_SIZE).collect();
        assert!(vm.map(0, &pages));
        let at = |queue: u64| QUEUES * PAGE_SIZE + queue * bytes;
        let (nvme, mut admin) = Nvme::start(vm.device().clone(), &vm.memory, at(0));
        let queue = |id: u16| nvme.make_queue(&mut admin, &vm.memory, id, at(id.into())).into();
        let queues = (1..=VCPUS).map(queue).collect();
        Self { nvme, admin_pages: pages, queues }
    }

    /// No DMA any more, and then nothing mapped.
    fn stop(self, vm: &Vm) {
        drop(self.nvme);
        vm.unmap(&self.admin_pages);
        vm.deactivate();
        assert_eq!(vm.pinner().mappings(), 0);
    }
}

/// Pages that were moved.
#[derive(Debug, Default)]
struct Moved {
    read: AtomicU64,
    written: AtomicU64,
}

/// What a vCPU does: writes pages of random bytes to its part of the disk, and reads pages back.
fn run_vcpu(vm: &Vm, running: &RwLock<Option<Running>>, vcpu: u16, seed: u64, over: &AtomicBool, moved: &Moved) {
    let mut rng = Rng::with_seed(seed);
    let mut written: Vec<Option<u64>> = vec![None; PAGES_EACH as usize];
    // A buffer is one vCPU's at a time.
    let share = (BUFFERS.end - BUFFERS.start) / u64::from(VCPUS);
    let first = BUFFERS.start + share * u64::from(vcpu);
    let buffers = first..first + share;
    while !over.load(Relaxed) {
        let guard = running.read().unwrap();
        let Running { nvme, queues, .. } = guard.as_ref().unwrap();
        let queue = &mut queues[usize::from(vcpu)].lock().unwrap();
        let count = if rng.u8(..) < 30 { rng.usize(8..64) } else { rng.usize(1..4) };
        let mut pages: Vec<u64> = (0..count).map(|_| rng.u64(buffers.clone())).collect();
        pages.sort_unstable();
        pages.dedup();
        if !vm.map(vcpu.into(), &pages) {
            continue;
        }
        for &page in &pages {
            let place = rng.u32(0..PAGES_EACH);
            let block = (u32::from(vcpu) * PAGES_EACH + place) * PAGE_BLOCKS;
            let known = written[place as usize];
            if let Some(seed) = known.filter(|_| rng.bool()) {
                nvme.read(queue, &vm.memory, page * PAGE_SIZE, block, PAGE_BLOCKS);
                assert!(vm.bytes(page, 0x1000) == random_page(seed), "vcpu {vcpu}: bad bytes at {page:#x}");
                moved.read.fetch_add(1, Relaxed);
            } else {
                let seed = rng.u64(..);
                vm.fill(page, &random_page(seed));
                nvme.write(queue, &vm.memory, page * PAGE_SIZE, block, PAGE_BLOCKS);
                written[place as usize] = Some(seed);
                moved.written.fetch_add(1, Relaxed);
            }
        }
        vm.unmap(&pages);
    }
}

fn random_page(seed: u64) -> Vec<u8> {
    let mut page = vec![0; 0x1000];
    Rng::with_seed(seed).fill(&mut page);
    page
}

#[test]
#[ignore = "needs an nvme behind an IOMMU"]
fn nvme_keeps_its_bytes_while_the_host_takes_pages() {
    let vm = Vm::new(&Nvme::address(), "unpin_policy=lru,unpin_interval=0.01,unpin_gen_threshold=0", VCPUS.into(), RAM);
    let running = RwLock::new(Some(Running::start(&vm)));
    let (over, moved, start) = (AtomicBool::new(false), Moved::default(), Instant::now());
    let seed = number_from_env("COIOMMU_STRESS_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("COIOMMU_STRESS_SEED={seed}");
    let (mut unpinned, mut taken, mut parks, mut rounds) = (0, 0, 0, 0);
    thread::scope(|scope| {
        let _over = EndOnDrop(&over);
        for vcpu in 0..VCPUS {
            let (vm, running, over, moved) = (&vm, &running, &over, &moved);
            scope.spawn(move || {
                let _over = EndOnDrop(over);
                run_vcpu(vm, running, vcpu, seed ^ u64::from(vcpu + 1), over, moved);
            });
        }
        let mut rng = Rng::with_seed(seed);
        while start.elapsed() < seconds() && !over.load(Relaxed) {
            match rng.u8(0..100) {
                0 => {
                    let mut running = running.write().unwrap();
                    running.take().unwrap().stop(&vm);
                    *running = Some(Running::start(&vm));
                    rounds += 1;
                }
                1..20 => {
                    vm.park();
                    thread::sleep(Duration::from_millis(rng.u64(0..20)));
                    vm.unpark();
                    parks += 1;
                }
                _ => {
                    let first = rng.u64(BUFFERS.start..BUFFERS.end - 0x200);
                    let pages = first..first + rng.u64(1..0x200);
                    let (report, hold) = vm.unpin(pages.clone());
                    assert_eq!(report.may_be_taken(), hold.is_some());
                    unpinned += report.released;
                    if hold.is_some() {
                        taken += pages.end - pages.start;
                        vm.take(pages);
                    }
                }
            }
            thread::sleep(Duration::from_millis(rng.u64(0..20)));
        }
    });
    running.into_inner().unwrap().unwrap().stop(&vm);
    let counters = vm.pinner().counters();
    println!(
        "{moved:?} pages, {unpinned} unpinned by force, {taken} taken, {parks} parks, {rounds} times deactivated and \
         activated; {counters:?}"
    );
    // A few a second, where there are thousands.
    let least = seconds().as_secs() * 10;
    assert!(moved.read.load(Relaxed) > least && moved.written.load(Relaxed) > least && counters.pages_pinned > least);
    assert!(unpinned > 0 && taken > 0 && parks > 0 && rounds > 0 && counters.pages_unpinned_idle > 0);
    assert_eq!(counters.requests_pinned + counters.requests_failed, vm.requests.load(Relaxed));
    assert_eq!((counters.requests_refused, counters.requests_timed_out), (0, 0));
    vm.end();
}

fn seconds() -> Duration {
    Duration::from_secs(number_from_env("COIOMMU_STRESS_SECONDS").unwrap_or(60))
}

fn number_from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
