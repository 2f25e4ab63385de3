//! The notify map as the host has it: [`NotifyMap`], and [`SharedSlots`], which is one in memory that a VMM maps.

use std::sync::Arc;

use coiommu_dtt::memory::Word64;
use coiommu_dtt::{Gpa, MemoryError, NotifySlots, TableMemory};

/// The slots in which a guest puts its requests, one a vCPU.
pub trait NotifyMap: Send + Sync {
    /// A slot.
    type Slot: Word64;

    /// All of them: always as many, always the same.
    fn slots(&self) -> NotifySlots<'_, Self::Slot>;
}

impl<W: Word64 + Send> NotifyMap for Vec<W> {
    type Slot = W;

    fn slots(&self) -> NotifySlots<'_, W> {
        NotifySlots::new(self)
    }
}

/// Slots in memory that the guest shares: the device's BAR 2.
///
/// ```
/// use std::sync::Arc;
///
/// use coiommu_pin::{NotifyMap, SharedSlots};
/// use vm_memory::{GuestAddress, GuestMemoryMmap};
///
/// // Over a memfd, and mapped into the guest as well, in real life.
/// let bar2 = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x2000)])?;
/// let slots = SharedSlots::new(Arc::new(bar2), 4)?;
/// assert_eq!(slots.slots().len(), 4);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SharedSlots<M> {
    memory: Arc<M>,
    vcpus: usize,
}

impl<M: TableMemory> SharedSlots<M> {
    /// The slots of so many vCPUs, from address 0 of this memory on.
    ///
    /// # Errors
    ///
    /// [`MemoryError`]: there is no memory for so many.
    pub fn new(memory: Arc<M>, vcpus: usize) -> Result<Self, MemoryError> {
        memory.words64(Gpa::new(0), vcpus)?;
        Ok(Self { memory, vcpus })
    }
}

impl<M: TableMemory + Send + Sync> NotifyMap for SharedSlots<M>
where
    M::U64: Send,
{
    type Slot = M::U64;

    fn slots(&self) -> NotifySlots<'_, M::U64> {
        // It was there when this was made, and memory that is owned stays.
        NotifySlots::new(self.memory.words64(Gpa::new(0), self.vcpus).unwrap_or_default())
    }
}
