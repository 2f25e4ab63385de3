//! The control socket: what is answered to what, and what holds hold.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::Shutdown;
use std::thread;

use coiommu_dtt::PAGE_SIZE;
use serde_json::{Value, json};

use crate::common::run;
use crate::guest::{Command, Guest, HIGH, LOW};
use crate::lines::Lines;
use crate::server::Server;
use crate::wait_for;

/// All of the RAM that guests here do DMA in.
const ALL: [(u64, u64); 1] = [(HIGH.gpa, HIGH.bytes)];

/// A server and its guest, with two pages pinned of which one is in use.
fn guest(options: &[&str]) -> (Server, Guest) {
    let server = Server::start(options);
    let mut guest = Guest::active(&server);
    assert!(guest.dma_map(0, &HIGH.pages(0..1)) && guest.dma_map(0, &HIGH.pages(9..10)));
    guest.dma_unmap(&HIGH.pages(9..10));
    (server, guest)
}

#[test]
fn without_a_vmm_there_is_nothing_to_tell() {
    let server = Server::start(&["--persist"]);
    let mut control = server.control();
    for command in [json!({"cmd": "stats"}), json!({"cmd": "pins"}), json!({"cmd": "unpin", "ranges": []})] {
        assert_eq!(control.ask(command).unwrap_err()["code"], "no_guest");
    }
    assert_eq!(control.resume(&json!(1)).unwrap_err()["code"], "unknown_hold");
    let guest = Guest::boot(&server);
    assert_eq!(control.pins(), [], "the same connection");
    drop(guest);
    server.wait_for_log("waiting for the next VMM", 1);
    assert_eq!(control.ask(json!({"cmd": "pins"})).unwrap_err()["code"], "no_guest");
}

#[test]
fn stats_are_those_that_are_documented() {
    let (server, _guest) = guest(&[]);
    let documented: BTreeSet<_> = include_str!("../../../docs/control.md")
        .split("## ")
        .find_map(|chapter| chapter.strip_prefix("`stats`"))
        .unwrap()
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split_once(" | "))
        .flat_map(|(names, _)| names.split(", ").map(|name| name.trim_matches('`').to_owned()))
        .filter(|name| name != "member" && !name.starts_with("---"))
        .collect();
    let stats = server.control().stats();
    let names: BTreeSet<_> = stats.as_object().unwrap().keys().cloned().collect();
    assert_eq!(names, documented);
    assert_eq!(stats["failure"], Value::Null);
}

#[test]
fn pages_in_use_are_not_taken() {
    let (server, guest) = guest(&[]);
    let mut control = server.control();
    let unpinned = control.unpin(&ALL).unwrap();
    assert_eq!(unpinned["hold"], Value::Null);
    let range = &unpinned["ranges"][0];
    let counts = ["released", "not_pinned", "busy", "parked"].map(|name| range[name].as_u64().unwrap());
    assert_eq!((counts, &range["may_be_taken"]), ([1, 1022, 1, 0], &json!(false)), "{unpinned}");
    assert_eq!(control.pins(), [(HIGH.gpa, PAGE_SIZE)]);
    assert!(guest.is_pinned(HIGH.page(0)) && !guest.is_pinned(HIGH.page(9)));
    assert_eq!(control.stat("pages_unpinned_forced"), 1);

    guest.dma_unmap(&HIGH.pages(0..1));
    let unpinned = control.unpin(&ALL).unwrap();
    assert_eq!((&unpinned["ranges"][0]["may_be_taken"], control.pins()), (&json!(true), vec![]));
}

#[test]
fn what_is_held_is_not_pinned_until_it_is_let_go() {
    let (server, mut guest) = guest(&[]);
    let mut control = server.control();
    let held = (HIGH.gpa + 9 * PAGE_SIZE, PAGE_SIZE);
    let unpinned = control.unpin(&[held]).unwrap();
    let (hold, page) = (&unpinned["hold"], HIGH.pages(9..10));
    assert!(!guest.dma_map(0, &page), "held");
    assert!(guest.dma_map(0, &HIGH.pages(8..9)) && guest.dma_map(0, &HIGH.pages(10..11)), "its neighbours are not");
    assert_eq!(control.stat("requests_failed"), 1);
    // A hold is of the connection that has it.
    let mut other = server.control();
    assert_eq!(other.resume(hold).unwrap_err()["code"], "unknown_hold");
    assert!(!guest.dma_map(0, &page));
    assert_eq!(control.resume(hold), Ok(json!({})));
    assert!(guest.dma_map(0, &page), "let go");
    assert_eq!(control.resume(hold).unwrap_err()["code"], "unknown_hold");
}

#[test]
fn a_connection_that_is_closed_lets_go() {
    let (server, mut guest) = guest(&[]);
    let page = HIGH.pages(9..10);
    let unpin = |control: &mut Lines| control.unpin(&[(HIGH.gpa + 9 * PAGE_SIZE, PAGE_SIZE)]).unwrap();
    let (mut control, mut other) = (server.control(), server.control());
    for _ in 0..3 {
        assert_eq!(unpin(&mut control)["ranges"][0]["may_be_taken"], true);
    }
    assert_eq!(unpin(&mut other)["ranges"][0]["not_pinned"], 1);
    drop(control);
    assert!(!guest.dma_map(0, &page), "the other has it too");
    drop(other);
    wait_for("the end of the holds", || guest.dma_map(0, &page).then_some(()));
}

#[test]
fn several_ranges_are_one_hold() {
    let (server, mut guest) = guest(&[]);
    let mut control = server.control();
    let at = |page: u64| (HIGH.gpa + page * PAGE_SIZE, PAGE_SIZE);
    let unpinned = control.unpin(&[at(9), at(0), at(20), (1 << 50, PAGE_SIZE)]).unwrap();
    let taken: Vec<_> = unpinned["ranges"].as_array().unwrap().iter().map(|range| &range["may_be_taken"]).collect();
    assert_eq!(taken, [true, false, true, true], "{unpinned}");
    assert!(!guest.dma_map(0, &HIGH.pages(9..10)) && !guest.dma_map(0, &HIGH.pages(20..21)));
    assert!(guest.dma_map(0, &HIGH.pages(0..1)), "what may not be taken is not held");
    control.resume(&unpinned["hold"]).unwrap();
    assert!(guest.dma_map(0, &HIGH.pages(9..10)) && guest.dma_map(0, &HIGH.pages(20..21)));
    let none = control.unpin(&[]).unwrap();
    assert_eq!(none, json!({"hold": null, "ranges": []}));
}

#[test]
fn a_hold_ends_with_its_guest_and_is_not_the_next_ones() {
    let (server, guest) = guest(&["--persist"]);
    let mut control = server.control();
    let held = control.unpin(&[(HIGH.gpa + 9 * PAGE_SIZE, PAGE_SIZE)]).unwrap();
    let mut other = server.control();
    let others = other.unpin(&[(HIGH.gpa + 9 * PAGE_SIZE, PAGE_SIZE)]).unwrap();
    drop(guest);
    server.wait_for_log("waiting for the next VMM", 1);
    assert_eq!(other.resume(&others["hold"]).unwrap_err()["code"], "unknown_hold", "nobody is there");
    let mut next = Guest::active(&server);
    assert!(next.dma_map(0, &HIGH.pages(9..10)));
    assert_eq!(control.resume(&held["hold"]).unwrap_err()["code"], "unknown_hold");
    assert_eq!(control.pins(), [(HIGH.gpa + 9 * PAGE_SIZE, PAGE_SIZE)]);
}

#[test]
fn bad_lines_are_answered() {
    let (server, _guest) = guest(&[]);
    let mut control = server.control();
    let page = r#"{"gpa":"0x1000","bytes":4096}"#;
    let not_pages = [(1, 4096), (4096, 0), (4096, 1), (u64::MAX - 4095, 4096), (u64::MAX - 4095, u64::MAX - 4095)];
    let not_pages = not_pages
        .map(|(gpa, bytes)| json!({"id": 7, "cmd": "unpin", "ranges": [{"gpa": format!("{gpa:#x}"), "bytes": bytes}]}));
    let with_id = [
        r#"{"id":7}"#.to_owned(),
        r#"{"id":7,"cmd":"explode"}"#.to_owned(),
        r#"{"id":7,"cmd":7}"#.to_owned(),
        r#"{"id":7,"cmd":"unpin"}"#.to_owned(),
        r#"{"id":7,"cmd":"unpin","ranges":{}}"#.to_owned(),
        r#"{"id":7,"cmd":"unpin","ranges":[{"gpa":4096,"bytes":4096}]}"#.to_owned(),
        r#"{"id":7,"cmd":"unpin","ranges":[{"gpa":"4096","bytes":4096}]}"#.to_owned(),
        r#"{"id":7,"cmd":"unpin","ranges":[{"gpa":"0x10000000000000000","bytes":4096}]}"#.to_owned(),
        r#"{"id":7,"cmd":"unpin","ranges":[{"gpa":"0x1000","bytes":-4096}]}"#.to_owned(),
        format!(r#"{{"id":7,"cmd":"unpin","ranges":[{page},{{"gpa":"0x1000"}}]}}"#),
        r#"{"id":7,"cmd":"resume"}"#.to_owned(),
        r#"{"id":7,"cmd":"resume","hold":"1"}"#.to_owned(),
    ];
    for line in with_id.into_iter().chain(not_pages.map(|line| line.to_string())) {
        let reply = control.say(line.as_bytes()).unwrap();
        assert_eq!((&reply["id"], &reply["error"]["code"]), (&json!(7), &json!("bad_request")), "{line}: {reply}");
        assert!(!reply["error"]["message"].as_str().unwrap().is_empty());
    }
    let nested = "[".repeat(100_000);
    for line in [
        &b""[..],
        b"null",
        b"stats",
        b"{\"id\":",
        b"\xff\xfe",
        br#"{"id":-1,"cmd":"stats"}"#,
        br#"{"cmd":"stats"}"#,
        nested.as_bytes(),
    ] {
        let reply = control.say(line).unwrap();
        assert_eq!((&reply["id"], &reply["error"]["code"]), (&json!(0), &json!("bad_request")), "{reply}");
    }
    // What is not known may be of a later version.
    assert!(control.say(br#"{"id":7,"cmd":"stats","verbose":true}"#).unwrap().get("ok").is_some());
    assert_eq!(control.stat("pages_unpinned_forced"), 0);
}

#[test]
fn lines_come_as_they_like() {
    let (server, _guest) = guest(&[]);
    // Many at once, and in pieces; the last without its end, from somebody who only listens from then on.
    let mut control = server.control();
    let lines: String = (1..=50).map(|id| format!("{}\r\n", json!({"id": id, "cmd": "pins"}))).collect();
    for piece in lines.as_bytes().chunks(37) {
        control.stream.get_mut().write_all(piece).unwrap();
    }
    control.stream.get_mut().write_all(br#"{"id":51,"cmd":"stats"}"#).unwrap();
    control.stream.get_mut().shutdown(Shutdown::Write).unwrap();
    for id in 1..=51 {
        let reply = control.reply().unwrap();
        assert!(reply["id"] == id && reply.get("ok").is_some(), "{reply}");
    }
    assert_eq!(control.reply(), None);
}

#[test]
fn a_line_that_is_too_long_is_the_last() {
    let (server, mut guest) = guest(&[]);
    // As long as may be, its end counted.
    let stats = json!({"id": 1, "cmd": "stats"}).to_string();
    let padded = |bytes: usize| [stats.as_bytes(), &vec![b' '; bytes - 1 - stats.len()]].concat();
    let mut control = server.control();
    assert!(control.say(&padded(1 << 20)).unwrap().get("ok").is_some());
    control.unpin(&[(HIGH.gpa + 9 * PAGE_SIZE, PAGE_SIZE)]).unwrap();
    for bytes in [(1 << 20) + 1, 8 << 20] {
        let line = padded(bytes);
        let mut other = server.control();
        let reply = other.say(&line).unwrap();
        assert_eq!((&reply["id"], &reply["error"]["code"]), (&json!(0), &json!("bad_request")), "{reply}");
        assert_eq!(other.reply(), None, "it is closed");
    }
    assert!(!guest.dma_map(0, &HIGH.pages(9..10)), "others are not");
}

#[test]
fn there_is_an_end_to_ranges_and_holds() {
    let (server, mut guest) = guest(&[]);
    let mut control = server.control();
    // Where no RAM is.
    let ranges: Vec<_> = (0..4097).map(|n| ((1 << 45) + n * 2 * PAGE_SIZE, PAGE_SIZE)).collect();
    assert_eq!(control.unpin(&ranges).unwrap_err()["code"], "too_many");
    let most = control.unpin(&ranges[1..]).unwrap();
    assert_eq!(most["ranges"].as_array().unwrap().len(), 4096);
    control.resume(&most["hold"]).unwrap();

    let free = [(HIGH.gpa + 9 * PAGE_SIZE, PAGE_SIZE)];
    // What cannot be held counts for nothing.
    control.unpin(&[ALL[0], ALL[0]]).unwrap();
    // All who hold share what there is.
    let holds: Vec<_> = (0..96).map(|_| control.unpin(&free).unwrap()["hold"].take()).collect();
    let mut other = server.control();
    let others = other.unpin(&ranges[97..]).unwrap();
    for control in [&mut control, &mut other] {
        let refused = control.unpin(&free).unwrap_err();
        assert_eq!(refused["code"], "too_many");
        assert!(refused["message"].as_str().unwrap().contains("4096 ranges"), "{refused}");
        assert_eq!(control.unpin(&ALL).unwrap_err()["code"], "too_many", "nothing is unpinned that could not be held");
    }
    assert_eq!(control.resume(&holds[50]), Ok(json!({})));
    let again = control.unpin(&free).unwrap();
    assert!(!holds.contains(&again["hold"]), "a number is not used again");
    assert_eq!(other.unpin(&free).unwrap_err()["code"], "too_many");
    other.resume(&others["hold"]).unwrap();
    other.unpin(&ranges[97..]).unwrap();
    drop((control, other));
    wait_for("the end of the holds", || guest.dma_map(0, &HIGH.pages(9..10)).then_some(()));
    // And they are given back.
    let mut third = server.control();
    wait_for("room", || third.unpin(&ranges[1..]).ok());
}

#[test]
fn there_is_an_end_to_connections() {
    let (server, _guest) = guest(&[]);
    let mut served: Vec<_> = (0..16).map(|_| server.control()).collect();
    for control in &mut served {
        control.stats();
    }
    let mut one_too_many = server.control();
    let told = one_too_many.reply().unwrap();
    assert_eq!((&told["id"], &told["error"]["code"]), (&json!(0), &json!("too_many")), "{told}");
    assert_eq!(one_too_many.reply(), None);
    let control = server.control_path();
    let ctl = run(["ctl", "--control", control.to_str().unwrap(), "stats"]);
    assert!(ctl.complaint().contains("16 are connected"), "{}", ctl.stderr);
    served.pop();
    wait_for("a place", || server.control().say(br#"{"id":1,"cmd":"pins"}"#)?.get("ok").map(drop));
    served[0].stats();
}

#[test]
fn many_may_ask_while_the_guest_works() {
    let (server, mut guest) = guest(&["--policy", "extent=page"]);
    let unpin = |taker: u64| {
        let mut control = server.control();
        let mut taken = 0;
        for _ in 0..50 {
            let range = (HIGH.gpa + (100 + 50 * taker) * PAGE_SIZE, 60 * PAGE_SIZE);
            let unpinned = control.unpin(&[range]).unwrap();
            let answer = &unpinned["ranges"][0];
            let counts = ["released", "not_pinned", "busy", "parked"].map(|name| answer[name].as_u64().unwrap());
            assert_eq!(counts.iter().sum::<u64>(), 60, "{unpinned}");
            if !unpinned["hold"].is_null() {
                let inside = |&(gpa, bytes): &(u64, u64)| gpa < range.0 + range.1 && range.0 < gpa + bytes;
                assert!(!control.pins().iter().any(inside), "held, and pinned");
                control.resume(&unpinned["hold"]).unwrap();
                taken += 1;
            }
        }
        taken
    };
    thread::scope(|scope| {
        let takers: Vec<_> = (0..3).map(|taker| scope.spawn(move || unpin(taker))).collect();
        let pages = HIGH.pages(100..260);
        while takers.iter().any(|taker| !taker.is_finished()) {
            if guest.dma_map(0, &pages) {
                assert_eq!(guest.pinned(&pages), pages.len(), "what is in use stays pinned");
                guest.dma_unmap(&pages);
            }
        }
        takers.into_iter().for_each(|taker| _ = taker.join().unwrap());
    });
    assert_eq!(server.control().stat("anomalies"), 0);
}

#[test]
fn a_guest_that_parks_is_waited_for_while_others_are_served() {
    let (server, mut guest) = guest(&[]);
    guest.command(Command::Park);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| server.control().unpin(&[(HIGH.gpa + 9 * PAGE_SIZE, PAGE_SIZE)]).unwrap());
        // Pins are, and other connections, and the VMM.
        assert!(guest.dma_map(0, &LOW.pages(0..4)));
        assert!(server.control().stat("pinned_bytes") >= 5 * PAGE_SIZE);
        let unpinned = waiting.join().unwrap();
        assert_eq!(unpinned["ranges"][0]["parked"], 1, "{unpinned}");
    });
}
