//! A whole device: accesses to its registers are carried out on a pinner, while the guest writes what it likes into slots,
//! tables and batches, the host takes pages back, and RAM comes and goes.

use coiommu_dtt_fuzz::number;
use coiommu_pci::{Device, DeviceConfig, Outcome, Start};
use coiommu_pin::pinner::Drain;
use coiommu_pin_fuzz::{Step, play};

use crate::access;

/// Plays what an input describes: as `coiommu-pin`'s target, but that of the steps every third or so is an access, and that
/// a further flag, 8, says that the guest is of the first generation.
///
/// # Panics
///
/// If something is wrong with the host's books, or a slot is never answered.
pub fn guest(input: &[u8]) {
    let mut config = DeviceConfig::new(4, vec!["00:03.0".parse().expect("an endpoint")]);
    if input.get(1).is_some_and(|flags| flags & 8 != 0) {
        config.start = Start::RootAndLevels;
    }
    let mut device = Device::new(&config).expect("four vCPUs");
    play(input, |input| {
        if number::<u8>(input).is_multiple_of(3) {
            carry_out(access::step(&mut device, input))
        } else {
            Step::read(input)
        }
    });
}

/// What a VMM does about an access. Doorbells come through as a look at all slots, as does whatever means nothing.
fn carry_out(outcome: Outcome) -> Step {
    match outcome {
        Outcome::Activate { root, levels } => Step::Activate { root: root.raw(), levels },
        Outcome::Deactivate => Step::Deactivate(Drain::Deactivate),
        Outcome::Reset => Step::Deactivate(Drain::Reset),
        Outcome::Park => Step::Park,
        Outcome::Unpark => Step::Unpark,
        Outcome::Nothing | Outcome::Doorbell { .. } | Outcome::MemorySpace => Step::Poll,
    }
}
