use super::*;
use proptest::prelude::*;

/// A tracefs line of a task that minds its own business.
fn tracefs(event: &str) -> String {
    format!("    kworker/u8:1-31      [000] .....     4.108737: {event}")
}

type Parsed = (u64, String, What, Vec<(u64, u64)>, bool);

fn parsed(text: &str) -> Option<Parsed> {
    let mut scratch = Scratch::default();
    match line(text.as_bytes(), &mut scratch) {
        Line::Event { time, what, truncated } => {
            let segments = match what {
                What::Map { .. } => scratch.segments.iter().map(|s| (s.addr(), s.size())).collect(),
                _ => Vec::new(),
            };
            Some((time, scratch.device, what, segments, truncated))
        }
        Line::Skip => None,
        other => panic!("{text}: {other:?}"),
    }
}

/// What an event is, and its segments.
fn what(event: &str) -> Option<(What, Vec<(u64, u64)>)> {
    parsed(&tracefs(event)).map(|(_, _, what, segments, _)| (what, segments))
}

fn other(text: &str) -> Line {
    line(text.as_bytes(), &mut Scratch::default())
}

fn map(family: Family, key: u64) -> What {
    What::Map { family, key }
}

fn unmap(family: Family, key: u64, size: impl Into<Option<u64>>) -> What {
    What::Unmap { family, key, size: size.into() }
}

#[test]
fn single_ranges_map_and_unmap_by_dma_address() {
    for (pair, family) in [
        (["dma_map_page", "dma_unmap_page"], Family::Single),
        (["dma_map_phys", "dma_unmap_phys"], Family::Single),
        (["dma_alloc", "dma_free"], Family::Coherent),
        (["dma_alloc_pages", "dma_free_pages"], Family::Pages),
    ] {
        let fields =
            "0000:00:03.0 dir=NONE dma_addr=11503e000 size=4096 phys_addr=2000 virt_addr=00000000d2c8b08a attrs=";
        let on = what(&format!("{}: {fields}", pair[0]));
        assert_eq!(on, Some((map(family, 0x1_1503_e000), vec![(0x1_1503_e000, 4096)])));
        let off = what(&format!("{}: {fields}", pair[1]));
        assert_eq!(off, Some((unmap(family, 0x1_1503_e000, 4096), vec![])));
    }
}

#[test]
fn lists_map_and_unmap_by_first_physical_address() {
    let on = "dma_map_sg: d dir=NONE nents=2/2 ents=2/2 dma_addrs={0x1000,0x3000} sizes={0x1000,0x10} \
              phys_addrs={0x7000,0x9000} attrs=";
    let segments = vec![(0x1000, 0x1000), (0x3000, 0x10)];
    assert_eq!(what(on), Some((map(Family::ScatterList, 0x7000), segments.clone())));
    assert_eq!(what(&on.replace("nents=2/2 ents=2/2 ", "")).unwrap().1, segments, "as 6.12 began");
    assert_eq!(what(&on.replace(" phys_addrs={0x7000,0x9000}", "")).unwrap().0, map(Family::ScatterList, 0x1000));
    assert_eq!(what(&on.replace("{0x7000,0x9000}", "{}")).unwrap().0, map(Family::ScatterList, 0x1000));
    let off = what("dma_unmap_sg: d dir=NONE phys_addrs={0x7000,0x9000} attrs=");
    assert_eq!(off, Some((unmap(Family::ScatterList, 0x7000, None), vec![])));
}

#[test]
fn tables_are_one_range() {
    let fields = "d dir=NONE dma_addr=1000 size=8192 phys_addrs={0x7000,0x9000} flags=GFP_KERNEL attrs=";
    let on = what(&format!("dma_alloc_sgt: {fields}"));
    assert_eq!(on, Some((map(Family::ScatterTable, 0x7000), vec![(0x1000, 8192)])));
    let off = what("dma_free_sgt: d dir=NONE dma_addr=1000 size=8192 phys_addrs={0x7000,0x9000}");
    assert_eq!(off, Some((unmap(Family::ScatterTable, 0x7000, 8192), vec![])));
    let bare = what("dma_free_sgt: d dir=NONE phys_addrs={0x7000}");
    assert_eq!(bare, Some((unmap(Family::ScatterTable, 0x7000, None), vec![])));
}

#[test]
fn the_rest_is_named_only() {
    let fields = "d dir=NONE dma_addr=1000 size=16 attrs=";
    let is = |name: &str| what(&format!("{name}: {fields}")).map(|(what, _)| what);
    assert_eq!(is("dma_map_resource"), Some(What::MapResource));
    assert_eq!(is("dma_unmap_resource"), Some(What::UnmapResource));
    for sync in ["single_for_cpu", "single_for_device", "sg_for_cpu", "sg_for_device"] {
        assert_eq!(is(&format!("dma_sync_{sync}")), Some(What::Sync));
    }
    for failed in ["dma_map_sg_err", "dma_alloc_err", "dma_alloc_sgt_err"] {
        assert_eq!(is(failed), Some(What::Failed));
    }
    for foreign in ["dma_fence_emit", "dma_map", "sched_switch", "dma_map_pages", "xdma:dma_map_page"] {
        assert_eq!(is(foreign), None);
    }
}

#[test]
fn failures_map_nothing() {
    let error = "ffffffffffffffff";
    for name in ["dma_map_page", "dma_map_phys", "dma_map_resource", "dma_alloc", "dma_alloc_sgt"] {
        let event = format!("{name}: d dir=NONE dma_addr={error} size=4096 phys_addrs={{0x1}} attrs=");
        assert_eq!(what(&event).unwrap().0, What::Failed, "{name}");
    }
    let list = format!("dma_map_sg: d dma_addrs={{0x1000,0x{error}}} sizes={{0x10,0x10}} phys_addrs={{0x1,0x2}}");
    assert_eq!(what(&list).unwrap().0, What::Failed);
    for (virt, failed) in [
        ("(null)", true),
        ("(nil)", true),
        ("0000000000000000", true),
        ("0x0", true),
        ("000000009ebb7799", false),
        ("(____ptrval____)", false),
        ("", false),
    ] {
        for name in ["dma_alloc", "dma_alloc_pages"] {
            let event = what(&format!("{name}: d dma_addr=0 size=4096 virt_addr={virt} flags=0 attrs="));
            assert_eq!(event.unwrap().0 == What::Failed, failed, "{virt}");
        }
    }
}

#[test]
fn long_lists_are_cut_by_the_kernel() {
    let list = |ents: &str| {
        let fields = "dma_addrs={0x1000,0x3000} sizes={0x10,0x20} phys_addrs={0x1,0x2}";
        let (.., segments, truncated) = parsed(&tracefs(&format!("dma_map_sg: d {ents} {fields}")))?;
        Some((segments.len(), truncated))
    };
    assert_eq!(list("ents=2/2"), Some((2, false)));
    assert_eq!(list("ents=2/300"), Some((2, true)));
    assert_eq!(list("ents=2/2 [TRUNCATED]"), Some((2, true)));
    assert_eq!(list("[TRUNCATED]"), Some((2, true)));
    assert_eq!(list("ents=4/4"), Some((2, true)));
    // What follows the real entries is stale.
    assert_eq!(list("ents=1/1"), Some((1, false)));
    assert_eq!(list("ents=0/0"), None);
    assert_eq!(list("ents=2"), None);
}

#[test]
fn stale_entries_are_not_judged() {
    let event =
        "dma_map_sg: d ents=1/1 dma_addrs={0x1000,0xffffffffffffffff,0x0} sizes={0x10,0x20,0x0} phys_addrs={0x1}";
    assert_eq!(what(event), Some((map(Family::ScatterList, 1), vec![(0x1000, 0x10)])));
}

#[test]
fn what_trace_cmd_cannot_print_it_shows_raw() {
    let raw = |event: &str| parsed(&format!("  mke2fs-172   [001]     7.081461: {event}"));
    let (time, device, what, segments, truncated) =
        raw("dma_map_sg:           [FAILED TO PARSE] device=0000:00:03.0 full_nents=2 full_ents=2 truncated=0 \
         phys_addrs=ARRAY[00, 90, 2e, 5e, 00, 00, 00, 00, 00, 80, 2e, 5e, 00, 01, 00, 00] \
         dma_addrs=ARRAY[00, a0, 2e, 5e, 00, 00, 00, 00, 00, 80, 2e, 5e, 00, 01, 00, 00] \
         lengths=ARRAY[00, 10, 00, 00, 00, 20, 00, 00] dir=1 attrs=0x0")
        .unwrap();
    assert_eq!((time, device.as_str(), truncated), (7_081_461_000, "0000:00:03.0", false));
    assert_eq!(what, map(Family::ScatterList, 0x5e2e_9000));
    assert_eq!(segments, [(0x5e2e_a000, 0x1000), (0x100_5e2e_8000, 0x2000)]);

    let off =
        raw("dma_unmap_sg: [FAILED TO PARSE] device=d addrs=ARRAY[00, 90, 2e, 5e, 00, 00, 00, 00] dir=1 attrs=0x0");
    assert_eq!(off.unwrap().2, unmap(Family::ScatterList, 0x5e2e_9000, None));
    let table =
        "[FAILED TO PARSE] device=d phys_addrs=ARRAY[00, 90, 2e, 5e, 00, 00, 00, 00] dma_addr=1580109824 size=4096";
    let (_, _, what, segments, _) = raw(&format!("dma_alloc_sgt: {table} dir=1 flags=3264 attrs=0x0")).unwrap();
    assert_eq!((what, segments), (map(Family::ScatterTable, 0x5e2e_9000), vec![(0x5e2e_9000, 4096)]));
    assert_eq!(raw("dma_sync_sg_for_cpu: [FAILED TO PARSE] device=d dma_addrs=ARRAY[]").unwrap().2, What::Sync);

    for broken in ["ARRAY[00, 90]", "ARRAY[]", "ARRAY[00, 90, 2e, 5e, 00, 00, 00, 0]", "ARRAY[00, 90"] {
        assert_eq!(raw(&format!("dma_unmap_sg: [FAILED TO PARSE] device=d addrs={broken} dir=1")), None, "{broken}");
    }
    assert_eq!(raw("dma_sync_sg_for_cpu: [FAILED TO PARSE] dir=1"), None);
}

#[test]
fn broken_fields_skip_the_line() {
    let good = "dma_map_page: d dir=NONE dma_addr=1000 size=16 phys_addr=1000 attrs=";
    assert!(what(good).is_some());
    for (from, to) in [
        (" dma_addr=1000", ""),
        (" size=16", ""),
        ("size=16", "size=0"),
        ("size=16", "size=-1"),
        ("size=16", "size=1x"),
        ("size=16", "size="),
        ("size=16", "size=99999999999999999999"),
        ("size=16", "size=16 size=32"),
        ("=1000 ", "=10000000000000000 "),
        ("=1000 ", "=fffffffffffffff8 "),
        ("=1000 ", "=10g0 "),
        ("d dir", "dir"),
        ("d dir", "d\u{7f} dir"),
        (": d dir=NONE dma_addr=1000 size=16 phys_addr=1000 attrs=", ":"),
    ] {
        assert_eq!(what(&good.replacen(from, to, 1)), None, "{to}");
    }
    assert_eq!(what(&good.replace("d dir", &format!("{} dir", "d".repeat(257)))), None);
    for lists in [
        "dma_addrs={0x1,0x2} sizes={0x1}",
        "dma_addrs={0x1} sizes={0x1,0x2}",
        "dma_addrs={} sizes={}",
        "dma_addrs={0x1} sizes={0x0}",
        "dma_addrs={0x1,,0x2} sizes={0x1,0x1,0x1}",
        "dma_addrs={0x1} sizes={0x1",
        "dma_addrs=0x1 sizes=0x1",
        "dma_addrs={0x1}",
        "dma_addrs={0x1} sizes={0x1} phys_addrs={0x1,0xg}",
    ] {
        assert_eq!(what(&format!("dma_map_sg: d {lists}")), None, "{lists}");
    }
    assert_eq!(what("dma_unmap_sg: d phys_addrs={}"), None);
    assert_eq!(what("dma_unmap_sg: d"), None);
}

#[test]
fn a_device_that_is_no_utf8_skips_the_line() {
    let mut text = tracefs("dma_sync_single_for_cpu: dX").into_bytes();
    let mut scratch = Scratch::default();
    assert!(matches!(line(&text, &mut scratch), Line::Event { .. }));
    *text.last_mut().unwrap() = 0xff;
    assert_eq!(line(&text, &mut scratch), Line::Skip);
}

#[test]
fn fields_come_in_any_order() {
    let event = what("dma_map_page: d future={1 2} attrs= size=16 word dma_addr=0x1000\tdir=NONE\r");
    assert_eq!(event, Some((map(Family::Single, 0x1000), vec![(0x1000, 16)])));
}

#[test]
fn every_printer_has_its_columns() {
    for columns in [
        "    kworker/u8:1-31      [000] .....     4.108737: dma_sync_x:",
        "          <idle>-0       [002] d.h1.     4.108737: dma_sync_x:",
        "           <...>-5551    (-------) [002] d.h1.     4.108737: dma_sync_x:",
        "             cat-5551    (   5550) [1023] d.h1.     4.108737: dma_sync_x:",
        "          mke2fs-172   [001]     4.108737: dma_sync_x:        ",
        "          mke2fs-172   [001] d..1.     4.108737000: dma:dma_sync_x:",
        "          mke2fs-172   [001]   4108737000: dma_sync_x:",
        "mke2fs   172 [001]     4.108737:        dma:dma_sync_x:",
        "a-1 [000]\t4.108737: dma_sync_x:",
    ] {
        let (time, device, what, ..) = parsed(&format!("{columns} dev.0 dir=NONE")).expect(columns);
        assert_eq!((time, device.as_str(), what), (4_108_737_000, "dev.0", What::Sync), "{columns}");
    }
}

#[test]
fn times_are_nanoseconds() {
    for (text, ns) in [
        ("0.000000:", Some(0)),
        ("4.108737:", Some(4_108_737_000)),
        ("4.108737001:", Some(4_108_737_001)),
        ("4.5:", Some(4_500_000_000)),
        ("18446744073.709551615:", Some(u64::MAX)),
        ("18446744073.709551616:", None),
        ("99999999999.0:", None),
        ("4.1087370011:", None),
        ("4.:", None),
        (".5:", None),
        ("4.-5:", None),
        ("4.108737", None),
        (":", None),
        ("12:", None),
        ("123:", Some(123)),
    ] {
        assert_eq!(timestamp(text.as_bytes()), ns, "{text}");
    }
}

#[test]
fn a_task_cannot_call_itself_an_event() {
    for task in [
        "dma_map_page: x",
        "1.5: dma_free: ",
        "[000] 1.5: x: y",
        "-1 [000] 1.5: x",
        "1 [000] 1.5: x:",
        "1 [000] 123: a:",
        "a [000]",
        "[[[[[[[[[[[[[[[",
        "a b:c]d [LOST 1",
        "CPU:0 [LOST 1 E",
        "a-1 (1) [000]",
    ] {
        assert!(task.len() <= 15);
        let text = format!("{task:>16}-31      [000] .....     4.108737: dma_sync_x: dev dir=NONE");
        let (time, device, ..) = parsed(&text).expect(task);
        assert_eq!((time, device.as_str()), (4_108_737_000, "dev"), "{task}");
    }
    // Nor can what it writes into the trace.
    let quote = tracefs("dma_sync_x: dev dir=NONE");
    assert_eq!(other(&tracefs(&format!("tracing_mark_write: {quote}"))), Line::Skip);
}

#[test]
fn what_is_no_event_is_told_apart() {
    for (text, line) in [
        ("", Line::Quiet),
        ("  \t\r", Line::Quiet),
        ("# tracer: nop", Line::Quiet),
        ("#     a-1 [000] .....     4.1: dma_sync_x: dev", Line::Quiet),
        ("# entries-in-buffer/entries-written: 75096/75096   #P:2", Line::Quiet),
        ("# entries-in-buffer/entries-written: 100/250   #P:2", Line::Lost(150)),
        ("# entries-in-buffer/entries-written: 250/100   #P:2", Line::Quiet),
        ("CPU:0 [LOST 12 EVENTS]", Line::Lost(12)),
        ("CPU 1 [LOST 12 EVENTS]", Line::Lost(12)),
        ("CPU:7 [204600 EVENTS DROPPED]", Line::Lost(204_600)),
        (" [12 EVENTS DROPPED]\r", Line::Lost(12)),
        ("[LOST EVENTS]", Line::Lost(1)),
        ("CPU:3 [EVENTS DROPPED]", Line::Lost(1)),
        ("CPU:0 [LOST 99999999999999999999 EVENTS]", Line::Skip),
        ("CPU:0 [LOST x EVENTS]", Line::Skip),
        ("we LOST 12 EVENTS]", Line::Skip),
        ("cpus=2", Line::Quiet),
        ("version = 6", Line::Quiet),
        ("cpus=two", Line::Skip),
        ("CPU 0 is empty", Line::Skip),
        (" => dma_map_page_attrs", Line::Skip),
        ("a-1 [000] ..... 4.108737: sched_wakeup: comm=x", Line::Skip),
        ("a-1 [000] ..... 4.108737: <stack trace>", Line::Skip),
        ("a-1 [000] ..... 4.108737:", Line::Skip),
    ] {
        assert_eq!(other(text), line, "{text}");
    }
}

/// A family of events that print alike, with any numbers in it.
fn any_event() -> impl Strategy<Value = (String, What, Vec<(u64, u64)>)> {
    let range = (0..1_u64 << 52, 1..1_u64 << 32);
    let single = (range.clone(), any::<bool>()).prop_map(|((addr, size), on)| {
        let (name, what, segments) = match on {
            true => ("dma_map_phys", map(Family::Single, addr), vec![(addr, size)]),
            false => ("dma_unmap_phys", unmap(Family::Single, addr, size), vec![]),
        };
        let fields = format!("dir=TO_DEVICE dma_addr={addr:x} size={size} phys_addr={addr:x} attrs=");
        (format!("{name}: DEV {fields}"), what, segments)
    });
    let list = (proptest::collection::vec(range, 1..130), any::<u64>()).prop_map(|(segments, phys)| {
        let join = |item: fn(&(u64, u64)) -> u64| {
            segments.iter().map(|s| format!("{:#x}", item(s))).collect::<Vec<_>>().join(",")
        };
        let (n, addrs, sizes) = (segments.len(), join(|s| s.0), join(|s| s.1));
        let event = format!(
            "dma_map_sg: DEV dir=NONE nents={n}/{n} ents={n}/{n} dma_addrs={{{addrs}}} sizes={{{sizes}}} \
             phys_addrs={{{phys:#x}}} attrs=NO_WARN"
        );
        (event, map(Family::ScatterList, phys), segments)
    });
    prop_oneof![single, list]
}

proptest! {
    #[test]
    fn a_printed_event_parses_back(
        (event, want, segments) in any_event(),
        task in "[ -~]{1,15}", pid in 0..9_999_999_u32, cpu in 0..4096_u32,
        secs in 0..1_000_000_000_u64, usecs in 0..1_000_000_u64,
        device in "[a-z0-9:._@-]{1,20}", padded in any::<bool>(),
    ) {
        let event = event.replace("DEV", &device);
        let event = if padded { event.replacen(": ", ":          ", 1) } else { event };
        let text = format!(" {task:>16}-{pid:<7} [{cpu:03}] d.h1. {secs:5}.{usecs:06}: {event}");
        let time = secs * 1_000_000_000 + usecs * 1000;
        prop_assert_eq!(parsed(&text), Some((time, device, want, segments, false)));
    }

    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        line(&bytes, &mut Scratch::default());
    }

    #[test]
    fn near_misses_are_survived(
        parts in proptest::collection::vec(
            prop_oneof![
                Just("a-1"), Just(" "), Just("[000]"), Just("4.1:"), Just("dma_map_sg:"), Just("dma_alloc:"), Just("d"),
                Just("dma_addr="), Just("dma_addrs="), Just("sizes="), Just("phys_addrs="), Just("size="), Just("{"),
                Just("}"), Just(","), Just("0x"), Just("1000"), Just("ARRAY["), Just("]"), Just("00, "), Just("ents="),
                Just("1/2"), Just("[FAILED TO PARSE]"), Just("device="), Just("[LOST "), Just(" EVENTS]"), Just("CPU:"),
                Just("ffffffffffffffff"), Just("("), Just(")"), Just("# entries-in-buffer/entries-written:"),
            ],
            0..60,
        ),
        shaped in any::<bool>(),
    ) {
        let text = parts.concat();
        line(text.as_bytes(), &mut Scratch::default());
        if shaped {
            line(tracefs(&format!("dma_map_sg: d {text}")).as_bytes(), &mut Scratch::default());
        }
    }
}
