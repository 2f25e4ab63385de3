//! The machine's own IOMMU, with nothing of ours but the calls: what the other tests stand on.

use std::ptr::NonNull;
use std::sync::Arc;
use std::thread;

use coiommu_vfio::{Backing, DmaMapper as _, Type1};
use fastrand::Rng;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

use crate::nvme::{Nvme, QUEUE_BYTES, Queue};

const PAGE: u64 = 0x1000;
const THREADS: u16 = 4;
const OWN: u64 = 0x1000_0000;
const OWN_BYTES: usize = (THREADS as usize + 1) * QUEUE_BYTES;
/// Where memory is, of which the runs are taken, each thread its own.
const MEMORY: u64 = 0x2000_0000;
/// Where they are mapped.
const STAGE: u64 = 0x4000_0000;
/// The longest run, in pages, and how many there are of memory and of iovas.
const RUN: u64 = 64;
const PAGES: u64 = 2 * RUN;
const ROUNDS: usize = 400;

/// An emulated IOMMU may keep a translation after it was told to forget it.
#[test]
#[ignore = "needs an nvme behind an IOMMU"]
fn a_device_reaches_what_is_mapped_now() {
    let bytes = usize::try_from(PAGES * PAGE).unwrap();
    let memories = (0..THREADS).map(|thread| (GuestAddress(memory_of(thread)), bytes));
    let ranges: Vec<_> = [(GuestAddress(OWN), OWN_BYTES)].into_iter().chain(memories).collect();
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let container = Type1::open([Nvme::address()]).unwrap();
    map(&container, &memory, OWN, OWN, OWN_BYTES as u64);
    let (nvme, mut admin) = Nvme::start(Arc::clone(&container.devices()[0]), &memory, OWN);
    let at = |id: u16| OWN + u64::from(id) * QUEUE_BYTES as u64;
    let queues: Vec<_> = (1..=THREADS).map(|id| nvme.make_queue(&mut admin, &memory, id, at(id))).collect();
    let stale: usize = thread::scope(|scope| {
        let work = |(thread, queue)| {
            let (container, memory, nvme) = (&container, &memory, &nvme);
            scope.spawn(move || map_and_look(container, memory, nvme, queue, thread))
        };
        let threads: Vec<_> = (0..THREADS).zip(queues).map(work).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(stale, 0, "so often, other memory was reached than what was mapped");
}

fn memory_of(thread: u16) -> u64 {
    MEMORY + u64::from(thread) * PAGES * PAGE
}

fn map(container: &Type1, memory: &GuestMemoryMmap, iova: u64, at: u64, bytes: u64) {
    let hva = NonNull::new(memory.get_host_address(GuestAddress(at)).unwrap()).unwrap();
    // SAFETY: the memory outlives the container, and is touched through vm-memory only.
    unsafe { container.map(iova, Backing { hva, file: None }, bytes) }.unwrap();
}

/// Maps runs of memory here and there, and has the device take a word from them to its disk and back. How often it was
/// another word.
fn map_and_look(container: &Type1, memory: &GuestMemoryMmap, nvme: &Nvme, mut queue: Queue, thread: u16) -> usize {
    let (mut rng, mut stale) = (Rng::with_seed(thread.into()), 0);
    let stage = STAGE + u64::from(thread) * PAGES * PAGE;
    for _ in 0..ROUNDS {
        let pages = rng.u64(1..=RUN);
        let (iova, at) = (stage + rng.u64(..PAGES - pages) * PAGE, memory_of(thread) + rng.u64(..PAGES - pages) * PAGE);
        map(container, memory, iova, at, pages * PAGE);
        for _ in 0..3 {
            let (value, offset) = (rng.u64(..), rng.u64(..pages) * PAGE);
            let word = GuestAddress(at + offset);
            memory.write_obj(value, word).unwrap();
            nvme.write(&mut queue, memory, iova + offset, thread.into(), 1);
            memory.write_obj(!value, word).unwrap();
            nvme.read(&mut queue, memory, iova + offset, thread.into(), 1);
            stale += usize::from(memory.read_obj::<u64>(word).unwrap() != value);
        }
        assert_eq!(container.unmap(iova, pages * PAGE), Ok(pages * PAGE));
    }
    stale
}
