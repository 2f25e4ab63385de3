//! The guest's driver, built for the kernels that it is for; those kernels, and what else guests run.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::step;
use crate::vm::tree::SUITES;
use crate::vm::{Kernel, Tree};

/// The kernel of a series that the tree has headers of.
pub(super) fn kernel(tree: &Tree, series: &str) -> anyhow::Result<Kernel> {
    let version = tree.headers(series)?;
    Kernel::of_version(&version, &SUITES)
        .with_context(|| format!("Linux {version}, the headers' version (remove target/vm/trees for newer ones)"))
}

/// Runs those of the driver's tests that need no kernel.
pub(super) fn check(tree: &Tree) -> anyhow::Result<()> {
    let inside = "/build/check";
    copy_files(Path::new("linux-guest"), &tree.path(inside))?;
    copy_files(Path::new("linux-guest/tests"), &tree.path(&format!("{inside}/tests")))?;
    step::finish(tree.command("make").args(["-s", "-C", inside, "check"]), "make -C linux-guest check")
}

/// Builds the driver's module for a kernel, with warnings as errors.
pub(super) fn build_module(tree: &Tree, series: &str) -> anyhow::Result<PathBuf> {
    build_in(tree, series, "linux-guest", "coiommu.ko")
}

/// Builds a module of the driver's tests.
pub(super) fn build_test_module(tree: &Tree, series: &str, name: &str) -> anyhow::Result<PathBuf> {
    build_in(tree, series, "linux-guest/tests", name)
}

fn build_in(tree: &Tree, series: &str, from: &str, name: &str) -> anyhow::Result<PathBuf> {
    let version = tree.headers(series)?;
    let inside = format!("/build/{series}/{from}");
    let folder = tree.path(&inside);
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    copy_files(Path::new(from), &folder)?;
    let mut make = tree.command("make");
    make.args(["-s", "-C", &format!("/usr/src/linux-headers-{version}"), &format!("M={inside}")]);
    make.args(["W=1", "KCFLAGS=-Werror", "modules"]);
    step::finish(&mut make, &format!("make {name} for Linux {version}, warnings as errors"))?;
    Ok(folder.join(name))
}

/// Builds a program of the driver's tests, with all that it needs in it.
pub(super) fn build_test(tree: &Tree, name: &str) -> anyhow::Result<PathBuf> {
    let inside = "/build/tests";
    copy_files(Path::new("linux-guest/tests"), &tree.path(inside))?;
    let mut cc = tree.command("gcc");
    let program = format!("{inside}/{name}");
    cc.args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", &program, &format!("{program}.c")]);
    step::finish(&mut cc, &format!("gcc -static {name}.c"))?;
    Ok(tree.path(&program))
}

/// The files of a folder, not those of folders in it.
fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("no {} here", from.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
