//! QEMU's edu: a device that copies some bytes between memory and a buffer of its own, in about 100 ms.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use coiommu_vfio::Type1;
use coiommu_vfio::type1::Device;

use crate::machine::{self, announce_faults, kernel_log};

/// Registers of its interrupt in BAR 0: bits written to the one raise it, to the other take it back.
const RAISE: u64 = 0x60;
const LOWER: u64 = 0x64;
/// Registers of its DMA.
const SOURCE: u64 = 0x80;
const TARGET: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
/// Where its own buffer is, for SOURCE and TARGET.
const BUFFER: u64 = 0x4_0000;
/// What it copies at most, here: one byte more than it could, 4,096, ends QEMU.
pub(crate) const MOST: u64 = 0x800;
/// Bits of COMMAND.
const START: u64 = 1;
const FROM_BUFFER: u64 = 2;

/// An edu that may do DMA.
#[derive(Debug)]
pub(crate) struct Edu(Arc<Device>);

impl Edu {
    pub(crate) fn address() -> String {
        machine::device(machine::EDU)
    }

    /// The edu of a container that was opened with it alone.
    pub(crate) fn of(container: &Type1) -> Self {
        let device = Arc::clone(&container.devices()[0]);
        device.set_bus_master(true).unwrap();
        Self(device)
    }

    /// Copies from memory into its buffer.
    pub(crate) fn read(&self, iova: u64, length: u64) {
        self.copy(iova, BUFFER, length, START);
    }

    /// Copies from its buffer to memory.
    pub(crate) fn write(&self, iova: u64, length: u64) {
        self.copy(BUFFER, iova, length, START | FROM_BUFFER);
    }

    /// Raises its interrupt: it stays so until it is lowered.
    pub(crate) fn raise(&self) {
        self.0.write(0, RAISE, &1_u32.to_le_bytes()).unwrap();
    }

    pub(crate) fn lower(&self) {
        self.0.write(0, LOWER, &1_u32.to_le_bytes()).unwrap();
    }

    fn copy(&self, source: u64, target: u64, length: u64, command: u64) {
        assert!(length <= MOST);
        for (register, value) in [(SOURCE, source), (TARGET, target), (COUNT, length), (COMMAND, command)] {
            self.0.write(0, register, &value.to_le_bytes()).unwrap();
        }
        let start = Instant::now();
        let mut state = [0; 8];
        loop {
            self.0.read(0, COMMAND, &mut state).unwrap();
            if u64::from_le_bytes(state) & START == 0 {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "edu is never done");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Has it access what is not mapped: the kernel says so. It says ten faults in five seconds and no more, so that it may
    /// take some trying.
    pub(crate) fn expect_fault(&self, iova: u64, access: impl Fn(&Self)) {
        let _announced = announce_faults(iova & !0xfff, 0x1000);
        let page = format!("{:x}", iova & !0xfff);
        let faults = || kernel_log().lines().filter(|line| line.contains(&page) && is_fault(line)).count();
        let (before, start) = (faults(), Instant::now());
        while faults() <= before {
            assert!(start.elapsed() < Duration::from_secs(30), "no fault at {iova:#x} in the kernel's log");
            access(self);
            // The interrupt that tells of it comes when it comes.
            thread::sleep(Duration::from_millis(200));
        }
    }
}

fn is_fault(line: &str) -> bool {
    line.contains("DMAR: [DMA") || line.contains("IO_PAGE_FAULT")
}
