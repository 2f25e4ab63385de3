//! The ioctls that are our own: three of a container, five of a device.
//!
//! vfio-ioctls has two of the first for a container that it opened itself; these work on anybody's, and tell what the kernel
//! said: its unmap hands the kernel a shared reference to write through, and takes "nothing was mapped" for an error. Of a
//! device, it drops the kernel's answer to a reset, the errno and the positive answer to a message about interrupts, and a
//! region that the kernel does not describe, so that those after it get the wrong index.
//!
//! Unsafe is needed here to call the kernel.
#![allow(unsafe_code)]

use std::ffi::c_ulong;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL, VFIO_IRQ_SET_DATA_BOOL,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_TYPE, vfio_device_info, vfio_iommu_type1_dma_map,
    vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info, vfio_irq_info, vfio_irq_set, vfio_region_info,
};
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::ioctl::{ioctl, ioctl_expr, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};

const fn request(number: u32) -> c_ulong {
    ioctl_expr(vmm_sys_util::ioctl::_IOC_NONE, VFIO_TYPE as u32, VFIO_BASE + number, 0)
}

const DEVICE_GET_INFO: c_ulong = request(7);
const DEVICE_GET_REGION_INFO: c_ulong = request(8);
const DEVICE_GET_IRQ_INFO: c_ulong = request(9);
const DEVICE_SET_IRQS: c_ulong = request(10);
const DEVICE_RESET: c_ulong = request(11);
const GET_INFO: c_ulong = request(12);
const MAP_DMA: c_ulong = request(13);
const UNMAP_DMA: c_ulong = request(14);

/// The length of an ioctl's argument, which is its first field.
const fn argsz<T>() -> u32 {
    #[allow(clippy::cast_possible_truncation, reason = "arguments have some dozens of bytes")]
    let length = size_of::<T>() as u32;
    length
}

/// What is to be unmapped.
pub(super) enum Unmap {
    Range { iova: u64, size: u64 },
    All,
}

/// Maps a piece of this process's memory, for reading and writing.
///
/// # Safety
///
/// The contract of [`DmaMapper::map`](coiommu_pin::DmaMapper::map).
pub(super) unsafe fn map(container: BorrowedFd<'_>, iova: u64, vaddr: u64, size: u64) -> Result<(), Errno> {
    let argument = vfio_iommu_type1_dma_map {
        argsz: argsz::<vfio_iommu_type1_dma_map>(),
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        vaddr,
        iova,
        size,
    };
    // SAFETY: the kernel reads the argument, which has the length that it says. That devices reach the memory from here
    // on is what the caller has promised to stand.
    let result = unsafe { ioctl_with_ref(&container, MAP_DMA, &argument) };
    if result == 0 { Ok(()) } else { Err(Errno::last()) }
}

/// Unmaps, and returns how many bytes were mapped there.
pub(super) fn unmap(container: BorrowedFd<'_>, what: &Unmap) -> Result<u64, Errno> {
    let (flags, iova, size) = match *what {
        Unmap::Range { iova, size } => (0, iova, size),
        Unmap::All => (VFIO_DMA_UNMAP_FLAG_ALL, 0, 0),
    };
    let mut argument = vfio_iommu_type1_dma_unmap {
        argsz: argsz::<vfio_iommu_type1_dma_unmap>(),
        flags,
        iova,
        size,
        ..Default::default()
    };
    // SAFETY: the kernel reads and writes the argument, which has the length that it says; without the flag for it, no
    // bitmap follows. To unmap takes away from devices, and gives them nothing.
    let result = unsafe { ioctl_with_mut_ref(&container, UNMAP_DMA, &mut argument) };
    if result == 0 { Ok(argument.size) } else { Err(Errno::last()) }
}

/// What the container says of itself: the structure and the capabilities that follow it, as bytes.
pub(super) fn info(container: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    ask(container, GET_INFO, [0; words::<vfio_iommu_type1_info>()])
}

/// What a device says of itself: `vfio_device_info`.
pub(super) fn device_info(device: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    ask(device, DEVICE_GET_INFO, [0; words::<vfio_device_info>()])
}

/// What it says of a region: `vfio_region_info` and the capabilities that follow it.
pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> Result<Vec<u8>, Errno> {
    ask(device, DEVICE_GET_REGION_INFO, about::<{ words::<vfio_region_info>() }>(index))
}

/// What it says of a kind of interrupt: `vfio_irq_info`.
pub(super) fn irq_info(device: BorrowedFd<'_>, index: u32) -> Result<Vec<u8>, Errno> {
    ask(device, DEVICE_GET_IRQ_INFO, about::<{ words::<vfio_irq_info>() }>(index))
}

/// How many words a structure has.
const fn words<T>() -> usize {
    size_of::<T>() / 4
}

/// A structure for a question about one of many: argsz, flags, index.
fn about<const N: usize>(index: u32) -> [u32; N] {
    std::array::from_fn(|word| if word == 2 { index } else { 0 })
}

/// Asks for a structure, which begins with its length, and for the capabilities that follow it: all of it, as bytes.
fn ask<const N: usize>(file: BorrowedFd<'_>, request: c_ulong, question: [u32; N]) -> Result<Vec<u8>, Errno> {
    /// In bytes; far more than there are capabilities for.
    const MOST: u32 = 1 << 20;
    let mut length = argsz::<[u32; N]>();
    loop {
        let mut answer = question.to_vec();
        answer.resize(length.div_ceil(4) as usize, 0);
        answer[0] = length;
        // SAFETY: these requests have the kernel write as many bytes as the first word says at most, and so many are there.
        let result = unsafe { ioctl_with_mut_ptr(&file, request, answer.as_mut_ptr()) };
        if result != 0 {
            return Err(Errno::last());
        }
        let wanted = answer[0];
        if wanted > MOST {
            return Err(Errno::new(rustix::io::Errno::OVERFLOW.raw_os_error()));
        }
        if wanted <= length {
            return Ok(answer.iter().flat_map(|word| word.to_ne_bytes()).collect());
        }
        length = wanted;
    }
}

/// What a message about interrupts says of each of them.
#[derive(Debug)]
pub(super) enum IrqData<'a, F> {
    /// Nothing, of so many. To trigger none disables the kind.
    None(u32),
    /// Whether it is meant.
    Bools(&'a [bool]),
    /// An eventfd, or that there is none.
    Eventfds(&'a [Option<&'a F>]),
}

/// Sends a message about interrupts of a kind, from `start` on; `action` is one of VFIO_IRQ_SET_ACTION. A positive number:
/// it cannot have so many, but that many.
pub(super) fn set_irqs<F: AsFd>(
    device: BorrowedFd<'_>,
    action: u32,
    index: u32,
    start: u32,
    data: &IrqData<'_, F>,
) -> Result<u32, Errno> {
    const NO_EVENTFD: RawFd = -1;
    let too_long = |_| Errno::new(rustix::io::Errno::OVERFLOW.raw_os_error());
    let (kind, count, data): (u32, usize, Vec<u8>) = match *data {
        IrqData::None(count) => (VFIO_IRQ_SET_DATA_NONE, count as usize, Vec::new()),
        IrqData::Bools(bools) => (VFIO_IRQ_SET_DATA_BOOL, bools.len(), bools.iter().map(|&is| u8::from(is)).collect()),
        IrqData::Eventfds(fds) => {
            let numbers = fds.iter().map(|fd| fd.map_or(NO_EVENTFD, |fd| fd.as_fd().as_raw_fd()));
            (VFIO_IRQ_SET_DATA_EVENTFD, fds.len(), numbers.flat_map(RawFd::to_ne_bytes).collect())
        }
    };
    let count = u32::try_from(count).map_err(too_long)?;
    // `vfio_irq_set`, which says how long it is.
    let length = u32::try_from(size_of::<vfio_irq_set>() + data.len()).map_err(too_long)?;
    let header = [length, kind | action, index, start, count];
    let message: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).chain(data).collect();
    // SAFETY: the kernel reads as many bytes as the message says that it has. The file descriptors in it are borrowed, and
    // what the kernel keeps of them are references of its own.
    let result = unsafe { ioctl_with_ptr(&device, DEVICE_SET_IRQS, message.as_ptr()) };
    u32::try_from(result).map_err(|_negative| Errno::last())
}

/// Resets a device.
pub(super) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: it has no argument, and of this process it touches nothing.
    let result = unsafe { ioctl(&device, DEVICE_RESET) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Another file for what somebody else has open.
pub(super) fn duplicate(fd: &impl AsRawFd) -> io::Result<File> {
    // SAFETY: its owner is borrowed, and has it open as long.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
    Ok(borrowed.try_clone_to_owned()?.into())
}
