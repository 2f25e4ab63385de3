//! Where a device's capabilities are in its config space, and what those of its message interrupts say.
//!
//! The device may be broken or hostile: nothing here trusts what it says.

use std::ops::Range;

/// How much of config space has what this is about, in bytes.
pub(super) const LENGTH: usize = 256;

/// The beginning of config space.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config<'a>(pub(super) &'a [u8; LENGTH]);

/// Where a table is: in which BAR, and which bytes of it.
pub(super) type Place = (u32, Range<u64>);

/// Capabilities, by their numbers.
const MSI: u8 = 0x05;
const MSIX: u8 = 0x11;

impl Config<'_> {
    /// Where the capability for MSI has its message control.
    pub(super) fn msi_control(self) -> Option<u64> {
        self.capability(MSI).map(|at| u64::from(at) + 2)
    }

    /// Where a device with MSI-X has the table and the pending bits of it.
    pub(super) fn msix_tables(self) -> Option<[Place; 2]> {
        let at = self.capability(MSIX)?;
        let vectors = u64::from(self.u16_at(at, 2)? & 0x7ff) + 1;
        let place = |register: u32, length: u64| {
            let offset = u64::from(register & !7);
            (register & 7, offset..offset + length)
        };
        // An entry has 16 bytes; pending bits come in words of 64.
        let table = place(self.u32_at(at, 4)?, vectors * 16);
        let pending = place(self.u32_at(at, 8)?, vectors.div_ceil(64) * 8);
        Some([table, pending])
    }

    /// Where the first capability of a kind is, as the list of them tells.
    fn capability(self, kind: u8) -> Option<u8> {
        const HAS_LIST: u16 = 1 << 4;
        /// There is no room for more behind the header: so a list in a circle ends.
        const MOST: usize = (LENGTH - 0x40) / 4;
        if self.u16_at(0, 6)? & HAS_LIST == 0 {
            return None;
        }
        let next = |at: u8, field: u8| Some(self.byte_at(at, field)? & !3).filter(|&at| at >= 0x40);
        let list = std::iter::successors(next(0, 0x34), |&at| next(at, 1));
        list.take(MOST).find(|&at| self.byte_at(at, 0) == Some(kind))
    }

    fn byte_at(self, at: u8, field: u8) -> Option<u8> {
        self.0.get(usize::from(at) + usize::from(field)).copied()
    }

    fn u16_at(self, at: u8, field: u8) -> Option<u16> {
        self.bytes_at(at, field).map(u16::from_le_bytes)
    }

    fn u32_at(self, at: u8, field: u8) -> Option<u32> {
        self.bytes_at(at, field).map(u32::from_le_bytes)
    }

    fn bytes_at<const N: usize>(self, at: u8, field: u8) -> Option<[u8; N]> {
        self.0.get(usize::from(at) + usize::from(field)..)?.first_chunk().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A config space with these bytes, and a list of capabilities that begins at 0x40.
    fn config(bytes: &[(usize, &[u8])]) -> [u8; LENGTH] {
        let mut config = [0; LENGTH];
        (config[6], config[0x34]) = (0x10, 0x40);
        for (at, bytes) in bytes {
            config[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        config
    }

    #[test]
    fn message_interrupts_are_found() {
        // QEMU's nvme has 65 vectors; MSI was put in front, as it has none.
        let config =
            config(&[(0x40, &[0x05, 0x80, 0x80, 0]), (0x80, &[0x11, 0x60, 0x40, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0])]);
        let config = Config(&config);
        assert_eq!(config.msi_control(), Some(0x42));
        assert_eq!(config.msix_tables(), Some([(0, 0x2000..0x2410), (0, 0x3000..0x3010)]));
    }

    #[test]
    fn tables_may_be_in_two_bars() {
        let config = config(&[(0x40, &[0x11, 0, 0xff, 0xff, 4, 0, 0, 0, 5, 0xf0, 0xff, 0xff])]);
        let tables = Config(&config).msix_tables();
        assert_eq!(tables, Some([(4, 0..0x8000), (5, 0xffff_f000..0xffff_f100)]));
    }

    #[test]
    fn a_list_that_is_broken_ends() {
        let none = |config: [u8; LENGTH]| {
            assert_eq!((Config(&config).msi_control(), Config(&config).msix_tables()), (None, None))
        };
        none(config(&[(0x40, &[0x01, 0x50]), (0x50, &[0x02, 0x40])])); // a circle
        none(config(&[(0x40, &[0x01, 0x40])])); // of one
        none(config(&[(0x40, &[0x01, 0x04]), (0x04, &[0x11, 0])])); // back into the header
        none(config(&[(0x06, &[0]), (0x40, &[0x05, 0])])); // there is none
        none([0xff; LENGTH]); // the device is gone
        // No room for its registers.
        let last = config(&[(0x40, &[0x01, 0xfc]), (0xfc, &[0x11, 0, 0, 0])]);
        assert_eq!(Config(&last).msix_tables(), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), LENGTH), list in any::<bool>()) {
            let mut config: [u8; LENGTH] = bytes.try_into().unwrap();
            config[6] |= if list { 0x10 } else { 0 };
            let config = Config(&config);
            if let Some(at) = config.msi_control() {
                prop_assert!((0x42..LENGTH as u64).contains(&at));
            }
            for (bar, bytes) in config.msix_tables().into_iter().flatten() {
                prop_assert!(bar < 8 && !bytes.is_empty());
            }
        }
    }
}
