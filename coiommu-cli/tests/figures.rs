//! What `coiommu replay` finds in real traces, and in one that is small enough to count by hand.

mod common;

use std::fs::File;
use std::path::Path;
use std::process::Stdio;
use std::sync::LazyLock;

use common::{
    DEVICE, PolicyFigures, Report, event, file, finish, first_lines, gzip, map_sg, replay, replay_command, run,
    shipped, shipped_text, unmap_sg,
};

const PAGE: usize = 0;
const RUN: usize = 1;
const ALIGNED: usize = 2;
const LRU: usize = 3;
const WIDE_QUOTA: usize = 5;
const TIGHT_QUOTA: usize = 6;
/// Places of the constants above.
const POLICIES: [&str; 7] = [
    "extent=page,unpin_policy=off",
    "extent=run,unpin_policy=off",
    "extent=aligned=2m,unpin_policy=off",
    "extent=run,unpin_policy=lru,unpin_interval=1",
    "extent=aligned=64k,unpin_policy=lru,unpin_interval=0.5,unpin_limit=500,unpin_gen_threshold=0",
    "extent=run,quota=32m",
    "extent=page,quota=4m",
];

/// Full runs take seconds: one a trace.
static LINUX_6_12: LazyLock<(String, Report)> = LazyLock::new(|| full("6.12"));
static LINUX_7_3: LazyLock<(String, Report)> = LazyLock::new(|| full("7.3"));

fn full(kernel: &str) -> (String, Report) {
    let run = replay(&shipped(kernel), &POLICIES);
    let report = run.report();
    (run.stdout, report)
}

fn both() -> [&'static Report; 2] {
    [&LINUX_6_12.1, &LINUX_7_3.1]
}

/// What an independent program counted over the same traces: events, distinct pages, most pages mapped at once, pages
/// mapped at the end, map calls that touch a page never seen before.
const COUNTED: [[u64; 5]; 2] = [[75_096, 31_369, 1_720, 172, 3_366], [74_343, 13_479, 4_820, 3_080, 2_840]];

#[test]
fn the_shipped_traces_hold_what_an_independent_count_found() {
    for (report, counted) in both().into_iter().zip(COUNTED) {
        let (trace, page) = (&report.trace, &report.policies[PAGE]);
        let found =
            [trace.events, trace.distinct_pages, trace.peak_mapped_pages, trace.final_mapped_pages, page.pin_requests];
        assert_eq!(found, counted);
        assert_eq!((trace.unmatched_unmaps, trace.lost_events, trace.skipped_lines), (0, 0, 0));
        assert_eq!(trace.map_calls + trace.unmap_calls, trace.events);
        // Without unpinning, every page is pinned once, alone, and stays.
        let distinct = trace.distinct_pages;
        assert_eq!([page.peak_pinned_pages, page.final_pinned_pages, page.pages_pinned], [distinct; 3]);
        assert_eq!([page.iommu_map_calls, page.peak_mappings], [distinct; 2]);
        assert_eq!([page.iommu_unmap_calls, page.pages_unpinned], [0; 2]);
    }
}

#[test]
fn no_policy_loses_a_page_that_is_in_use() {
    for report in both() {
        report.assert_no_faults();
        for policy in &report.policies {
            let tight = policy.policy.ends_with("quota=4m");
            assert_eq!(policy.failed_pins > 0, tight, "{}: {}", policy.policy, policy.failed_pins);
            assert_eq!(policy.pages_pinned - policy.pages_unpinned, policy.final_pinned_pages, "{}", policy.policy);
        }
    }
}

#[test]
fn wider_extents_cost_fewer_calls() {
    for report in both() {
        let [page, run, aligned] = [PAGE, RUN, ALIGNED].map(|at| &report.policies[at]);
        let pages = |policy: &PolicyFigures| (policy.peak_pinned_pages, policy.final_pinned_pages);
        assert_eq!((run.pin_requests, pages(run)), (page.pin_requests, pages(page)));
        assert!(run.iommu_map_calls * 4 < page.iommu_map_calls, "{} calls", run.iommu_map_calls);
        assert!(aligned.pin_requests * 10 < run.pin_requests, "{} requests", aligned.pin_requests);
        assert!(aligned.peak_pinned_pages > run.peak_pinned_pages, "nothing was pinned ahead");
        // Each of them pins some 2 MiB at once, so neither more nor much less.
        assert_eq!(aligned.iommu_map_calls, aligned.pin_requests);
        assert!((256..=512).contains(&(aligned.pages_pinned / aligned.iommu_map_calls)));
    }
}

#[test]
fn idle_pages_go() {
    // On 7.3 a third of what is ever pinned stays mapped from half-way on, and that cannot go.
    for (report, most) in both().into_iter().zip([0.5, 0.75]) {
        let [off, lru] = [RUN, LRU].map(|at| &report.policies[at]);
        let share = lru.mean_pinned_pages / off.mean_pinned_pages;
        assert!(share < most, "a mean of {share:.2} of what it is without unpinning");
        assert!(lru.pages_unpinned > 0 && lru.iommu_unmap_calls > 0);
        assert!(lru.pin_requests > off.pin_requests, "pages that went had to come again");
        assert!(lru.final_pinned_pages >= report.trace.final_mapped_pages);
    }
}

#[test]
fn a_quota_holds() {
    for report in both() {
        for (policy, quota) in [(WIDE_QUOTA, 32 << 20), (TIGHT_QUOTA, 4 << 20)] {
            let figures = &report.policies[policy];
            assert!(figures.peak_pinned_pages * 4096 <= quota, "{}: {}", figures.policy, figures.peak_pinned_pages);
            assert!(figures.pages_unpinned > 0, "{}: there was no need to make room", figures.policy);
        }
    }
}

#[test]
fn the_amount_of_ram_is_the_highest_address_unless_somebody_says() {
    // 7.3 had 4 GiB, the last of it above a hole.
    assert_eq!(both().map(|report| report.guest_memory_bytes >> 30), [2, 5]);
    let trace = file(by_hand());
    let said =
        run(["replay".as_ref(), "--json".as_ref(), "--memory".as_ref(), "3m".as_ref(), trace.path().as_os_str()]);
    assert_eq!(said.report().guest_memory_bytes, 3 << 20);
}

#[test]
fn two_runs_print_the_same_but_for_the_time_they_took() {
    let timeless = |text: &str| {
        let kept: Vec<_> = text.lines().filter(|line| !line.contains("\"elapsed_seconds\": ")).collect();
        assert_eq!(kept.len() + 1, text.lines().count());
        kept.join("\n")
    };
    let again = replay(&shipped("6.12"), &POLICIES);
    assert_eq!(timeless(&again.stdout), timeless(&LINUX_6_12.0));
    assert!(again.report().elapsed_seconds > 0.0);
}

#[test]
fn the_json_has_these_keys_in_this_order() {
    const POLICY: [&str; 12] = [
        "policy",
        "pin_requests",
        "peak_pinned_pages",
        "mean_pinned_pages",
        "final_pinned_pages",
        "pages_pinned",
        "pages_unpinned",
        "iommu_map_calls",
        "iommu_unmap_calls",
        "peak_mappings",
        "failed_pins",
        "dma_faults",
    ];
    let trace = [
        "trace",
        "events",
        "map_calls",
        "unmap_calls",
        "distinct_pages",
        "peak_mapped_pages",
        "final_mapped_pages",
        "unmatched_unmaps",
        "lost_events",
        "skipped_lines",
        "seconds",
        "guest_memory_bytes",
        "policies",
    ];
    let expected = [&trace[..], &POLICY, &POLICY, &["elapsed_seconds"]].concat();
    let small = file(by_hand());
    let run = replay(small.path(), &["extent=page", "quota=1g"]);
    assert_eq!(keys(&run.stdout), expected);
    let policies = run.report().policies.into_iter().map(|figures| figures.policy).collect::<Vec<_>>();
    let rest = "unpin_policy=off,unpin_interval=60,unpin_limit=none,unpin_gen_threshold=10";
    assert_eq!(policies, [format!("extent=page,{rest},quota=none"), format!("extent=run,{rest},quota=1g")]);
}

/// The strings of a JSON text that a colon follows; none of ours has quotes in it.
fn keys(json: &str) -> Vec<&str> {
    let parts: Vec<_> = json.split('"').collect();
    parts
        .chunks_exact(2)
        .zip(parts.iter().skip(2).step_by(2))
        .filter(|(_, after)| after.starts_with(':'))
        .map(|(pair, _)| pair[1])
        .collect()
}

/// Two devices, every kind of event, and things that are none; from 1 s to 11 s.
fn by_hand() -> String {
    const OTHER: &str = "0000:00:04.0";
    let second = |seconds: u64| seconds * 1_000_000;
    [
        "# a comment\ncpus=2\n\n".to_owned(),
        event(second(1), "dma_alloc", DEVICE, "dma_addr=1000 size=8192 virt_addr=000000009ebb7799 flags=GFP_KERNEL"),
        // The same two pages, for somebody else.
        event(second(2), "dma_map_phys", OTHER, "dma_addr=1ff0 size=32 phys_addr=1ff0"),
        map_sg(second(3), &[0x5000, 0x8000]),
        // Two CPUs disagree about the time: it stays 3 s.
        event(second(2) + 500_000, "dma_sync_single_for_cpu", DEVICE, "dma_addr=1000 size=16"),
        unmap_sg(second(4), &[0x5000, 0x8000]),
        event(second(4), "dma_unmap_phys", OTHER, "dma_addr=9000 size=16"),
        event(second(5), "dma_free", DEVICE, "dma_addr=1000 size=8192 virt_addr=000000009ebb7799"),
        event(second(5), "dma_map_resource", DEVICE, "dma_addr=fe000000 size=4096 phys_addr=fe000000"),
        event(second(5), "dma_unmap_resource", DEVICE, "dma_addr=fe000000 size=4096"),
        // The kernel refused.
        event(second(5), "dma_map_page", DEVICE, "dma_addr=ffffffffffffffff size=4096 phys_addr=7000"),
        "CPU:1 [LOST 12 EVENTS]\n".to_owned(),
        event(second(5), "dma_map_page", DEVICE, "dma_addr=7000"),
        event(second(5), "sched_switch", "prev_comm=swapper/0", "prev_pid=0"),
        event(second(7), "dma_unmap_phys", OTHER, "dma_addr=1ff0 size=32"),
        event(second(11), "dma_sync_sg_for_device", OTHER, "phys_addrs={0x5000}"),
    ]
    .concat()
}

#[test]
fn a_trace_counted_by_hand() {
    let trace = file(by_hand());
    let policies = [
        "extent=page",
        "extent=run",
        "extent=aligned=2m",
        "extent=run,unpin_policy=lru,unpin_interval=1",
        "extent=page,quota=12k",
    ];
    let report = replay(trace.path(), &policies).report();
    let trace = &report.trace;
    assert_eq!((trace.events, trace.map_calls, trace.unmap_calls), (12, 4, 5));
    assert_eq!((trace.distinct_pages, trace.peak_mapped_pages, trace.final_mapped_pages), (4, 4, 0));
    assert_eq!((trace.unmatched_unmaps, trace.lost_events, trace.skipped_lines), (1, 12, 2));
    assert_eq!((trace.seconds, report.guest_memory_bytes), (10.0, 1 << 30));
    report.assert_no_faults();

    let requests_and_calls = |policy: &PolicyFigures| {
        (policy.pin_requests, policy.iommu_map_calls, policy.peak_mappings, policy.peak_pinned_pages)
    };
    let [page, run, aligned, lru, quota] = report.policies.as_slice() else { panic!("{:?}", report.policies) };
    assert_eq!(requests_and_calls(page), (2, 4, 4, 4));
    assert_eq!(requests_and_calls(run), (2, 3, 3, 4));
    // 2 pages for 2 s, 4 for 8 s.
    assert_eq!((page.mean_pinned_pages, run.mean_pinned_pages), (3.6, 3.6));
    assert_eq!(requests_and_calls(aligned), (1, 1, 1, 512));
    assert_eq!((aligned.pages_pinned, aligned.mean_pinned_pages), (512, 512.0));

    // A look each second, before what happens in it. Accessed at 3 s, aged at 4 s, gone at 5 s; the others are in use
    // until 7 s, and gone at 8 s. So 2 pages for 2 s, 4 for 2 s, 2 for 3 s, none for 3 s.
    assert_eq!(requests_and_calls(lru), (2, 3, 3, 4));
    assert_eq!((lru.mean_pinned_pages, lru.final_pinned_pages), (1.8, 0));
    assert_eq!((lru.pages_pinned, lru.pages_unpinned), (4, 4));

    // Room for three pages while two are in use: the list of two does not fit.
    assert_eq!((quota.failed_pins, quota.dma_faults), (1, 0));
    assert!(quota.peak_pinned_pages <= 3);
    assert!(report.policies[..4].iter().all(|policy| policy.failed_pins == 0));
}

#[test]
fn devices_are_told_apart() {
    let trace = shipped("6.12");
    let text = shipped_text("6.12");
    let of = |devices: &[&str]| {
        let mut command = replay_command(&trace, &["extent=page"]);
        finish(command.args(devices.iter().flat_map(|device| ["--device", device]))).report()
    };
    let nic = of(&["0000:00:02.0"]);
    let disk = of(&["00:03.0"]);
    for (report, device) in [(&nic, " 0000:00:02.0 "), (&disk, " 0000:00:03.0 ")] {
        let lines = text.lines().filter(|line| line.contains(device)).count();
        assert_eq!(usize::try_from(report.trace.events), Ok(lines), "{device}");
        assert_eq!(report.policies[0].final_pinned_pages, report.trace.distinct_pages);
        report.assert_no_faults();
    }
    let all = &LINUX_6_12.1.trace;
    let sum = |figure: fn(&Report) -> u64| figure(&nic) + figure(&disk);
    assert_eq!(sum(|report| report.trace.events), all.events);
    assert_eq!(sum(|report| report.trace.map_calls), all.map_calls);
    assert_eq!(sum(|report| report.trace.final_mapped_pages), all.final_mapped_pages);
    assert!(sum(|report| report.trace.distinct_pages) >= all.distinct_pages);
}

#[test]
fn all_devices_by_name_are_all_devices() {
    let trace = file(by_hand());
    let policies = ["extent=page"];
    let all = replay(trace.path(), &policies).report();
    let named =
        finish(replay_command(trace.path(), &policies).args(["--device", DEVICE, "--device", "00:04.0"])).report();
    assert_eq!(named.timeless(), all.timeless());
}

#[test]
fn a_device_that_is_not_there_is_said_so_with_those_that_are() {
    let trace = file(by_hand());
    let run = finish(replay_command(trace.path(), &["extent=page"]).args(["--device", "0000:00:05.0"]));
    let line = run.complaint();
    for name in ["0000:00:05.0", DEVICE, "0000:00:04.0"] {
        assert!(line.contains(name), "{line}");
    }
}

#[test]
fn it_does_not_matter_how_a_trace_is_stored() {
    let text = first_lines(&shipped_text("7.3"), 5_000);
    let stored = [text.clone().into_bytes(), gzip(text.as_bytes()), zstd::encode_all(text.as_bytes(), 1).unwrap()];
    let policies = ["extent=run,unpin_policy=lru,unpin_interval=0.1"];
    let mut reports = Vec::new();
    for content in stored {
        let trace = file(content);
        reports.push(replay(trace.path(), &policies).report().timeless());
        let stdin = Stdio::from(File::open(trace.path()).unwrap());
        reports.push(finish(replay_command(Path::new("-"), &policies).stdin(stdin)).report().timeless());
    }
    // What the kernel wrote less its 12 lines of header.
    assert_eq!(reports[0].trace.events, 4_988);
    for report in &reports {
        assert_eq!(report, &reports[0]);
    }
}

#[test]
fn policies_do_not_disturb_each_other() {
    let text = first_lines(&shipped_text("7.3"), 10_000);
    let trace = file(text);
    let policies = [POLICIES[PAGE], POLICIES[ALIGNED], POLICIES[LRU], "extent=page,quota=256k"];
    let together = replay(trace.path(), &policies).report();
    // Both of the things that could: room that ran out, and pages that went.
    assert!(together.policies[3].failed_pins > 0 && together.policies[2].pages_unpinned > 0);
    for (policy, in_company) in policies.iter().zip(&together.policies) {
        let alone = replay(trace.path(), &[policy]).report();
        assert_eq!(alone.policies, std::slice::from_ref(in_company));
        assert_eq!(alone.trace, together.trace);
    }
}
