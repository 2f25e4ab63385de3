//! RAM that comes and goes, and what is no RAM.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::guest::{Command, Guest, HIGH, LOW, Place, map, memory_file};
use crate::lines::Lines;
use crate::server::Server;
use crate::wire::{EEXIST, EINVAL, ENOENT, READ, WRITE, Wire};
use coiommu_dtt::PAGE_SIZE;

/// Pages of [`HIGH`] that are pinned in most tests here, and what `pins` says of them.
const PINNED: std::ops::Range<u64> = 250..260;
const PINS: [(u64, u64); 1] = [(HIGH.gpa + 250 * PAGE_SIZE, 10 * PAGE_SIZE)];

/// A guest with some pages pinned.
fn guest(server: &Server) -> (Guest, Lines) {
    let mut guest = Guest::active(server);
    assert!(guest.dma_map(0, &HIGH.pages(PINNED)));
    let mut control = server.control();
    assert_eq!(control.pins(), PINS);
    (guest, control)
}

/// How often the server has a file of this name mapped, and open.
fn mapped_and_open(server: &Server, name: &str) -> (usize, usize) {
    let name = format!("memfd:{name} ");
    let maps = fs::read_to_string(server.proc("maps")).unwrap();
    let links = fs::read_dir(server.proc("fd")).unwrap();
    // One may be closed meanwhile.
    let links = links.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    (maps.matches(&name).count(), links.filter(|link| link.to_string_lossy().contains(&name)).count())
}

#[test]
fn ram_that_returns_is_pinned_as_before() {
    let server = Server::start(&[]);
    let (mut guest, mut control) = guest(&server);
    for _ in 0..3 {
        guest.unmap(HIGH).unwrap();
        assert_eq!((control.pins(), control.stat("guest_memory_bytes")), (vec![], LOW.bytes), "at once");
        assert_eq!(guest.pinned(&HIGH.pages(PINNED)), 10, "the guest is not told");
        guest.map(HIGH).unwrap();
        assert_eq!((control.pins(), control.stat("mappings")), (PINS.to_vec(), 2), "without being asked");
        assert_eq!(guest.pinned(&HIGH.pages(PINNED)), 10);
    }
    assert_eq!(control.stat("requests_pinned"), 1);
    // Cut in two, and from a descriptor of its own, it is still the same.
    guest.unmap(HIGH).unwrap();
    let link = format!("/proc/self/fd/{}", guest.ram.as_raw_fd());
    let again = File::options().read(true).write(true).open(link).unwrap();
    let half = HIGH.bytes / 4;
    let [first, second] = [(0, half), (half, HIGH.bytes - half)].map(|(from, bytes)| Place {
        gpa: HIGH.gpa + from,
        bytes,
        offset: HIGH.offset + from,
    });
    map(&mut guest.vmm, &again, second).unwrap();
    assert_eq!(control.pins(), [(second.gpa, 4 * PAGE_SIZE)]);
    map(&mut guest.vmm, &guest.ram.try_clone().unwrap(), first).unwrap();
    assert_eq!(control.pins(), PINS);
    assert_eq!(guest.pinned(&HIGH.pages(PINNED)), 10);
}

#[test]
fn other_memory_at_its_place_is_not_pinned() {
    let server = Server::start(&[]);
    let (mut guest, mut control) = guest(&server);
    let pages = HIGH.pages(PINNED);
    // The same file from another place in it, and then another file.
    guest.unmap(HIGH).unwrap();
    let elsewhere = Place { offset: HIGH.offset - PAGE_SIZE, ..HIGH };
    guest.map(elsewhere).unwrap();
    assert_eq!((control.pins(), guest.pinned(&pages)), (vec![], 0), "and the guest is told");
    guest.ask(0, &pages);
    assert_eq!((control.pins(), guest.pinned(&pages)), (PINS.to_vec(), 10));

    guest.unmap(elsewhere).unwrap();
    let other = memory_file("other-ram", HIGH.offset + HIGH.bytes, true);
    map(&mut guest.vmm, &other, HIGH).unwrap();
    assert_eq!((control.pins(), guest.pinned(&pages)), (vec![], 0));
    // What was there before is forgotten.
    guest.unmap(HIGH).unwrap();
    guest.map(elsewhere).unwrap();
    assert_eq!((control.pins(), guest.pinned(&pages)), (vec![], 0));
    assert_eq!(control.stat("anomalies"), 0);
}

#[test]
fn memory_that_moves_is_not_pinned_where_it_goes() {
    let server = Server::start(&[]);
    let (mut guest, mut control) = guest(&server);
    guest.unmap(HIGH).unwrap();
    let moved = Place { gpa: HIGH.gpa + (64 << 20), ..HIGH };
    guest.map(moved).unwrap();
    assert_eq!(control.pins(), []);
    assert!(guest.dma_map(0, &moved.pages(0..1)));
    // It will be pinned where it was when it comes back there, so it may not be taken meanwhile.
    let unpinned = control.unpin(&[(HIGH.gpa, HIGH.bytes)]).unwrap();
    assert_eq!((&unpinned["hold"], &unpinned["ranges"][0]["busy"]), (&serde_json::Value::Null, &10.into()));
    guest.unmap(moved).unwrap();
    guest.map(HIGH).unwrap();
    assert_eq!(control.pins(), PINS);
}

#[test]
fn what_goes_while_nobody_is_active_is_not_remembered() {
    let server = Server::start(&[]);
    let (mut guest, mut control) = guest(&server);
    guest.unmap(HIGH).unwrap();
    guest.command(Command::Deactivate);
    assert_eq!(guest.pinned(&HIGH.pages(PINNED)), 0);
    guest.map(HIGH).unwrap();
    assert_eq!(control.pins(), []);
    guest.activate();
    guest.ask(0, &HIGH.pages(PINNED));
    assert_eq!(control.pins(), PINS);
}

#[test]
fn a_file_is_mapped_once_however_many_pieces_it_is() {
    let server = Server::start(&[]);
    let mut vmm = Wire::connect(&server.socket());
    let ram = memory_file("pieces", 8 << 20, true);
    // The guest's addresses are not in the file's order, and one piece of the file is at two places.
    let places = [(0x1_0000_0000, 6), (0, 0), (0x20_0000, 2), (0x8000_0000, 2), (0x40_0000, 4)]
        .map(|(gpa, offset)| Place { gpa, bytes: 2 << 20, offset: offset << 20 });
    for (count, place) in places.iter().enumerate() {
        map(&mut vmm, &ram, *place).unwrap();
        assert_eq!(mapped_and_open(&server, "pieces"), (1, 1), "after {count}");
    }
    // A table in one piece that leads into another; its pages are taken in order.
    let root_and_next = places[4].gpa - PAGE_SIZE;
    let mut seen = places;
    seen.sort_by_key(|place| place.gpa);
    let mut guest = Guest::over(vmm, ram, &seen, root_and_next);
    guest.activate();
    let mut control = server.control();
    assert_eq!(control.stats()["active"], true);
    let pages = places.map(|place| place.page(511));
    assert!(guest.dma_map(0, &pages));
    let mut pins = places.map(|place| (place.gpa + 511 * PAGE_SIZE, PAGE_SIZE));
    pins.sort_unstable();
    assert_eq!(control.pins(), pins);

    for place in places {
        guest.unmap(place).unwrap();
    }
    assert_eq!((control.pins(), control.stat("guest_memory_bytes")), (vec![], 0));
    assert_eq!(mapped_and_open(&server, "pieces"), (0, 0), "nothing of it is left");
}

#[test]
fn a_file_that_has_grown_is_mapped_as_far_as_it_goes() {
    let server = Server::start(&[]);
    let mut vmm = Wire::connect(&server.socket());
    let ram = memory_file("growing", 4 << 20, false);
    map(&mut vmm, &ram, LOW).unwrap();
    let more = Place { offset: 4 << 20, ..HIGH };
    assert_eq!(map(&mut vmm, &ram, more), Err(EINVAL));
    ram.set_len(8 << 20).unwrap();
    map(&mut vmm, &ram, more).unwrap();
    let mut guest = Guest::over(vmm, ram, &[LOW], 1 << 20);
    guest.activate();
    assert!(guest.dma_map(0, &[LOW.page(0), HIGH.page(1023)]));
}

#[test]
fn what_is_no_ram_is_left_alone() {
    let server = Server::start(&[]);
    let mut guest = Guest::active(&server);
    let mut control = server.control();
    let ram = guest.ram.try_clone().unwrap();
    let rom = Place { gpa: 0x1000_0000, bytes: 1 << 20, offset: 0 };
    let nothing: [(u32, Option<(&File, u64)>); 5] =
        [(READ, Some((&ram, 0))), (WRITE, Some((&ram, 0))), (0, Some((&ram, 0))), (READ | WRITE, None), (READ, None)];
    for (flags, file) in nothing {
        guest.vmm.dma_map(rom.gpa, rom.bytes, flags, file).unwrap();
        assert_eq!(control.stat("guest_memory_bytes"), LOW.bytes + HIGH.bytes);
        assert_eq!(mapped_and_open(&server, "guest-ram").0, 1);
        let page = [rom.page(0)];
        assert!(!guest.dma_map(0, &page));
        assert_eq!(control.pins(), []);
        // It is known all the same.
        assert_eq!(guest.vmm.dma_map(rom.gpa, rom.bytes, flags, file), Err(EEXIST));
        guest.vmm.dma_unmap(rom.gpa, rom.bytes).unwrap();
        assert_eq!(guest.vmm.dma_unmap(rom.gpa, rom.bytes), Err(ENOENT));
    }
    assert!(!server.log().contains("share=on"), "other devices' registers come without a file, and are none");
}

#[test]
fn pinned_ram_that_becomes_rom_is_not_pinned() {
    let server = Server::start(&[]);
    let (mut guest, mut control) = guest(&server);
    // As firmware does with what it shadows.
    guest.unmap(HIGH).unwrap();
    guest.vmm.dma_map(HIGH.gpa, HIGH.bytes, READ, Some((&guest.ram, HIGH.offset))).unwrap();
    assert_eq!(control.pins(), []);
    guest.unmap(HIGH).unwrap();
    guest.map(HIGH).unwrap();
    assert_eq!(control.pins(), PINS, "and back");
}

#[test]
fn memory_that_is_not_shared_is_told_of_once() {
    let server = Server::start(&[]);
    let mut vmm = Wire::connect(&server.socket());
    for _ in 0..3 {
        vmm.dma_map(LOW.gpa, LOW.bytes, READ | WRITE, None).unwrap();
        vmm.dma_map(HIGH.gpa, HIGH.bytes, READ | WRITE, None).unwrap();
        vmm.dma_unmap_all().unwrap();
    }
    let log = server.log();
    let told: Vec<_> = log.lines().filter(|line| line.contains("share=on")).collect();
    assert_eq!(told.len(), 1, "{log}");
    assert!(told[0].contains("ERROR") && told[0].contains("memory-backend-memfd"), "{}", told[0]);
    assert_eq!(server.control().stat("guest_memory_bytes"), 0);
}

#[test]
fn a_driver_without_any_memory_is_told_of_once() {
    let server = Server::start(&[]);
    let mut vmm = Wire::connect(&server.socket());
    // Not at 0, where RAM is known by its place.
    vmm.dma_map(HIGH.gpa, HIGH.bytes, READ | WRITE, None).unwrap();
    assert!(!server.log().contains("share=on"));
    let mut guest = Guest::over(vmm, memory_file("private", 8 << 20, true), &[LOW], 1 << 20);
    guest.activate();
    guest.activate();
    assert_eq!(told_to_share(&server), 1, "{}", server.log());
}

#[test]
fn memory_whose_file_the_guest_does_not_write_is_told_of_once() {
    let server = Server::start(&[]);
    let mut vmm = Wire::connect(&server.socket());
    // What the VMM hands over, and what the guest has: that is a copy, as of a file that is mapped privately.
    let handed = memory_file("handed", 8 << 20, true);
    for place in [LOW, HIGH] {
        map(&mut vmm, &handed, place).unwrap();
    }
    let mut guest = Guest::over(vmm, memory_file("private", 8 << 20, true), &[LOW], 1 << 20);
    guest.activate();
    assert_eq!(told_to_share(&server), 0, "nothing is wrong yet");
    for n in 0..10 {
        assert!(!guest.dma_map(0, &HIGH.pages(n..n + 1)));
    }
    assert_eq!(told_to_share(&server), 1, "{}", server.log());
    assert!(server.log().contains("table is empty"), "{}", server.log());

    // With its table to be seen, a guest may ask for what cannot be.
    let server = Server::start(&[]);
    let mut guest = Guest::active(&server);
    assert!(guest.dma_map(0, &HIGH.pages(0..1)));
    for _ in 0..10 {
        guest.ask(0, &[Place { gpa: 1 << 40, bytes: PAGE_SIZE, offset: 0 }.page(0)]);
    }
    assert!(server.control().stat("requests_failed") + server.control().stat("requests_refused") > 0);
    assert_eq!(told_to_share(&server), 0, "{}", server.log());
}

/// How often it is said, as an error, that memory has to be shared.
fn told_to_share(server: &Server) -> usize {
    server.log().lines().filter(|line| line.contains("ERROR") && line.contains("share=on")).count()
}

#[test]
fn memory_that_can_be_cut_off_is_told_of_once() {
    let server = Server::start(&[]);
    let mut vmm = Wire::connect(&server.socket());
    let ram = memory_file("unsealed", 8 << 20, false);
    for place in [LOW, HIGH] {
        map(&mut vmm, &ram, place).unwrap();
    }
    vmm.dma_unmap_all().unwrap();
    map(&mut vmm, &tempfile_of(8 << 20), LOW).unwrap();
    let log = server.log();
    let told: Vec<_> = log.lines().filter(|line| line.contains("can be cut off")).collect();
    assert_eq!(told.len(), 1, "{log}");
    assert!(told[0].contains("WARN"), "{}", told[0]);

    let server = Server::start(&[]);
    let _guest = Guest::active(&server);
    assert!(!server.log().contains("WARN"), "{}", server.log());
}

fn tempfile_of(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

#[test]
fn maps_that_cannot_be_are_errors_and_nothing_more() {
    let server = Server::start(&[]);
    let (mut guest, mut control) = guest(&server);
    let page = PAGE_SIZE;
    // Whatever comes over something that is there, be it of the same file or no RAM at all.
    let over = [(HIGH.gpa, HIGH.bytes), (HIGH.gpa - page, 2 * page), (HIGH.gpa + page, page), (0, u64::MAX)];
    let by_a_byte = [(HIGH.gpa - page, page + 1), (HIGH.gpa + HIGH.bytes - 1, 1)];
    for (gpa, bytes) in over.into_iter().chain(by_a_byte) {
        for file in [Some((&guest.ram, 0)).filter(|_| bytes <= HIGH.bytes), None] {
            assert_eq!(guest.vmm.dma_map(gpa, bytes, READ | WRITE, file), Err(EEXIST), "{gpa:#x} {bytes:#x}");
        }
    }
    // Unmaps of what is not there, or only in part, or more than that.
    for (gpa, bytes) in [
        (HIGH.gpa, page),
        (HIGH.gpa, 2 * HIGH.bytes),
        (HIGH.gpa + page, HIGH.bytes - page),
        (1 << 45, page),
        (0, u64::MAX),
    ] {
        assert_eq!(guest.vmm.dma_unmap(gpa, bytes), Err(ENOENT), "{gpa:#x} {bytes:#x}");
    }
    // RAM that no file has, that is not made of pages, or at no address.
    let file_end = 8 << 20;
    for (gpa, bytes, offset) in [
        (1 << 32, page, file_end),
        (1 << 32, 2 * page, file_end - page),
        (1 << 32, page, u64::MAX / 2 - 2 * page),
        (1 << 32 | 1, page, 0),
        (1 << 32, page + 1, 0),
        (1 << 32, page, 16),
        (u64::MAX - page + 1, 2 * page, 0),
        (1 << 32, 0, 0),
    ] {
        let mapped = guest.vmm.dma_map(gpa, bytes, READ | WRITE, Some((&guest.ram, offset)));
        assert_eq!(mapped, Err(EINVAL), "{gpa:#x} {bytes:#x} {offset:#x}");
    }
    // What is no file of memory.
    let (reader, writer) = std::io::pipe().unwrap();
    let (folder, device) = (File::open("/").unwrap(), File::open("/dev/null").unwrap());
    for (file, at) in [OwnedFd::from(reader), writer.into(), folder.into(), device.into()].into_iter().zip(33..) {
        assert!(guest.vmm.dma_map(1 << at, page, READ | WRITE, Some((&File::from(file), 0))).is_err());
        guest.vmm.dma_map(1 << at, page, READ | WRITE, None).unwrap();
    }
    // None of it has changed anything.
    assert_eq!((control.pins(), control.stat("guest_memory_bytes")), (PINS.to_vec(), LOW.bytes + HIGH.bytes));
    assert_eq!(mapped_and_open(&server, "guest-ram").0, 1);
    assert!(guest.dma_map(0, &HIGH.pages(0..3)));
}

#[test]
fn all_of_it_can_go_at_once() {
    let server = Server::start(&[]);
    let (mut guest, mut control) = guest(&server);
    guest.vmm.dma_map(1 << 40, 1 << 20, READ | WRITE, None).unwrap();
    guest.vmm.dma_unmap_all().unwrap();
    assert_eq!((control.pins(), control.stat("guest_memory_bytes")), (vec![], 0));
    assert_eq!(mapped_and_open(&server, "guest-ram"), (0, 0));
    guest.vmm.dma_unmap_all().unwrap();
    guest.vmm.dma_map(1 << 40, 1 << 20, READ | WRITE, None).unwrap();
    // The table is away with the rest, and the device is still active.
    for place in [HIGH, LOW] {
        guest.map(place).unwrap();
    }
    assert_eq!((control.pins(), control.stats()["active"].as_bool()), (PINS.to_vec(), Some(true)));
    assert!(guest.dma_map(0, &HIGH.pages(0..3)));
}

#[test]
fn a_guest_whose_table_goes_is_answered() {
    let server = Server::start(&[]);
    let (mut guest, mut control) = guest(&server);
    guest.unmap(LOW).unwrap();
    let page = HIGH.pages(0..1);
    guest.count(&page);
    guest.ask(0, &page);
    assert_eq!((guest.pinned(&page), control.pins()), (0, PINS.to_vec()));
    guest.map(LOW).unwrap();
    guest.ask(0, &page);
    assert_eq!(guest.pinned(&page), 1);
}
