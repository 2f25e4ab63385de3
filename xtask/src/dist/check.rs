//! Whether a package is what it should be. What a tool is wanting for is said, and is an error in CI.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail, ensure};

use super::{COMPLETIONS, Package, VERSION, cargo_home, has, said};
use crate::files::{files, write};
use crate::step;

/// The most that `systemd-analyze security` may find exposed of the unit, in tenths: 11 by systemd 252.
const EXPOSURE: u32 = 15;

/// Checks all of a package, which was made with this program.
pub(super) fn all(package: &Package, program: &Path) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir().context("cannot make a folder")?;
    let unpacked = unpack(package, scratch.path())?;
    let installed = unpacked.join("bin/coiommu");
    is_static(&installed)?;
    names_none_of(&installed, &[env::current_dir()?, cargo_home()?])?;
    runs(&installed)?;
    manual(&unpacked.join("share/man/man1"))?;
    completions(&unpacked)?;
    unit(&unpacked, scratch.path())?;
    is_reproducible(package, program)
}

/// Unpacks the archive, whose sum is the one beside it, and says where.
fn unpack(package: &Package, scratch: &Path) -> anyhow::Result<PathBuf> {
    let line = "sha256sum --check --strict SHA256SUMS";
    step::finish(step::command(line).current_dir(&package.folder), line)?;
    step::run(&format!("tar --extract --file {} --directory {}", package.archive().display(), scratch.display()))?;
    let unpacked = scratch.join(&package.name);
    ensure!(files(scratch)? == [unpacked.clone()], "the archive has more than one folder at its top");
    step::run(&format!("diff --recursive {} {}", package.stage_folder().display(), unpacked.display()))?;
    Ok(unpacked)
}

fn is_static(program: &Path) -> anyhow::Result<()> {
    let line = format!("readelf --wide --program-headers --dynamic {}", program.display());
    let headers = step::output(&line)?;
    ensure!(headers.contains("LOAD"), "`{line}` shows no program");
    for loader in ["INTERP", "(NEEDED)"] {
        ensure!(!headers.contains(loader), "{} is not static: `{line}` shows {loader}", program.display());
    }
    Ok(())
}

/// Paths of this machine in a program make it another elsewhere, and tell who built it.
fn names_none_of(program: &Path, paths: &[PathBuf]) -> anyhow::Result<()> {
    let bytes = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    for path in paths {
        let path = path.display().to_string();
        let found = bytes.windows(path.len()).any(|window| window == path.as_bytes());
        ensure!(!found, "{} has {path} in it", program.display());
    }
    Ok(())
}

fn runs(program: &Path) -> anyhow::Result<()> {
    let run = |arguments: &str| step::output(&format!("{} {arguments}", program.display()));
    let version = run("--version")?;
    ensure!(version.trim() == format!("coiommu {VERSION}"), "it says it is {version:?}");
    let help = run("serve --help")?;
    ensure!(help.contains("Usage: coiommu serve"), "`serve --help` says {help:?}");
    Ok(())
}

/// Every subcommand has a page, and pages are well formed.
fn manual(folder: &Path) -> anyhow::Result<()> {
    let pages = files(folder)?;
    let page = |name: &str| folder.join(format!("{name}.1"));
    for name in ["coiommu", "coiommu-serve", "coiommu-ctl-unpin"] {
        ensure!(pages.contains(&page(name)), "{name}(1) is missing");
    }
    for page in &pages {
        let page = page.display();
        // Below errors it is about style, which is a library's.
        let line = match (has("mandoc"), has("man")) {
            (true, _) => format!("mandoc -T lint -W error {page}"),
            (false, true) => format!("man --warnings --local-file --troff-device=utf8 --ditroff {page}"),
            (false, false) => return wanting("mandoc"),
        };
        let (ok, text) = said(&mut step::command(&line), &line)?;
        let complaint = text.lines().find(|line| line.contains("warning:") || line.contains("ERROR:"));
        ensure!(ok && complaint.is_none(), "{page}: {}", complaint.unwrap_or(&text));
    }
    Ok(())
}

fn completions(unpacked: &Path) -> anyhow::Result<()> {
    for (shell, path) in COMPLETIONS {
        let script = unpacked.join(path);
        if !has(shell) {
            eprintln!("{shell} is not there to read its completions");
            continue;
        }
        step::finish(Command::new(shell).arg("-n").arg(&script), &format!("{shell} -n {}", script.display()))?;
    }
    let script = unpacked.join(COMPLETIONS[0].1);
    let line = "source \"$0\" && complete -p coiommu";
    step::finish(Command::new("bash").args(["-c", line]).arg(&script), &format!("bash -c '{line}'"))
}

/// The unit's settings are known, and shut as much away as they should.
fn unit(unpacked: &Path, scratch: &Path) -> anyhow::Result<()> {
    if !has("systemd-analyze") {
        return wanting("systemd-analyze");
    }
    let template = unpacked.join("lib/systemd/system/coiommu-serve@.service");
    let text = fs::read_to_string(&template).with_context(|| format!("cannot read {}", template.display()))?;
    let program = unpacked.join("bin/coiommu");
    let unit = scratch.join("coiommu-serve@vm1.service");
    write(&unit, with_program(&text, &program)?)?;
    // Its manual is not where `man` looks.
    let line = format!("systemd-analyze verify --man=no {}", unit.display());
    let (ok, said_of_it) = said(&mut step::command(&line), &line)?;
    // Other units of this machine may be at fault.
    let complaints: Vec<_> = said_of_it.lines().filter(|line| line.contains("coiommu")).collect();
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    ensure!(ok, "`{line}` says: {said_of_it}");
    let line = format!("systemd-analyze security --no-pager --offline=true --threshold={EXPOSURE} {}", unit.display());
    let (ok, table) = said(&mut step::command(&line), &line)?;
    let overall = table.lines().last().unwrap_or_default();
    eprintln!("{overall}");
    ensure!(ok, "the unit is open more than {EXPOSURE} tenths: see `{line}`");
    Ok(())
}

/// The unit as it is where the program is at a place that systemd would not look at.
fn with_program(unit: &str, program: &Path) -> anyhow::Result<String> {
    const COMMAND: &str = "\nExecStart=coiommu ";
    ensure!(unit.matches(COMMAND).count() == 1, "the unit does not start `coiommu` just once");
    Ok(unit.replace(COMMAND, &format!("\nExecStart={} ", program.display())))
}

/// Made again, later, it is the same.
fn is_reproducible(package: &Package, program: &Path) -> anyhow::Result<()> {
    let before = fs::read(package.archive())?;
    package.stage(program)?;
    package.pack()?;
    ensure!(fs::read(package.archive())? == before, "packed again, {} is another", package.archive().display());
    Ok(())
}

/// In CI, what cannot be checked has failed.
fn wanting(tool: &str) -> anyhow::Result<()> {
    if env::var_os("CI").is_some_and(|ci| !ci.is_empty()) {
        bail!("{tool} is not there, so not all is checked");
    }
    eprintln!("{tool} is not there, so not all is checked");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_of_the_tree_starts_the_program_once() {
        let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist/coiommu-serve@.service");
        let unit = fs::read_to_string(unit).unwrap();
        let other = with_program(&unit, Path::new("/x/coiommu")).unwrap();
        assert!(other.contains("\nExecStart=/x/coiommu serve "));
        assert!(with_program(&other, Path::new("/x/coiommu")).is_err());
    }

    #[test]
    fn a_program_with_a_loader_is_not_static() {
        let shell = is_static(Path::new("/bin/sh")).unwrap_err().to_string();
        assert!(shell.contains("INTERP"), "{shell}");
    }

    #[test]
    fn paths_in_a_program_are_found() {
        let program = env::current_exe().unwrap();
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let nowhere = here.join(format!("no-such-{}", std::process::id()));
        names_none_of(&program, std::slice::from_ref(&nowhere)).unwrap();
        assert!(names_none_of(&program, &[nowhere, here.to_owned()]).is_err());
    }
}
