//! A device is reset, or the kernel says why not.

use std::sync::Arc;

use coiommu_vfio::Type1;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::edu::Edu;
use crate::nvme::{Nvme, QUEUE_BYTES};

#[test]
#[ignore = "needs an nvme behind an IOMMU"]
fn a_device_that_is_reset_is_off() {
    let container = Type1::open([Nvme::address()]).unwrap();
    let device = Arc::clone(&container.devices()[0]);
    // It has nothing to do there, so that nothing need be mapped.
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), QUEUE_BYTES)]).unwrap();
    let (nvme, _admin) = Nvme::start(Arc::clone(&device), &memory, 0);
    assert!(nvme.is_ready());
    assert!(device.is_resettable());
    device.reset().unwrap();
    assert!(!nvme.is_ready());
}

#[test]
#[ignore = "needs edu behind an IOMMU"]
fn a_device_that_cannot_be_reset_alone_says_so() {
    let container = Type1::open([Edu::address()]).unwrap();
    assert!(!container.devices()[0].is_resettable());
    let error = container.devices()[0].reset().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{error}");
}
