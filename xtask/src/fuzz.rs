//! `cargo xtask fuzz`: fuzz a target for a while, from its corpus.
//!
//! A target is a program in the `fuzz` folder of the crate that it is for, with a corpus beside it. It is built with
//! cargo-fuzz, for its flags, and run on a copy of the corpus, so the tree stays as it is.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::builder::PossibleValuesParser;

use crate::files::{files, make_empty};
use crate::tools::Tool;
use crate::{nightly, step};

/// Fuzz a target (or all), from its corpus; fails if there is a finding
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The target
    #[arg(required_unless_present_any = ["all", "list"], value_parser = PossibleValuesParser::new(TARGETS.map(|t| t.name)))]
    target: Option<String>,
    /// Every target, one after the other
    #[arg(long, conflicts_with = "target")]
    all: bool,
    /// How long each is fuzzed
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// List the targets
    #[arg(long)]
    list: bool,
}

const CARGO_FUZZ: Tool = Tool { name: "cargo-fuzz", version: "0.13.2", options: "" };
/// Where targets are built and run; corpora in the tree are read only.
const WORK: &str = "target/fuzz";

/// A target, and what an input of it may cost.
#[derive(Clone, Copy)]
struct Target {
    name: &'static str,
    /// The folder of the crate it is for.
    folder: &'static str,
    about: &'static str,
    /// The longest input, in bytes.
    max_len: u32,
    /// The most memory, all of the sanitizer's included, and the largest allocation.
    memory_mib: u32,
    allocation_mib: u32,
}

const TARGETS: [Target; 6] = [
    Target {
        name: "walk",
        folder: "coiommu-dtt",
        about: "tables made of anything, which change while they are walked",
        max_len: 1024,
        memory_mib: 512,
        allocation_mib: 16,
    },
    Target {
        name: "access",
        folder: "coiommu-pci",
        about: "any accesses to the device's config space and BARs",
        max_len: 1024,
        memory_mib: 512,
        allocation_mib: 16,
    },
    Target {
        name: "guest",
        folder: "coiommu-pci",
        about: "a whole device, and a guest that means harm",
        max_len: 1024,
        memory_mib: 512,
        allocation_mib: 16,
    },
    Target {
        name: "request",
        folder: "coiommu-pin",
        about: "the whole pinner, fed by a guest that writes anything",
        max_len: 1024,
        memory_mib: 512,
        allocation_mib: 16,
    },
    Target {
        name: "wire",
        folder: "coiommu-vfio-user",
        about: "any stream of a vfio-user client, in any pieces",
        max_len: 4096,
        memory_mib: 512,
        allocation_mib: 4,
    },
    Target {
        name: "trace",
        folder: "coiommu-cli",
        about: "the trace reader, on any bytes",
        max_len: 4096,
        // A frame of zstd may ask for a window of 128 MiB.
        memory_mib: 1024,
        allocation_mib: 160,
    },
];

/// Longer than any input takes on a busy machine.
const SECONDS_AN_INPUT: u32 = 30;

/// Fuzzes the targets asked for. The exit code is 1 if one failed.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.list {
        for target in TARGETS {
            println!("{:8} {} ({})", target.name, target.about, target.folder);
        }
        return Ok(ExitCode::SUCCESS);
    }
    nightly::install(&[])?;
    let cargo_fuzz = CARGO_FUZZ.program()?;
    let targets: Vec<_> = TARGETS.into_iter().filter(|t| args.all || args.target.as_deref() == Some(t.name)).collect();
    let ok = step::run_all(&targets, |target| target.name.to_owned(), |target| target.fuzz(&cargo_fuzz, args.seconds));
    Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Target {
    fn fuzz(self, cargo_fuzz: &Path, seconds: u32) -> anyhow::Result<()> {
        let program = self.build(cargo_fuzz)?;
        let corpus = self.copy_corpus()?;
        let findings = format!("{WORK}/findings/{}/", self.name);
        make_empty(Path::new(&findings))?;
        let log = format!("{WORK}/{}.log", self.name);
        eprintln!("$ {} (for {seconds} s; log: {log})", program.display());
        let status = Command::new(&program)
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-timeout={SECONDS_AN_INPUT}"))
            .arg(format!("-max_len={}", self.max_len))
            .arg(format!("-rss_limit_mb={}", self.memory_mib))
            .arg(format!("-malloc_limit_mb={}", self.allocation_mib))
            .arg(format!("-artifact_prefix={findings}"))
            .arg("-print_final_stats=1")
            .arg(&corpus)
            // As cargo-fuzz sets it, for rustc makes two of some constants; and a thread that is just ending is no leak.
            .env("ASAN_OPTIONS", "detect_odr_violation=0:detect_leaks=0")
            // A backtrace takes more memory than an input may; the fuzzer gives its own.
            .env("RUST_BACKTRACE", "0")
            .stdout(File::create(&log).with_context(|| format!("cannot write {log}"))?)
            .stderr(File::options().append(true).open(&log).with_context(|| format!("cannot write {log}"))?)
            .status()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let text = String::from_utf8_lossy(&fs::read(&log).with_context(|| format!("cannot read {log}"))?).into_owned();
        let figures = Figures::read(&text);
        eprintln!("{}", figures.line(Duration::from_secs(seconds.into())));
        let found = files(Path::new(&findings))?;
        if status.success() && found.is_empty() {
            ensure!(figures.executions > 0, "no input was run; see {log}");
            return Ok(());
        }
        eprintln!("{}", excerpt(&text));
        for finding in &found {
            let finding = finding.display();
            eprintln!("finding:    {finding}");
            eprintln!("reproduce:  {} {finding}", program.display());
            eprintln!("on stable:  cargo run -p {}-fuzz --bin {} -- {finding}", self.folder, self.name);
        }
        bail!("{} findings, {status}; see {log}", found.len())
    }

    fn build(self, cargo_fuzz: &Path) -> anyhow::Result<PathBuf> {
        let Self { name, folder, .. } = self;
        let line = format!("{} build --fuzz-dir {folder}/fuzz --target-dir {WORK} {name}", cargo_fuzz.display());
        // Coverage counts; links that take minutes do not help it.
        step::finish(nightly::command(&line).env("CARGO_PROFILE_RELEASE_LTO", "off"), &line)
            .context("is there a C++ compiler? libFuzzer needs one")?;
        Ok(Path::new(WORK).join(nightly::host()?).join("release").join(name))
    }

    /// A copy of the corpus, which the fuzzer adds to.
    fn copy_corpus(self) -> anyhow::Result<PathBuf> {
        let from = PathBuf::from(format!("{}/fuzz/corpus/{}", self.folder, self.name));
        let to = PathBuf::from(format!("{WORK}/corpus/{}", self.name));
        make_empty(&to)?;
        let inputs = files(&from)?;
        ensure!(!inputs.is_empty(), "{} has no inputs", from.display());
        for input in inputs {
            let name = input.file_name().context("a file without a name")?;
            fs::copy(&input, to.join(name)).with_context(|| format!("cannot copy {}", input.display()))?;
        }
        Ok(to)
    }
}

/// What libFuzzer says of a run.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    executions: u64,
    /// Instrumented edges that were reached.
    edges: u64,
    /// Inputs that reached something new.
    inputs: u64,
    peak_mib: u64,
}

impl Figures {
    fn read(log: &str) -> Self {
        let mut figures = Self::default();
        for line in log.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            for pair in words.windows(2) {
                // Of `corp: 344/12128b` the first number.
                let number = pair[1].split('/').next().and_then(|number| number.parse().ok());
                match (pair[0], number) {
                    ("stat::number_of_executed_units:", Some(executions)) => figures.executions = executions,
                    ("stat::peak_rss_mb:", Some(mib)) => figures.peak_mib = mib,
                    ("cov:", Some(edges)) => figures.edges = edges,
                    ("corp:", Some(inputs)) => figures.inputs = inputs,
                    _ => {}
                }
            }
        }
        figures
    }

    fn line(&self, time: Duration) -> String {
        let Self { executions, edges, inputs, peak_mib } = self;
        let rate = executions / time.as_secs().max(1);
        format!("{executions} executions ({rate}/s), {edges} edges, {inputs} inputs kept, {peak_mib} MiB at most")
    }
}

/// What a log says of a finding, without the fuzzer's own frames and dictionary: from the first line that tells what
/// happened; its end if none does.
fn excerpt(log: &str) -> String {
    const LINES: usize = 40;
    let tells = |line: &&str| ["panicked at", "ERROR:"].iter().any(|mark| line.contains(mark));
    let lines: Vec<_> = log.lines().skip_while(|line| !tells(line)).take(LINES).collect();
    if !lines.is_empty() {
        return lines.join("\n");
    }
    let all: Vec<_> = log.lines().collect();
    all[all.len().saturating_sub(LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_the_last_that_the_fuzzer_gave() {
        let log = "#2 INITED cov: 18 ft: 19 corp: 1/1b exec/s: 0 rss: 29Mb\n\
                   #84714\tDONE   cov: 678 ft: 1778 corp: 344/12128b lim: 233 exec/s: 5294 rss: 289Mb\n\
                   stat::number_of_executed_units: 84714\nstat::peak_rss_mb:              289\n";
        let figures = Figures::read(log);
        assert_eq!(figures, Figures { executions: 84714, edges: 678, inputs: 344, peak_mib: 289 });
        assert_eq!(
            figures.line(Duration::from_secs(16)),
            "84714 executions (5294/s), 678 edges, 344 inputs kept, 289 MiB at most"
        );
        assert_eq!(Figures::read("nothing"), Figures::default());
    }

    #[test]
    fn an_excerpt_begins_where_it_went_wrong() {
        let log = "INFO: x\n#1 NEW\nthread '<unnamed>' panicked at a.rs:1:1:\nno\n";
        assert_eq!(excerpt(log), "thread '<unnamed>' panicked at a.rs:1:1:\nno");
        assert_eq!(excerpt("one\ntwo"), "one\ntwo");
    }

    #[test]
    fn every_target_has_its_folder_and_a_small_corpus() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for target in TARGETS {
            let fuzz = root.join(target.folder).join("fuzz");
            assert!(fuzz.join(format!("fuzz_targets/{}.rs", target.name)).is_file(), "{}", target.name);
            let corpus = files(&fuzz.join("corpus").join(target.name)).unwrap();
            let bytes: u64 = corpus.iter().map(|file| file.metadata().unwrap().len()).sum();
            assert!(!corpus.is_empty() && bytes < 100 << 10, "{}: {bytes} bytes", target.name);
        }
    }
}
