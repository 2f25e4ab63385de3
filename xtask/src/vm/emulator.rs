//! QEMU: which one, and how it is started.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use super::process::Process;
use super::tools::QEMU;
use super::tree::Tree;
use crate::step;

/// The oldest that speaks vfio-user.
const VFIO_USER: (u32, u32) = (10, 1);

/// An emulator.
#[derive(Clone, Debug)]
pub(crate) struct Emulator {
    program: PathBuf,
    /// What goes before all other arguments.
    arguments: Vec<String>,
    /// Where its modules are, if not where it was built for.
    modules: Option<PathBuf>,
}

impl Emulator {
    /// The one of this name or path.
    pub(crate) fn named(program: &Path) -> Self {
        Self { program: program.to_owned(), arguments: Vec::new(), modules: None }
    }

    /// One that speaks vfio-user: the one that is named; if that is only the usual one, and is too old or not there, that of
    /// a tree.
    pub(crate) fn with_vfio_user(program: &Path) -> anyhow::Result<Self> {
        let named = Self::named(program);
        match named.version() {
            Ok(version) if version >= VFIO_USER => Ok(named),
            _ if program == Path::new(QEMU.0) => Ok(Self::of_tree(&Tree::find()?)),
            Ok((major, minor)) => bail!("{} is QEMU {major}.{minor}: vfio-user takes 10.1", program.display()),
            Err(error) => Err(error),
        }
    }

    /// The one of a tree, with the tree's libraries, but on this machine's files.
    fn of_tree(tree: &Tree) -> Self {
        const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
        let text = |path: &str| tree.path(path).display().to_string();
        let arguments = ["--library-path".to_owned(), text(LIBRARIES), text("usr/bin/qemu-system-x86_64")];
        let firmware = ["usr/share/qemu", "usr/share/seabios"].iter().flat_map(|path| ["-L".to_owned(), text(path)]);
        Self {
            program: tree.path("usr/lib64/ld-linux-x86-64.so.2"),
            arguments: arguments.into_iter().chain(firmware).collect(),
            modules: Some(tree.path(LIBRARIES).join("qemu")),
        }
    }

    /// Puts the one of a tree into a root file system, as `/qemu/qemu-system-x86_64`, with its libraries in `/qemu/lib` and its
    /// firmware in `/qemu/share`.
    pub(crate) fn install(tree: &Tree, root: &Path) -> anyhow::Result<()> {
        let program = "/usr/bin/qemu-system-x86_64";
        let firmware = ["share/seabios/bios-256k.bin", "share/qemu/kvmvapic.bin", "share/qemu/linuxboot_dma.bin"];
        let firmware = [&firmware[..], &["share/qemu/pvh.bin"]].concat();
        let firmware = firmware.into_iter().map(|path| ("qemu/share", tree.path("usr").join(path)));
        let libraries = tree.libraries(program)?.into_iter().map(|path| ("qemu/lib", path));
        let others = [("qemu", tree.path(program)), ("qemu/lib", tree.path("usr/lib64/ld-linux-x86-64.so.2"))];
        for (folder, file) in others.into_iter().chain(libraries).chain(firmware) {
            let folder = root.join(folder);
            fs::create_dir_all(&folder)?;
            let name = file.file_name().context("a file without a name")?;
            fs::copy(&file, folder.join(name)).with_context(|| format!("cannot copy {}", file.display()))?;
        }
        Ok(())
    }

    /// It, to be given its machine. It ends when we do.
    pub(crate) fn command(&self) -> Command {
        let mut command = Process::command(&self.program);
        command.args(&self.arguments);
        command.envs(self.modules.iter().map(|modules| ("QEMU_MODULE_DIR", modules)));
        command
    }

    fn version(&self) -> anyhow::Result<(u32, u32)> {
        let text = step::output_of(self.command().arg("-version"), "qemu -version")?;
        parse_version(&text).with_context(|| format!("{} tells no version", self.program.display()))
    }
}

/// Of `QEMU emulator version 11.1.3 (Debian …)`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_once(" version ")?.1.split(['.', ' ']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(parse_version("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\n"), Some((11, 1)));
        assert_eq!(parse_version("QEMU emulator version 7.2.17 (Debian 1:7.2)\n"), Some((7, 2)));
        assert_eq!(parse_version("what is this"), None);
    }
}
