//! The device's side: DMA through the table, and faults where it leads nowhere.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;

use vm_memory::VolatileSlice;

use super::SoftIommu;
use crate::sync;

/// How many faults are kept; see [`SoftIommu::faults`].
pub const FAULTS_KEPT: usize = 256;

/// What a device does to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// The device reads memory.
    Read,
    /// The device writes memory.
    Write,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// A device's access that no mapping covers, as an IOMMU reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("nothing is mapped at iova {iova:#x} for a device's {access}")]
pub struct DmaFault {
    /// The first byte of the access that is not mapped. Of an access that runs past the last IOVA there is: its first
    /// byte.
    pub iova: u64,
    /// What the device tried.
    pub access: Access,
}

/// Where an IOVA leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The address in this process. Nothing holds the mapping in place once the call has returned.
    pub hva: NonNull<u8>,
    /// Bytes from there to the end of the mapping. The next mapping may begin right behind it.
    pub len: u64,
}

/// The newest faults, and how many there were in all.
#[derive(Debug)]
pub(super) struct FaultLog {
    newest: VecDeque<DmaFault>,
    count: u64,
}

impl FaultLog {
    pub(super) fn new() -> Self {
        Self { newest: VecDeque::with_capacity(FAULTS_KEPT), count: 0 }
    }

    fn record(&mut self, fault: DmaFault) {
        if self.newest.len() == FAULTS_KEPT {
            self.newest.pop_front();
        }
        self.newest.push_back(fault);
        self.count += 1;
    }
}

/// # For devices
///
/// A device does its DMA with [`read`](SoftIommu::read) and [`write`](SoftIommu::write), from any thread. An access may
/// cross from one mapping into the next. Bytes move in ascending order, up to the first one that is not mapped: those
/// before it have moved when the call fails, that one and all behind it have not, even if they are mapped. (An access
/// that runs past the last IOVA, 2⁶⁴ − 1, moves nothing.) A byte is copied as the memory has it at that moment: accesses
/// of other threads may come between two bytes, as with hardware.
///
/// An access holds the table while it moves bytes. So when an unmap has returned, no access to the range is on its way
/// any more; the IOTLB flush gives the same promise in hardware.
impl SoftIommu {
    /// A device reads `buf.len()` bytes at `iova`.
    ///
    /// # Errors
    ///
    /// The fault, which is recorded as well. `buf` is filled up to it and as before from there on.
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), DmaFault> {
        self.transfer(iova, buf.len(), Access::Read, |memory, piece| {
            memory.copy_to(&mut buf[piece]);
        })
    }

    /// A device writes `buf` at `iova`.
    ///
    /// # Errors
    ///
    /// The fault, which is recorded as well. Memory is written up to it and as before from there on.
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<(), DmaFault> {
        self.transfer(iova, buf.len(), Access::Write, |memory, piece| memory.copy_from(&buf[piece]))
    }

    /// Where a device's access at `iova` would go.
    ///
    /// Good for looking, not for access: an unmap may come as soon as this has returned.
    ///
    /// # Errors
    ///
    /// The fault, which is recorded as well.
    pub fn translate(&self, iova: u64, access: Access) -> Result<Translation, DmaFault> {
        let found = sync::read(&self.table)
            .find(iova)
            .map(|(host, offset)| Translation { hva: host.address(offset), len: (host.len() - offset) as u64 });
        found.ok_or_else(|| self.fault(iova, access))
    }

    /// The newest faults, oldest first: the last [`FAULTS_KEPT`], without those [taken](SoftIommu::take_faults).
    #[must_use]
    pub fn faults(&self) -> Vec<DmaFault> {
        sync::lock(&self.faults).newest.iter().copied().collect()
    }

    /// Returns what [`faults`](SoftIommu::faults) would and forgets it. The count goes on.
    #[must_use = "the faults are gone from the record"]
    pub fn take_faults(&self) -> Vec<DmaFault> {
        sync::lock(&self.faults).newest.drain(..).collect()
    }

    /// All faults since the start, those no longer kept too.
    #[must_use]
    pub fn fault_count(&self) -> u64 {
        sync::lock(&self.faults).count
    }

    /// Moves `len` bytes piece by piece: `copy` gets the memory of a piece and which bytes of the access it is.
    fn transfer(
        &self,
        iova: u64,
        len: usize,
        access: Access,
        mut copy: impl FnMut(VolatileSlice<'_>, Range<usize>),
    ) -> Result<(), DmaFault> {
        let Some(past_first) = len.checked_sub(1) else {
            return Ok(());
        };
        if iova.checked_add(past_first as u64).is_none() {
            return Err(self.fault(iova, access));
        }
        // Held until the last byte has moved: an unmap waits for that.
        let table = sync::read(&self.table);
        let mut done = 0;
        while done < len {
            let at = iova + done as u64;
            let Some((host, offset)) = table.find(at) else {
                drop(table);
                return Err(self.fault(at, access));
            };
            let memory = host.bytes(offset, len - done);
            let piece = done..done + memory.len();
            done = piece.end;
            copy(memory, piece);
        }
        Ok(())
    }

    fn fault(&self, iova: u64, access: Access) -> DmaFault {
        let fault = DmaFault { iova, access };
        sync::lock(&self.faults).record(fault);
        fault
    }
}
