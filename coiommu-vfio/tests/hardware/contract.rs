//! The kernel's container keeps the contract of mappers, as `SoftIommu` does.

use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use coiommu_pin::contract::{Bed, CASES, Device, MIN_MEMORY, Memory, Rig};
use coiommu_vfio::{Backing, DmaMapper as _, Type1};
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

use crate::edu::Edu;
use crate::machine::{EntryLimit, announce_faults};
use crate::nvme::{BLOCK, Nvme, QUEUE_BYTES, Queue};

/// Nothing needs more at once.
const ENTRIES: u64 = 65_535;
/// Where the cases map.
const FIELD: u64 = 0x1_0000_0000;
/// Where the devices have memory of their own, in one mapping: queues, and a page to pass data through. Iova.
const OWN: u64 = 0x1000_0000;
const PASSAGE: u64 = OWN + 2 * QUEUE_BYTES as u64;
const OWN_BYTES: usize = 3 * QUEUE_BYTES;

/// The case that takes mappings away from a device at work. The emulated nvme has threads whose work goes on then; edu does
/// each access at once.
const AT_WORK: &str = "threads::see_no_access_after_unmap";

#[test]
#[ignore = "needs edu and an nvme behind an IOMMU"]
fn type1_keeps_the_contract() {
    let nvme = Type1Bed::new(Kind::Nvme);
    let edu = Type1Bed::new(Kind::Edu);
    // Each case looks where nothing is mapped.
    let _announced = announce_faults(FIELD, MIN_MEMORY);
    assert!(CASES.iter().any(|case| case.name == AT_WORK));
    for case in CASES {
        let bed = if case.name == AT_WORK { &edu } else { &nvme };
        println!("{}", case.name);
        assert_eq!((case.run)(bed), Ok(()), "there is a device, and mappings can be limited");
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Edu,
    Nvme,
}

#[derive(Debug)]
struct Type1Bed {
    kind: Kind,
    memory: MmapRegion<()>,
    own: GuestMemoryMmap,
}

impl Type1Bed {
    fn new(kind: Kind) -> Self {
        let own = GuestMemoryMmap::from_ranges(&[(GuestAddress(OWN), OWN_BYTES)]).unwrap();
        Self { kind, memory: MmapRegion::new(usize::try_from(MIN_MEMORY).unwrap()).unwrap(), own }
    }
}

// SAFETY: the region is the bed's alone and lives as long. Rigs are the cases', which drop them before the bed goes.
unsafe impl Bed for Type1Bed {
    fn rig(&self) -> Rig {
        self.rig_with_entries(ENTRIES).unwrap()
    }

    fn rig_with_entries(&self, entries: u64) -> Option<Rig> {
        // One is the device's own.
        let _limit = EntryLimit::set(entries + 1);
        let address = match self.kind {
            Kind::Edu => Edu::address(),
            Kind::Nvme => Nvme::address(),
        };
        let container = Type1::open([address]).unwrap();
        let hva = NonNull::new(self.own.get_host_address(GuestAddress(OWN)).unwrap()).unwrap();
        // SAFETY: the memory is the bed's, which outlives the container.
        unsafe { container.map(OWN, Backing { hva, file: None }, OWN_BYTES as u64) }.unwrap();
        let own = self.own.clone();
        let device: Arc<dyn Device> = match self.kind {
            Kind::Edu => Arc::new(EduDevice { edu: Mutex::new(Edu::of(&container)), own }),
            Kind::Nvme => {
                let (nvme, mut admin) = Nvme::start(Arc::clone(&container.devices()[0]), &own, OWN);
                let queue = nvme.make_queue(&mut admin, &own, 1, OWN + QUEUE_BYTES as u64);
                Arc::new(NvmeDevice { nvme, queue: Mutex::new(queue), own })
            }
        };
        Some(Rig { mapper: Arc::new(container), device: Some(device) })
    }

    fn memory(&self) -> Memory<'_> {
        Memory { backing: Backing { hva: NonNull::new(self.memory.as_ptr()).unwrap(), file: None }, len: MIN_MEMORY }
    }

    fn iova(&self) -> u64 {
        FIELD
    }
}

/// A controller that moves bytes by way of its disk, in blocks. Where it is stopped, it reads zeroes, and no byte of the
/// cases is zero where they read.
struct NvmeDevice {
    nvme: Nvme,
    queue: Mutex<Queue>,
    own: GuestMemoryMmap,
}

impl NvmeDevice {
    /// The block around `iova`, passed to memory of its own.
    fn fetch(&self, queue: &mut Queue, iova: u64) {
        self.nvme.write(queue, &self.own, iova & !(BLOCK - 1), 0, 1);
        self.nvme.read(queue, &self.own, PASSAGE, 0, 1);
    }

    fn byte(&self, iova: u64) -> GuestAddress {
        GuestAddress(PASSAGE + iova % BLOCK)
    }
}

impl Device for NvmeDevice {
    fn read(&self, iova: u64) -> Option<u8> {
        self.fetch(&mut self.queue.lock().unwrap(), iova);
        let byte: u8 = self.own.read_obj(self.byte(iova)).unwrap();
        (byte != 0).then_some(byte)
    }

    fn write(&self, iova: u64, byte: u8) -> bool {
        let queue = &mut self.queue.lock().unwrap();
        self.fetch(queue, iova);
        self.own.write_obj(byte, self.byte(iova)).unwrap();
        self.nvme.write(queue, &self.own, PASSAGE, 0, 1);
        self.nvme.read(queue, &self.own, iova & !(BLOCK - 1), 0, 1);
        self.fetch(queue, iova);
        self.own.read_obj::<u8>(self.byte(iova)).unwrap() == byte
    }
}

impl fmt::Debug for NvmeDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NvmeDevice").field("nvme", &self.nvme).finish_non_exhaustive()
    }
}

/// An edu that moves bytes by way of its buffer, which keeps what it had where the device is stopped, or has zeroes.
struct EduDevice {
    edu: Mutex<Edu>,
    own: GuestMemoryMmap,
}

impl EduDevice {
    /// The byte at `iova`, if it is not `otherwise`.
    fn fetch(&self, edu: &Edu, iova: u64, otherwise: u8) -> Option<u8> {
        self.load(edu, otherwise);
        edu.read(iova, 1);
        edu.write(PASSAGE, 1);
        let byte: u8 = self.own.read_obj(GuestAddress(PASSAGE)).unwrap();
        (byte != otherwise && byte != 0).then_some(byte)
    }

    /// Puts a byte into edu's buffer.
    fn load(&self, edu: &Edu, byte: u8) {
        self.own.write_obj(byte, GuestAddress(PASSAGE)).unwrap();
        edu.read(PASSAGE, 1);
    }
}

impl Device for EduDevice {
    fn read(&self, iova: u64) -> Option<u8> {
        // No byte of the cases has only ones.
        self.fetch(&self.edu.lock().unwrap(), iova, 0xff)
    }

    fn write(&self, iova: u64, byte: u8) -> bool {
        let edu = self.edu.lock().unwrap();
        self.load(&edu, byte);
        edu.write(iova, 1);
        self.fetch(&edu, iova, !byte) == Some(byte)
    }
}

impl fmt::Debug for EduDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EduDevice").field("edu", &self.edu).finish_non_exhaustive()
    }
}
