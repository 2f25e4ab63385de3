//! What a VMM tells of RAM, on each of its sockets: the CoIOMMU device's is what counts, and the others should say the same.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Ranges of RAM, by their first byte: their last.
pub(crate) type RamRanges = BTreeMap<u64, u64>;

/// What the VMM has told the CoIOMMU device.
#[derive(Debug, Default)]
pub(crate) struct Memory(Mutex<RamRanges>);

impl Memory {
    /// More ranges than any VMM has are not remembered.
    pub(crate) const MOST: usize = 16_384;

    /// It tells something else.
    pub(crate) fn set(&self, ranges: RamRanges) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = ranges;
    }

    /// How what another device was told differs, if it does.
    pub(crate) fn difference(&self, told: &RamRanges) -> Option<String> {
        let ranges = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let only = |here: &RamRanges, there: &RamRanges| {
            let (start, last) = here.iter().find(|(start, last)| there.get(start) != Some(last))?;
            Some(format!("{start:#x} to {last:#x}"))
        };
        match (only(told, &ranges), only(&ranges, told)) {
            (None, None) => None,
            (Some(here), None) => Some(format!("it has {here} as well")),
            (None, Some(there)) => Some(format!("it lacks {there}")),
            (Some(here), Some(there)) => Some(format!("it has {here}, and lacks {there}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named() {
        let memory = Memory::default();
        memory.set([(0, 0xfff), (0x10_0000, 0x7fff_ffff)].into());
        let difference = |told: &[(u64, u64)]| memory.difference(&told.iter().copied().collect());
        assert_eq!(difference(&[(0, 0xfff), (0x10_0000, 0x7fff_ffff)]), None);
        assert_eq!(difference(&[(0, 0xfff)]).unwrap(), "it lacks 0x100000 to 0x7fffffff");
        let more = [(0, 0xfff), (0x10_0000, 0x7fff_ffff), (1 << 32, (1 << 32) + 0xfff)];
        assert_eq!(difference(&more).unwrap(), "it has 0x100000000 to 0x100000fff as well");
        let other = [(0, 0xfff), (0x10_0000, 0x3fff_ffff)];
        assert_eq!(difference(&other).unwrap(), "it has 0x100000 to 0x3fffffff, and lacks 0x100000 to 0x7fffffff");
    }
}
