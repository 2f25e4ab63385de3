//! The face that a CoIOMMU device shows its guest: a PCI function with registers and doorbells (BAR 0), the notify map
//! (BAR 2) and the topology map (BAR 4).
//!
//! This crate decides and does nothing: what a vCPU reads or writes goes in, bytes or an [`Outcome`] come out, and the VMM
//! carries the outcome out, **before** the guest's access is done; a doorbell alone is acknowledged first. There are no
//! threads here, no guest memory and no pins, so it fits under any VMM's bus.
//!
//! ```
//! use coiommu_pci::{Bar, Device, DeviceConfig, Outcome};
//!
//! let mut device = Device::new(&DeviceConfig::new(2, vec!["00:05.0".parse()?]))?;
//! // What the guest's driver does, as exits of its vCPU tell it: root, levels, ACTIVATE.
//! assert_eq!(device.write_bar(Bar::Registers, 0x00, &0x10_0000_u64.to_le_bytes()), Outcome::Nothing);
//! assert_eq!(device.write_bar(Bar::Registers, 0x10, &4_u64.to_le_bytes()), Outcome::Nothing);
//! let Outcome::Activate { root, levels } = device.write_bar(Bar::Registers, 0x08, &1_u64.to_le_bytes()) else {
//!     panic!("the driver said ACTIVATE");
//! };
//! assert_eq!((root.raw(), levels), (0x10_0000, 4));
//! // vCPU 1 has put a request into its slot.
//! assert_eq!(device.write_bar(Bar::Registers, 0x19, &[0]), Outcome::Doorbell { vcpu: 1 });
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | module | what is there |
//! | --- | --- |
//! | [`device`] | [`Device`], all of it behind one door, and [`Outcome`] |
//! | [`bar`] | [`Bar`]: which regions of memory the device has |
//! | [`config`] | [`ConfigSpace`]: identity, command register, BARs and their sizing |
//! | [`registers`] | BAR 0: [`Doorbells`], and the offsets of what is before them |
//! | [`topology`] | [`Topology`]: BAR 4, the endpoints |
//!
//! The notify map has no room here: it is memory that host and guest share, which the VMM maps into the guest, and
//! [`coiommu_dtt::NotifySlots`] is what it holds.

pub mod bar;
pub mod config;
pub mod device;
pub mod registers;
pub mod topology;

pub use bar::Bar;
pub use config::ConfigSpace;
pub use device::{Device, DeviceConfig, DeviceError, Outcome};
pub use registers::{Doorbells, Start};
pub use topology::{Topology, TopologyError};
