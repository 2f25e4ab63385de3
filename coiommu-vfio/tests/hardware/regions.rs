//! Regions: how they can be used, what of them may be mapped, and what is refused.

use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::Arc;

use coiommu_vfio::Type1;
use coiommu_vfio::type1::device::CONFIG;
use coiommu_vfio::type1::{Area, Device, Region};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::edu::Edu;
use crate::machine;
use crate::nvme::Nvme;

fn open(address: &str) -> (Type1, Arc<Device>) {
    let container = Type1::open([address]).unwrap();
    let device = Arc::clone(&container.devices()[0]);
    (container, device)
}

/// The four bytes at an offset of a region, through a mapping of the area around it.
fn read_mapped(fd: &OwnedFd, region: Region, area: Area, offset: u64) -> u32 {
    let length = usize::try_from(area.size).unwrap();
    // SAFETY: the kernel chooses where, and nobody else knows of it.
    let mapped =
        unsafe { mmap(ptr::null_mut(), length, ProtFlags::READ, MapFlags::SHARED, fd, region.offset + area.offset) };
    let mapped = mapped.unwrap();
    let at = usize::try_from(offset - area.offset).unwrap();
    assert!(at + 4 <= length);
    // SAFETY: it lies in what is mapped.
    let register = unsafe { mapped.byte_add(at) }.cast::<u32>();
    // SAFETY: it is a register of the device, aligned, and reading has no effect.
    let value = unsafe { register.read_volatile() };
    // SAFETY: it was mapped above, and no reference to it was made.
    unsafe { munmap(mapped, length) }.unwrap();
    u32::from_le(value)
}

fn read(device: &Device, offset: u64) -> u32 {
    let mut value = [0; 4];
    device.read(0, offset, &mut value).unwrap();
    u32::from_le_bytes(value)
}

#[test]
#[ignore = "needs an nvme behind an IOMMU"]
fn what_may_be_mapped_reads_as_the_region_does() {
    let (container, device) = open(&Nvme::address());
    let region = device.region(0);
    assert_eq!((region.size, region.readable, region.writable), (0x4000, true, true));
    // QEMU has the table of MSI-X in the third page and the pending bits in the fourth.
    let areas = device.mappable(0).to_vec();
    assert_eq!(areas, [Area { offset: 0, size: 0x2000 }]);
    let fd = device.try_clone_fd().unwrap();
    drop((device, container));
    // Capabilities and version, through a file that has outlived everything else, as a VMM's does.
    let mapped = [0, 4, 8].map(|offset| read_mapped(&fd, region, areas[0], offset));
    drop(fd);
    let (_container, device) = open(&Nvme::address());
    assert_eq!(mapped, [0, 4, 8].map(|offset| read(&device, offset)));
    assert_eq!(mapped[2], 0x1_0400, "NVMe 1.4");
}

#[test]
#[ignore = "needs an xHCI behind an IOMMU"]
fn tables_that_share_a_page_cost_one_page() {
    let (_container, device) = open(&machine::device(machine::XHCI));
    assert_eq!(device.region(0).size, 0x4000);
    assert_eq!(device.mappable(0), [Area { offset: 0, size: 0x3000 }]);
    let fd = device.try_clone_fd().unwrap();
    assert_eq!(read_mapped(&fd, device.region(0), device.mappable(0)[0], 0), read(&device, 0));
}

#[test]
#[ignore = "needs edu behind an IOMMU"]
fn a_region_without_msix_may_be_mapped_whole() {
    let (_container, device) = open(&Edu::address());
    assert_eq!(device.mappable(0), [Area { offset: 0, size: device.region(0).size }]);
    let fd = device.try_clone_fd().unwrap();
    assert_eq!(read_mapped(&fd, device.region(0), device.mappable(0)[0], 0), 0x0100_00ed);
}

#[test]
#[ignore = "needs edu behind an IOMMU"]
fn what_is_no_bar_is_not_mapped() {
    let (_container, device) = open(&Edu::address());
    let config = device.region(CONFIG);
    assert_eq!((config.readable, config.writable), (true, true));
    assert_eq!(device.mappable(CONFIG), []);
    // BARs that it has not, VGA, and beyond.
    for index in [1, 5, 8, 9, u32::MAX] {
        let Region { size, readable, writable, .. } = device.region(index);
        assert_eq!((size, readable, writable), (0, false, false), "region {index}");
        assert_eq!(device.mappable(index), []);
    }
}

#[test]
#[ignore = "needs edu behind an IOMMU"]
fn errors_have_an_errno() {
    const COMMAND: u64 = 4;
    const MEMORY: u16 = 2;
    let (_container, device) = open(&Edu::address());
    let size = device.region(0).size;
    let errno = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
    for (region, offset) in [(0, size), (0, size - 2), (0, u64::MAX), (1, 0), (9, 0), (u32::MAX, 0)] {
        assert_eq!(errno(device.read(region, offset, &mut [0; 4])), Some(libc::EINVAL), "{region} {offset:#x}");
        assert_eq!(errno(device.write(region, offset, &[0; 4])), Some(libc::EINVAL), "{region} {offset:#x}");
    }
    let mut command = [0; 2];
    device.read(CONFIG, COMMAND, &mut command).unwrap();
    let on = u16::from_le_bytes(command) | MEMORY;
    device.write(CONFIG, COMMAND, &(on & !MEMORY).to_le_bytes()).unwrap();
    let off = [errno(device.read(0, 0, &mut [0; 4])), errno(device.write(0, 4, &[0; 4]))];
    device.write(CONFIG, COMMAND, &on.to_le_bytes()).unwrap();
    assert_eq!(off, [Some(libc::EIO); 2], "its memory is off");
    assert_eq!(read(&device, 0), 0x0100_00ed);
}
