//! Another Debian release in a folder: the emulator that speaks vfio-user, and compilers and headers of its kernels.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

use super::packages::Packages;
use super::{FOLDER, folder};
use crate::step;

/// The release, which has the emulator and a new kernel in its backports, and those before, for their kernels.
const RELEASE: &str = "trixie";
pub(crate) const SUITES: [&str; 4] = ["trixie", "trixie-backports", "bookworm", "bookworm-backports"];
/// What is in it, besides headers and compilers of kernels.
const PROGRAMS: [&str; 5] = ["gcc", "libc6-dev", "make", "perl", "qemu-system-x86"];
/// The package that names a kernel's headers.
const HEADERS: &str = "linux-headers-amd64";

/// The kernels that modules are built for, oldest first: each the newest that the suites have.
pub(crate) const KERNELS: [&str; 3] = ["6.1", "6.12", "7.3"];

/// A tree, as if it were installed.
#[derive(Debug)]
pub(crate) struct Tree {
    root: PathBuf,
}

impl Tree {
    /// The one that was made before, or a new one: that takes some minutes, and 2 GB.
    pub(crate) fn find() -> anyhow::Result<Self> {
        // One that has other programs was made for an older state of this.
        let name = [&[RELEASE], &PROGRAMS[..], &KERNELS[..]].concat().join("-");
        let root = Path::new(FOLDER).join("trees").join(name);
        ensure!(is_root()?, "to make a tree of {RELEASE}, and to build in it: be root");
        if !root.is_dir() {
            make(&root)?;
        }
        Ok(Self { root: root.canonicalize()? })
    }

    /// Where something is that has this path in the tree.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.root.join(inside.trim_start_matches('/'))
    }

    /// The version of a kernel whose headers are there, by how it begins.
    pub(crate) fn headers(&self, kernel: &str) -> anyhow::Result<String> {
        let entries = fs::read_dir(self.path("usr/src")).context("the tree has no headers")?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let versions = names.filter_map(|name| name.strip_prefix("linux-headers-").map(ToOwned::to_owned));
        let is = |version: &String| version.starts_with(&format!("{kernel}.")) && version.ends_with("-amd64");
        versions.filter(is).max().with_context(|| format!("the tree has no headers of Linux {kernel}"))
    }

    /// Where the libraries are that a program of the tree is linked with.
    pub(crate) fn libraries(&self, program: &str) -> anyhow::Result<Vec<PathBuf>> {
        let list = step::output_of(self.command("ldd").arg(program), &format!("ldd {program}"))?;
        let paths = list.lines().filter_map(|line| line.split_once("=> /")?.1.split_whitespace().next());
        Ok(paths.map(|path| self.path(path)).collect())
    }

    /// A program of the tree, run as if there were nothing else; what it is shown of processes is unmounted with its end.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", r#"mount -t proc proc "$0/proc" && exec chroot "$0" "$@""#]);
        command.arg(&self.root).arg(program);
        command
    }
}

/// By what the system says of this process.
fn is_root() -> anyhow::Result<bool> {
    Ok(step::output("id -u")?.trim() == "0")
}

/// Makes a tree. What is half done is never found under its name.
fn make(root: &Path) -> anyhow::Result<()> {
    let packages = Packages::of_suites(&SUITES)?;
    let mut include: Vec<_> = PROGRAMS.map(ToOwned::to_owned).into();
    for kernel in KERNELS {
        let version = packages.newest(HEADERS, kernel)?;
        let depends = packages.depends(&format!("{HEADERS}={version}"))?;
        let headers = depends.into_iter().find(|name| name.starts_with("linux-headers-"));
        include.push(headers.with_context(|| format!("{HEADERS} {version} depends on no headers"))?);
    }
    let scratch = folder::scratch()?;
    let made = scratch.path().join("tree");
    let mut command = Command::new("mmdebstrap");
    command.args(["--variant=minbase", "--mode=root", "--aptopt=APT::Install-Recommends \"false\""]);
    // The emulator's parts have to be of one version.
    command.arg(format!("--aptopt=APT::Default-Release \"{RELEASE}-backports\""));
    command.arg(format!("--include={}", include.join(",")));
    command.arg(RELEASE).arg(&made).arg(packages.sources());
    eprintln!("making a tree of {RELEASE}: this takes some minutes, once");
    step::finish(&mut command, &format!("mmdebstrap --include={} {RELEASE}", include.join(",")))?;
    if let Some(parent) = root.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::rename(&made, root).with_context(|| format!("cannot make {}", root.display()))
}
