//! A driver for an NVMe controller, as small as can be: it polls, and has one command at a time on each queue.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use coiommu_vfio::type1::Device;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::machine;

/// Bytes of a block of the namespace.
pub(crate) const BLOCK: u64 = 512;
/// Entries of each queue.
const ENTRIES: u16 = 16;
const SUBMISSION_BYTES: u64 = 64;
const COMPLETION_BYTES: u64 = 16;
/// What a queue pair takes: a page for submissions, one for completions.
pub(crate) const QUEUE_BYTES: usize = 0x2000;

// Registers of BAR 0.
const CAPABILITIES: u64 = 0x00;
const CONFIGURATION: u64 = 0x14;
const STATUS: u64 = 0x1c;
const ADMIN_ENTRIES: u64 = 0x24;
const ADMIN_SUBMISSIONS: u64 = 0x28;
const ADMIN_COMPLETIONS: u64 = 0x30;
const DOORBELLS: u64 = 0x1000;

/// Entries of 64 and 16 bytes, and on.
const ENABLE: u32 = 4 << 20 | 6 << 16 | 1;
const READY: u32 = 1;

/// A controller that may do DMA.
#[derive(Debug)]
pub(crate) struct Nvme {
    device: Arc<Device>,
    /// Bytes from one doorbell to the next.
    stride: u64,
}

/// A queue pair, and what was done with it.
#[derive(Debug)]
pub(crate) struct Queue {
    id: u16,
    submissions: u64,
    completions: u64,
    tail: u16,
    head: u16,
    /// What a completion has in its lowest status bit if it is new.
    phase: bool,
}

impl Nvme {
    pub(crate) fn address() -> String {
        machine::device(machine::NVME)
    }

    /// Switches a controller on, with its admin queue at this iova.
    pub(crate) fn start(device: Arc<Device>, memory: &GuestMemoryMmap, admin: u64) -> (Self, Queue) {
        let stride = 4 << (u64_of(&device, CAPABILITIES) >> 32 & 0xf);
        let nvme = Self { device, stride };
        nvme.set(CONFIGURATION, 0);
        nvme.wait_until_ready_is(false);
        nvme.device.set_bus_master(true).unwrap();
        let queue = Queue::new(0, memory, admin);
        nvme.set(ADMIN_ENTRIES, u32::from(ENTRIES - 1) << 16 | u32::from(ENTRIES - 1));
        nvme.device.write(0, ADMIN_SUBMISSIONS, &queue.submissions.to_le_bytes()).unwrap();
        nvme.device.write(0, ADMIN_COMPLETIONS, &queue.completions.to_le_bytes()).unwrap();
        nvme.set(CONFIGURATION, ENABLE);
        nvme.wait_until_ready_is(true);
        (nvme, queue)
    }

    /// Makes a queue pair for reading and writing at this iova.
    pub(crate) fn make_queue(&self, admin: &mut Queue, memory: &GuestMemoryMmap, id: u16, at: u64) -> Queue {
        self.make_queue_with(admin, memory, id, at, 0)
    }

    /// The same, with an interrupt for each completion.
    pub(crate) fn make_queue_that_interrupts(
        &self,
        admin: &mut Queue,
        memory: &GuestMemoryMmap,
        id: u16,
        at: u64,
        vector: u16,
    ) -> Queue {
        self.make_queue_with(admin, memory, id, at, u32::from(vector) << 16 | 2)
    }

    fn make_queue_with(&self, admin: &mut Queue, memory: &GuestMemoryMmap, id: u16, at: u64, interrupt: u32) -> Queue {
        let queue = Queue::new(id, memory, at);
        let size = u32::from(ENTRIES - 1) << 16 | u32::from(id);
        // In one piece; the submissions' completions are the ones made before.
        self.command(admin, memory, [0x05, 0], queue.completions, [size, interrupt | 1, 0]).unwrap();
        self.command(admin, memory, [0x01, 0], queue.submissions, [size, u32::from(id) << 16 | 1, 0]).unwrap();
        queue
    }

    /// Copies blocks from memory to the namespace; they lie within a page.
    pub(crate) fn write(&self, queue: &mut Queue, memory: &GuestMemoryMmap, iova: u64, block: u32, count: u32) {
        self.command(queue, memory, [0x01, 1], iova, [block, 0, count - 1]).unwrap();
    }

    /// Copies blocks from the namespace to memory; they lie within a page.
    pub(crate) fn read(&self, queue: &mut Queue, memory: &GuestMemoryMmap, iova: u64, block: u32, count: u32) {
        self.command(queue, memory, [0x02, 1], iova, [block, 0, count - 1]).unwrap();
    }

    /// Has a command done: opcode and namespace, where its data are, dwords 10 to 12. The error is its status.
    fn command(
        &self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        [opcode, namespace]: [u32; 2],
        data: u64,
        [dw10, dw11, dw12]: [u32; 3],
    ) -> Result<(), u32> {
        let at = queue.submissions + u64::from(queue.tail) * SUBMISSION_BYTES;
        let words = [opcode, namespace, 0, 0, 0, 0, 0, 0, 0, 0, dw10, dw11, dw12, 0, 0, 0];
        memory.write_slice(&words.map(u32::to_le_bytes).concat(), GuestAddress(at)).unwrap();
        memory.write_slice(&data.to_le_bytes(), GuestAddress(at + 24)).unwrap();
        queue.tail = (queue.tail + 1) % ENTRIES;
        self.ring(2 * u64::from(queue.id), queue.tail);

        let at = GuestAddress(queue.completions + u64::from(queue.head) * COMPLETION_BYTES + 12);
        let start = Instant::now();
        let status = loop {
            let status = u32::from_le(memory.load(at, Ordering::Acquire).unwrap()) >> 16;
            if (status & 1 == 1) == queue.phase {
                break status >> 1;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "a command is never done");
            thread::yield_now();
        };
        queue.head = (queue.head + 1) % ENTRIES;
        queue.phase ^= queue.head == 0;
        self.ring(2 * u64::from(queue.id) + 1, queue.head);
        if status == 0 { Ok(()) } else { Err(status) }
    }

    fn ring(&self, doorbell: u64, value: u16) {
        self.set(DOORBELLS + doorbell * self.stride, value.into());
    }

    fn set(&self, register: u64, value: u32) {
        self.device.write(0, register, &value.to_le_bytes()).unwrap();
    }

    fn wait_until_ready_is(&self, ready: bool) {
        let start = Instant::now();
        while self.is_ready() != ready {
            assert!(start.elapsed() < Duration::from_secs(60), "the controller never gets ready, or never stops");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether it takes commands.
    pub(crate) fn is_ready(&self) -> bool {
        let mut status = [0; 4];
        self.device.read(0, STATUS, &mut status).unwrap();
        u32::from_le_bytes(status) & READY != 0
    }
}

/// No DMA any more.
impl Drop for Nvme {
    fn drop(&mut self) {
        self.device.set_bus_master(false).unwrap();
    }
}

impl Queue {
    fn new(id: u16, memory: &GuestMemoryMmap, at: u64) -> Self {
        memory.write_slice(&[0; QUEUE_BYTES], GuestAddress(at)).unwrap();
        Self { id, submissions: at, completions: at + QUEUE_BYTES as u64 / 2, tail: 0, head: 0, phase: true }
    }
}

fn u64_of(device: &Device, register: u64) -> u64 {
    let mut value = [0; 8];
    device.read(0, register, &mut value).unwrap();
    u64::from_le_bytes(value)
}
