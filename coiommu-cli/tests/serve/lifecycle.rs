//! Arguments, sockets, VMMs that come and go, signals.

use std::fs::{self, Permissions};
use std::io::{Read, Write, pipe};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Stdio;

use rustix::process::{Resource, Rlimit, Signal, prlimit};

use crate::common::{coiommu, finish, run};
use crate::guest::{COMMAND, Command, Guest, HIGH};
use crate::server::{Server, names_in};
use crate::wire::{BAR0, CONFIG, REGION_READ, message, posted_write, u32s, u64s};
use crate::{PATIENCE, wait_for};

#[test]
fn wrong_arguments_end_with_2() {
    let good = ["--socket", "/nowhere/s", "--vcpus", "1", "--endpoint", "00:03.0"];
    let with = |more: &[&'static str]| [&good[..], more].concat();
    let wrong: [&[&str]; 15] = [
        &[],
        &good[..4],
        &good[2..],
        &["--socket", "/nowhere/s", "--endpoint", "00:03.0"],
        &["--socket", "/nowhere/s", "--vcpus", "0", "--endpoint", "00:03.0"],
        &["--socket", "/nowhere/s", "--vcpus", "1025", "--endpoint", "00:03.0"],
        &["--socket", "/nowhere/s", "--vcpus", "1", "--endpoint", "00:20.0"],
        &["--socket", "/nowhere/s", "--vcpus", "1", "--endpoint", "00:00.0"],
        &with(&["--policy", "extent=everything"]),
        &with(&["--metrics", "9400"]),
        &with(&["--log-format", "poem"]),
        &with(&["--pin-workers", "0"]),
        &with(&["--without-driver", "pray"]),
        &with(&["--passthrough", "host=0000:03:00.0,guest=00:05.0"]),
        &with(&["--passthrough", "host=0000:03:00.0,guest=00:20.0,socket=/nowhere/d"]),
    ];
    for arguments in wrong {
        let run = run([&["serve"], arguments].concat());
        assert_eq!((run.status.code(), run.stdout.as_str()), (Some(2), ""), "{arguments:?}: {}", run.stderr);
    }
}

#[test]
fn what_cannot_be_is_said_before_anything_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let ended = Server::launch(folder, &["--endpoint", "00:03.0"]).end();
    assert!(ended.complaint().contains("00:03.0"), "the endpoint is there twice: {}", ended.log);
    assert_eq!(names_in(ended.folder.path()), ["log"]);

    // No machine has a bus of this domain.
    let device = "host=fffffff0:00:00.0,guest=00:05.0,socket={}/device.sock";
    let ended = Server::launch(tempfile::tempdir().unwrap(), &["--passthrough", device]).end();
    assert!(ended.complaint().contains("there is no PCI device fffffff0:00:00.0"), "{}", ended.log);
    assert_eq!(names_in(ended.folder.path()), ["log"]);
    let ended = Server::launch(tempfile::tempdir().unwrap(), &["--passthrough", device, "--passthrough", device]).end();
    assert!(ended.complaint().contains("fffffff0:00:00.0 is passed through twice"), "{}", ended.log);

    let ended = Server::launch(tempfile::tempdir().unwrap(), &["--metrics", "{}/no/such/folder"]).end();
    assert!(ended.complaint().contains("no/such/folder"), "{}", ended.log);
    assert_eq!(names_in(ended.folder.path()), ["log"], "the other sockets are gone again");
}

#[test]
fn only_its_user_can_connect() {
    let server = Server::start(&["--metrics", "{}/metrics.sock"]);
    for name in ["vm.sock", "vm.ctl", "metrics.sock"] {
        let metadata = fs::symlink_metadata(server.path(name)).unwrap();
        assert!(metadata.file_type().is_socket(), "{name}");
        assert_eq!(metadata.mode() & 0o777, 0o600, "{name}");
    }
    server.signal(Signal::TERM);
    server.end().assert_well();
}

#[test]
fn a_service_manager_is_told_when_a_vmm_may_come() {
    let folder = tempfile::tempdir().unwrap();
    let manager = UnixDatagram::bind(folder.path().join("manager")).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let server = Server::launch_under(&folder.path().join("manager"));
    let mut message = [0; 100];
    let length = manager.recv(&mut message).unwrap();
    assert_eq!(message[..length], *b"READY=1\n");
    // Not sooner.
    drop(server.visit());
    drop(server.control());
    server.signal(Signal::TERM);
    server.end().assert_well();
}

#[test]
fn sockets_that_a_server_left_behind_are_replaced() {
    let server = Server::start(&["--metrics", "{}/metrics.sock"]);
    server.signal(Signal::KILL);
    let ended = server.end();
    assert_eq!(names_in(ended.folder.path()), ["log", "metrics.sock", "vm.ctl", "vm.sock"]);

    let server = Server::start_in(ended.folder, &["--metrics", "{}/metrics.sock"]);
    let mut guest = Guest::active(&server);
    assert!(guest.dma_map(0, &HIGH.pages(0..1)));
    assert_eq!(server.control().pins(), [(HIGH.gpa, 4096)]);
    drop(guest);
    server.end().assert_well();
}

#[test]
fn what_else_is_at_a_path_stays() {
    for name in ["vm.sock", "vm.ctl", "metrics.sock"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, "precious").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let ended = Server::launch(folder, &["--metrics", "{}/metrics.sock"]).end();
        let complaint = ended.complaint();
        assert!(complaint.contains(name) && complaint.contains("no socket"), "{complaint}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        assert_eq!(names_in(ended.folder.path()).len(), 2, "and nothing else is left: {complaint}");
    }
}

#[test]
fn another_servers_sockets_are_refused_and_it_goes_on() {
    let mut server = Server::start(&[]);
    for options in [["--socket", "vm.sock", "--control", "other"], ["--socket", "other", "--control", "vm.ctl"]] {
        let [socket, control] = [options[1], options[3]].map(|name| server.path(name));
        let mut other = coiommu(["serve", "--vcpus", "1", "--endpoint", "00:03.0"]);
        let other = finish(other.arg("--socket").arg(socket).arg("--control").arg(control));
        assert_eq!(other.status.code(), Some(1), "{}", other.stderr);
        assert!(other.stderr.contains("another server's"), "{}", other.stderr);
    }
    assert_eq!(names_in(server.folder.path()), ["log", "vm.ctl", "vm.sock"]);
    let mut guest = Guest::active(&server);
    assert!(guest.dma_map(0, &HIGH.pages(0..1)));
    assert!(server.is_running());
}

#[test]
fn who_connects_and_says_nothing_is_no_vmm() {
    let server = Server::start(&[]);
    for _ in 0..3 {
        drop(server.visit());
    }
    let mut guest = Guest::active(&server);
    assert!(guest.dma_map(0, &HIGH.pages(0..1)));
    drop(guest);
    server.end().assert_well();
}

#[test]
fn a_second_vmm_is_turned_away() {
    let server = Server::start(&[]);
    let mut guest = Guest::active(&server);
    for times in 1..=3 {
        assert_eq!(server.visit().read(&mut [0]).unwrap(), 0);
        server.wait_for_log("turned away", times);
    }
    assert!(guest.dma_map(0, &HIGH.pages(0..1)), "the first is served as before");
}

#[test]
fn a_vmm_that_has_gone_ends_it() {
    let server = Server::start(&[]);
    let mut guest = Guest::active(&server);
    let pages = HIGH.pages(0..9);
    assert!(guest.dma_map(1, &pages));
    let Guest { vmm, memory, table, .. } = guest;
    drop(vmm);
    let ended = server.end();
    ended.assert_well();
    assert!(ended.log.contains("nothing is pinned"), "{}", ended.log);
    // It is no guest's any more, so it is not written.
    assert!(pages.iter().all(|&page| table.is_pinned(&memory, page).unwrap()));
}

#[test]
fn the_next_vmm_is_served_afresh() {
    let server = Server::start(&["--persist"]);
    let mut control = server.control();
    assert_eq!(control.ask(serde_json::json!({"cmd": "stats"})).unwrap_err()["code"], "no_guest");
    let mut notify_maps = Vec::new();
    for times in 1..=3 {
        let mut guest = Guest::boot(&server);
        let region = guest.vmm.region(2).unwrap();
        notify_maps.push(region.file.unwrap().metadata().unwrap().ino());
        assert_eq!((guest.vmm.read_u64(BAR0, 0), guest.vmm.read_u64(BAR0, 0x10)), (0, 0));
        assert_eq!(guest.vmm.read(CONFIG, 4, 2).unwrap(), [0, 0]);
        let stats = control.stats();
        assert_eq!((&stats["active"], &stats["requests_pinned"]), (&false.into(), &0.into()), "{stats}");

        guest.vmm.write(CONFIG, 4, &[2, 0]).unwrap();
        guest.activate();
        assert!(guest.dma_map(0, &HIGH.pages(0..times)));
        guest.command(Command::Park);
        assert_eq!(control.pins(), [(HIGH.gpa, 4096 * times)]);
        drop(guest);
        server.wait_for_log("waiting for the next VMM", usize::try_from(times).unwrap());
    }
    notify_maps.dedup();
    assert_eq!(notify_maps.len(), 3, "nobody sees another's");
    server.signal(Signal::TERM);
    server.end().assert_well();
}

#[test]
fn a_vmm_that_breaks_the_protocol_is_the_last_or_the_last_but_one() {
    let break_it = |server: &Server| {
        let guest = Guest::active(server);
        (&guest.vmm.stream).write_all(&message(0, 9, 1, &[])).unwrap();
        let mut vmm = guest.vmm;
        vmm.assert_closed();
    };
    let server = Server::start(&[]);
    break_it(&server);
    let ended = server.end();
    assert!(ended.complaint().contains("not a command"), "{}", ended.log);
    assert_eq!(names_in(ended.folder.path()), ["log"]);

    let server = Server::start(&["--persist"]);
    break_it(&server);
    server.wait_for_log("waiting for the next VMM", 1);
    let mut guest = Guest::active(&server);
    assert!(guest.dma_map(0, &HIGH.pages(0..1)));
}

#[test]
fn a_vmm_that_goes_in_the_middle_of_a_message_has_gone() {
    let server = Server::start(&[]);
    let guest = Guest::active(&server);
    (&guest.vmm.stream).write_all(&[7; 5]).unwrap();
    drop(guest);
    let ended = server.end();
    ended.assert_well();
    assert!(ended.log.contains("middle of a message"), "{}", ended.log);
}

#[test]
fn signals_unpin_everything_and_end_it() {
    for (signal, options) in [(Signal::TERM, &[][..]), (Signal::INT, &["--persist"])] {
        let server = Server::start(options);
        let mut guest = Guest::active(&server);
        let pages = HIGH.pages(0..20);
        assert!(guest.dma_map(0, &pages) && guest.pinned(&pages) == 20);
        // Nothing a guest does keeps it.
        guest.command(Command::Park);
        server.signal(signal);
        let ended = server.end();
        ended.assert_well();
        assert_eq!(guest.pinned(&pages), 0, "the guest is told");
        guest.vmm.assert_closed();
        assert!(ended.log.contains("stopped by a signal"), "{}", ended.log);
    }
}

#[test]
fn signals_end_a_server_that_waits() {
    for signal in [Signal::TERM, Signal::INT] {
        let server = Server::start(&["--persist"]);
        server.signal(signal);
        server.end().assert_well();
    }
}

/// A server that finds many writes in its socket, then a read, when it is let go on.
fn server_with_much_to_do() -> (Server, Guest) {
    let server = Server::start(&[]);
    let guest = Guest::active(&server);
    server.signal(Signal::STOP);
    let is_stopped = || fs::read_to_string(server.proc("stat")).unwrap().contains(") T ").then_some(());
    wait_for("the server's stop", is_stopped);
    // Commands that mean nothing, as a VMM passes on writes that no CPU waits for.
    let writes = posted_write(BAR0, COMMAND, &99_u64.to_le_bytes()).repeat(2000);
    let read = message(1, REGION_READ, 0, &[u64s(&[COMMAND]), u32s(&[BAR0, 8])].concat());
    (&guest.vmm.stream).write_all(&[writes, read].concat()).unwrap();
    (server, guest)
}

#[test]
fn a_guest_that_never_stops_writing_does_not_keep_signals_away() {
    let (server, mut guest) = server_with_much_to_do();
    server.signal(Signal::TERM);
    server.signal(Signal::CONT);
    server.end().assert_well();
    guest.vmm.assert_closed();
}

#[test]
fn a_guest_that_never_stops_writing_does_not_keep_others_waiting() {
    let (server, guest) = server_with_much_to_do();
    let mut other = server.visit();
    server.signal(Signal::CONT);
    (&guest.vmm.stream).read_exact(&mut [0; 40]).unwrap();
    other.set_nonblocking(true).unwrap();
    assert_eq!(other.read(&mut [0]).unwrap(), 0, "turned away before the last is read");
}

#[test]
fn logs_that_nobody_reads_do_not_end_it() {
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let folder = tempfile::tempdir().unwrap();
    let server = Server::launch_with(folder, &[], writer.into());
    wait_for("the socket", || server.control_path().exists().then_some(()));
    let mut guest = Guest::active(&server);
    assert!(guest.dma_map(0, &HIGH.pages(0..1)));
    drop(guest);
    let ended = server.end();
    assert_eq!(ended.status.code(), Some(0));
}

#[test]
fn a_socket_that_is_moved_away_is_not_removed() {
    let server = Server::start(&[]);
    fs::rename(server.socket(), server.path("moved")).unwrap();
    let _other = UnixListener::bind(server.socket()).unwrap();
    server.signal(Signal::TERM);
    let ended = server.end();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.log);
    assert_eq!(names_in(ended.folder.path()), ["log", "moved", "vm.sock"]);
}

#[test]
fn want_of_descriptors_ends_nothing() {
    let server = Server::start(&["--persist"]);
    let mut guest = Guest::active(&server);
    let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
    let limit = |current| prlimit(Some(server.pid()), Resource::Nofile, Rlimit { current: Some(current), maximum });
    limit(3).unwrap();
    let other = UnixStream::connect(server.socket()).unwrap();
    server.wait_for_log("another VMM cannot be turned away", 2);
    assert!(guest.dma_map(0, &HIGH.pages(0..1)), "it is served all the same");
    drop(guest);
    server.wait_for_log("a VMM cannot be accepted", 2);
    limit(1024).unwrap();
    drop(other);
    server.wait_for_log("it was no VMM", 1);
    let mut next = Guest::active(&server);
    assert!(next.dma_map(0, &HIGH.pages(0..1)));
}

/// Starts a server in a shell that has set a limit, with more vCPUs than it allows.
fn limited(folder: &std::path::Path, limit: &str) -> std::process::Command {
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &format!("ulimit {limit}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_coiommu")]);
    command.args(["serve", "--vcpus", "200", "--endpoint", "00:03.0", "--socket"]).arg(folder.join("vm.sock"));
    command
}

#[test]
fn as_many_files_are_opened_as_may_be() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = limited(folder.path(), "-S -n 64").stderr(Stdio::null()).spawn().unwrap();
    wait_for("a server", || {
        assert_eq!(server.try_wait().unwrap(), None, "it has raised the limit");
        UnixStream::connect(folder.path().join("vm.sock")).ok()
    });
    server.kill().unwrap();
    server.wait().unwrap();
    let run = finish(&mut limited(folder.path(), "-n 64"));
    assert_eq!(run.status.code(), Some(1), "{}", run.stderr);
    assert!(run.stderr.contains("RLIMIT_NOFILE") && run.stderr.contains("is 64"), "{}", run.stderr);
}
