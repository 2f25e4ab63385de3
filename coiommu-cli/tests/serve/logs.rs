//! How much is logged, whatever a guest does, and how it looks.

use std::io::Read;
use std::time::Instant;

use coiommu_dtt::{Bdf, PAGE_SIZE, RequestWord};
use rustix::process::Signal;
use serde_json::Value;

use crate::guest::{Command, Guest, HIGH};
use crate::server::Server;
use crate::wire::{BAR0, READ, WRITE, Wire};

/// How often a guest does each thing that it does.
const TIMES: u64 = 1500;

/// What can be logged of a flood, of each of some messages: so many lines at once, then one a second; and the same
/// again of those that say that some were left out.
fn most_lines(since: Instant) -> usize {
    const MESSAGES: usize = 6;
    MESSAGES * 2 * (100 + usize::try_from(since.elapsed().as_secs()).unwrap() + 1)
}

fn guest_that_floods(server: &Server) {
    let mut guest = Guest::boot(server);
    let root = guest.table.dtt().root().raw();
    let stranger = RequestWord::page(HIGH.page(0), Bdf::new(0xffff).unwrap()).unwrap();
    for n in 0..TIMES {
        // Commands that there are not, accesses to nothing, and requests of nobody's.
        guest.vmm.write(BAR0, 8, &(4 + n).to_le_bytes()).unwrap();
        guest.vmm.write(BAR0, 9, &[1]).unwrap();
        guest.vmm.read(BAR0, 0x1fff, 1).unwrap();
        assert!(guest.vmm.read(3, 0, 4).is_err());
        guest.post(0, stranger);
        guest.ring(0, &[1]);
        // Activations that cannot be, and those that can, over and over.
        guest.start(n * PAGE_SIZE + 1, 4);
        guest.start(root, n);
        guest.start(root, 4);
        guest.command(if n % 2 == 0 { Command::Park } else { Command::Deactivate });
        // What a guest can make its VMM do.
        assert!(guest.vmm.dma_map(HIGH.gpa, HIGH.bytes, READ | WRITE, None).is_err());
        assert!(guest.vmm.dma_unmap(HIGH.gpa, PAGE_SIZE).is_err());
        guest.vmm.dma_map(1 << 40, PAGE_SIZE, READ | WRITE, Some((&guest.ram, u64::MAX / 4))).unwrap_err();
        if n % 50 == 0 {
            guest.vmm.reset();
        }
    }
    guest.wait_for_answer(0);
}

#[test]
fn a_guest_does_not_fill_the_log() {
    let since = Instant::now();
    let server = Server::start(&["--persist"]);
    guest_that_floods(&server);
    let lines = server.log().lines().count();
    assert!(lines <= most_lines(since), "{lines} lines");
    assert!(server.log().contains("messages were left out") || lines < 200, "nor is it silent about that");
    // Everything else is heard in spite of it.
    server.wait_for_log("the VMM has gone", 1);
    let mut next = Wire::connect(&server.socket());
    next.dma_map(0, PAGE_SIZE, READ | WRITE, None).unwrap();
    server.wait_for_log("share=on", 1);
}

#[test]
fn a_crowd_at_the_socket_does_not_fill_the_log() {
    let since = Instant::now();
    let server = Server::start(&["--persist"]);
    let mut guest = Guest::active(&server);
    for _ in 0..1500 {
        assert_eq!(server.visit().read(&mut [0]).unwrap(), 0);
    }
    assert!(guest.dma_map(0, &HIGH.pages(0..1)));
    let lines = server.log().lines().count();
    assert!(lines <= most_lines(since), "{lines} lines");
}

#[test]
fn json_is_an_object_a_line() {
    let server = Server::start(&["--log-format", "json", "--persist"]);
    let mut guest = Guest::active(&server);
    // From the libraries as well.
    guest.start(0x1001, 4);
    guest.vmm.dma_unmap(1 << 40, PAGE_SIZE).unwrap_err();
    drop(guest);
    server.wait_for_log("waiting for the next VMM", 1);
    server.signal(Signal::TERM);
    let ended = server.end();
    ended.assert_well();
    let mut levels = Vec::new();
    for line in ended.log.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert!(["timestamp", "message", "target"].iter().all(|name| line[name].is_string()), "{line}");
        levels.push(line["level"].as_str().unwrap().to_owned());
    }
    assert!(levels.contains(&"INFO".to_owned()) && levels.contains(&"WARN".to_owned()), "{levels:?}");
    for part in ["waiting for a VMM", "the guest's driver is active", "not activated", "there is no mapping"] {
        assert!(ended.log.contains(part), "{part:?} is not in\n{}", ended.log);
    }
}

#[test]
fn json_is_what_a_failure_is_told_in() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("vm.sock"), "precious").unwrap();
    let ended = Server::launch(folder, &["--log-format", "json"]).end();
    assert_eq!(ended.status.code(), Some(1));
    let lines: Vec<Value> = ended.log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.last().unwrap();
    assert!(last["level"] == "ERROR" && last["message"].as_str().unwrap().contains("vm.sock"), "{last}");
}

#[test]
fn text_is_for_people() {
    let server = Server::start(&[]);
    let _guest = Guest::active(&server);
    server.wait_for_log("the guest's driver is active", 1);
    let log = server.log();
    assert!(!log.contains('\x1b'), "no colours in a file: {log}");
    assert!(log.lines().all(|line| line.contains(" INFO ")), "nothing is wrong: {log}");
}

#[test]
fn a_vcpu_too_many_is_named() {
    let server = Server::start(&[]);
    let mut guest = Guest::active(&server);
    guest.vmm.write(BAR0, 0x18 + 4, &[1]).unwrap();
    server.wait_for_log("vCPU 4 of the guest asks for something", 1);
    assert!(server.log().contains("raise --vcpus"));
    guest.command(Command::Deactivate);
    server.wait_for_log("not active any more", 1);
}
