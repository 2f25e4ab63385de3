//! The bit for bus mastering in accesses to config space: the guest sees, and writes, its wish; what the device has is the
//! [`Gate`](super::gate::Gate)'s.

/// Where the command register is; the bit is in its first byte.
const COMMAND: u64 = 4;
const BUS_MASTER: u8 = 1 << 2;

/// What the bit is in an access at an offset, if that has it.
pub(super) fn bus_master(offset: u64, data: &[u8]) -> Option<bool> {
    let at = usize::try_from(COMMAND.checked_sub(offset)?).ok()?;
    data.get(at).map(|byte| byte & BUS_MASTER != 0)
}

/// Sets or clears the bit, if the access has it.
pub(super) fn set_bus_master(offset: u64, data: &mut [u8], on: bool) {
    let at = COMMAND.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
    if let Some(byte) = at.and_then(|at| data.get_mut(at)) {
        *byte = *byte & !BUS_MASTER | if on { BUS_MASTER } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// As if the access were to a config space of which each byte is a number.
        #[test]
        fn the_bit_is_where_it_is_however_it_is_accessed(
            offset in prop_oneof![0_u64..9, any::<u64>()],
            data in proptest::collection::vec(any::<u8>(), 0..9),
            on in any::<bool>(),
        ) {
            let mut changed = data.clone();
            set_bus_master(offset, &mut changed, on);
            let at = |index: usize| offset.checked_add(index as u64);
            for (index, (before, after)) in data.iter().zip(&changed).enumerate() {
                let mask = if at(index) == Some(4) { 4 } else { 0 };
                prop_assert_eq!(before & !mask, after & !mask);
                prop_assert_eq!(after & mask, if on { mask } else { 0 });
            }
            let bit = (0..data.len()).find(|&index| at(index) == Some(4)).map(|index| data[index] & 4 != 0);
            prop_assert_eq!(bus_master(offset, &data), bit);
        }
    }
}
