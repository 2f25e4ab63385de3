//! What mapping costs through the pinner, beside the bare calls.

use std::ptr::NonNull;
use std::time::{Duration, Instant};

use coiommu_dtt::PAGE_SIZE;
use coiommu_pin::pinner::{PinResult, SystemClock};
use coiommu_pin::request::Scratch;
use coiommu_vfio::{Backing, DmaMapper as _};
use vm_memory::{GuestAddress, GuestMemoryBackend as _};

use crate::nvme::Nvme;
use crate::vm::{FREE, Vm};

/// Pages of one measurement; never so many that there is no room.
const PAGES: u32 = 16_384;
const RAM: u64 = 256 << 20;
const ROUNDS: usize = 3;

/// Pages in runs of `run` with as long a hole after each: none crosses a block.
fn runs(run: u64) -> Vec<std::ops::Range<u64>> {
    (0..u64::from(PAGES) / run).map(|n| FREE + n * 2 * run).map(|first| first..first + run).collect()
}

/// Times of mapping and of unmapping, by calls of the container.
fn bare(vm: &Vm, run: u64) -> [Duration; 2] {
    let start = Instant::now();
    for run in runs(run) {
        let (iova, bytes) = (run.start * PAGE_SIZE, (run.end - run.start) * PAGE_SIZE);
        let hva = NonNull::new(vm.memory.get_host_address(GuestAddress(iova)).unwrap()).unwrap();
        // SAFETY: guest memory is there as long as the VM, and is touched through vm-memory only.
        unsafe { vm.container.map(iova, Backing { hva, file: None }, bytes) }.unwrap();
    }
    let mapped = start.elapsed();
    let start = Instant::now();
    for run in runs(run) {
        let bytes = (run.end - run.start) * PAGE_SIZE;
        assert_eq!(vm.container.unmap(run.start * PAGE_SIZE, bytes), Ok(bytes));
    }
    [mapped, start.elapsed()]
}

/// The same by the pinner, for requests of 512 pages, and then by a tick: without what the guest does.
fn ours(vm: &Vm, run: u64) -> [Duration; 2] {
    let pages: Vec<u64> = runs(run).into_iter().flatten().collect();
    let (mut scratch, mut mapped) = (Scratch::default(), Duration::ZERO);
    for batch in pages.chunks(512) {
        let request = vm.request(0, &vm.count(batch));
        let start = Instant::now();
        assert_eq!(vm.pinner().pin(request, &mut scratch, &SystemClock), PinResult::Pinned);
        mapped += start.elapsed();
    }
    vm.unmap(&pages);
    // The first one clears ACCESSED.
    assert_eq!(vm.pinner().tick(None).unpinned_pages, 0);
    let start = Instant::now();
    assert_eq!(vm.pinner().tick(None).unpinned_pages, u64::from(PAGES));
    [mapped, start.elapsed()]
}

#[test]
#[ignore = "needs a device behind an IOMMU"]
fn what_is_ours_of_the_cost_of_a_page() {
    for (policy, run) in [("extent=page", 1), ("extent=run", 64), ("extent=run", 512)] {
        let vm = Vm::new(&Nvme::address(), policy, 1, RAM);
        vm.activate();
        // Memory that was never touched is another matter.
        bare(&vm, run);
        let times: Vec<_> = (0..ROUNDS).map(|_| [bare(&vm, run), ours(&vm, run)]).collect();
        let median = |pick: fn(&[[Duration; 2]; 2]) -> Duration| {
            let mut times: Vec<_> = times.iter().map(pick).collect();
            times.sort_unstable();
            times[ROUNDS / 2].as_secs_f64() * 1e9 / f64::from(PAGES)
        };
        for (what, bare, ours) in [
            ("map", median(|times| times[0][0]), median(|times| times[1][0])),
            ("unmap", median(|times| times[0][1]), median(|times| times[1][1])),
        ] {
            let share = (ours - bare) / ours * 100.0;
            println!(
                "runs of {run:3}: {what:5} {bare:8.0} ns a page bare, {ours:8.0} through the pinner: {share:.0} % ours"
            );
        }
        vm.end();
    }
}
