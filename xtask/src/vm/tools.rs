//! Programs of this machine, and the Debian packages to install where one is missing.

use std::env;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

/// A program, and the package that has it.
type Tool = (&'static str, &'static str);

/// What every VM takes, besides the emulator.
const FOR_VMS: &[Tool] = &[
    ("apt-get", "apt"),
    ("cpio", "cpio"),
    ("depmod", "kmod"),
    ("dpkg-deb", "dpkg"),
    ("gzip", "gzip"),
    ("modprobe", "kmod"),
    ("setpriv", "util-linux"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
];

/// The emulator, unless another is named.
pub(crate) const QEMU: Tool = ("qemu-system-x86_64", "qemu-system-x86");

/// Whether all that a VM takes is there: the error names every package that is missing. The emulator is a program of
/// the path, or of a folder.
pub(crate) fn require_for_vms(qemu: &Path) -> anyhow::Result<()> {
    if qemu == Path::new(QEMU.0) {
        return require(&[FOR_VMS, &[QEMU]].concat());
    }
    require(FOR_VMS)?;
    let found = Command::new(qemu).arg("--version").stdout(Stdio::null()).status();
    found.map(drop).with_context(|| format!("cannot run {}", qemu.display()))
}

/// Whether all is there that a VM takes whose emulator comes from a tree, if no other is named.
pub(crate) fn require_for_trees() -> anyhow::Result<()> {
    require(&[FOR_VMS, &[("mmdebstrap", "mmdebstrap"), ("unshare", "util-linux")]].concat())
}

fn require(tools: &[Tool]) -> anyhow::Result<()> {
    let missing = |path: &str| {
        let folders: Vec<_> = env::split_paths(path).collect();
        let is_missing = |tool: &str| !folders.iter().any(|folder| folder.join(tool).is_file());
        let mut packages: Vec<_> = tools.iter().filter(|(tool, _)| is_missing(tool)).map(|&(_, has)| has).collect();
        packages.sort_unstable();
        packages.dedup();
        packages
    };
    // What manages a system is not in everybody's path.
    let path = env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let packages = missing(&path);
    ensure!(packages.is_empty(), "missing packages: apt-get install {}", packages.join(" "));
    Ok(())
}

/// The path of a program that may be in nobody's path.
pub(crate) fn of_system(tool: &str) -> String {
    let found = ["/usr/sbin", "/sbin"].into_iter().map(|folder| format!("{folder}/{tool}"));
    found.into_iter().find(|path| Path::new(path).is_file()).unwrap_or_else(|| tool.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_by_its_package() {
        require(&[("sh", "dash"), ("ls", "coreutils")]).unwrap();
        let error = require(&[("sh", "dash"), ("no-such-b", "pack-b"), ("no-such-a", "pack-a"), ("no-2", "pack-b")]);
        assert_eq!(error.unwrap_err().to_string(), "missing packages: apt-get install pack-a pack-b");
    }

    #[test]
    fn an_emulator_that_is_named_is_tried() {
        let error = require_for_vms(Path::new("/no/such/qemu")).unwrap_err().to_string();
        assert!(error == "cannot run /no/such/qemu" || error.starts_with("missing packages: "), "{error}");
    }
}
