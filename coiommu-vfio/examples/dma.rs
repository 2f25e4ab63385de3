//! A device in software reads a request from guest memory, writes its answer, and faults once the page is unmapped.
//!
//! `cargo run -p coiommu-vfio --example dma`

// `DmaMapper::map` is unsafe: the one block says why its promise holds.
#![allow(unsafe_code)]

use std::error::Error;
use std::ptr::NonNull;

use coiommu_vfio::{Backing, DmaFault, DmaMapper, SoftIommu};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const PAGE: u64 = 0x1000;

/// A device that turns a text into capitals, as slowly as hardware would: by DMA.
struct Shouter<'a> {
    iommu: &'a SoftIommu,
}

impl Shouter<'_> {
    fn run(&self, iova: u64, len: usize) -> Result<(), DmaFault> {
        let mut text = vec![0; len];
        self.iommu.read(iova, &mut text)?;
        text.make_ascii_uppercase();
        self.iommu.write(iova, &text)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let guest = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
    // A buffer that lies across the border of two pages.
    let (buffer, text) = (GuestAddress(0x4ffd), b"direct memory access");
    guest.write_slice(text, buffer)?;

    let iommu = SoftIommu::new();
    let device = Shouter { iommu: &iommu };
    for page in [0x4000, 0x5000] {
        let hva = NonNull::new(guest.get_host_address(GuestAddress(page))?).ok_or("memory at null")?;
        // SAFETY: `guest` outlives `iommu`'s use of it and is touched through vm-memory only.
        unsafe { iommu.map(page, Backing { hva, file: None }, PAGE) }?;
    }
    println!("{:x?}", iommu.snapshot());

    device.run(buffer.0, text.len())?;
    let mut answer = [0; 20];
    guest.read_slice(&mut answer, buffer)?;
    println!("{}", String::from_utf8_lossy(&answer));

    println!("{:#x} bytes unmapped", iommu.unmap(0x5000, PAGE)?);
    match device.run(buffer.0, text.len()) {
        Ok(()) => Err("the device reached a page that is not mapped".into()),
        Err(fault) => {
            println!("{fault}");
            assert_eq!(iommu.take_faults(), [fault]);
            Ok(())
        }
    }
}
