//! The ioctls that are our own: three of a container, one of a device.
//!
//! vfio-ioctls has two of them for a container that it opened itself; these work on anybody's, and tell what the kernel
//! said: its unmap hands the kernel a shared reference to write through, and takes "nothing was mapped" for an error. Its
//! reset drops the kernel's answer.
//!
//! Unsafe is needed here to call the kernel.
#![allow(unsafe_code)]

use std::ffi::c_ulong;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL, VFIO_TYPE,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info,
};
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::ioctl::{ioctl, ioctl_expr, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ref};

const fn request(number: u32) -> c_ulong {
    ioctl_expr(vmm_sys_util::ioctl::_IOC_NONE, VFIO_TYPE as u32, VFIO_BASE + number, 0)
}

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
    /// Far more than there are capabilities for.
    const MOST: u32 = 1 << 20;
    let mut length = argsz::<vfio_iommu_type1_info>();
    loop {
        // Words, for the alignment of the structure.
        let mut words = vec![0_u64; length.div_ceil(8) as usize];
        let argument = words.as_mut_ptr().cast::<vfio_iommu_type1_info>();
        // SAFETY: there is room for the structure, aligned, and zeroes are a value of it.
        unsafe { (*argument).argsz = length };
        // SAFETY: the kernel writes `argsz` bytes at most, and so many are there.
        let result = unsafe { ioctl_with_mut_ptr(&container, GET_INFO, argument) };
        if result != 0 {
            return Err(Errno::last());
        }
        // SAFETY: as above; the kernel has written all of it.
        let wanted = unsafe { (*argument).argsz };
        if wanted > MOST {
            return Err(Errno::new(rustix::io::Errno::OVERFLOW.raw_os_error()));
        }
        if wanted <= length {
            return Ok(words.iter().flat_map(|word| word.to_ne_bytes()).collect());
        }
        length = wanted;
    }
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
