//! BAR 0, 2 and 4 as a guest's driver uses them, and as one does that means harm.

use coiommu_dtt::Gpa;
use coiommu_pci::{Bar, Device, DeviceConfig, DeviceError, Outcome, Start, TopologyError};
use proptest::prelude::*;

const VCPUS: usize = 3;

fn device(start: Start) -> Device {
    let mut config = DeviceConfig::new(VCPUS, vec!["00:05.0".parse().unwrap(), "00:06.0".parse().unwrap()]);
    config.start = start;
    Device::new(&config).unwrap()
}

fn write(device: &mut Device, offset: u64, value: u64) -> Outcome {
    device.write_bar(Bar::Registers, offset, &value.to_le_bytes())
}

fn write_half(device: &mut Device, offset: u64, value: u32) -> Outcome {
    device.write_bar(Bar::Registers, offset, &value.to_le_bytes())
}

fn read(device: &Device, offset: u64) -> u64 {
    let mut data = [0; 8];
    device.read_bar(Bar::Registers, offset, &mut data);
    u64::from_le_bytes(data)
}

fn active(root: u64, levels: u64) -> Outcome {
    Outcome::Activate { root: Gpa::new(root), levels }
}

#[test]
fn a_driver_comes_and_goes() {
    let device = &mut device(Start::Command);
    assert_eq!(write(device, 0x00, 0x12_3456_7000), Outcome::Nothing);
    assert_eq!(write(device, 0x10, 5), Outcome::Nothing);
    assert_eq!((read(device, 0x00), read(device, 0x08), read(device, 0x10)), (0x12_3456_7000, 0, 5));
    assert_eq!(write(device, 0x08, 1), active(0x12_3456_7000, 5));
    assert_eq!(write(device, 0x08, 2), Outcome::Park);
    assert_eq!(write(device, 0x08, 3), Outcome::Unpark);
    assert_eq!(read(device, 0x08), 0);
    assert_eq!(write(device, 0x08, 1), active(0x12_3456_7000, 5), "a crash kernel");
    assert_eq!(write(device, 0x08, 0), Outcome::Deactivate);
    assert_eq!((read(device, 0x00), read(device, 0x10)), (0, 0), "root and levels are forgotten");
    assert_eq!(write(device, 0x08, 1), active(0, 0));
    let _root = write(device, 0x00, 0x1000);
    assert_eq!(device.reset(), Outcome::Reset);
    assert_eq!(read(device, 0x00), 0);
    assert_eq!(device.dropped_writes(), 0);
}

#[test]
fn registers_have_halves() {
    let device = &mut device(Start::Command);
    assert_eq!(write_half(device, 0x04, 0x12), Outcome::Nothing);
    assert_eq!(write_half(device, 0x00, 0x3456_7000), Outcome::Nothing);
    assert_eq!(read(device, 0x00), 0x12_3456_7000);
    let mut half = [0; 4];
    device.read_bar(Bar::Registers, 0x04, &mut half);
    assert_eq!(u32::from_le_bytes(half), 0x12);
    assert_eq!(write_half(device, 0x00, 0x1000), Outcome::Nothing);
    assert_eq!(read(device, 0x00), 0x12_0000_1000);
    // Whichever half of a command comes first, it is said once, by the lower.
    assert_eq!(write_half(device, 0x0c, 0), Outcome::Nothing);
    assert_eq!(write_half(device, 0x08, 2), Outcome::Park);
    assert_eq!(device.dropped_writes(), 0);
    assert_eq!(write_half(device, 0x0c, 1), Outcome::Nothing);
    assert_eq!(device.dropped_writes(), 1);
}

#[test]
fn the_first_guests_start_with_root_and_levels() {
    let device = &mut device(Start::RootAndLevels);
    assert_eq!(write(device, 0x00, 0x5000), Outcome::Nothing);
    assert_eq!(write(device, 0x10, 4), active(0x5000, 4));
    // One that is written in halves is complete with the second.
    assert_eq!(write_half(device, 0x00, 0x6000), active(0x6000, 4));
    assert_eq!(write_half(device, 0x04, 0x1), active(0x1_0000_6000, 4));
    assert_eq!(write(device, 0x10, 0), Outcome::Nothing);
    assert_eq!(device.reset(), Outcome::Reset);
    assert_eq!(write(device, 0x10, 4), Outcome::Nothing);
    assert_eq!(write(device, 0x08, 0), Outcome::Deactivate, "they may know commands");
}

#[test]
fn a_doorbell_rings_once_whatever_the_width_and_the_value() {
    let device = &mut device(Start::Command);
    for width in 1..=16 {
        for vcpu in 0..VCPUS {
            let offset = 0x18 + vcpu as u64;
            for value in [0, 0xff] {
                let rung = device.write_bar(Bar::Registers, offset, &vec![value; width]);
                assert_eq!(rung, Outcome::Doorbell { vcpu }, "{width} bytes at {offset:#x}");
            }
        }
    }
    assert_eq!(device.dropped_writes(), 0);
    assert_eq!(read(device, 0x18), u64::MAX, "nobody hears anything");
    assert_eq!(write(device, 0x18 + VCPUS as u64, 0), Outcome::Nothing);
    assert_eq!(device.write_bar(Bar::Registers, 0x18, &[]), Outcome::Nothing);
    assert_eq!(device.dropped_writes(), 2);
}

#[test]
fn the_topology_map_cannot_be_written() {
    let device = &mut device(Start::Command);
    let topology = |device: &Device| {
        let mut words = [0; 8];
        device.read_bar(Bar::Topology, 0, &mut words);
        words
    };
    assert_eq!(topology(device), [2, 0, 0x28, 0, 0x30, 0, 0, 0]);
    assert_eq!(device.write_bar(Bar::Topology, 0, &[9, 9]), Outcome::Nothing);
    assert_eq!(topology(device), [2, 0, 0x28, 0, 0x30, 0, 0, 0]);
    assert_eq!(device.dropped_writes(), 1);
}

#[test]
fn a_device_that_cannot_be_is_refused() {
    let endpoint = "00:05.0".parse().unwrap();
    for vcpus in [0, 1025, usize::MAX] {
        let refused = Device::new(&DeviceConfig::new(vcpus, vec![endpoint])).unwrap_err();
        assert_eq!(refused, DeviceError::Vcpus(vcpus));
        assert_eq!(refused.to_string(), format!("{vcpus} vCPUs: a device serves 1 to 1024"));
    }
    let refused = Device::new(&DeviceConfig::new(1, vec![endpoint, endpoint])).unwrap_err();
    assert_eq!(refused, DeviceError::Topology(TopologyError::Twice(endpoint)));
    assert_eq!(refused.to_string(), "endpoint 00:05.0 is given more than once");
    assert!(Device::new(&DeviceConfig::new(1024, vec![])).is_ok());
}

/// An access to BAR 0, near where something is, or anywhere.
fn accesses() -> impl Strategy<Value = Vec<(u64, Vec<u8>)>> {
    let offset = prop_oneof![4 => 0_u64..0x20, 1 => 0..0x2010_u64, 1 => any::<u64>()];
    let small =
        (0_u64..6, prop_oneof![Just(4), Just(8)]).prop_map(|(value, width)| value.to_le_bytes()[..width].to_vec());
    let data = prop_oneof![small, prop::collection::vec(any::<u8>(), 0..10)];
    prop::collection::vec((offset, data), 0..40)
}

/// The registers by the letter of the ABI, byte by byte.
#[derive(Default)]
struct Model {
    bytes: [u8; 24],
    dropped: u64,
}

impl Model {
    fn number(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Outcome {
        if let Some(vcpu) = (0..VCPUS).find(|&vcpu| offset == 0x18 + vcpu as u64 && !data.is_empty()) {
            return Outcome::Doorbell { vcpu };
        }
        let fits = matches!((offset % 8, data.len()), (0, 4 | 8) | (4, 4)) && offset < 0x18;
        if !fits {
            self.dropped += 1;
            return Outcome::Nothing;
        }
        if (8..16).contains(&offset) {
            return self.command(offset, data);
        }
        self.bytes(offset, data.len()).copy_from_slice(data);
        Outcome::Nothing
    }

    fn bytes(&mut self, offset: u64, len: usize) -> &mut [u8] {
        &mut self.bytes[usize::try_from(offset).unwrap()..][..len]
    }

    fn command(&mut self, offset: u64, data: &[u8]) -> Outcome {
        let mut wide = [0; 8];
        wide[..data.len()].copy_from_slice(data);
        match (offset, u64::from_le_bytes(wide)) {
            (12, 0) => return Outcome::Nothing,
            (8, 0) => {
                self.bytes = [0; 24];
                return Outcome::Deactivate;
            }
            (8, 1) => return active(self.number(0), self.number(16)),
            (8, 2) => return Outcome::Park,
            (8, 3) => return Outcome::Unpark,
            _ => self.dropped += 1,
        }
        Outcome::Nothing
    }
}

proptest! {
    #[test]
    fn any_accesses_do_what_the_abi_says(accesses in accesses()) {
        let device = &mut device(Start::Command);
        let mut model = Model::default();
        for (offset, data) in accesses {
            prop_assert_eq!(device.write_bar(Bar::Registers, offset, &data), model.write(offset, &data));
            prop_assert_eq!(device.dropped_writes(), model.dropped);
            prop_assert_eq!((read(device, 0), read(device, 8), read(device, 16)), (model.number(0), 0, model.number(16)));
            let mut read = vec![0; data.len()];
            device.read_bar(Bar::Registers, offset, &mut read);
            let is_register = matches!((offset % 8, data.len()), (0, 4 | 8) | (4, 4)) && offset < 0x18;
            let expected = if is_register {
                model.bytes(offset, data.len()).to_vec()
            } else {
                vec![0xff; data.len()]
            };
            prop_assert_eq!(read, expected);
        }
    }
}
