//! The end: DEACTIVATE and reset against a pin.

use coiommu_pin::pinner::Drain;

use crate::check::check;
use crate::host::{Host, together};

/// When it returns, nothing is mapped and nothing will be; PINNED is clear.
#[test]
fn deactivate_while_a_page_is_asked_for() {
    check(None, || {
        let host = Host::new("", &[0, 1]).with_ram(0..4).with_idle(0..1);
        // Bus mastering is off already: no device uses them.
        let deactivate = |host: &Host| {
            host.pinner().deactivate(Drain::Deactivate).unwrap();
            host.iommu.take(0..4);
            host.iommu.assert_unmapped(0..4);
        };
        together(host, [|host| _ = host.map(&[0, 1]), deactivate]);
    });
}

/// When it returns, the table may be anybody's memory, and the host is out of it.
#[test]
fn reset_while_a_page_is_asked_for() {
    check(None, || {
        let host = Host::new("", &[0]).with_ram(0..4);
        let reset = |host: &Host| {
            host.pinner().deactivate(Drain::Reset).unwrap();
            host.iommu.take(0..4);
            host.memory.take_table(host.guest.dtt().root());
        };
        // The guest's CPUs are stopped: only the host is at it still.
        let serve = |host: &Host| _ = host.ask(&[0], &crate::host::NOW);
        let host = std::sync::Arc::new(host);
        let worker = loom::thread::spawn({
            let host = std::sync::Arc::clone(&host);
            move || serve(&host)
        });
        reset(&host);
        worker.join().unwrap();
        host.iommu.assert_unmapped(0..4);
    });
}
