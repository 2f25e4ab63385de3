//! All of CoIOMMU in a VMM, as short as it can be.
//!
//! | file | |
//! | --- | --- |
//! | `vmm.rs` | your side: what your exits call, what you carry out, who does the work |
//! | `driver.rs` | what runs in the guest; here it calls your exits as functions |
//! | `main.rs` | a guest that sends two packets through a network card in software |
//!
//! `cargo run -p coiommu-pci --example vmm`

mod driver;
mod vmm;

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use coiommu_dtt::{Gfn, Gpa, PAGE_SIZE};
use coiommu_vfio::{DmaFault, SoftIommu};
use driver::Driver;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap};
use vmm::{Memory, Vmm};

const RAM: usize = 64 << 20;

/// A network card that sends what it finds in memory, and receives the same in capitals.
fn echo(iommu: &SoftIommu, iova: u64, len: usize) -> Result<(), DmaFault> {
    let mut packet = vec![0; len];
    iommu.read(iova, &mut packet)?;
    packet.make_ascii_uppercase();
    iommu.write(iova, &packet)
}

fn main() -> Result<(), Box<dyn Error>> {
    let ram = Arc::new(GuestRegionMmap::<()>::from_range(GuestAddress(0), RAM, None)?);
    let memory = Memory::new(GuestMemoryMmap::from_arc_regions(vec![Arc::clone(&ram)])?);
    // BAR 2. Over a memfd in real life, as the guest maps it too.
    let bar2 = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x2000)])?);
    let vmm = Arc::new(Vmm::new(&ram, &memory, &bar2, "00:05.0".parse()?, 1)?);

    let driver = Driver::probe(&vmm, &memory, &bar2, 1)?;
    let buffer = Gpa::new(0x200_0000);
    let page = Gfn::containing(buffer);
    for text in ["hello", "again"] {
        memory.memory().write_slice(text.as_bytes(), GuestAddress(buffer.raw()))?;
        driver.dma_map(0, &[page])?;
        vmm.endpoint.dma(|iommu| echo(iommu, buffer.raw(), text.len()))?;
        driver.dma_unmap(&[page])?;
        let mut received = vec![0; text.len()];
        memory.memory().read_slice(&mut received, GuestAddress(buffer.raw()))?;
        println!("{text} -> {}", String::from_utf8_lossy(&received));
        assert_eq!(received, text.to_uppercase().into_bytes());
    }
    let (pinned, requests) = (vmm.team.service().pinner().pinned_pages(), driver.requests.load(Ordering::Relaxed));
    println!("pinned {pinned} of {} pages, by {requests} request", RAM as u64 / PAGE_SIZE);

    driver.remove();
    println!("mappings after DEACTIVATE: {}", vmm.endpoint.iommu.mappings());
    vmm.reset();
    Ok(vmm.shut_down()?)
}
