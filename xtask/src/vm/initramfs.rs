//! The file system of a VM: it has what one job takes, and nothing else.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use tempfile::TempDir;

use super::packages::Packages;
use super::{FOLDER, Kernel, folder};

/// What a VM is heard through: it loads these first.
const VIRTIO: [&str; 2] = ["virtio_pci", "virtio_console"];

/// A root file system in the making.
pub(crate) struct Initramfs {
    root: TempDir,
}

impl Initramfs {
    /// With busybox, some modules to load at the start, in this order, and a job: a shell script.
    pub(crate) fn new(kernel: &Kernel, modules: &[&str], job: &str) -> anyhow::Result<Self> {
        let root = folder::scratch()?;
        for folder in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
            fs::create_dir(root.path().join(folder))?;
        }
        let made = Self { root };
        made.add(&busybox()?, "bin/busybox")?;
        kernel.install_modules(&[&VIRTIO, modules].concat(), made.root.path())?;
        fs::write(
            made.root.path().join("etc/modules"),
            modules.iter().map(|name| format!("{name}\n")).collect::<String>(),
        )?;
        fs::write(made.root.path().join("job"), job)?;
        let init = made.root.path().join("init");
        fs::write(&init, include_str!("init.sh"))?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        Ok(made)
    }

    /// The folder that it is made in.
    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    /// Puts a program into it; `name` is its path, without a slash before.
    pub(crate) fn add(&self, program: &Path, name: &str) -> anyhow::Result<()> {
        let to = self.root.path().join(name);
        fs::copy(program, &to).with_context(|| format!("cannot copy {}", program.display()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).context("cannot make it a program")
    }

    /// Writes it to a file that a kernel can start from.
    pub(crate) fn write(self, file: &Path) -> anyhow::Result<()> {
        let root = self.root.path();
        let mut names = Vec::new();
        list(root, Path::new(""), &mut names)?;
        let mut cpio = Command::new("cpio");
        cpio.args(["--create", "--format=newc", "--quiet", "--null", "--owner=0:0"]).current_dir(root);
        let mut child =
            cpio.stdin(Stdio::piped()).stdout(fs::File::create(file)?).spawn().context("cannot run cpio")?;
        let mut input = child.stdin.take().context("cpio has no input")?;
        for name in names {
            input.write_all(name.as_os_str().as_encoded_bytes())?;
            input.write_all(&[0])?;
        }
        drop(input);
        let status = child.wait()?;
        ensure!(status.success(), "cpio: {status}");
        Ok(())
    }
}

/// All that is in a folder, each folder before what is in it.
fn list(root: &Path, folder: &Path, names: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in fs::read_dir(root.join(folder))? {
        let entry = entry?;
        let name = folder.join(entry.file_name());
        names.push(name.clone());
        if entry.file_type()?.is_dir() {
            list(root, &name, names)?;
        }
    }
    Ok(())
}

/// A busybox that needs no library.
fn busybox() -> anyhow::Result<PathBuf> {
    let root = Path::new(FOLDER).join("busybox");
    if !root.is_dir() {
        Packages::update()?.unpack(&["busybox-static".to_owned()], &root)?;
    }
    // Debian 13 has it under usr.
    let found = ["bin/busybox", "usr/bin/busybox"].map(|path| root.join(path)).into_iter().find(|path| path.is_file());
    found.with_context(|| format!("no busybox in {}", root.display()))
}
