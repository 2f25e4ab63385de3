//! Bus mastering is what config space says.

use coiommu_vfio::Type1;
use coiommu_vfio::type1::device::CONFIG;

use crate::edu::Edu;
use crate::nvme::Nvme;

#[test]
#[ignore = "needs edu and an nvme behind an IOMMU"]
fn bus_mastering_is_read_back() {
    const COMMAND: u64 = 4;
    const MASTER: u16 = 4;
    let container = Type1::open([Edu::address(), Nvme::address()]).unwrap();
    for device in container.devices() {
        let command = || {
            let mut command = [0; 2];
            device.read(CONFIG, COMMAND, &mut command).unwrap();
            u16::from_le_bytes(command)
        };
        for on in [false, true, true, false] {
            let others = command() & !MASTER;
            device.set_bus_master(on).unwrap();
            assert_eq!(device.is_bus_master().unwrap(), on);
            assert_eq!(command(), others | if on { MASTER } else { 0 }, "nothing else changes");
        }
        // As a guest does it.
        device.write(CONFIG, COMMAND, &(command() | MASTER).to_le_bytes()).unwrap();
        assert!(device.is_bus_master().unwrap());
        device.set_bus_master(false).unwrap();
    }
}
