//! The IOMMUs that CoIOMMU pins through.
//!
//! `coiommu-pin` knows what has to be mapped for a device, and asks a [`DmaMapper`] to do it. What answers is a matter of
//! where one is: a host with hardware has the kernel's VFIO container. A test, a replay of a trace and a host whose
//! devices are software have none, and still need to know two things: would the kernel have said yes, and did a device
//! touch a page that was not mapped? [`SoftIommu`] answers both. It holds mappings by the rules of VFIO's type1
//! container to the letter, devices in software do their DMA through it, and where the table leads nowhere they fault and
//! the fault is recorded.
//!
//! # Example
//!
//! ```
//! use coiommu_vfio::{Backing, DmaMapper, MapError, SoftIommu};
//! use std::ptr::NonNull;
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
//!
//! let guest = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)])?;
//! guest.write_slice(b"hello", GuestAddress(0x3000))?;
//! let hva = NonNull::new(guest.get_host_address(GuestAddress(0x3000))?).expect("memory is not at 0");
//!
//! let iommu = SoftIommu::new();
//! let backing = Backing { hva, file: None };
//! // SAFETY: `guest` holds the page until it is unmapped, and is touched through vm-memory only.
//! unsafe { iommu.map(0x3000, backing, 0x1000) }?;
//!
//! let mut seen = [0; 5];
//! iommu.read(0x3000, &mut seen)?;
//! assert_eq!(&seen, b"hello");
//!
//! assert_eq!(iommu.unmap(0x3000, 0x1000), Ok(0x1000));
//! let fault = iommu.read(0x3000, &mut seen).unwrap_err();
//! assert_eq!(fault.to_string(), "nothing is mapped at iova 0x3000 for a device's read");
//! assert_eq!(iommu.take_faults(), [fault]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Navigating
//!
//! * [`soft`]: the IOMMU in software. It needs no hardware, no privilege and no VFIO crate.
//! * `type1` (feature `type1`): the kernel's VFIO container, and the devices in it.
//!
//! What every mapper must keep is [`DmaMapper`]'s documentation and, as a suite of tests, `coiommu_pin::contract`;
//! `tests/contract.rs` runs it.

pub mod soft;
mod sync;
#[cfg(feature = "type1")]
pub mod type1;

pub use coiommu_pin::{Backing, DmaMapper, FileBacking, Limits, MapError};

#[cfg(feature = "type1")]
pub use type1::Type1;

pub use soft::{Access, Builder, Call, Calls, DEFAULT_ENTRY_LIMIT, DmaFault, FAULTS_KEPT, SoftIommu, Translation};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
