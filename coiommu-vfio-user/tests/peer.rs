//! An independent client: that of the `vfio_user` crate, which is Cloud Hypervisor's. It takes no error replies (it waits for
//! the rest of a message that does not come), so here all goes well; and its `resettable` says the opposite.

#[path = "../examples/server/device.rs"]
mod device;

use std::fs::File;
use std::io::{Read, Write, pipe};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;

use coiommu_vfio_user::{
    Area, Connection, DeviceInfo, Event, IrqChange, Limits, Listener, Mapping, RegionInfo, Request, SetIrqs, pci,
};
use device::Device;
use rustix::event::{PollFd, PollFlags, poll};
use vfio_user::Client;

/// Runs a client beside a server that serves it with `serve`. Both give what they come to.
fn with_client<T: Send, C>(serve: impl FnOnce(Connection) -> T + Send, client: impl FnOnce(Client) -> C) -> (T, C) {
    let folder = tempfile::tempdir().unwrap();
    let listener = Listener::bind(folder.path().join("device.sock")).unwrap();
    let path: &Path = listener.path();
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            poll(&mut [PollFd::new(&listener, PollFlags::IN)], None).unwrap();
            serve(Connection::new(listener.accept().unwrap().unwrap(), Limits::default()))
        });
        // If the client panics, its end is closed, and the server's thread ends.
        let client = client(Client::new(path).unwrap());
        (server.join().unwrap(), client)
    })
}

#[test]
fn a_client_uses_the_example() {
    let serve = |mut connection: Connection| Device::new().unwrap().serve(&mut connection, None).unwrap();
    let (client_went, ()) = with_client(serve, |mut client| {
        assert!(!client.resettable(), "it can be reset, says this client in its way");
        let sizes: Vec<_> = (0..pci::REGIONS).map(|index| client.region(index).unwrap().size).collect();
        assert_eq!(sizes, [0x1000, 0, 0x1000, 0, 0, 0, 0, 256, 0]);
        assert!(client.region(0).unwrap().file_offset.is_none());

        let mut identity = [0; 4];
        client.region_read(pci::CONFIG_REGION, 0, &mut identity).unwrap();
        assert_eq!(identity, [0x34, 0x12, 0x01, 0x00]);
        client.region_write(pci::CONFIG_REGION, 4, &[6, 0]).unwrap();
        client.region_read(pci::CONFIG_REGION, 2, &mut identity).unwrap();
        assert_eq!(identity, [0x01, 0x00, 6, 0]);

        let msi = client.get_irq_info(pci::MSI_IRQ).unwrap();
        assert_eq!((msi.index, msi.flags, msi.count), (pci::MSI_IRQ, 9, 1));
        assert_eq!(client.get_irq_info(pci::INTX_IRQ).unwrap().count, 0);
        let (mut interrupt, eventfd) = pipe().unwrap();
        client.set_irqs(pci::MSI_IRQ, 0x24, 0, 1, &[eventfd.as_raw_fd()]).unwrap();

        let ram = tempfile::tempfile().unwrap();
        ram.set_len(1 << 20).unwrap();
        client.dma_map(0, 0, 1 << 20, ram.as_raw_fd()).unwrap();
        client.dma_unmap(0, 1 << 20).unwrap();
        client.dma_map(0x1000, 0x1000, 1 << 16, ram.as_raw_fd()).unwrap();

        // BAR 2 is memory that both have; the doorbell is in BAR 0.
        let memory = client.region(2).unwrap().file_offset.as_ref().unwrap().file();
        memory.write_all_at(&[1, 2, 3].map(u32::to_le_bytes).concat(), 0).unwrap();
        client.region_write(0, 0, &2_u32.to_le_bytes()).unwrap();
        interrupt.read_exact(&mut [0; 8]).unwrap();
        let mut sums = [0; 8];
        client.region_read(0, 4, &mut sums).unwrap();
        assert_eq!(sums, [3, 0, 0, 0, 1, 0, 0, 0]);
        client.set_irqs(pci::MSI_IRQ, 0x21, 0, 0, &[]).unwrap();

        client.reset().unwrap();
        client.region_read(0, 4, &mut sums).unwrap();
        assert_eq!(sums, [0; 8]);
        drop(eventfd);
        assert_eq!(interrupt.read(&mut [0]).unwrap(), 0, "the device has let go of it");
        client.shutdown().unwrap();
    });
    assert!(client_went);
}

#[test]
fn a_client_finds_areas_and_their_file() {
    let file = tempfile::tempfile().unwrap();
    let areas = [(0, 0x1000), (0x3000, 0x5000)];
    let serve = |mut connection: Connection| {
        loop {
            match connection.receive().unwrap() {
                Event::Request(Request::DeviceInfo(ticket)) => {
                    connection.answer(ticket, Ok(DeviceInfo { resettable: false, regions: 2, irqs: 1 }));
                }
                Event::Request(Request::RegionInfo(_, ticket)) => {
                    let areas = areas.map(|(offset, size)| Area { offset, size }).to_vec();
                    let mapping = Mapping::sparse(file.try_clone().unwrap().into(), 0x7000, areas);
                    connection.answer(ticket, Ok(RegionInfo::mapped(0x8000, mapping)));
                }
                Event::Request(other) => panic!("{other:?}"),
                Event::Closed => break,
                Event::Idle => drop(connection.wait(None, None).unwrap()),
                Event::More => {}
            }
        }
    };
    with_client(serve, |client| {
        assert!(client.resettable(), "it cannot be reset");
        for index in 0..2 {
            let region = client.region(index).unwrap();
            assert_eq!((region.flags, region.size), (0xf, 0x8000));
            let found: Vec<_> = region.sparse_areas.iter().map(|area| (area.offset, area.size)).collect();
            assert_eq!(found, areas);
            let mapped = region.file_offset.as_ref().unwrap();
            assert_eq!(mapped.start(), 0x7000);
            mapped.file().write_all_at(&[7], index.into()).unwrap();
        }
        client.shutdown().unwrap();
    });
    let mut written = Vec::new();
    File::read_to_end(&mut file.try_clone().unwrap(), &mut written).unwrap();
    assert_eq!(written, [7, 7]);
}

#[test]
fn a_client_passes_many_eventfds_at_once() {
    let serve = |mut connection: Connection| {
        let mut eventfds = Vec::new();
        loop {
            match connection.receive().unwrap() {
                Event::Request(Request::DeviceInfo(ticket)) => {
                    connection.answer(ticket, Ok(DeviceInfo { resettable: true, regions: 0, irqs: 5 }));
                }
                Event::Request(Request::SetIrqs(SetIrqs { change, .. }, ticket)) => {
                    if let IrqChange::Assign { range, eventfds: more, .. } = change {
                        assert_eq!(range.within(2048).unwrap(), eventfds.len()..eventfds.len() + more.len());
                        eventfds.extend(more);
                    }
                    connection.answer(ticket, Ok(()));
                }
                Event::Request(other) => panic!("{other:?}"),
                Event::Closed => return eventfds,
                Event::Idle => drop(connection.wait(None, None).unwrap()),
                Event::More => {}
            }
        }
    };
    let pipes: Vec<_> = (0..40).map(|_| pipe().unwrap()).collect();
    let (eventfds, ()) = with_client(serve, |mut client| {
        for (start, piece) in (0..).step_by(16).zip(pipes.chunks(16)) {
            let fds: Vec<_> = piece.iter().map(|(_, writer)| writer.as_raw_fd()).collect();
            client.set_irqs(pci::MSIX_IRQ, 0x24, start, u32::try_from(fds.len()).unwrap(), &fds).unwrap();
        }
        client.shutdown().unwrap();
    });
    assert_eq!(eventfds.len(), 40);
    for (eventfd, (mut reader, _)) in eventfds.into_iter().zip(pipes) {
        File::from(eventfd).write_all(b"!").unwrap();
        reader.read_exact(&mut [0]).unwrap();
    }
}
