//! PCI config space: a header of type 0, of a function without capabilities.

use coiommu_dtt::Gpa;

use crate::bar::Bar;

/// Where the fields of a type 0 header are, in bytes.
mod field {
    pub(super) const VENDOR: usize = 0x00;
    pub(super) const DEVICE: usize = 0x02;
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const SUBCLASS: usize = 0x0a;
    pub(super) const CLASS: usize = 0x0b;
    pub(super) const CACHE_LINE: usize = 0x0c;
    pub(super) const BARS: usize = 0x10;
    pub(super) const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub(super) const SUBSYSTEM: usize = 0x2e;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
}

/// Who it is, in the words of the guest ABI.
mod identity {
    pub(super) const VENDOR: u16 = 0x1234;
    pub(super) const DEVICE: u16 = 0xabcd;
    pub(super) const REVISION: u8 = 0x10;
    pub(super) const CLASS: u8 = 0xff;
    pub(super) const SUBCLASS: u8 = 0xff;
}

/// Bits of the command register that a guest can set.
mod command {
    pub(super) const MEMORY_SPACE: u16 = 1 << 1;
    pub(super) const BUS_MASTER: u16 = 1 << 2;
}

/// In the low word of a BAR: memory, anywhere in 64 bits, not prefetchable, as a doorbell is no memory.
const MEMORY_64: u32 = 0b100;

/// Config space of a function without capabilities: 256 bytes.
///
/// Accesses of any width and alignment are taken for what they are, some bytes: each bit is the guest's or fixed. What is
/// beyond the 256 bytes is not there: it reads as all ones.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; Self::BYTES],
    /// The bits of each byte that a guest can write.
    writable: [u8; Self::BYTES],
}

impl Default for ConfigSpace {
    fn default() -> Self {
        let mut space = Self { bytes: [0; Self::BYTES], writable: [0; Self::BYTES] };
        space.fix(field::VENDOR, identity::VENDOR.to_le_bytes());
        space.fix(field::DEVICE, identity::DEVICE.to_le_bytes());
        space.fix(field::SUBSYSTEM_VENDOR, identity::VENDOR.to_le_bytes());
        space.fix(field::SUBSYSTEM, identity::DEVICE.to_le_bytes());
        space.fix(field::REVISION, [identity::REVISION]);
        space.fix(field::SUBCLASS, [identity::SUBCLASS]);
        space.fix(field::CLASS, [identity::CLASS]);
        space.allow(field::COMMAND, (command::MEMORY_SPACE | command::BUS_MASTER).to_le_bytes());
        // Firmware keeps numbers of its own here, which mean nothing to the device.
        space.allow(field::CACHE_LINE, [0xff]);
        space.allow(field::INTERRUPT_LINE, [0xff]);
        for bar in Bar::ALL {
            space.fix(bar_at(bar), MEMORY_64.to_le_bytes());
            // A BAR is as large as the address bits that cannot be written say: that is how guests size it.
            space.allow(bar_at(bar), (!(Bar::SIZE - 1)).to_le_bytes());
        }
        space
    }
}

impl ConfigSpace {
    /// Its size.
    pub const BYTES: usize = 256;

    /// The guest reads some bytes.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0xff);
        for (byte, from) in data.iter_mut().zip(self.bytes.iter().skip(offset)) {
            *byte = *from;
        }
    }

    /// The guest writes some bytes; true if that moved a BAR, or switched them all on or off.
    #[must_use = "a guest that moved a BAR expects the device there"]
    pub fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        let before = Bar::ALL.map(|bar| self.bar_address(bar));
        let there = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, writable), written) in there.zip(data) {
            *byte = *byte & !writable | written & writable;
        }
        before != Bar::ALL.map(|bar| self.bar_address(bar))
    }

    /// Where a region answers; `None` while the guest has memory space switched off, or has the region at 0, which is where
    /// it is before it is placed. Any other multiple of [`Bar::SIZE`]: while a guest sizes a BAR, it may be the last one of
    /// the address space.
    #[must_use]
    pub fn bar_address(&self, bar: Bar) -> Option<Gpa> {
        let address = u64::from_le_bytes(self.field(bar_at(bar))) & !(Bar::SIZE - 1);
        (address != 0 && self.command(command::MEMORY_SPACE)).then_some(Gpa::new(address))
    }

    /// Whether the guest has switched bus mastering on.
    #[must_use]
    pub fn is_bus_master(&self) -> bool {
        self.command(command::BUS_MASTER)
    }

    fn command(&self, bit: u16) -> bool {
        u16::from_le_bytes(self.field(field::COMMAND)) & bit != 0
    }

    fn field<const N: usize>(&self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(at, &mut bytes);
        bytes
    }

    fn fix<const N: usize>(&mut self, at: usize, value: [u8; N]) {
        self.bytes.iter_mut().skip(at).zip(value).for_each(|(byte, value)| *byte = value);
    }

    fn allow<const N: usize>(&mut self, at: usize, bits: [u8; N]) {
        self.writable.iter_mut().skip(at).zip(bits).for_each(|(byte, bits)| *byte = bits);
    }
}

/// Where a region's first BAR register is.
const fn bar_at(bar: Bar) -> usize {
    field::BARS + 4 * bar.index()
}
