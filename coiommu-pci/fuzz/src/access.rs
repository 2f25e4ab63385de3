//! The device's face: any accesses, of any width, anywhere, in any order.

use arbitrary::Unstructured;
use coiommu_dtt::Bdf;
use coiommu_dtt_fuzz::number;
use coiommu_pci::{Bar, Device, DeviceConfig, Outcome, Start};

/// Plays the accesses that an input describes: first how many vCPUs there are (two bytes) and how the device starts (one),
/// then accesses until the end. All numbers are little-endian, and zero after the end of the input.
///
/// # Panics
///
/// If the device is not any more what it was made as, or means something by an access that cannot mean it.
pub fn access(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let vcpus = usize::from(number::<u16>(&mut input) % 1024 + 1);
    let mut config = DeviceConfig::new(vcpus, (1..=vcpus).filter_map(|n| Bdf::new(u16::try_from(n).ok()?)).collect());
    config.start = if number::<u8>(&mut input) & 1 == 0 { Start::Command } else { Start::RootAndLevels };
    let mut device = Device::new(&config).expect("1 to 1,024 vCPUs, and as many endpoints");
    let fixed = Fixed::of(&device);
    while !input.is_empty() {
        let _not_carried_out = step(&mut device, &mut input);
        assert_eq!(Fixed::of(&device), fixed);
    }
}

/// One access, and what it means.
pub(crate) fn step(device: &mut Device, input: &mut Unstructured<'_>) -> Outcome {
    let (addresses, dropped) = (Bar::ALL.map(|bar| device.bar_address(bar)), device.dropped_writes());
    let op: u8 = number(input);
    let (at, mut data) = (place(input), [0; 16]);
    let data = &mut data[..usize::from(number::<u8>(input) % 17)];
    // What is left of the input, and zeros.
    let _short = input.fill_buffer(data);
    let bar = Bar::ALL[usize::from(op >> 4) % 3];
    let outcome = match op & 7 {
        0 => {
            device.read_config(usize::try_from(at).unwrap_or(usize::MAX), data);
            Outcome::Nothing
        }
        1 => device.write_config(usize::try_from(at).unwrap_or(usize::MAX), data),
        2 | 3 => {
            device.read_bar(bar, at, data);
            Outcome::Nothing
        }
        7 if op == 0xff => device.reset(),
        _ => device.write_bar(bar, at, data),
    };
    let moved = addresses != Bar::ALL.map(|bar| device.bar_address(bar));
    match outcome {
        Outcome::Doorbell { vcpu } => assert_eq!(device.doorbells().offset(vcpu), Some(at)),
        Outcome::Nothing => assert!(!moved),
        Outcome::MemorySpace => assert!(moved),
        _ => {}
    }
    assert!(device.dropped_writes() - dropped <= 1);
    outcome
}

/// Where an access is: near where something is, or anywhere.
fn place(input: &mut Unstructured<'_>) -> u64 {
    match number::<u8>(input) {
        near @ 0..0xf0 => near.into(),
        0xf0..0xfc => number::<u16>(input).into(),
        _ => number(input),
    }
}

/// What no access changes.
#[derive(Debug, PartialEq)]
struct Fixed {
    identity: [u8; 4],
    class: [u8; 4],
    subsystem: [u8; 4],
    /// The low bits of each BAR.
    kinds: [u8; 3],
    endpoints: [u8; 4],
    command: [u8; 8],
}

impl Fixed {
    fn of(device: &Device) -> Self {
        let kind = |bar: Bar| u8::from_le_bytes(config(device, 0x10 + 4 * bar.index())) & 0xf;
        let (mut endpoints, mut command) = ([0; 4], [0; 8]);
        device.read_bar(Bar::Topology, 0, &mut endpoints);
        device.read_bar(Bar::Registers, 8, &mut command);
        let [identity, class, subsystem] = [0x00, 0x08, 0x2c].map(|at| config(device, at));
        Self { identity, class, subsystem, kinds: Bar::ALL.map(kind), endpoints, command }
    }
}

fn config<const N: usize>(device: &Device, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    device.read_config(at, &mut bytes);
    bytes
}
