//! Config space as PCI software finds it: an independent reader walks it.
//!
//! Unsafe is needed to implement that reader's way to config space, which it declares as unsafe.
#![allow(unsafe_code)]

use std::cell::RefCell;

use coiommu_pci::{Bar, ConfigSpace, Device, DeviceConfig, Outcome};
use pci_types::{Bar as Found, CommandRegister, ConfigRegionAccess, EndpointHeader, HeaderType, PciAddress, PciHeader};
use proptest::prelude::*;

/// A bus with one function on it.
struct Bus(RefCell<Device>);

impl ConfigRegionAccess for &Bus {
    unsafe fn read(&self, _address: PciAddress, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.0.borrow().read_config(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    unsafe fn write(&self, _address: PciAddress, offset: u16, value: u32) {
        let _noticed = self.0.borrow_mut().write_config(offset.into(), &value.to_le_bytes());
    }
}

fn bus() -> Bus {
    let endpoint = "00:05.0".parse().unwrap();
    Bus(RefCell::new(Device::new(&DeviceConfig::new(4, vec![endpoint])).unwrap()))
}

fn header() -> PciHeader {
    PciHeader::new(PciAddress::new(0, 0, 4, 0))
}

fn endpoint(bus: &Bus) -> EndpointHeader {
    EndpointHeader::from_header(header(), bus).expect("a header of type 0")
}

#[test]
fn it_is_who_the_guest_abi_says() {
    let bus = &bus();
    let header = header();
    assert_eq!(header.id(bus), (0x1234, 0xabcd));
    assert_eq!(header.header_type(bus), HeaderType::Endpoint);
    assert!(!header.has_multiple_functions(bus));
    assert_eq!(header.revision_and_class(bus), (0x10, 0xff, 0xff, 0));
    let endpoint = endpoint(bus);
    assert_eq!(endpoint.subsystem(bus), (0xabcd, 0x1234));
    assert_eq!(endpoint.capabilities(bus).count(), 0);
    assert_eq!(endpoint.interrupt(bus), (0, 0), "no interrupt pin");
    assert!(!endpoint.status(bus).has_capability_list());
}

/// Where software finds a region that is 8 KiB of 64-bit memory, not prefetchable.
fn found(bus: &Bus, slot: u8) -> Option<u64> {
    match endpoint(bus).bar(slot, bus)? {
        Found::Memory64 { address, size: 0x2000, prefetchable: false } => Some(address),
        other => panic!("{other:?}"),
    }
}

#[test]
fn its_bars_are_found_sized_and_moved() {
    let bus = &bus();
    let mut endpoint = endpoint(bus);
    assert_eq!([0, 2, 4].map(|slot| found(bus, slot)), [Some(0); 3]);
    for (slot, address) in [(0, 0xfebd_0000), (2, 0x38_0000_2000), (4, 0xffff_ffff_ffff_e000_u64)] {
        // SAFETY: there is no memory behind the reader's bus.
        unsafe { endpoint.write_bar(slot, bus, usize::try_from(address).unwrap()) }.unwrap();
        assert_eq!(found(bus, slot), Some(address));
    }
    let answers = || Bar::ALL.map(|bar| bus.0.borrow().bar_address(bar).map(coiommu_dtt::Gpa::raw));
    assert_eq!(answers(), [None; 3], "memory space is off");
    endpoint.update_command(bus, |command| command | CommandRegister::MEMORY_ENABLE);
    assert_eq!(answers(), [0xfebd_0000, 0x38_0000_2000, 0xffff_ffff_ffff_e000].map(Some));
    let _reset = bus.0.borrow_mut().reset();
    assert_eq!(answers(), [None; 3]);
    assert_eq!(found(bus, 2), Some(0));
}

#[test]
fn the_command_register_is_written_at_every_width() {
    // Each write switches memory space and bus mastering on, whatever else it says.
    let writes: [(usize, &[u8]); 4] = [(0x04, &[0xff]), (0x04, &[0xff, 0xff]), (0x04, &[0xff; 4]), (0x00, &[0xff; 8])];
    for (offset, data) in writes {
        let mut config = ConfigSpace::default();
        assert!(!config.write(0x11, &[0xe0]), "a region is placed, but all are off");
        assert!(config.write(offset, data), "memory space was switched on");
        let mut command = [0; 4];
        config.read(0x04, &mut command);
        assert_eq!(command, [0b110, 0, 0, 0], "{} bytes at {offset:#x}", data.len());
        assert!(config.is_bus_master());
        assert!(!config.write(0x05, &[0xff]), "the upper byte has nothing to switch");
        assert!(config.write(0x04, &[0b100]));
        assert!(!config.write(0x04, &[0]));
        assert!(!config.is_bus_master());
    }
}

#[test]
fn moving_a_bar_is_told_only_while_it_answers() {
    let mut device = bus().0.into_inner();
    assert_eq!(device.write_config(0x10, &0xfe00_0000_u32.to_le_bytes()), Outcome::Nothing);
    assert_eq!(device.write_config(0x04, &2_u16.to_le_bytes()), Outcome::MemorySpace);
    assert_eq!(device.write_config(0x10, &0xfe00_0000_u32.to_le_bytes()), Outcome::Nothing, "where it is");
    assert_eq!(device.write_config(0x14, &1_u32.to_le_bytes()), Outcome::MemorySpace);
    assert_eq!(device.bar_address(Bar::Registers).map(coiommu_dtt::Gpa::raw), Some(0x1_fe00_0000));
    assert_eq!(device.write_config(0x04, &0_u16.to_le_bytes()), Outcome::MemorySpace);
}

/// What PCI says of each bit of the header, as plainly as can be: which ones a guest can write.
fn is_writable(offset: usize, bit: u32) -> bool {
    match offset {
        0x04 => bit == 1 || bit == 2,
        0x0c | 0x3c => true,
        // The upper 19 bits of an 8 KiB region's address, then another 32.
        0x10 | 0x18 | 0x20 => false,
        0x11 | 0x19 | 0x21 => bit >= 5,
        0x12..=0x17 | 0x1a..=0x1f | 0x22..=0x27 => true,
        _ => false,
    }
}

fn accesses() -> impl Strategy<Value = Vec<(usize, Vec<u8>)>> {
    let offset = prop_oneof![0_usize..0x40, 0..260_usize, any::<usize>()];
    prop::collection::vec((offset, prop::collection::vec(any::<u8>(), 0..9)), 0..40)
}

proptest! {
    #[test]
    fn any_writes_change_what_is_the_guests_and_nothing_else(writes in accesses()) {
        let mut config = ConfigSpace::default();
        let mut expected = [0; ConfigSpace::BYTES];
        config.read(0, &mut expected);
        for (offset, data) in &writes {
            let _noticed = config.write(*offset, data);
            for (index, byte) in data.iter().enumerate() {
                let Some(at) = offset.checked_add(index).filter(|&at| at < ConfigSpace::BYTES) else { continue };
                for bit in (0..8).filter(|&bit| is_writable(at, bit)) {
                    expected[at] = expected[at] & !(1 << bit) | byte & 1 << bit;
                }
            }
        }
        let mut all = [0; ConfigSpace::BYTES];
        config.read(0, &mut all);
        prop_assert_eq!(all, expected);
        // Each width and offset reads the same bytes, and all ones where there are none.
        for (offset, data) in &writes {
            let mut read = vec![0; data.len()];
            config.read(*offset, &mut read);
            for (index, byte) in read.into_iter().enumerate() {
                let at = offset.checked_add(index);
                prop_assert_eq!(byte, at.and_then(|at| expected.get(at)).copied().unwrap_or(0xff));
            }
        }
    }
}
