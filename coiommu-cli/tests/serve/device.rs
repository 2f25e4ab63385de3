//! The device that the guest sees, and what it does: identity, regions, activation, requests, parking, reset.

use std::os::unix::fs::FileExt;

use coiommu_dtt::{Bdf, Gfn, Gpa, PAGE_SIZE, RequestWord};
use rustix::fs::{SealFlags, fcntl_get_seals, ftruncate};
use serde_json::json;

use crate::guest::{COMMAND, Command, DOORBELLS, Guest, HIGH, LOW};
use crate::server::{ENDPOINTS, Server, VCPUS};
use crate::wait_for;
use crate::wire::{
    BAR0, BAR2, BAR4, CONFIG, EINVAL, ENOTSUP, GET_INFO, GET_IRQ_INFO, GET_REGION_IO_FDS, SET_IRQS, Wire, u32s, u64s,
};

const BAR_BYTES: u64 = 0x2000;

#[test]
fn it_says_what_it_is() {
    let server = Server::start(&[]);
    let mut vmm = Wire::connect(&server.socket());
    let (info, _) = vmm.call(GET_INFO, &u32s(&[16, 0, 0, 0]), &[]).unwrap();
    assert_eq!(
        info,
        u32s(&[16, 3, 9, 5]),
        "a PCI device that can be reset, with so many regions and kinds of interrupts"
    );
    for index in 0..5 {
        let (irq, _) = vmm.call(GET_IRQ_INFO, &u32s(&[16, 0, index, 0]), &[]).unwrap();
        assert_eq!(irq, u32s(&[16, 0, index, 0]), "and none of a kind");
        vmm.call(SET_IRQS, &u32s(&[20, 0x21, index, 0, 0]), &[]).unwrap();
        assert_eq!(vmm.call(SET_IRQS, &u32s(&[20, 0x21, index, 0, 1]), &[]).unwrap_err(), EINVAL);
    }
    assert_eq!(vmm.call(GET_IRQ_INFO, &u32s(&[16, 0, 5, 0]), &[]).unwrap_err(), EINVAL);
    assert_eq!(vmm.call(GET_REGION_IO_FDS, &u32s(&[16, 0, 0, 0]), &[]).unwrap_err(), ENOTSUP);

    let identity = vmm.read(CONFIG, 0, 64).unwrap();
    assert_eq!(identity[..4], [0x34, 0x12, 0xcd, 0xab]);
    assert_eq!(identity[8..12], [0x10, 0, 0xff, 0xff], "revision, then the class");
    assert_eq!((identity[14], identity[52], identity[61]), (0, 0, 0), "header type, capabilities, interrupt pin");
    assert_eq!(identity[44..48], [0x34, 0x12, 0xcd, 0xab]);
    for bar in [0x10, 0x18, 0x20] {
        vmm.write(CONFIG, bar, &[0xff; 8]).unwrap();
        let sized = vmm.read_u64(CONFIG, bar);
        assert_eq!((sized & 0xf, !(sized & !0xf) + 1), (0b0100, BAR_BYTES), "64-bit memory of this size");
        vmm.write(CONFIG, bar, &u64s(&[bar << 32])).unwrap();
        assert_eq!(vmm.read_u64(CONFIG, bar), bar << 32 | 0b0100);
    }
}

#[test]
fn one_of_its_regions_is_mapped_and_cannot_be_resized() {
    let server = Server::start(&[]);
    let mut vmm = Wire::connect(&server.socket());
    let sizes: Vec<_> = (0..9).map(|index| vmm.region(index).unwrap().size).collect();
    assert_eq!(sizes, [BAR_BYTES, 0, BAR_BYTES, 0, BAR_BYTES, 0, 0, 256, 0]);
    assert_eq!(vmm.region(9).unwrap_err(), EINVAL);
    for trapped in [BAR0, BAR4, CONFIG] {
        let region = vmm.region(trapped).unwrap();
        assert!(region.file.is_none() && region.flags & 0b100 == 0, "{region:?}");
    }
    let region = vmm.region(BAR2).unwrap();
    assert_eq!(region.flags & 0b111, 0b111, "read, write, mmap");
    let file = region.file.unwrap();
    let seals = fcntl_get_seals(&file).unwrap();
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL), "{seals:?}");
    assert!(ftruncate(&file, 0).is_err() && ftruncate(&file, 2 * BAR_BYTES).is_err());
    assert_eq!(file.metadata().unwrap().len(), region.offset + BAR_BYTES);
    // It is the same memory by either way.
    vmm.write(BAR2, BAR_BYTES - 8, &u64s(&[77])).unwrap();
    let mut word = [0; 8];
    file.read_exact_at(&mut word, region.offset + BAR_BYTES - 8).unwrap();
    assert_eq!(u64::from_le_bytes(word), 77);
    file.write_all_at(&u64s(&[78]), region.offset + BAR_BYTES - 8).unwrap();
    assert_eq!(vmm.read_u64(BAR2, BAR_BYTES - 8), 78);
}

#[test]
fn the_topology_is_that_of_the_arguments() {
    let server = Server::start(&[]);
    let mut vmm = Wire::connect(&server.socket());
    let topology = vmm.read(BAR4, 0, 6).unwrap();
    let words: Vec<_> = topology.chunks(2).map(|word| u16::from_le_bytes([word[0], word[1]])).collect();
    assert_eq!(words, [2, ENDPOINTS[0], ENDPOINTS[1]]);
    vmm.write(BAR4, 0, &[9; 6]).unwrap();
    assert_eq!(vmm.read(BAR4, 0, 6).unwrap(), topology);
}

#[test]
fn accesses_stay_within_regions() {
    let server = Server::start(&[]);
    let mut vmm = Wire::connect(&server.socket());
    for (region, size) in [(BAR0, BAR_BYTES), (BAR2, BAR_BYTES), (BAR4, BAR_BYTES), (CONFIG, 256)] {
        assert_eq!(vmm.read(region, size - 4, 4).unwrap().len(), 4);
        for (offset, count) in [(size - 4, 8), (size, 1), (u64::MAX - 7, 8), (1 << 32, 4)] {
            assert_eq!(vmm.read(region, offset, count).unwrap_err(), EINVAL, "{region} {offset:#x}");
            let data = vec![0; usize::try_from(count).unwrap()];
            assert_eq!(vmm.write(region, offset, &data).unwrap_err(), EINVAL, "{region} {offset:#x}");
        }
    }
    for nothing in [1, 6, 8, 9, u32::MAX] {
        assert_eq!(vmm.read(nothing, 0, 4).unwrap_err(), EINVAL);
        assert_eq!(vmm.write(nothing, 0, &[0; 4]).unwrap_err(), EINVAL);
    }
    // What has no meaning reads as all ones, and is dropped.
    assert_eq!(vmm.read(BAR0, COMMAND, 2).unwrap(), [0xff; 2]);
    vmm.write(BAR0, COMMAND, &[1, 0]).unwrap();
    vmm.write(BAR0, 0x4, &7_u32.to_le_bytes()).unwrap();
    assert_eq!(vmm.read_u64(BAR0, 0), 7 << 32, "a half of a register");
}

#[test]
fn pages_are_pinned_one_by_one_and_in_batches() {
    let server = Server::start(&[]);
    let mut guest = Guest::boot(&server);
    let mut control = server.control();
    let page = HIGH.pages(5..6);
    assert!(!guest.dma_map(0, &page), "nothing is pinned before it is active");
    assert_eq!((control.stats()["active"].as_bool(), control.stat("requests_refused")), (Some(false), 1));

    guest.activate();
    assert_eq!(control.stats()["active"], true);
    assert_eq!(control.stat("guest_memory_bytes"), LOW.bytes + HIGH.bytes);
    assert!(guest.dma_map(0, &page));
    assert_eq!((control.pins(), control.stat("mappings")), (vec![(HIGH.gpa + 5 * PAGE_SIZE, PAGE_SIZE)], 1));

    // Over a block's border, with one that is pinned, one twice, and a gap.
    let batch = [HIGH.pages(4..10), HIGH.pages(255..258), HIGH.pages(9..10), LOW.pages(3..4)].concat();
    assert!(guest.dma_map(3, &batch));
    assert_eq!(guest.pinned(&batch), batch.len());
    let pins = [
        (LOW.gpa + 3 * PAGE_SIZE, PAGE_SIZE),
        (HIGH.gpa + 4 * PAGE_SIZE, 6 * PAGE_SIZE),
        (HIGH.gpa + 255 * PAGE_SIZE, 3 * PAGE_SIZE),
    ];
    assert_eq!(control.pins(), pins, "in order, neighbours in one");
    let stats = control.stats();
    let figures =
        ["pinned_bytes", "requests_pinned", "requests_failed", "requests_refused", "pages_pinned", "anomalies"];
    let figures = figures.map(|name| stats[name].as_u64().unwrap());
    assert_eq!(figures, [10 * PAGE_SIZE, 2, 0, 1, 10, 0], "{stats}");
    assert!(!guest.is_pinned(HIGH.page(10)));

    guest.dma_unmap(&batch);
    assert_eq!(guest.pinned(&batch), batch.len(), "lazily");
    assert!(guest.count(&batch).is_empty(), "so it asks for none of them again");
}

#[test]
fn pages_that_are_no_ram_are_not_pinned() {
    let server = Server::start(&[]);
    let mut guest = Guest::active(&server);
    let hole = Gfn::containing(Gpa::new(LOW.bytes));
    // The others of its request are.
    let pages = [HIGH.page(0), hole, HIGH.page(1)];
    assert!(!guest.dma_map(0, &pages));
    assert_eq!(pages.map(|page| guest.is_pinned(page)), [true, false, true]);
    assert_eq!(server.control().stat("requests_failed"), 1);
    // A batch that is nowhere, and one that says it is longer than memory is.
    for header in [hole.gpa().raw(), LOW.bytes - 16, 1 << 62] {
        guest.vmm.write(BAR2, 0, &u64s(&[1 << 63 | header])).unwrap();
        guest.ring(0, &[1]);
        guest.wait_for_answer(0);
    }
    assert!(guest.dma_map(0, &HIGH.pages(2..3)));
}

#[test]
fn only_its_endpoints_ask() {
    let server = Server::start(&[]);
    let mut guest = Guest::active(&server);
    let pages = HIGH.pages(0..4);
    guest.count(&pages);
    for (refused, bdf) in [(1, 4 << 3), (2, 0xffff)] {
        let stranger = Bdf::new(bdf).unwrap();
        for request in [RequestWord::page(pages[0], stranger).unwrap(), guest.batch(0, stranger, &pages)] {
            guest.post(0, request);
            guest.ring(0, &[1]);
            guest.wait_for_answer(0);
        }
        assert_eq!((guest.pinned(&pages), server.control().stat("requests_refused")), (0, 2 * refused));
    }
    for (endpoint, page) in ENDPOINTS.into_iter().zip(&pages) {
        guest.post(0, RequestWord::page(*page, Bdf::new(endpoint).unwrap()).unwrap());
        guest.ring(0, &[1]);
        guest.wait_for_answer(0);
    }
    assert_eq!(guest.pinned(&pages), 2);
}

#[test]
fn every_vcpu_has_a_doorbell_of_any_width() {
    let server = Server::start(&["--look", "0"]);
    let mut guest = Guest::active(&server);
    let widths: [&[u8]; 4] = [&[0], &[1; 2], &[0xff; 4], &[0; 8]];
    for (page, (vcpu, data)) in (0..VCPUS).flat_map(|vcpu| widths.map(|data| (vcpu, data))).enumerate() {
        let page = HIGH.page(page as u64);
        guest.count(&[page]);
        guest.post(vcpu, RequestWord::page(page, Bdf::new(ENDPOINTS[0]).unwrap()).unwrap());
        guest.ring(vcpu, data);
        guest.wait_for_answer(vcpu);
        assert!(guest.is_pinned(page), "vcpu {vcpu}, {data:?}");
    }
    // Nobody waits behind these, and nothing has asked behind that one.
    for nobody in VCPUS..1024 {
        guest.ring(nobody, &[1]);
    }
    guest.ring(0, &[1]);
    assert_eq!(guest.vmm.read(BAR0, DOORBELLS, 1).unwrap(), [0xff]);
    assert_eq!(server.control().stat("requests_pinned"), 4 * VCPUS as u64);
}

#[test]
fn vcpus_ask_at_once() {
    let server = Server::start(&["--pin-workers", "2", "--policy", "extent=page"]);
    let mut guest = Guest::active(&server);
    for round in 0..20 {
        let pages: Vec<_> =
            (0..VCPUS as u64).map(|vcpu| HIGH.pages(round * 40 + vcpu * 10..round * 40 + vcpu * 10 + 10)).collect();
        for (vcpu, pages) in pages.iter().enumerate() {
            guest.count(pages);
            guest.post(vcpu, guest.batch(vcpu, Bdf::new(ENDPOINTS[0]).unwrap(), pages));
            guest.ring(vcpu, &[1]);
        }
        for (vcpu, pages) in pages.iter().enumerate() {
            guest.wait_for_answer(vcpu);
            assert_eq!(guest.pinned(pages), pages.len(), "round {round}, vcpu {vcpu}");
        }
    }
    let mut control = server.control();
    assert_eq!((control.pins(), control.stat("mappings")), (vec![(HIGH.gpa, 800 * PAGE_SIZE)], 800));
}

#[test]
fn nothing_is_unpinned_while_it_is_parked() {
    let server = Server::start(&[]);
    let mut guest = Guest::active(&server);
    let pages = HIGH.pages(0..3);
    assert!(guest.dma_map(0, &pages));
    guest.dma_unmap(&pages);
    let mut control = server.control();
    let range = [(HIGH.gpa, 4 * PAGE_SIZE)];
    guest.command(Command::Park);
    guest.command(Command::Park);
    guest.command(Command::Unpark);
    let parked = control.unpin(&range).unwrap();
    let expected = json!({"gpa": "0x40100000", "bytes": 16384, "may_be_taken": false,
        "released": 0, "not_pinned": 1, "busy": 0, "parked": 3});
    assert_eq!(parked, json!({"hold": null, "ranges": [expected.clone()]}), "two parks take two unparks");
    let parked = control.unpin(&[range[0], (HIGH.gpa + 8 * PAGE_SIZE, 2 * PAGE_SIZE)]).unwrap();
    assert_eq!((&parked["ranges"][0], &parked["ranges"][1]["parked"]), (&expected, &json!(2)), "one wait is enough");
    assert_eq!(guest.pinned(&pages), 3);
    assert!(guest.dma_map(0, &HIGH.pages(3..4)), "to pin is another matter");
    guest.dma_unmap(&HIGH.pages(3..4));
    let before = control.stats()["parked_seconds"].as_f64().unwrap();
    assert!(before > 0.0, "it was waited for");
    guest.command(Command::Unpark);
    let unpinned = control.unpin(&range).unwrap();
    assert_eq!((&unpinned["ranges"][0]["released"], guest.pinned(&pages)), (&json!(4), 0), "{unpinned}");
    let after = control.stats()["parked_seconds"].as_f64().unwrap();
    assert!(after >= before);
    assert_eq!(control.stats()["parked_seconds"].as_f64(), Some(after), "it is over");
    guest.command(Command::Unpark);
    assert!(guest.vmm.read_u64(BAR0, COMMAND) == 0, "one too many is nothing");
}

#[test]
fn a_kernel_after_one_that_crashed_has_nothing_parked() {
    let server = Server::start(&[]);
    let mut guest = Guest::active(&server);
    let mut control = server.control();
    guest.command(Command::Park);
    wait_for("time", || (control.stats()["parked_seconds"].as_f64().unwrap() > 0.0).then_some(()));
    guest.activate();
    let parked = control.stats()["parked_seconds"].as_f64();
    assert!(guest.dma_map(0, &HIGH.pages(0..1)));
    guest.dma_unmap(&HIGH.pages(0..1));
    assert_eq!(control.unpin(&[(HIGH.gpa, PAGE_SIZE)]).unwrap()["ranges"][0]["released"], 1);
    assert_eq!(control.stats()["parked_seconds"].as_f64(), parked, "it stands still");
}

#[test]
fn idle_pages_go_as_the_policy_says() {
    let policy = "extent=page,unpin_policy=lru,unpin_interval=0.01,unpin_limit=none,unpin_gen_threshold=0";
    let server = Server::start(&["--policy", policy]);
    let mut guest = Guest::active(&server);
    let (idle, used) = (HIGH.pages(0..8), HIGH.pages(8..12));
    assert!(guest.dma_map(0, &idle) && guest.dma_map(0, &used));
    guest.dma_unmap(&idle);
    wait_for("the end of idle pages", || (guest.pinned(&idle) == 0).then_some(()));
    let mut control = server.control();
    wait_for("the count", || (control.stat("pages_unpinned_idle") == 8).then_some(()));
    assert_eq!((guest.pinned(&used), control.pins()), (4, vec![(HIGH.gpa + 8 * PAGE_SIZE, 4 * PAGE_SIZE)]));
    assert!(control.stats()["policy"].as_str().unwrap().starts_with(policy));
}

#[test]
fn deactivated_it_pins_nothing() {
    let server = Server::start(&[]);
    let mut guest = Guest::active(&server);
    let mut control = server.control();
    for _ in 0..2 {
        let pages = HIGH.pages(0..600);
        assert!(guest.dma_map(0, &pages));
        guest.command(Command::Park);
        guest.command(Command::Deactivate);
        assert_eq!((guest.pinned(&pages), control.pins(), control.stat("mappings")), (0, vec![], 0));
        assert_eq!((guest.vmm.read_u64(BAR0, 0), guest.vmm.read_u64(BAR0, 0x10)), (0, 0));
        let parked = control.stats()["parked_seconds"].as_f64();
        guest.dma_unmap(&pages);
        assert!(!guest.dma_map(0, &pages), "it is answered, and that is all");
        assert_eq!(control.stats()["parked_seconds"].as_f64(), parked, "what was parked is not any more");
        guest.command(Command::Activate);
        assert_eq!(control.stats()["active"], false, "root and levels are forgotten");
        // A driver that is loaded again.
        guest.activate();
    }
    let pages = HIGH.pages(0..1);
    assert!(guest.dma_map(0, &pages));
    guest.dma_unmap(&pages);
    assert_eq!(control.unpin(&[(HIGH.gpa, PAGE_SIZE)]).unwrap()["ranges"][0]["released"], 1);
}

#[test]
fn activated_again_it_begins_anew() {
    let server = Server::start(&[]);
    let mut guest = Guest::active(&server);
    let pages = HIGH.pages(0..30);
    assert!(guest.dma_map(0, &pages));
    guest.activate();
    let mut control = server.control();
    assert_eq!((guest.pinned(&pages), control.stat("pinned_bytes")), (0, 0));
    guest.ask(0, &pages);
    assert_eq!((guest.pinned(&pages), control.stat("pinned_bytes")), (30, 30 * PAGE_SIZE));
    // A table that cannot be leaves it inactive.
    for (root, levels) in [(0x1001, 4), (1 << 40, 4), (guest.table.dtt().root().raw(), 0), (0x10_0000, 6)] {
        guest.activate();
        guest.start(root, levels);
        assert_eq!(control.stats()["active"], false, "{root:#x} {levels}");
        assert_eq!((guest.pinned(&pages), control.stat("pinned_bytes")), (0, 0));
    }
}

#[test]
fn reset_it_writes_to_the_table_no_more() {
    let server = Server::start(&[]);
    let mut guest = Guest::active(&server);
    let pages = HIGH.pages(0..7);
    assert!(guest.dma_map(0, &pages));
    guest.vmm.write(CONFIG, 4, &[6, 0]).unwrap();
    guest.vmm.reset();
    assert_eq!(guest.vmm.read(CONFIG, 4, 2).unwrap(), [0, 0]);
    assert_eq!((guest.vmm.read_u64(BAR0, 0), guest.vmm.read_u64(BAR0, 0x10)), (0, 0));
    let mut control = server.control();
    assert_eq!((control.pins(), control.stat("mappings")), (vec![], 0));
    assert_eq!(guest.pinned(&pages), pages.len(), "it may be anybody's memory by now");
    assert_eq!(control.stat("guest_memory_bytes"), LOW.bytes + HIGH.bytes, "RAM stays");
    // The next driver's table is another.
    guest.dma_unmap(&pages);
    guest.activate();
    guest.ask(0, &pages);
    assert_eq!(control.pins(), [(HIGH.gpa, 7 * PAGE_SIZE)]);
}

#[test]
fn a_request_that_is_under_way_when_it_is_reset_is_answered() {
    let server = Server::start(&[]);
    let mut guest = Guest::boot(&server);
    let pages = HIGH.pages(0..1024);
    for _ in 0..10 {
        guest.activate();
        guest.count(&pages);
        guest.post(0, guest.batch(0, Bdf::new(ENDPOINTS[0]).unwrap(), &pages));
        guest.ring(0, &[1]);
        guest.vmm.reset();
        assert_eq!(server.control().pins(), []);
        guest.wait_for_answer(0);
        guest.dma_unmap(&pages);
    }
}
