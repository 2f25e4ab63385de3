//! What people see: the table, the drawing, help, completions, man pages, and nothing that is not asked for.

mod common;

use std::io::{Write, pipe};
use std::process::Stdio;
use std::time::Duration;

use common::{Run, coiommu, event, file, finish, first_lines, map, map_sg, replay, run, shipped_text, unmap, unmap_sg};

/// A table as a reader sees it: the words of each cell, whatever number of lines they take.
struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn read(text: &str) -> Self {
        let (mut columns, mut rows) = (Vec::new(), Vec::new());
        let mut in_header = true;
        for line in text.lines() {
            in_header &= !line.starts_with('╞');
            let Some(line) = line.strip_prefix('│').and_then(|line| line.strip_suffix('│')) else { continue };
            let cells: Vec<_> = line.split('┆').map(str::trim).collect();
            let goes_on = cells[1..].iter().all(|cell| cell.is_empty());
            let row = match (in_header, rows.last_mut()) {
                (true, _) => &mut columns,
                (false, Some(row)) if goes_on => row,
                _ => {
                    rows.push(Vec::new());
                    let Some(row) = rows.last_mut() else { continue };
                    row
                }
            };
            row.resize(cells.len(), String::new());
            for (cell, words) in row.iter_mut().zip(cells) {
                let gap = if cell.is_empty() || words.is_empty() || cell.ends_with(',') { "" } else { " " };
                *cell = format!("{cell}{gap}{words}");
            }
        }
        Self { columns, rows }
    }

    fn policies(&self) -> Vec<&str> {
        self.rows.iter().map(|row| row[0].as_str()).collect()
    }

    /// What is in the row of a policy and under a heading; if there are two of the same, in both.
    #[track_caller]
    fn cell(&self, policy: &str, heading: &str) -> String {
        let row = self.rows.iter().find(|row| row[0] == policy).unwrap();
        let under =
            self.columns.iter().zip(row).filter(|(column, _)| *column == heading).map(|(_, cell)| cell.as_str());
        under.collect::<Vec<_>>().join(", ")
    }
}

/// Runs a command that must go well and say nothing on standard error.
#[track_caller]
fn stdout_of(run: &Run) -> &str {
    assert_eq!((run.status.code(), run.stderr.as_str()), (Some(0), ""), "{}", run.status);
    &run.stdout
}

#[test]
fn the_table_begins_with_full_pinning_and_has_a_row_for_each_policy() {
    let trace = file(first_lines(&shipped_text("6.12"), 8_000));
    let args = |rest: &[&str]| -> Vec<_> {
        ["replay", trace.path().to_str().unwrap(), "--memory", "2g"]
            .into_iter()
            .chain(rest.iter().copied())
            .map(str::to_owned)
            .collect()
    };
    let policies = ["extent=page", "extent=run,unpin_policy=lru,unpin_interval=0.2", "extent=aligned=2m", "quota=1g"];
    let list = policies.iter().flat_map(|policy| ["--policy", policy]).collect::<Vec<_>>();
    let run_of_some = run(args(&list));
    let table = Table::read(stdout_of(&run_of_some));
    let labels = [
        "full pinning",
        "extent=page",
        "extent=run,unpin_policy=lru,unpin_interval=0.2",
        "extent=aligned=2m",
        "extent=run,quota=1g",
    ];
    assert_eq!(table.policies(), labels);

    let full = |heading| table.cell("full pinning", heading);
    assert_eq!([full("peak pinned"), full("mean pinned")], ["2.0 GiB", "2.0 GiB"]);
    assert_eq!([full("of RAM"), full("pin requests")], ["100 %, 100 %", "0"]);
    let report = replay(trace.path(), &policies).report();
    assert!(report.policies[1].iommu_unmap_calls > 0, "nothing to show");
    for (label, figures) in labels[1..].iter().zip(&report.policies) {
        let count = |heading| table.cell(label, heading).replace(',', "").parse::<u64>();
        assert_eq!(count("pin requests"), Ok(figures.pin_requests), "{label}");
        assert_eq!(count("IOMMU calls"), Ok(figures.iommu_map_calls + figures.iommu_unmap_calls), "{label}");
        assert_eq!(count("mappings at peak"), Ok(figures.peak_mappings), "{label}");
    }

    let without_policies = run(args(&[]));
    let table = Table::read(stdout_of(&without_policies));
    let names = table.policies();
    assert_eq!(names[0], "full pinning");
    assert!(names.len() >= 5, "a set worth comparing: {names:?}");
    for extent in ["extent=page", "extent=run", "extent=aligned=2m"] {
        assert!(names.contains(&extent), "{extent} is not in {names:?}");
    }
    assert!(names.iter().any(|name| name.contains("unpin_policy=lru")));
}

/// 1,000 pages, in one call, for 3 of 4 s; a page for the last.
fn thousand_pages() -> String {
    [
        map(0, 0x10_0000, 1_000 << 12),
        unmap(3_000_000, 0x10_0000, 1_000 << 12),
        map(3_000_000, 0x1000, 8),
        unmap(4_000_000, 0x1000, 8),
    ]
    .concat()
}

#[test]
fn the_shares_in_the_table_are_of_the_ram_that_was_said() {
    let trace = file(thousand_pages());
    let of =
        |memory: &[&str]| run(["replay", "--policy=extent=page", trace.path().to_str().unwrap()].iter().chain(memory));
    let (guess, said) = (of(&[]), of(&["--memory", "16m"]));
    let table = Table::read(stdout_of(&said));
    let cell = |heading| table.cell("extent=page", heading);
    // 1,001 pages are 3.9 MiB; 1,000.25 of them are 3.9 MiB, too.
    assert_eq!([cell("peak pinned"), cell("mean pinned"), cell("of RAM")], ["3.9 MiB", "3.9 MiB", "24.4 %, 24.4 %"]);
    assert_eq!([cell("pin requests"), cell("of map calls")], ["2", "100 %"]);
    assert_eq!([cell("IOMMU calls"), cell("mappings at peak"), cell("of 65,535")], ["1,001", "1,001", "1.53 %"]);
    assert_eq!(table.cell("full pinning", "peak pinned"), "16.0 MiB");
    assert!(!said.stdout.contains("guess"), "{}", said.stdout);
    assert_eq!(Table::read(stdout_of(&guess)).cell("full pinning", "peak pinned"), "1.0 GiB");
    assert!(guess.stdout.contains("guess"), "{}", guess.stdout);
}

#[test]
fn the_table_says_what_was_wrong_with_the_trace() {
    let nothing_wrong = run(["replay", file(thousand_pages()).path().to_str().unwrap()]);
    for word in ["lost", "skipped", "before the trace began", "cut", "failed"] {
        assert!(!stdout_of(&nothing_wrong).contains(word), "{word}: {}", nothing_wrong.stdout);
    }
    let cut = "dma_addrs={0x1000} sizes={0x1000} phys_addrs={0x1000} ents=1/200 nents=1/200 [TRUNCATED]";
    let trace = [
        thousand_pages(),
        "CPU:0 [LOST 1234 EVENTS]\nno event\nno event\n".to_owned(),
        unmap(4_000_000, 0x7000, 8),
        unmap_sg(4_000_000, &[0x7000]),
        unmap_sg(4_000_000, &[0x8000]),
        event(4_000_000, "dma_map_sg", common::DEVICE, cut),
        map_sg(4_000_000, &[0x1000, 0x5000]),
    ];
    let wrong = run(["replay", file(trace.concat()).path().to_str().unwrap(), "--policy", "quota=1m"]);
    for note in [
        "1,234 events were lost",
        "2 lines were skipped",
        "3 unmaps were",
        "1 scatter lists are cut",
        "extent=run,quota=1m: 1 map calls failed",
    ] {
        assert!(stdout_of(&wrong).contains(note), "{note:?} is not in\n{}", wrong.stdout);
    }
}

#[test]
fn a_plot_has_a_line_and_a_label_for_each_policy() {
    let trace = file(thousand_pages());
    let folder = tempfile::tempdir().unwrap();
    let drawing = folder.path().join("pinned.svg");
    let policies = ["extent=page", "extent=aligned=64k", "unpin_policy=lru,unpin_interval=0.5"];
    let args = ["replay", "--plot", drawing.to_str().unwrap(), trace.path().to_str().unwrap()];
    let run = run(args.into_iter().chain(policies.iter().flat_map(|policy| ["--policy", policy])));
    assert_eq!(Table::read(stdout_of(&run)).rows.len(), 4, "the table is still there");

    let svg = std::fs::read_to_string(&drawing).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    let texts: Vec<_> = svg
        .split("<text")
        .skip(1)
        .filter_map(|text| text.split_once('>')?.1.split_once("</text>"))
        .map(|(text, _)| text.trim())
        .collect();
    for label in ["full pinning", "extent=page", "extent=aligned=64k", "extent=run,unpin_policy=lru,unpin_interval=0.5"]
    {
        assert_eq!(texts.iter().filter(|&&text| text == label).count(), 1, "{label} in {texts:?}");
    }
    // A line and its sample in the legend, each of a colour of its own.
    let colour = |line: &str| line.split_once("stroke=\"#").map(|(_, rest)| rest[..6].to_owned());
    let mut colours: Vec<_> =
        svg.split("<polyline").skip(1).filter_map(colour).filter(|colour| colour != "000000").collect();
    colours.sort_unstable();
    colours.dedup();
    assert_eq!(colours.len(), policies.len(), "{colours:?}");
}

#[test]
fn a_plot_that_cannot_be_written_is_one_line() {
    let trace = file(thousand_pages());
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("no/such/folder.svg");
    let run = run(["replay", trace.path().to_str().unwrap(), "--plot", nowhere.to_str().unwrap()]);
    assert_eq!((run.status.code(), run.stderr.lines().count()), (Some(1), 1), "{}", run.stderr);
    assert!(run.stderr.contains("no/such/folder.svg") && run.stderr.contains("No such file"), "{}", run.stderr);
}

#[test]
fn help_has_examples_and_every_key_of_a_policy() {
    let help = run(["replay", "--help"]);
    let text = stdout_of(&help);
    for part in
        ["Examples:", "coiommu replay ", "Usage:", "--policy", "--device", "--memory", "--plot", "--json", "Exit codes"]
    {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    let trace = file(thousand_pages());
    let shown = replay(trace.path(), &["extent=run"]).report().policies.remove(0).policy;
    for key in shown.split(',').filter_map(|pair| pair.split('=').next()) {
        assert!(text.contains(&format!("  {key}=")), "{key} is not in\n{text}");
    }
    let program = run(["--help"]);
    for subcommand in ["replay", "doctor", "serve", "ctl", "top", "completions", "man"] {
        assert!(stdout_of(&program).contains(subcommand), "{subcommand} is not in\n{}", program.stdout);
        assert!(stdout_of(&run([subcommand, "--help"])).contains("Example"), "{subcommand} has no example");
    }
    assert_eq!(stdout_of(&run(["--version"])), concat!("coiommu ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn shells_and_man_know_the_program() {
    for (shell, begins) in [("bash", "_coiommu()"), ("zsh", "#compdef coiommu"), ("fish", "")] {
        let script = run(["completions", shell]);
        let text = stdout_of(&script);
        assert!(text.starts_with(begins), "{shell}:\n{text}");
        for word in ["replay", "policy", "doctor", "qemu", "serve", "endpoint", "ctl", "unpin", "top", "interval"] {
            assert!(text.contains(word), "{word} is not in {shell}'s script:\n{text}");
        }
    }
    let program = run(["man"]);
    assert!(stdout_of(&program).contains(".TH coiommu 1"), "{}", program.stdout);
    let replay = run(["man", "replay"]);
    for part in [".TH coiommu-replay 1", "policy", "unpin_interval=SECONDS", "SIZE"] {
        assert!(stdout_of(&replay).contains(part), "{part:?} is not in\n{}", replay.stdout);
    }
    for (subcommand, part) in
        [("doctor", "Exit codes"), ("serve", "persist"), ("ctl", "Exit codes"), ("top", "interval")]
    {
        let page = run(["man", subcommand]);
        let text = stdout_of(&page);
        assert!(text.contains(&format!(".TH coiommu-{subcommand} 1")) && text.contains(part), "{subcommand}:\n{text}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let trace = file(thousand_pages());
    let trace = trace.path().to_str().unwrap();
    for args in [
        &["replay", trace][..],
        &["replay", "--json", trace],
        &["completions", "zsh"],
        &["man", "replay"],
        &["replay", "--help"],
    ] {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let output = coiommu(args).stdin(Stdio::null()).stdout(writer).output().unwrap();
        assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn a_disk_that_is_full_is_an_error() {
    let trace = file(thousand_pages());
    let trace = trace.path().to_str().unwrap();
    for args in [&["replay", trace][..], &["replay", "--json", trace], &["doctor"], &["completions", "zsh"], &["man"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = coiommu(args).stdin(Stdio::null()).stdout(full).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), stderr.lines().count()), (Some(1), 1), "{args:?}: {stderr}");
        assert!(stderr.contains("No space left"), "{args:?}: {stderr}");
    }
}

#[test]
fn progress_shows_on_terminals_only() {
    let (stdin, mut trace) = pipe().unwrap();
    let slow = std::thread::spawn(move || {
        trace.write_all(thousand_pages().as_bytes()).unwrap();
        // Longer than a terminal would be left without a sign of life.
        std::thread::sleep(Duration::from_secs(1));
    });
    let run = finish(coiommu(["replay", "-", "--policy", "extent=page"]).stdin(stdin));
    slow.join().unwrap();
    assert_eq!(Table::read(stdout_of(&run)).cell("extent=page", "pin requests"), "2");
}
