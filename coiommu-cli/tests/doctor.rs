//! `coiommu doctor` on the machine that the tests run on, whatever it can do.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::pipe;
use std::process::{Command, Stdio};

use common::{Run, coiommu, run};
use serde::Deserialize;
use tempfile::TempDir;

/// What `--json` prints: these keys and no others.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Report {
    result: String,
    checks: Vec<Check>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Check {
    check: String,
    device: Option<String>,
    result: String,
    seen: String,
    remedy: Option<String>,
    commands: Vec<String>,
}

impl Report {
    /// Of a run, whose exit code is the one that goes with it.
    #[track_caller]
    fn of(run: &Run) -> Self {
        let report: Self = serde_json::from_str(&run.stdout).unwrap();
        let results: BTreeSet<_> = report.checks.iter().map(|check| check.result.as_str()).collect();
        assert!(results.iter().all(|result| ["ok", "warning", "failed", "unknown"].contains(result)), "{results:?}");
        let (result, code) = match () {
            () if results.contains("failed") => ("failed", 1),
            () if results.len() > 1 || !results.contains("ok") => ("warning", 0),
            () => ("ok", 0),
        };
        assert_eq!(
            (report.result.as_str(), run.status.code(), run.stderr.as_str()),
            (result, Some(code), ""),
            "{report:?}"
        );
        for check in &report.checks {
            assert!(!check.seen.is_empty() && !check.seen.contains('\n'), "{check:?}");
            assert!(check.result != "ok" || check.remedy.is_none() && check.commands.is_empty(), "{check:?}");
            assert!(check.result != "warning" || check.remedy.is_some(), "{check:?}");
        }
        report
    }

    /// The names of the checks, each with the device that it is of.
    fn names(&self) -> Vec<(&str, Option<&str>)> {
        self.checks.iter().map(|check| (check.check.as_str(), check.device.as_deref())).collect()
    }

    #[track_caller]
    fn check(&self, name: &str) -> &Check {
        self.checks.iter().find(|check| check.check == name).unwrap()
    }
}

/// A program that answers as a QEMU of some version does, and with some command to whether it has `vfio-user-pci`.
fn qemu(version: &str, device: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qemu");
    let script = format!(
        r#"#!/bin/sh
case "$*" in
    --version) echo '{version}' ;;
    '-device vfio-user-pci,help') {device} ;;
    *) exit 2 ;;
esac
"#
    );
    // Not by this process: what another test starts meanwhile would have it open for a moment, and it could not be run.
    let write = ["-c", "printf %s \"$1\" > \"$2\" && chmod +x \"$2\"", "sh", &script];
    assert!(Command::new("sh").args(write).arg(&path).status().unwrap().success());
    folder
}

const HOST: [&str; 7] = ["kernel", "page-size", "iommu", "interrupts", "vfio", "devices", "memlock"];

#[test]
fn json_has_every_check_and_the_exit_code_goes_with_it() {
    let report = Report::of(&run(["doctor", "--json", "--no-qemu"]));
    let names: Vec<_> = HOST.into_iter().chain(["mappings"]).map(|name| (name, None)).collect();
    assert_eq!(report.names(), names);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(report.check("kernel").seen.split(':').next(), Some(format!("Linux {}", release.trim()).as_str()));

    let report = Report::of(&run(["doctor", "--json", "--no-qemu", "--memory", "4g"]));
    assert_eq!(report.names().last(), Some(&("pin-all", None)));
    assert!(report.check("pin-all").seen.contains("2,048 mappings of 2 MiB"));
}

#[test]
fn a_device_that_is_not_there_has_failed() {
    // No machine has so many buses.
    let report = Report::of(&run(["doctor", "--json", "--no-qemu", "--host", "ffff:ff:1f.7"]));
    let device = report.check("device");
    assert_eq!((device.device.as_deref(), device.result.as_str()), (Some("ffff:ff:1f.7"), "failed"));
    assert_eq!(device.seen, "there is no PCI device ffff:ff:1f.7");
    assert_eq!(report.result, "failed");
}

#[test]
fn qemu_has_to_speak_vfio_user() {
    let speaks = "echo 'vfio-user-pci options:'";
    // As QEMU does, which exits with 0 then.
    let does_not = "echo \"qemu: -device vfio-user-pci,help: Device 'vfio-user-pci' not found\" >&2";
    for (version, device, result, seen) in [
        ("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)", speaks, "ok", "QEMU 11.1.3, with vfio-user-pci"),
        ("QEMU emulator version 10.1.0", does_not, "failed", "QEMU 10.1.0, built without vfio-user-pci"),
        ("QEMU emulator version 10.0.2", speaks, "failed", "QEMU 10.0.2, which does not speak vfio-user"),
        ("cat (GNU coreutils) 9.1", speaks, "failed", "is no QEMU"),
    ] {
        let folder = qemu(version, device);
        let path = folder.path().join("qemu");
        let report = Report::of(&run(["doctor", "--json", "--qemu", path.to_str().unwrap()]));
        let check = report.checks.last().unwrap();
        assert_eq!((check.check.as_str(), check.result.as_str()), ("qemu", result));
        assert!(check.seen.contains(seen), "{check:?}");
        assert!(check.remedy.as_deref().is_none_or(|remedy| remedy.contains("10.1")), "{check:?}");
    }
    let report = Report::of(&run(["doctor", "--json", "--qemu", "/no/such/qemu"]));
    let check = report.check("qemu");
    assert_eq!((check.result.as_str(), check.seen.as_str()), ("failed", "there is no /no/such/qemu"));
}

#[test]
fn people_get_a_line_a_check_and_a_sum() {
    let args = ["doctor", "--no-qemu", "--memory", "1g"];
    let (people, report) = (run(args), Report::of(&run(args.iter().copied().chain(["--json"]))));
    assert_eq!((people.status.code().is_some(), people.stderr.as_str()), (true, ""));
    let lines: Vec<_> = people.stdout.lines().filter(|line| !line.starts_with(' ')).collect();
    let (sum, checks) = lines.split_last().unwrap();
    assert_eq!(checks.len(), report.checks.len());
    for (line, check) in checks.iter().zip(&report.checks) {
        assert!(line.starts_with(&check.result) && line.contains(&check.check), "{line}: {check:?}");
    }
    let ok = report.checks.iter().filter(|check| check.result == "ok").count();
    assert!(sum.starts_with(&format!("{ok} ok")), "{sum}");
    assert_eq!(sum.ends_with("cannot do it yet"), report.result == "failed", "{sum}");
    assert!(!people.stdout.contains('\u{1b}'), "colours are for terminals");
}

#[test]
fn a_reader_that_goes_away_does_not_mend_the_host() {
    let args = ["doctor", "--no-qemu", "--host", "ffff:ff:1f.7"];
    let (reader, writer) = pipe().unwrap();
    drop(reader);
    let output = coiommu(args).stdin(Stdio::null()).stdout(writer).output().unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(1), Vec::new()));
}

#[test]
fn wrong_arguments_are_told_from_a_host_that_cannot() {
    for args in [
        &["--host", "3"][..],
        &["--host", "../x"],
        &["--memory", "0"],
        &["--memory", "4 GB"],
        &["--policy", "quota=1g"],
        &["--memory", "1g", "--policy", "extend=run"],
        &["--no-qemu", "--qemu", "qemu"],
        &["0000:03:00.0"],
    ] {
        let run = run(["doctor"].iter().chain(args));
        assert_eq!((run.status.code(), run.stdout.as_str()), (Some(2), ""), "{args:?}: {}", run.stderr);
    }
}
