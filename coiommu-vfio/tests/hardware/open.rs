//! What cannot be opened is refused, with what to do.

use std::fs;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread;

use coiommu_vfio::type1::device::CONFIG;
use coiommu_vfio::type1::{Needs, NeedsError, OpenError};
use coiommu_vfio::{Backing, DmaMapper as _, MapError, Type1};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, Uid, capabilities, set_capabilities, set_thread_uid};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioOps};
use vm_memory::mmap::MmapRegion;

use crate::edu::Edu;
use crate::machine::{self, EntryLimit};
use crate::nvme::Nvme;

#[test]
#[ignore = "needs edu behind an IOMMU"]
fn what_cannot_be_opened_is_refused() {
    assert!(matches!(Type1::open([""; 0]), Err(OpenError::NoDevices)));
    assert!(matches!(Type1::open(["0000:77:00.0"]), Err(OpenError::NoDevice { .. })));
    // The machine's own bridge has no driver.
    let error = Type1::open(["0000:00:00.0"]).unwrap_err();
    assert!(matches!(error, OpenError::NotBound { driver: None, .. }), "{error}");

    let address = Edu::address();
    let first = Type1::open([&address]).unwrap();
    let error = Type1::open([&address]).unwrap_err();
    assert!(matches!(error, OpenError::Busy { .. }), "{error}");
    drop(first);

    let group = fs::read_link(format!("/sys/bus/pci/devices/{address}/iommu_group")).unwrap();
    let node = Path::new("/dev/vfio").join(group.file_name().unwrap());
    let away = node.with_extension("away");
    fs::rename(&node, &away).unwrap();
    let error = Type1::open([&address]).unwrap_err();
    fs::rename(&away, &node).unwrap();
    assert!(matches!(error, OpenError::NoNode { .. }), "{error}");
    fs::rename("/dev/vfio/vfio", "/dev/vfio/away").unwrap();
    let error = Type1::open([&address]).unwrap_err();
    fs::rename("/dev/vfio/away", "/dev/vfio/vfio").unwrap();
    assert!(matches!(error, OpenError::NoVfio), "{error}");
    drop(Type1::open([&address]).unwrap());
}

#[test]
#[ignore = "needs edu behind an IOMMU"]
fn what_a_guest_needs_is_checked() {
    let _limit = EntryLimit::set(100);
    let container = Type1::open([Edu::address()]).unwrap();
    let fine = Needs { ram: vec![0..0xa_0000, 0x10_0000..0x4000_0000], pinned: 1 << 30, mappings: 100 };
    container.prepare(&fine).unwrap();
    let error = container.prepare(&Needs { mappings: 101, ..fine.clone() }).unwrap_err();
    assert_eq!(error, NeedsError::Mappings { needed: 101, left: 100 });
    // The interrupts' hole.
    let error = container.prepare(&Needs { ram: vec![0xfee0_0000..0xfee0_1000], ..fine }).unwrap_err();
    assert!(matches!(error, NeedsError::RamOutside { .. }), "{error}");
}

#[test]
#[ignore = "needs edu and an nvme behind an IOMMU"]
fn devices_of_two_groups_share_a_container() {
    let addresses = [Edu::address(), Nvme::address()];
    let container = Type1::open(&addresses).unwrap();
    let devices: Vec<_> = container.devices().iter().map(|device| device.address()).collect();
    let mut sorted = addresses.to_vec();
    sorted.sort();
    assert_eq!(devices, sorted);
    assert_eq!(container.limits().mappings_left, Some(65_535));
    // Config space says who is who.
    for device in container.devices() {
        let mut vendor = [0; 2];
        device.read(CONFIG, 0, &mut vendor).unwrap();
        let wanted = if *device.address() == addresses[0] { 0x1234 } else { 0x1b36 };
        assert_eq!(u16::from_le_bytes(vendor), wanted);
        let error = device.read(CONFIG, device.region(CONFIG).size - 1, &mut vendor).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}

#[test]
#[ignore = "needs two devices behind a bridge behind an IOMMU"]
fn a_neighbour_that_the_host_drives_is_named() {
    let (ours, theirs) = (machine::device(machine::IDLE), machine::device(machine::DRIVEN));
    let error = Type1::open([&ours]).unwrap_err();
    let OpenError::NotViable { obstacles, .. } = &error else { panic!("{error}") };
    assert_eq!(obstacles.iter().map(|neighbour| &neighbour.device).collect::<Vec<_>>(), [&theirs], "{error}");
    let driver = format!("/sys/bus/pci/devices/{theirs}/driver/unbind");
    fs::write(driver, &theirs).unwrap();
    drop(Type1::open([&ours]).unwrap());
    fs::write("/sys/bus/pci/drivers_probe", &theirs).unwrap();
    assert!(matches!(Type1::open([&ours]), Err(OpenError::NotViable { .. })));
}

/// In a thread of its own, which is somebody else from then on.
#[test]
#[ignore = "needs edu behind an IOMMU"]
fn who_may_not_open_a_group_is_told() {
    let address = Edu::address();
    let opened = thread::spawn(move || {
        set_thread_uid(Uid::from_raw(65_534)).unwrap();
        Type1::open([address])
    });
    let error = opened.join().unwrap().unwrap_err();
    let OpenError::Permission { path } = &error else { panic!("{error}") };
    assert!(path.starts_with("/dev/vfio/"), "{error}");
}

#[test]
#[ignore = "needs edu behind an IOMMU"]
fn a_container_of_somebody_else_will_do() {
    const PAGE: u64 = 0x1000;
    let container = Arc::new(VfioContainer::new(None).unwrap());
    let duplicate = || {
        // SAFETY: the container has it open.
        unsafe { BorrowedFd::borrow_raw(container.as_raw_fd()) }.try_clone_to_owned().unwrap()
    };
    let error = Type1::from_container(duplicate()).unwrap_err();
    assert!(matches!(error, OpenError::System { .. }), "without a group it has no IOMMU: {error}");
    let path = Path::new("/sys/bus/pci/devices").join(Edu::address());
    let device = VfioDevice::new(&path, Arc::clone(&container) as Arc<dyn VfioOps>, false).unwrap();
    let ours = Type1::from_container(duplicate()).unwrap();
    assert!(ours.devices().is_empty());
    let memory = MmapRegion::<()>::new(1 << 20).unwrap();
    let backing = Backing { hva: NonNull::new(memory.as_ptr()).unwrap(), file: None };
    // SAFETY: nobody else has the memory, and it is unmapped before it goes.
    unsafe { ours.map(PAGE, backing, PAGE) }.unwrap();
    assert_eq!(ours.limits().mappings_left, Some(65_534));
    drop(ours);
    let again = Type1::from_container(duplicate()).unwrap();
    assert_eq!(again.limits().mappings_left, Some(65_535), "it has unmapped what it mapped");
    drop((again, device));
}

/// In a thread of its own, as capabilities are a thread's; the limit is the process's, and put back.
#[test]
#[ignore = "needs edu behind an IOMMU"]
fn what_may_be_locked_is_kept_to_and_raised() {
    const PAGE: u64 = 0x1000;
    let before = getrlimit(Resource::Memlock);
    setrlimit(Resource::Memlock, Rlimit { current: Some(4 * PAGE), maximum: Some(16 * PAGE) }).unwrap();
    let result = thread::spawn(|| {
        let mut sets = capabilities(None).unwrap();
        for set in [&mut sets.effective, &mut sets.permitted, &mut sets.inheritable] {
            set.remove(CapabilitySet::IPC_LOCK);
        }
        set_capabilities(None, sets).unwrap();
        let container = Type1::open([Edu::address()]).unwrap();
        let needs = |pinned| Needs { ram: vec![0..1 << 20], pinned, mappings: 1 };
        container.prepare(&needs(4 * PAGE)).unwrap();
        assert_eq!(getrlimit(Resource::Memlock).current, Some(4 * PAGE), "that was enough");
        let error = container.prepare(&needs(17 * PAGE)).unwrap_err();
        assert_eq!(error, NeedsError::Memlock { needed: 17 * PAGE, limit: 16 * PAGE });
        let memory = MmapRegion::<()>::new(1 << 20).unwrap();
        let map = |pages: u64| {
            let backing = Backing { hva: NonNull::new(memory.as_ptr()).unwrap(), file: None };
            // SAFETY: nobody else has the memory, and it is unmapped before it goes.
            unsafe { container.map(0, backing, pages * PAGE) }
        };
        assert_eq!(map(8), Err(MapError::NoMemory), "more than may be locked");
        container.prepare(&needs(8 * PAGE)).unwrap();
        assert_eq!(map(8), Ok(()), "the limit was raised");
        assert_eq!(container.unmap_all(), Ok(8 * PAGE));
    })
    .join();
    setrlimit(Resource::Memlock, before).unwrap();
    result.unwrap();
}
