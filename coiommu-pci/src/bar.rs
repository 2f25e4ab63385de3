//! The device's regions of memory.

/// One of the device's regions of memory. Each is 64-bit memory, takes two BAR registers, and is aligned to its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bar {
    /// Registers and doorbells: every access is trapped.
    Registers,
    /// The notify map, a u64 a vCPU: memory that host and guest share, with no exit.
    Notify,
    /// The topology map, which guests read once: trapped, or memory that they cannot write.
    Topology,
}

impl Bar {
    /// All of them, by ascending index.
    pub const ALL: [Self; 3] = [Self::Registers, Self::Notify, Self::Topology];

    /// The size of each, in bytes.
    pub const SIZE: u64 = 0x2000;

    /// The region that begins with this BAR register, 0 to 5; `None` if none does.
    #[must_use]
    pub const fn from_index(index: usize) -> Option<Self> {
        match index {
            0 => Some(Self::Registers),
            2 => Some(Self::Notify),
            4 => Some(Self::Topology),
            _ => None,
        }
    }

    /// Its first BAR register: 0, 2 or 4.
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Registers => 0,
            Self::Notify => 2,
            Self::Topology => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_even_registers_begin_a_region() {
        let found: Vec<_> = (0..10).filter_map(|index| Some((index, Bar::from_index(index)?))).collect();
        assert_eq!(found, Bar::ALL.map(|bar| (bar.index(), bar)));
    }
}
