//! Traces come from other machines and by mail. Whatever is in them, the program ends by itself, says what it could not
//! use, and needs bounded memory; whatever its arguments are, it says which one is wrong.

mod common;

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use common::{
    DEVICE, Run, event, file, finish, first_lines, gzip, map, map_sg, replay, replay_command, run, shipped,
    shipped_text, unmap,
};
use proptest::prelude::*;

/// One that takes pages back, one that does not, one that pins ahead: between them, all the code there is.
const POLICIES: [&str; 3] = [
    "extent=run,unpin_policy=lru,unpin_interval=0.001",
    "extent=page",
    "extent=aligned=2m,unpin_policy=lru,unpin_interval=1",
];

const MIB: u64 = 1 << 20;

/// Runs a replay with the stack of a thread rather than that of a process: nothing may recurse as deep as a trace asks.
fn replay_on_a_small_stack(trace: &Path, policies: &[&str]) -> Run {
    let command = replay_command(trace, policies);
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -s 1024 && exec \"$0\" \"$@\""]).arg(command.get_program()).args(command.get_args());
    finish(shell.stdin(Stdio::null()))
}

#[test]
fn a_trace_that_cannot_be_played_is_one_line() {
    let text = first_lines(&shipped_text("6.12"), 2_000);
    let zipped = gzip(text.as_bytes());
    let packed = zstd::encode_all(text.as_bytes(), 1).unwrap();
    let with_flipped_bits = |mut stored: Vec<u8>| {
        let middle = stored.len() / 2;
        stored[middle..middle + 8].iter_mut().for_each(|byte| *byte ^= 0x55);
        stored
    };
    let cases: [(&str, Vec<u8>, &str); 14] = [
        ("empty", vec![], "is empty"),
        ("empty, compressed", gzip(b""), "is empty"),
        ("a program", std::fs::read(env!("CARGO_BIN_EXE_coiommu")).unwrap()[..100_000].into(), "is binary"),
        ("text", b"It was a dark and stormy night.\n".into(), "no dma events"),
        ("other events", b"  a-1  [000] .....     1.000000: sched_switch: prev_comm=a\n".into(), "no dma events"),
        ("a header alone", first_lines(&text, 12).into(), "no dma events"),
        ("an empty mapping", map(0, 0x1000, 0).into(), "no dma events"),
        ("gzip cut in the middle", zipped[..zipped.len() / 2].into(), "cut short"),
        ("gzip without its last byte", zipped[..zipped.len() - 1].into(), "cut short"),
        ("zstd cut in the middle", packed[..packed.len() / 2].into(), "cut short"),
        ("zstd without its last byte", packed[..packed.len() - 1].into(), "cut short"),
        ("gzip with flipped bits", with_flipped_bits(zipped.clone()), "gzip stream is corrupt"),
        ("trace.dat", b"\x17\x08\x44tracing6\0\0\0\x08\0\0\x10\0\0".into(), "trace-cmd report"),
        ("perf.data", b"PERFILE2\x68\0\0\0\0\0\0\0".into(), "perf script"),
    ];
    for (what, content, says) in cases {
        let trace = file(content);
        let run = replay(trace.path(), &["extent=page"]);
        let line = run.complaint();
        assert!(line.contains(says), "{what}: {line}");
        assert!(line.contains(&*trace.path().to_string_lossy()), "{what}: which file? {line}");
        // A table and a drawing of it are not there either.
        let drawing = trace.path().with_extension("svg");
        let table = run_drawing(trace.path(), &drawing);
        assert_eq!(table.complaint(), line);
        assert!(!drawing.exists(), "{what}");
    }
}

fn run_drawing(trace: &Path, drawing: &Path) -> Run {
    run(["replay".as_ref(), trace.as_os_str(), "--plot".as_ref(), drawing.as_os_str()])
}

#[test]
fn a_file_that_is_not_there_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("nothing.trace");
    for (path, says) in [(missing.as_path(), "No such file"), (folder.path(), "directory")] {
        let run = replay(path, &[]);
        let line = run.complaint();
        assert!(line.contains(says) && line.contains(&*path.to_string_lossy()), "{line}");
    }
    let run = finish(replay_command(Path::new("-"), &[]).stdin(Stdio::null()));
    assert!(run.complaint().contains("standard input is empty"), "{}", run.stderr);
}

#[test]
fn wrong_arguments_are_told_from_wrong_traces() {
    let trace = shipped("6.12");
    let trace = trace.to_str().unwrap();
    let too_many =
        ["replay", trace].into_iter().chain(["--policy", "extent=page"].into_iter().cycle().take(130)).collect();
    let cases: [(Vec<&str>, &str); 24] = [
        (vec!["replay"], "<TRACE>"),
        (vec!["replay", trace, trace], "unexpected argument"),
        (vec!["replay", trace, "--polices", "extent=page"], "--polices"),
        (vec!["replay", trace, "--policy"], "--policy"),
        (vec!["replay", trace, "--policy", "extents=page"], "unknown key \"extents\""),
        (vec!["replay", trace, "--policy", "extent"], "key=value"),
        (vec!["replay", trace, "--policy", "extent=page,,quota=1g"], "key=value"),
        (vec!["replay", trace, "--policy", "extent=page,extent=page"], "extent is given twice"),
        (vec!["replay", trace, "--policy", "extent=aligned=3m"], "extent=aligned=3m"),
        (vec!["replay", trace, "--policy", "extent=aligned=4k"], "64k"),
        (vec!["replay", trace, "--policy", "unpin_policy=LRU"], "off or lru"),
        (vec!["replay", trace, "--policy", "unpin_interval=0"], "above 0"),
        (vec!["replay", trace, "--policy", "unpin_interval=-1"], "above 0"),
        (vec!["replay", trace, "--policy", "unpin_interval=inf"], "seconds"),
        (vec!["replay", trace, "--policy", "unpin_limit=0"], "above 0"),
        (vec!["replay", trace, "--policy", "unpin_gen_threshold=-1"], "rounds"),
        (vec!["replay", trace, "--policy", "quota=0"], "4k at least"),
        (vec!["replay", trace, "--policy", "quota=16777216t"], "bytes"),
        (vec!["replay", trace, "--memory", "0"], "--memory"),
        (vec!["replay", trace, "--memory", "4gb"], "--memory"),
        (vec!["replay", trace, "--memory", "99999999999999999999"], "--memory"),
        (too_many, "65 policies"),
        (vec!["completions", "cmd.exe"], "cmd.exe"),
        (vec!["man", "cure"], "cure"),
    ];
    for (args, says) in cases {
        let run = run(&args);
        assert_eq!((run.status.code(), run.stdout.as_str()), (Some(2), ""), "{args:?}: {}", run.stderr);
        assert!(run.stderr.starts_with("error: ") && run.stderr.contains(says), "{args:?}: {}", run.stderr);
    }
    assert_eq!(run::<&str>([]).status.code(), Some(2));
}

/// What becomes of a line.
#[derive(Clone, Copy, Debug)]
enum Line {
    /// An event, played or counted.
    Event,
    /// An event, not played: it is counted as skipped, too.
    NotPlayed,
    /// An unmap of something never mapped.
    Unmatched,
    /// No event that is understood.
    Skipped,
    Ignored,
}

#[test]
fn what_cannot_be_played_is_skipped_and_counted() {
    use Line::{Event, Ignored, NotPlayed, Skipped, Unmatched};
    let on = |name, fields| event(1, name, DEVICE, fields);
    let top = u64::MAX - 0xfff;
    let cases: Vec<(Line, Vec<u8>)> = vec![
        (NotPlayed, map(1, top, 0x1000).into()),
        (NotPlayed, map(1, 1 << 46, 1).into()),
        (NotPlayed, map(1, (1 << 46) - 1, 2).into()),
        (Event, map(1, (1 << 46) - 1, 1).into()),
        (Skipped, map(1, top, 0x1001).into()),
        (Skipped, map(1, 2, u64::MAX).into()),
        (Skipped, map(1, 0x1000, 0).into()),
        (NotPlayed, map(1, 0, u64::MAX).into()),
        // More than a guest could ask for in one call, and nearly the whole address space.
        (NotPlayed, map(1, 0, 2 << 30).into()),
        (NotPlayed, map(1, 0, 1 << 45).into()),
        (NotPlayed, map_sg(1, &[0x1000, 1 << 50, 0x2000]).into()),
        (Skipped, on("dma_map_page", "dma_addr=1000 size=99999999999999999999").into()),
        (Skipped, on("dma_map_page", "dma_addr=10000000000000000 size=1").into()),
        (Skipped, on("dma_map_page", "dma_addr=1000 size=-1").into()),
        (Skipped, on("dma_map_page", "dma_addr=zzz size=1").into()),
        (Skipped, on("dma_map_page", "dma_addr=1000 dma_addr=1000 size=1").into()),
        (Skipped, on("dma_map_page", "dma_addr= size=").into()),
        (Skipped, on("dma_map_page", "dma_addr=1000").into()),
        (Skipped, on("dma_map_page", "size=16").into()),
        (Skipped, on("dma_alloc", "").into()),
        (Skipped, on("dma_unmap_page", "").into()),
        (Skipped, on("dma_free", "dma_addr=1000").into()),
        (Skipped, on("dma_map_sg", "").into()),
        (Skipped, on("dma_map_sg", "dma_addrs={} sizes={} phys_addrs={}").into()),
        (Skipped, on("dma_map_sg", "dma_addrs={0x1000} sizes={1,2} phys_addrs={0x1000}").into()),
        (Skipped, on("dma_map_sg", "dma_addrs={0x1000,0x2000} sizes={1} phys_addrs={0x1000}").into()),
        (Skipped, on("dma_map_sg", "dma_addrs={0x1000 sizes={1} phys_addrs={0x1000}").into()),
        (Skipped, on("dma_map_sg", "dma_addrs=ARRAY[00, 10 sizes=ARRAY[] phys_addrs=ARRAY[]").into()),
        (Skipped, on("dma_unmap_sg", "phys_addrs={}").into()),
        (Skipped, on("dma_map_pages", "dma_addr=1000 size=16").into()),
        (Skipped, on("kmalloc", "dma_addr=1000 size=16").into()),
        (Event, on("dma_sync_single_for_device", "dma_addr=zzz size=-1").into()),
        (Event, on("dma_map_page", "dma_addr=ffffffffffffffff size=16 phys_addr=1000").into()),
        (Unmatched, unmap(1, 0x7000, 0x1000).into()),
        (Unmatched, event(1, "dma_unmap_page", "0000:00:1f.0", "dma_addr=1000 size=4096").into()),
        (Unmatched, on("dma_free", "dma_addr=1000 size=4096").into()),
        (Unmatched, on("dma_unmap_sg", "phys_addrs={0x1000}").into()),
        // The end of a line is missing, the beginning of one, and the name of a device.
        (Skipped, b"    kworker/u8:1-31      [000] .....     4.108737: dma_map_page:\n".into()),
        (Skipped, b"4.108737: dma_map_page: 0000:00:03.0 dir=NONE dma_addr=1000 size=16\n".into()),
        (Skipped, b" a-1 [000] ..... 4.108737: dma_map_page: dir=NONE dma_addr=1000 size=16\n".into()),
        (Skipped, b" a-1 [000] ..... 99999999999999999999.000000: dma_map_page: d dma_addr=1000 size=16\n".into()),
        (Skipped, b" a-1 [000] ..... never: dma_map_page: d dma_addr=1000 size=16\n".into()),
        // Tasks have any names; devices do not.
        (Event, b" \xff\xfe\x80-1 [000] ..... 1.000000: dma_map_page: d dma_addr=1000 size=16\n".into()),
        (Event, b" [000] 1.0: dma_map_page: -1 [000] ..... 1.000000: dma_map_page: d dma_addr=1000 size=16\n".into()),
        (Skipped, b" a-1 [000] ..... 1.000000: dma_map_page: \xff\xfe dma_addr=1000 size=16\n".into()),
        (Skipped, b" a-1 [000] ..... 1.000000: dma_map_page: \x1b[2J dma_addr=1000 size=16\n".into()),
        (
            Skipped,
            [&b" a-1 [000] ..... 1.000000: dma_map_page: "[..], &[b'd'; 300], b" dma_addr=1000 size=16\n"].concat(),
        ),
        (Event, b" a-1 [000] ..... 1.000000: dma_map_page: d dma_addr=1000 size=16\r\n".into()),
        (Skipped, b"\xff\xfe\xfd\n".into()),
        (Skipped, b"cpus=many\n".into()),
        (Skipped, [vec![b'x'; 1_000_000], b"\n".to_vec()].concat()),
        (Ignored, b"\n \n\t\n# ?\n".into()),
    ];
    for (line, text) in cases {
        // What comes before it and after it must not mind.
        let good = |at| [map(at, 0x4000_0000, 0x2000), unmap(at + 1, 0x4000_0000, 0x2000)].concat().into_bytes();
        let trace = file([good(0), text.clone(), good(5)].concat());
        let report = replay(trace.path(), &POLICIES).report();
        let figures = &report.trace;
        let (events, skipped, unmatched) = match line {
            Event => (1, 0, 0),
            NotPlayed => (1, 1, 0),
            Unmatched => (1, 0, 1),
            Skipped => (0, 1, 0),
            Ignored => (0, 0, 0),
        };
        let expected = (4 + events, skipped, unmatched);
        let text = String::from_utf8_lossy(&text[..text.len().min(200)]).into_owned();
        assert_eq!((figures.events, figures.skipped_lines, figures.unmatched_unmaps), expected, "{line:?}: {text}");
        report.assert_no_faults();
        assert!(report.policies.iter().all(|policy| policy.failed_pins == 0), "{text}");
    }
}

#[test]
fn a_line_of_60_mb_costs_no_memory() {
    let long = [vec![b'['; 60_000_000], map(1, 0x1000, 1).into_bytes(), map(2, 0x2000, 1).into_bytes()].concat();
    let trace = file(long);
    let run = replay(trace.path(), &POLICIES);
    let report = run.report();
    assert_eq!((report.trace.events, report.trace.skipped_lines), (1, 1));
    assert_below(&run, 40 * MIB);
}

/// Says what was needed, for those who want to know how near it is: `--nocapture` shows it.
#[track_caller]
fn assert_below(run: &Run, bound: u64) {
    println!("{} MiB of {} MiB", run.peak_memory / MIB, bound / MIB);
    assert!(run.peak_memory > MIB, "nobody looked");
    assert!(run.peak_memory < bound, "{} MiB", run.peak_memory / MIB);
}

#[test]
fn the_same_page_can_be_mapped_any_number_of_times() {
    const TIMES: u64 = 70_000;
    // A guest counts so far, less one for each of its CPUs.
    const COUNTED: u64 = (1 << 16) - 1 - 1_024;
    let trace: String = (0..TIMES).map(|at| map(at, 0x1000, 16)).collect();
    let report = replay_on_a_small_stack(file(trace).path(), &POLICIES).report();
    let figures = &report.trace;
    assert_eq!((figures.events, figures.distinct_pages, figures.final_mapped_pages), (TIMES, 1, 1));
    assert_eq!(figures.skipped_lines, TIMES - COUNTED);
    report.assert_no_faults();
}

#[test]
fn mappings_that_pile_up_under_one_address_do_not_pile_up_on_the_stack() {
    const TIMES: u64 = 100_000;
    // Unmapped by its physical address, which is the same for all of them, so each is kept behind the one before.
    let fields = |at: u64| format!("dma_addrs={{{:#x}}} sizes={{0x1000}} phys_addrs={{0x1000}}", (at % 1_000) << 12);
    let trace: String = (0..TIMES).map(|at| event(at, "dma_map_sg", DEVICE, &fields(at))).collect();
    let report = replay_on_a_small_stack(file(trace).path(), &["extent=run"]).report();
    assert_eq!((report.trace.events, report.trace.skipped_lines), (TIMES, 0));
    assert_eq!((report.trace.distinct_pages, report.trace.final_mapped_pages), (1_000, 1_000));
    report.assert_no_faults();
}

#[test]
fn a_call_that_is_not_played_leaves_nothing_behind() {
    // A scatter list begins in memory that was never seen, and goes on where it cannot be played: at a page that is
    // mapped too often, at the end of addresses, beyond what a guest can ask for. Then the memory is used after all.
    let often: String = (0..65_535).map(|at| map(at, 0x1000, 16)).collect();
    for (before, bad) in [(often.as_str(), 0x1000), ("", 1 << 50)] {
        let rest =
            [map_sg(100_000, &[0x4000_0000, bad]), map(100_001, 0x4000_0000, 16), unmap(100_002, 0x4000_0000, 16)];
        let trace = file([before, &rest.concat()].concat());
        let report = replay(trace.path(), &POLICIES).report();
        report.assert_no_faults();
        for policy in &report.policies {
            assert_eq!(policy.failed_pins, 0, "{}: the page could have been pinned", policy.policy);
        }
    }
}

#[test]
fn there_are_as_many_devices_as_a_guest_has() {
    const DEVICES: u64 = 5_000;
    const PLAYED: u64 = 4_095;
    let on = |at: u64, name, fields: &str| event(at, name, &format!("device{at}"), fields);
    let maps = (0..DEVICES).map(|at| on(at, "dma_map_phys", "dma_addr=1000 size=16 phys_addr=1000"));
    let unmaps = (0..DEVICES).map(|at| on(at, "dma_unmap_phys", "dma_addr=1000 size=16"));
    let report = replay(file(maps.chain(unmaps).collect::<String>()).path(), &POLICIES).report();
    let figures = &report.trace;
    assert_eq!((figures.events, figures.distinct_pages, figures.final_mapped_pages), (2 * DEVICES, 1, 0));
    assert_eq!((figures.skipped_lines, figures.unmatched_unmaps), (DEVICES - PLAYED, DEVICES - PLAYED));
    report.assert_no_faults();
}

#[test]
fn a_trace_that_begins_in_the_middle_is_played_from_there() {
    let whole = shipped_text("7.3");
    let lines: Vec<_> = whole.split_inclusive('\n').collect();
    let half = lines[lines.len() / 2..].concat();
    let report = replay(file(&half).path(), &POLICIES).report();
    assert_eq!(usize::try_from(report.trace.events), Ok(half.lines().count()));
    // Some 3,000 pages were mapped all along. Only what is unmapped without having been mapped shows.
    assert!((1..5_000).contains(&report.trace.unmatched_unmaps), "{}", report.trace.unmatched_unmaps);
    assert_eq!(report.trace.skipped_lines, 0);
    report.assert_no_faults();
}

#[test]
fn time_can_jump_and_go_back() {
    let year = 31_557_600_000_000;
    let at = [0, 500 * year, 3, 500 * year + 5_000, 7, 500 * year + 9_000_000];
    let trace: String = (0_u64..).zip(at).map(|(n, at)| map(at, n << 22, 4096) + &unmap(at, n << 22, 4096)).collect();
    let report = replay(file(trace).path(), &POLICIES).report();
    assert_eq!(report.trace.seconds, 500.0 * 31_557_600.0 + 9.0);
    report.assert_no_faults();
    // All but the last, which came with the last event.
    assert_eq!((report.policies[0].final_pinned_pages, report.policies[0].pages_unpinned), (1, 5));
}

#[test]
fn huge_mappings_are_played_as_far_as_a_guest_could_ask_for_them() {
    const PAGES: u64 = 100_000;
    let size = PAGES << 12;
    // The second overlaps the first, a third is as large as all the address space, a fourth comes after all that.
    let trace = [
        map(0, 1 << 40, size),
        map(1, (1 << 40) + size / 2, size),
        map(2, 0, 1 << 45),
        unmap(3, 1 << 40, size),
        unmap(4, 0, 1 << 45),
        map(5, 0x1000, 1),
    ];
    let run = replay(file(trace.concat()).path(), &POLICIES);
    let report = run.report();
    let figures = &report.trace;
    assert_eq!((figures.skipped_lines, figures.unmatched_unmaps), (1, 1));
    assert_eq!((figures.distinct_pages, figures.final_mapped_pages), (PAGES * 3 / 2 + 1, PAGES + 1));
    report.assert_no_faults();
    // There are 65,535 mappings, and no more: one page each does not do.
    let failed: Vec<_> = report.policies.iter().map(|policy| policy.failed_pins).collect();
    assert_eq!(failed, [0, 2, 0]);
    assert_eq!(report.policies[1].peak_mappings, 65_535);
    assert_below(&run, 128 * MIB);
}

/// Pages all over the address space, each in 2 MiB of its own.
fn scattered(pages: u64) -> String {
    let addr = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 18 & !0xfff;
    let blocks: HashSet<_> = (0..pages).map(|n| addr(n) >> 21).collect();
    assert_eq!(Ok(blocks.len()), usize::try_from(pages), "they are not");
    (0..pages).map(|n| map(n, addr(n), 4096)).collect()
}

#[test]
fn pages_all_over_the_address_space_are_played() {
    const PAGES: u64 = 30_000;
    let run = replay(file(scattered(PAGES)).path(), &["extent=run"]);
    let report = run.report();
    assert_eq!((report.trace.distinct_pages, report.trace.skipped_lines), (PAGES, 0));
    assert_eq!((report.policies[0].peak_pinned_pages, report.policies[0].failed_pins), (PAGES, 0));
    report.assert_no_faults();
    assert_below(&run, 512 * MIB);
}

#[test]
fn the_memory_for_all_policies_together_is_bounded() {
    const PAGES: u64 = 6_000;
    let policies = [POLICIES[1]; 32];
    let run = replay(file(scattered(PAGES)).path(), &policies);
    let report = run.report();
    // Each has a table of its own, so with many of them there is less room for each: what does not fit is skipped.
    assert_eq!(report.trace.distinct_pages + report.trace.skipped_lines, PAGES);
    assert!(report.trace.skipped_lines > 0, "everything fitted");
    assert!(report.policies.iter().all(|policy| *policy == report.policies[0]));
    report.assert_no_faults();
    assert_below(&run, 1536 * MIB);
}

/// A way to spoil a text.
#[derive(Clone, Debug)]
enum Spoil {
    Put(usize, Vec<u8>),
    Cut(usize, usize),
    /// The digits that come next become these.
    Number(usize, String),
    /// A line again, somewhere else.
    Again(usize, usize),
}

impl Spoil {
    fn apply(&self, text: &mut Vec<u8>) {
        let place = |at: usize, text: &[u8]| at % (text.len() + 1);
        match self {
            Self::Put(at, bytes) => {
                let at = place(*at, text);
                text.splice(at..at, bytes.iter().copied());
            }
            Self::Cut(at, len) => {
                let at = place(*at, text);
                text.drain(at..(at + len).min(text.len()));
            }
            Self::Number(at, digits) => {
                let is_digit = |byte: &u8| byte.is_ascii_hexdigit();
                let from = place(*at, text);
                let start = text[from..].iter().position(is_digit).map_or(text.len(), |skip| from + skip);
                let end = text[start..].iter().position(|byte| !is_digit(byte)).map_or(text.len(), |len| start + len);
                text.splice(start..end, digits.bytes());
            }
            Self::Again(line, at) => {
                let lines: Vec<_> = text.split_inclusive(|&byte| byte == b'\n').collect();
                let Some(line) = (!lines.is_empty()).then(|| lines[line % lines.len()].to_vec()) else { return };
                let at = place(*at, text);
                text.splice(at..at, line);
            }
        }
    }
}

fn spoil() -> impl Strategy<Value = Spoil> {
    let number = prop_oneof![
        any::<u64>().prop_map(|number| format!("{number:x}")),
        any::<u64>().prop_map(|number| number.to_string()),
        // Few enough pages to be played.
        (0_u64..1 << 22).prop_map(|number| number.to_string()),
        "-?[0-9]{0,30}",
    ];
    prop_oneof![
        (any::<usize>(), prop::collection::vec(any::<u8>(), 0..40)).prop_map(|(at, bytes)| Spoil::Put(at, bytes)),
        (any::<usize>(), "[\n =:{},A-Z\\[\\]0-9]{0,8}").prop_map(|(at, text)| Spoil::Put(at, text.into_bytes())),
        (any::<usize>(), 0..200_usize).prop_map(|(at, len)| Spoil::Cut(at, len)),
        (any::<usize>(), number).prop_map(|(at, digits)| Spoil::Number(at, digits)),
        (any::<usize>(), any::<usize>()).prop_map(|(line, at)| Spoil::Again(line, at)),
    ]
}

/// Where the proptest takes its lines from.
static TEXTS: LazyLock<[String; 2]> = LazyLock::new(|| ["6.12", "7.3"].map(shipped_text));

proptest! {
    #![proptest_config(ProptestConfig {
        max_shrink_iters: 256,
        failure_persistence: None,
        ..ProptestConfig::with_cases(32)
    })]

    #[test]
    fn a_spoiled_trace_is_played_or_refused(
        kernel in 0..2_usize,
        from in 0..70_000_usize,
        spoils in prop::collection::vec(spoil(), 0..60),
    ) {
        let mut text: Vec<u8> = TEXTS[kernel].split_inclusive('\n').skip(from).take(300).collect::<String>().into();
        spoils.iter().for_each(|spoil| spoil.apply(&mut text));
        let trace = file(&text);
        let run = replay(trace.path(), &POLICIES);
        match run.status.code() {
            Some(0) => run.report().assert_no_faults(),
            Some(1) => { run.complaint(); }
            _ => prop_assert!(false, "{}: {}", run.status, run.stderr),
        }
    }
}
