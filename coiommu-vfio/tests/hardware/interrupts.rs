//! Interrupts of each kind: eventfds that come in pieces, from devices that interrupt.

use std::fs;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use coiommu_vfio::type1::device::CONFIG;
use coiommu_vfio::type1::interrupts::{ERR, INTX, MSI, MSIX, REQ};
use coiommu_vfio::type1::{Action, Device, InterruptError, Interrupts};
use coiommu_vfio::{Backing, DmaMapper as _, Type1};
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

use crate::edu::Edu;
use crate::machine;
use crate::nvme::{Nvme, QUEUE_BYTES};
use crate::signal::Signal;

fn open(address: &str) -> (Type1, Arc<Device>, Interrupts) {
    let container = Type1::open([address]).unwrap();
    let device = Arc::clone(&container.devices()[0]);
    let interrupts = Interrupts::new(Arc::clone(&device)).unwrap();
    (container, device, interrupts)
}

/// Has the kernel signal some interrupts, as if the device had.
fn trigger(interrupts: &Interrupts, index: u32, start: u32, count: u32) {
    interrupts.act(index, Action::Trigger, start, count, None).unwrap();
}

fn errno(result: Result<(), InterruptError>) -> i32 {
    result.unwrap_err().errno()
}

/// QEMU's way: the kind is enabled with nothing, then come eventfds for one interrupt or a few.
#[test]
#[ignore = "needs an nvme behind an IOMMU"]
fn an_nvme_interrupts_with_what_came_in_pieces() {
    const VECTOR: u16 = 9;
    let (container, device, mut interrupts) = open(&Nvme::address());
    let info = interrupts.info(MSIX);
    assert_eq!((info.count, info.eventfd, info.maskable, info.automasked), (65, true, false, false));
    println!("MSI-X {} grow", if info.noresize { "cannot" } else { "can" });

    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 4 * QUEUE_BYTES)]).unwrap();
    let hva = NonNull::new(memory.get_host_address(GuestAddress(0)).unwrap()).unwrap();
    let bytes = 4 * QUEUE_BYTES as u64;
    // SAFETY: nobody else has the memory, and the container goes before it.
    unsafe { container.map(0, Backing { hva, file: None }, bytes) }.unwrap();

    interrupts.assign(MSIX, 0, vec![None]).unwrap();
    let signals = Signal::several(65);
    interrupts.assign(MSIX, 0, Signal::fds(&signals[..1])).unwrap();
    interrupts.assign(MSIX, 5, Signal::fds(&signals[5..])).unwrap();
    interrupts.assign(MSIX, 1, Signal::fds(&signals[1..5])).unwrap();

    let (nvme, mut admin) = Nvme::start(Arc::clone(&device), &memory, 0);
    let mut queue = nvme.make_queue_that_interrupts(&mut admin, &memory, 1, QUEUE_BYTES as u64, VECTOR);
    signals[0].wait();
    assert_eq!(Signal::counts(&signals[1..]), [0; 64]);
    nvme.read(&mut queue, &memory, 2 * QUEUE_BYTES as u64, 0, 1);
    assert_eq!(signals[usize::from(VECTOR)].wait(), 1);
    drop(nvme);
    let others = signals.iter().enumerate().filter(|(vector, _)| ![0, VECTOR.into()].contains(vector));
    assert_eq!(others.map(|(_, signal)| signal.count()).sum::<u64>(), 0);
}

/// Here the device has nothing to say, so that every signal is one of ours.
#[test]
#[ignore = "needs an nvme behind an IOMMU"]
fn eventfds_are_exchanged_and_let_go() {
    let (_container, device, mut interrupts) = open(&Nvme::address());
    let signals = Signal::several(65);
    interrupts.assign(MSIX, 60, Signal::fds(&signals[60..])).unwrap();
    interrupts.assign(MSIX, 0, Signal::fds(&signals[..60])).unwrap();
    trigger(&interrupts, MSIX, 0, 65);
    assert_eq!(Signal::counts(&signals), [1; 65]);
    interrupts.assign(MSIX, 3, vec![None, signals[0].fd()]).unwrap();
    trigger(&interrupts, MSIX, 0, 6);
    assert_eq!(Signal::counts(&signals[..6]), [2, 1, 1, 0, 0, 1]);
    interrupts.act(MSIX, Action::Trigger, 5, 3, Some(&[true, false, true])).unwrap();
    assert_eq!(Signal::counts(&signals[5..8]), [1, 0, 1]);

    interrupts.disable(MSIX).unwrap();
    interrupts.disable(MSIX).unwrap();
    assert_eq!(errno(interrupts.act(MSIX, Action::Trigger, 0, 1, None)), libc::EINVAL, "it is disabled");
    // Others take over.
    interrupts.assign(MSIX, 2, Signal::fds(&signals[..1])).unwrap();
    drop(interrupts);
    let mut interrupts = Interrupts::new(device).unwrap();
    interrupts.assign(MSIX, 64, Signal::fds(&signals[64..])).unwrap();
    trigger(&interrupts, MSIX, 0, 65);
    assert_eq!(Signal::counts(&signals), [[0; 64].as_slice(), &[1]].concat());
}

#[test]
#[ignore = "needs an nvme behind an IOMMU"]
fn what_is_refused_changes_nothing() {
    let (_container, _device, mut interrupts) = open(&Nvme::address());
    let (signals, others) = (Signal::several(4), Signal::several(4));
    let no_eventfd = || Some(OwnedFd::from(fs::File::open("/dev/null").unwrap()));
    let none = |number: usize| (0..number).map(|_| None).collect::<Vec<_>>();

    assert_eq!(errno(interrupts.assign(MSIX, 0, vec![others[0].fd(), no_eventfd()])), libc::EINVAL);
    assert_eq!(errno(interrupts.act(MSIX, Action::Trigger, 0, 1, None)), libc::EINVAL, "it is not enabled");

    interrupts.assign(MSIX, 0, Signal::fds(&signals)).unwrap();
    let intact = |interrupts: &Interrupts| {
        trigger(interrupts, MSIX, 0, 65);
        assert_eq!((Signal::counts(&signals), Signal::counts(&others)), (vec![1; 4], vec![0; 4]));
    };
    let with_a_bad_one = vec![others[0].fd(), None, no_eventfd(), others[3].fd()];
    assert_eq!(errno(interrupts.assign(MSIX, 0, with_a_bad_one)), libc::EINVAL);
    intact(&interrupts);
    assert_eq!(errno(interrupts.assign(MSIX, 3, vec![others[0].fd(), no_eventfd()])), libc::EINVAL);
    intact(&interrupts);
    for (index, start, number) in
        [(MSIX, 60, 6), (MSIX, 65, 1), (MSIX, u32::MAX, 1), (MSIX, 0, 0), (MSI, 0, 1), (9, 0, 1)]
    {
        assert_eq!(
            errno(interrupts.assign(index, start, none(number))),
            libc::EINVAL,
            "{number} of {index} from {start} on"
        );
    }
    // The kernel's word: another kind is enabled, and messages cannot be masked.
    assert_eq!(errno(interrupts.assign(INTX, 0, Signal::fds(&others[..1]))), libc::EINVAL);
    assert_eq!(errno(interrupts.act(MSIX, Action::Mask, 0, 1, None)), libc::ENOTTY);
    assert_eq!(errno(interrupts.assign_unmask(MSIX, 0, Signal::fds(&others[..1]))), libc::ENOTTY);
    intact(&interrupts);
    interrupts.disable_all().unwrap();
    interrupts.assign(INTX, 0, Signal::fds(&others[..1])).unwrap();
}

#[test]
#[ignore = "needs edu behind an IOMMU"]
fn edu_s_pin_is_masked_until_it_is_unmasked() {
    let (container, _device, mut interrupts) = open(&Edu::address());
    let edu = Edu::of(&container);
    let info = interrupts.info(INTX);
    assert_eq!((info.count, info.eventfd, info.maskable, info.automasked), (1, true, true, true));
    let (pin, unmask) = (Signal::new(), Signal::new());
    interrupts.assign(INTX, 0, vec![pin.fd()]).unwrap();
    edu.raise();
    assert_eq!(pin.wait(), 1);
    // It is still raised: unmasked, it interrupts at once.
    interrupts.act(INTX, Action::Unmask, 0, 1, None).unwrap();
    assert_eq!(pin.wait(), 1);
    interrupts.assign_unmask(INTX, 0, vec![unmask.fd()]).unwrap();
    unmask.send();
    assert_eq!(pin.wait(), 1);
    // A VMM that sets it up anew has another, and may have the one before still.
    let unmask = Signal::new();
    interrupts.assign_unmask(INTX, 0, vec![unmask.fd()]).unwrap();

    edu.lower();
    interrupts.act(INTX, Action::Unmask, 0, 1, None).unwrap();
    interrupts.act(INTX, Action::Mask, 0, 1, Some(&[true])).unwrap();
    edu.raise();
    assert_eq!(pin.count(), 0, "it is masked");
    unmask.send();
    assert_eq!(pin.wait(), 1);
    edu.lower();

    // As on a reset of the guest; then from the beginning.
    interrupts.disable(INTX).unwrap();
    assert_eq!(errno(interrupts.act(INTX, Action::Unmask, 0, 1, None)), libc::EINVAL);
    interrupts.assign(INTX, 0, vec![None]).unwrap();
    interrupts.assign(INTX, 0, vec![pin.fd()]).unwrap();
    interrupts.assign_unmask(INTX, 0, vec![unmask.fd()]).unwrap();
    edu.raise();
    assert_eq!(pin.wait(), 1);
    edu.lower();
}

#[test]
#[ignore = "needs edu behind an IOMMU"]
fn edu_interrupts_with_a_message() {
    let (container, _device, mut interrupts) = open(&Edu::address());
    let edu = Edu::of(&container);
    let info = interrupts.info(MSI);
    assert_eq!((info.count, info.eventfd, info.maskable, info.noresize), (1, true, false, true));
    let message = Signal::new();
    interrupts.assign(MSI, 0, vec![message.fd()]).unwrap();
    for _ in 0..3 {
        edu.raise();
        assert_eq!(message.wait(), 1);
        edu.lower();
    }
    assert_eq!(interrupts.info(MSIX).count, 0);
    assert_eq!(interrupts.info(ERR).count, 0, "it is no PCI Express device");
}

/// Where a device has its message control for MSI.
fn message_control(device: &Device) -> u64 {
    let byte = |at: u64| {
        let mut byte = [0];
        device.read(CONFIG, at, &mut byte).unwrap();
        u64::from(byte[0])
    };
    let mut at = byte(0x34);
    while byte(at) != 5 {
        at = byte(at + 1);
        assert_ne!(at, 0, "it has no MSI");
    }
    at + 2
}

#[test]
#[ignore = "needs an xHCI behind an IOMMU"]
fn msi_has_as_many_messages_as_the_guest_has_enabled() {
    let address = machine::device(machine::XHCI);
    let (_container, device, mut interrupts) = open(&address);
    assert_eq!((interrupts.info(MSI).count, interrupts.info(MSI).noresize), (16, true));
    let control = message_control(&device);
    // What the device itself has, as the system sees it: whether MSI is enabled, and with how many messages.
    let enabled = || {
        let config = fs::read(format!("/sys/bus/pci/devices/{address}/config")).unwrap();
        let low = config[usize::try_from(control).unwrap()];
        (low & 1 == 1).then(|| 1 << (low >> 4 & 7))
    };
    let signals = Signal::several(16);
    for (field, messages) in [(4_u8, 16), (0, 1), (2, 4)] {
        // As QEMU does: the register as the guest wrote it, then eventfds, eight at a time.
        device.write(CONFIG, control, &[field << 4 | 1, 0]).unwrap();
        for (start, signals) in (0..).step_by(8).zip(signals[..messages as usize].chunks(8)) {
            interrupts.assign(MSI, start, Signal::fds(signals)).unwrap();
        }
        assert_eq!(enabled(), Some(messages));
        trigger(&interrupts, MSI, 0, messages);
        let each_once: Vec<_> = (0..16).map(|message| u64::from(message < messages)).collect();
        assert_eq!(Signal::counts(&signals), each_once);
        if messages < 16 {
            let error = interrupts.assign(MSI, 15, vec![None]).unwrap_err();
            assert!(matches!(error, InterruptError::Fixed { .. }), "{error}");
        }
        interrupts.disable(MSI).unwrap();
        assert_eq!(enabled(), None);
    }
    // More than the guest has asked for.
    interrupts.assign(MSI, 0, Signal::fds(&signals[..6])).unwrap();
    assert_eq!(enabled(), Some(8));
}

#[test]
#[ignore = "needs an nvme behind an IOMMU"]
fn errors_and_requests_are_signalled() {
    let (_container, _device, mut interrupts) = open(&Nvme::address());
    for index in [ERR, REQ] {
        let info = interrupts.info(index);
        assert_eq!((info.count, info.eventfd), (1, true));
        let signal = Signal::new();
        interrupts.disable(index).unwrap();
        interrupts.assign(index, 0, vec![None]).unwrap();
        interrupts.disable(index).unwrap();
        interrupts.assign(index, 0, vec![signal.fd()]).unwrap();
        trigger(&interrupts, index, 0, 1);
        assert_eq!(signal.count(), 1);
        interrupts.disable(index).unwrap();
        interrupts.act(index, Action::Trigger, 0, 1, None).unwrap_err();
        assert_eq!(signal.count(), 0);
    }
}
