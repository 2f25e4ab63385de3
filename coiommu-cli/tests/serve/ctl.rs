//! `coiommu ctl`, and what can be seen of `coiommu top` without a terminal.

use std::os::unix::process::CommandExt;
use std::process::Stdio;

use coiommu_dtt::PAGE_SIZE;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};

use crate::common::{Run, coiommu, finish, run};
use crate::guest::{Guest, HIGH};
use crate::server::Server;
use crate::wait_for;

/// A server and its guest, with pages 0 and 9 pinned, of which 0 is in use.
fn guest(options: &[&str]) -> (Server, Guest) {
    let server = Server::start(options);
    let mut guest = Guest::active(&server);
    assert!(guest.dma_map(0, &HIGH.pages(0..1)) && guest.dma_map(0, &HIGH.pages(9..10)));
    guest.dma_unmap(&HIGH.pages(9..10));
    (server, guest)
}

fn ctl(server: &Server, args: &[&str]) -> Run {
    let control = server.control_path();
    run([&["ctl", "--control", control.to_str().unwrap()], args].concat())
}

/// The addresses of a page as arguments.
fn page(n: u64) -> [String; 2] {
    [format!("{:#x}", HIGH.gpa + n * PAGE_SIZE), PAGE_SIZE.to_string()]
}

#[track_caller]
fn json_of(run: &Run) -> Value {
    assert_eq!((run.status.code(), run.stderr.as_str()), (Some(0), ""));
    serde_json::from_str(&run.stdout).unwrap()
}

#[test]
fn it_tells_what_the_socket_does() {
    let (server, _guest) = guest(&[]);
    let stats = json_of(&ctl(&server, &["stats", "--json"]));
    let told = server.control().stats();
    for name in ["active", "pinned_bytes", "mappings", "requests_pinned", "guest_memory_bytes", "policy", "failure"] {
        assert_eq!(stats[name], told[name], "{name}");
    }
    assert_eq!(stats.as_object().unwrap().len(), told.as_object().unwrap().len());
    let table = ctl(&server, &["stats"]);
    assert!(
        table.stdout.lines().any(|line| line.contains("pinned bytes") && line.contains("8192")),
        "{}",
        table.stdout
    );

    let pins = json_of(&ctl(&server, &["--json", "pins"]));
    assert_eq!(pins, json!([{"gpa": "0x40100000", "bytes": 4096}, {"gpa": "0x40109000", "bytes": 4096}]));
    let table = ctl(&server, &["pins"]);
    for part in ["0x40109000", "0x4010a000", "8192 bytes in 2 ranges"] {
        assert!(table.stdout.contains(part), "{}", table.stdout);
    }
}

#[test]
fn memory_that_may_not_be_taken_is_3() {
    let (server, guest) = guest(&[]);
    let [gpa, bytes] = page(0);
    let refused = ctl(&server, &["unpin", &gpa, &bytes]);
    assert_eq!((refused.status.code(), refused.stderr.as_str()), (Some(3), ""));
    assert!(refused.stdout.contains("may not be taken") && refused.stdout.contains("busy 1"), "{}", refused.stdout);
    let json = ctl(&server, &["--json", "unpin", &gpa, &bytes]);
    assert_eq!(json.status.code(), Some(3));
    assert_eq!(serde_json::from_str::<Value>(&json.stdout).unwrap()["hold"], Value::Null);
    // And no program is run.
    let trace = server.path("trace");
    let ran = ctl(&server, &["unpin", &gpa, &bytes, "--", "touch", trace.to_str().unwrap()]);
    assert_eq!((ran.status.code(), trace.exists()), (Some(3), false));

    guest.dma_unmap(&HIGH.pages(0..1));
    let taken = ctl(&server, &["unpin", &gpa, "0x1000"]);
    assert_eq!((taken.status.code(), taken.stderr.as_str()), (Some(0), ""));
    assert!(taken.stdout.contains("may be taken") && taken.stdout.contains("released 1"), "{}", taken.stdout);
}

#[test]
fn a_program_runs_while_the_range_is_held() {
    let (server, mut guest) = guest(&[]);
    let [gpa, bytes] = page(9);
    let [running, go_on] = ["running", "go_on"].map(|name| server.path(name));
    // Ends as well when this test has ended early, and the folder with it.
    let script = "touch $0; while [ -e $0 ] && ! [ -e $1 ]; do sleep 0.01; done; exit 7";
    let mut command = coiommu(["ctl", "--control", server.control_path().to_str().unwrap()]);
    command.args(["unpin", &gpa, &bytes, "--", "sh", "-c", script]).args([&running, &go_on]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    wait_for("the program", || running.exists().then_some(()));
    assert!(!guest.dma_map(0, &HIGH.pages(9..10)));
    std::fs::write(go_on, "").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(7), "what the program ended with");
    assert!(guest.dma_map(0, &HIGH.pages(9..10)), "at once: it has ended the hold itself");
    guest.dma_unmap(&HIGH.pages(9..10));

    for (program, code, complaint) in [
        (&["true"][..], 0, ""),
        (&["sh", "-c", "kill -9 $$"], 1, "signal"),
        (&["/no/such/program"], 1, "/no/such/program"),
    ] {
        let ran = ctl(&server, &[&["unpin", &gpa, &bytes, "--"], program].concat());
        assert_eq!(ran.status.code(), Some(code), "{program:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(complaint), "{program:?}: {}", ran.stderr);
        wait_for("the hold's end", || guest.dma_map(0, &HIGH.pages(9..10)).then_some(()));
        guest.dma_unmap(&HIGH.pages(9..10));
    }
}

#[test]
fn signals_do_not_end_a_hold_while_its_program_runs() {
    let (server, mut guest) = guest(&[]);
    let [gpa, bytes] = page(9);
    for signal in [Signal::INT, Signal::TERM] {
        let [running, told, go_on] =
            ["running", "told", "go_on"].map(|name| server.path(&format!("{signal:?}-{name}")));
        let script = "trap 'touch $1' INT TERM; touch $0; while [ -e $0 ] && ! [ -e $2 ]; do sleep 0.01; done; exit 7";
        let mut command = coiommu(["ctl", "--control", server.control_path().to_str().unwrap()]);
        command.args(["unpin", &gpa, &bytes, "--", "sh", "-c", script]).args([&running, &told, &go_on]);
        // As on a terminal, where the signal is for all.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null());
        let mut child = command.spawn().unwrap();
        wait_for("the program", || running.exists().then_some(()));
        kill_process_group(Pid::from_child(&child), signal).unwrap();
        wait_for("the signal", || told.exists().then_some(()));
        assert_eq!(child.try_wait().unwrap(), None);
        assert!(!guest.dma_map(0, &HIGH.pages(9..10)), "it is held as long as the program runs");
        std::fs::write(go_on, "").unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(7));
        assert!(guest.dma_map(0, &HIGH.pages(9..10)));
        guest.dma_unmap(&HIGH.pages(9..10));
    }
    // The program has them as they were.
    let ran = ctl(&server, &["unpin", &gpa, &bytes, "--", "sh", "-c", "kill -TERM $$; exit 7"]);
    assert_eq!(ran.status.code(), Some(1), "{}", ran.stderr);
}

#[test]
fn what_cannot_be_done_is_one_line() {
    let server = Server::start(&["--persist"]);
    for args in [&["stats"][..], &["pins"], &["unpin", "0x1000", "4096"]] {
        assert_eq!(ctl(&server, args).complaint(), "coiommu: no VMM is connected", "{args:?}");
    }
    let _guest = Guest::boot(&server);
    assert!(ctl(&server, &["unpin", "0x1000", "4095"]).complaint().contains("whole pages"));
    let nowhere = server.path("nowhere");
    for command in [
        &["ctl", "--control", nowhere.to_str().unwrap(), "stats"][..],
        &["top", "--control", nowhere.to_str().unwrap()],
    ] {
        let run = run(command);
        assert!(run.complaint().contains("nowhere") && run.stderr.contains("--control"), "{}", run.stderr);
    }
    // What listens there is something else.
    let socket = server.path("something-else");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for answer in ["what?\n", "{\"id\":9,\"ok\":{}}\n", "{\"id\":1}\n", ""] {
                let (mut stream, _) = listener.accept().unwrap();
                std::io::Read::read(&mut stream, &mut [0; 100]).unwrap();
                std::io::Write::write_all(&mut stream, answer.as_bytes()).unwrap();
            }
        });
        for _ in 0..4 {
            run(["ctl", "--control", socket.to_str().unwrap(), "stats"]).complaint();
        }
    });
}

#[test]
fn wrong_arguments_end_with_2() {
    for args in [
        &["ctl"][..],
        &["ctl", "stats"],
        &["ctl", "--control", "x"],
        &["ctl", "--control", "x", "explode"],
        &["ctl", "--control", "x", "unpin", "0x1000"],
        &["ctl", "--control", "x", "unpin", "1000", "-1"],
        &["ctl", "--control", "x", "unpin", "0xg", "4096"],
        &["ctl", "--control", "x", "unpin", "0x+1000", "4096"],
        &["ctl", "--control", "x", "unpin", "0x1000", "4096", "program"],
        &["top"],
        &["top", "--control", "x", "--interval", "0"],
    ] {
        assert_eq!(run(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn top_needs_a_terminal() {
    let server = Server::start(&["--persist"]);
    let control = server.control_path();
    let args = ["top", "--control", control.to_str().unwrap()];
    // In a session of its own there is no terminal, even if this has one.
    let run =
        finish(std::process::Command::new("setsid").arg(env!("CARGO_BIN_EXE_coiommu")).args(args).stdin(Stdio::null()));
    assert_eq!(run.status.code(), Some(1), "{}", run.stderr);
}
