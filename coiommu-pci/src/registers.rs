//! BAR 0: three registers, then a doorbell a vCPU.
//!
//! | offset | what | a write |
//! | --- | --- | --- |
//! | `0x00` | root u64 | is kept for the next ACTIVATE |
//! | `0x08` | command u64 | is obeyed |
//! | `0x10` | levels u64 | is kept for the next ACTIVATE |
//! | `0x18` + i | doorbell of vCPU i | rings it, whatever its value and width |
//!
//! Registers are accessed as one aligned u64 or as its two u32 halves. Whatever else a guest tries: reads give all ones,
//! writes are dropped and counted.

use coiommu_dtt::Gpa;

use crate::device::Outcome;

/// Where the root register is.
pub const ROOT: u64 = 0x00;
/// Where the command register is.
pub const COMMAND: u64 = 0x08;
/// Where the register of the number of levels is.
pub const LEVELS: u64 = 0x10;
/// Where the doorbells begin.
pub const DOORBELLS: u64 = 0x18;

/// When the device starts to serve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// When the guest says ACTIVATE.
    #[default]
    Command,
    /// Also when root and levels are both there: the first generation of guests never writes the command register. Each
    /// write of one of the two starts it anew.
    RootAndLevels,
}

/// How many vCPUs there are, so how many doorbells. A copy can ring them beside the device, with no lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbells {
    vcpus: u16,
}

impl Doorbells {
    /// How many vCPUs the notify map has room for.
    pub const MOST: usize = 1024;

    /// A doorbell for each of so many vCPUs; `None` unless there are 1 to [`MOST`](Self::MOST).
    #[must_use]
    pub fn new(vcpus: usize) -> Option<Self> {
        let vcpus = u16::try_from(vcpus).ok().filter(|&vcpus| (1..=Self::MOST).contains(&vcpus.into()))?;
        Some(Self { vcpus })
    }

    /// How many there are.
    #[must_use]
    pub fn count(self) -> usize {
        self.vcpus.into()
    }

    /// The vCPU whose doorbell a write to this offset of BAR 0 rings.
    #[must_use]
    pub fn at(self, offset: u64) -> Option<usize> {
        let vcpu = usize::try_from(offset.checked_sub(DOORBELLS)?).ok()?;
        (vcpu < self.count()).then_some(vcpu)
    }

    /// Where a vCPU's doorbell is in BAR 0, for an ioeventfd of any length and any value; `None` if it has none.
    #[must_use]
    pub fn offset(self, vcpu: usize) -> Option<u64> {
        (vcpu < self.count()).then(|| DOORBELLS + vcpu as u64)
    }
}

#[derive(Clone, Copy, Debug)]
enum Register {
    Root,
    Command,
    Levels,
}

/// Part of a register: all of it, or one half.
#[derive(Clone, Copy, Debug)]
enum Part {
    Whole,
    Low,
    High,
}

impl Part {
    /// This part of a register's value, as the guest reads it.
    fn read(self, value: u64, data: &mut [u8]) {
        let bytes = value.to_le_bytes();
        let from = if matches!(self, Self::High) { 4 } else { 0 };
        for (byte, from) in data.iter_mut().zip(&bytes[from..]) {
            *byte = *from;
        }
    }

    /// A register's value once this part of it is written.
    fn write(self, value: u64, written: u64) -> u64 {
        match self {
            Self::Whole => written,
            Self::Low => value & !0xffff_ffff | written,
            Self::High => value & 0xffff_ffff | written << 32,
        }
    }
}

/// What an access is to; `None` if there is nothing, or not with this width.
fn decode(offset: u64, width: usize) -> Option<(Register, Part)> {
    let register = match offset & !0x7 {
        ROOT => Register::Root,
        COMMAND => Register::Command,
        LEVELS => Register::Levels,
        _ => return None,
    };
    match (offset & 0x7, width) {
        (0, 8) => Some((register, Part::Whole)),
        (0, 4) => Some((register, Part::Low)),
        (4, 4) => Some((register, Part::High)),
        _ => None,
    }
}

/// Some bytes, four or eight, as a number.
fn number(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// The registers and what they mean.
#[derive(Clone, Debug)]
pub(crate) struct Registers {
    root: u64,
    levels: u64,
    start: Start,
    doorbells: Doorbells,
}

impl Registers {
    pub(crate) const fn new(start: Start, doorbells: Doorbells) -> Self {
        Self { root: 0, levels: 0, start, doorbells }
    }

    pub(crate) const fn doorbells(&self) -> Doorbells {
        self.doorbells
    }

    /// Nobody has written root and levels.
    pub(crate) const fn forget(&mut self) {
        (self.root, self.levels) = (0, 0);
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        match decode(offset, data.len()) {
            Some((Register::Root, part)) => part.read(self.root, data),
            Some((Register::Levels, part)) => part.read(self.levels, data),
            Some((Register::Command, part)) => part.read(0, data),
            None => data.fill(0xff),
        }
    }

    /// What a write means; `None` if it is dropped.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Option<Outcome> {
        if let Some(vcpu) = self.doorbells.at(offset) {
            return (!data.is_empty()).then_some(Outcome::Doorbell { vcpu });
        }
        let (register, part) = decode(offset, data.len())?;
        let written = number(data);
        match register {
            Register::Root => self.root = part.write(self.root, written),
            Register::Levels => self.levels = part.write(self.levels, written),
            Register::Command => return self.command(part, written),
        }
        let starts = self.start == Start::RootAndLevels && self.root != 0 && self.levels != 0;
        Some(if starts { self.activate() } else { Outcome::Nothing })
    }

    fn command(&mut self, part: Part, command: u64) -> Option<Outcome> {
        match (part, command) {
            // The half where all commands have 0: nothing is said.
            (Part::High, 0) => Some(Outcome::Nothing),
            (Part::High, _) => None,
            (_, 0) => {
                self.forget();
                Some(Outcome::Deactivate)
            }
            (_, 1) => Some(self.activate()),
            (_, 2) => Some(Outcome::Park),
            (_, 3) => Some(Outcome::Unpark),
            _ => None,
        }
    }

    const fn activate(&self) -> Outcome {
        Outcome::Activate { root: Gpa::new(self.root), levels: self.levels }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_and_its_doorbell_find_each_other() {
        assert_eq!((Doorbells::new(0), Doorbells::new(1025), Doorbells::new(65_537)), (None, None, None));
        for vcpus in [1, 2, 1024] {
            let doorbells = Doorbells::new(vcpus).unwrap();
            assert_eq!(doorbells.count(), vcpus);
            for vcpu in 0..vcpus {
                assert_eq!(doorbells.offset(vcpu).and_then(|offset| doorbells.at(offset)), Some(vcpu));
            }
            assert_eq!(doorbells.offset(vcpus), None);
            for nothing in [0, 0x17, 0x18 + vcpus as u64, 1 << 32 | 0x18, u64::MAX] {
                assert_eq!(doorbells.at(nothing), None, "{nothing:#x}");
            }
        }
    }
}
