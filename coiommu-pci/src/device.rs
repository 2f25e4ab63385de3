//! The whole device, as a VMM's bus sees it.

use coiommu_dtt::{Bdf, Gpa};

use crate::bar::Bar;
use crate::config::ConfigSpace;
use crate::registers::{Doorbells, Registers, Start};
use crate::topology::{Topology, TopologyError};

/// What a VMM is to do, and to have done before the guest's access is done. A guest reads the command register back right
/// after it wrote it, and takes for granted that its command took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the guest expects this to be done when its access is"]
pub enum Outcome {
    /// Nothing.
    Nothing,
    /// Serve the table at `root`, if there is one: both are what the guest wrote, unchecked. If a table is being served
    /// already, first do as for [`Deactivate`](Self::Deactivate). If there is no table, the device is not active.
    Activate {
        /// Where the guest says that the root of its table is.
        root: Gpa,
        /// How many levels it says the table has.
        levels: u64,
    },
    /// Take no more requests, answer those in flight, switch the endpoints' bus mastering off, unpin everything. The
    /// table is still the guest's table. Parking ends.
    Deactivate,
    /// Unpin nothing until the matching [`Unpark`](Self::Unpark); it nests. When the access is done, no unpin is in flight.
    Park,
    /// End one park.
    Unpark,
    /// Acknowledge the access, then look at this vCPU's slot.
    Doorbell {
        /// Whose doorbell it was.
        vcpu: usize,
    },
    /// A region was moved, or all were switched on or off: see [`Device::bar_address`].
    MemorySpace,
    /// As [`Deactivate`](Self::Deactivate), but the table may be anybody's memory by now, and is not written any more. And as
    /// [`MemorySpace`](Self::MemorySpace): the regions answer nowhere.
    Reset,
}

/// What a device is made for.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeviceConfig {
    /// How many vCPUs the guest can have, 1 to 1,024.
    pub vcpus: usize,
    /// The endpoints as the guest addresses them, each once, at most 4,095.
    pub endpoints: Vec<Bdf>,
    /// What the guest does to start the device.
    pub start: Start,
}

impl DeviceConfig {
    /// For so many vCPUs and these endpoints, with guests that say ACTIVATE.
    #[must_use]
    pub fn new(vcpus: usize, endpoints: Vec<Bdf>) -> Self {
        Self { vcpus, endpoints, start: Start::Command }
    }
}

/// Why there is no such device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// None, or more than the notify map has room for.
    #[error("{0} vCPUs: a device serves 1 to {most}", most = Doorbells::MOST)]
    Vcpus(usize),
    /// The endpoints cannot be told to the guest.
    #[error(transparent)]
    Topology(#[from] TopologyError),
}

/// A CoIOMMU device's face to its guest.
#[derive(Clone, Debug)]
pub struct Device {
    config: ConfigSpace,
    registers: Registers,
    topology: Topology,
    dropped_writes: u64,
}

impl Device {
    /// A device that was just reset.
    ///
    /// # Errors
    ///
    /// [`DeviceError`]: too many vCPUs or endpoints, or endpoints given twice.
    pub fn new(config: &DeviceConfig) -> Result<Self, DeviceError> {
        let doorbells = Doorbells::new(config.vcpus).ok_or(DeviceError::Vcpus(config.vcpus))?;
        Ok(Self {
            config: ConfigSpace::default(),
            registers: Registers::new(config.start, doorbells),
            topology: Topology::new(&config.endpoints)?,
            dropped_writes: 0,
        })
    }

    /// The guest reads config space.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    /// The guest writes config space.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) -> Outcome {
        if self.config.write(offset, data) { Outcome::MemorySpace } else { Outcome::Nothing }
    }

    /// The guest reads some bytes of a region. The notify map is memory that the VMM maps into the guest: a VMM that traps
    /// it accesses that memory; here it reads as all ones.
    pub fn read_bar(&self, bar: Bar, offset: u64, data: &mut [u8]) {
        match bar {
            Bar::Registers => self.registers.read(offset, data),
            Bar::Notify => data.fill(0xff),
            Bar::Topology => self.topology.read(offset, data),
        }
    }

    /// The guest writes some bytes of a region.
    pub fn write_bar(&mut self, bar: Bar, offset: u64, data: &[u8]) -> Outcome {
        let outcome = if bar == Bar::Registers { self.registers.write(offset, data) } else { None };
        outcome.unwrap_or_else(|| {
            self.dropped_writes = self.dropped_writes.saturating_add(1);
            Outcome::Nothing
        })
    }

    /// The device is reset: the guest's bus is, or its VMM. Config space and registers are as at first.
    pub fn reset(&mut self) -> Outcome {
        self.config = ConfigSpace::default();
        self.registers.forget();
        Outcome::Reset
    }

    /// Where a region answers; `None` while the guest has memory space switched off, or has not placed the region. It may
    /// place it anywhere, over RAM too: whether that can be is for the VMM's bus to say.
    #[must_use]
    pub fn bar_address(&self, bar: Bar) -> Option<Gpa> {
        self.config.bar_address(bar)
    }

    /// The doorbells, to be rung with no lock on the device, or by ioeventfds.
    #[must_use]
    pub const fn doorbells(&self) -> Doorbells {
        self.registers.doorbells()
    }

    /// How many writes meant nothing: where there is no register, of a wrong width, no command. Never goes back.
    #[must_use]
    pub const fn dropped_writes(&self) -> u64 {
        self.dropped_writes
    }
}
