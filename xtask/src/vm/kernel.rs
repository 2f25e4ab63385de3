//! A kernel with its modules.

use std::ffi::OsStr;
use std::fs;
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail, ensure};

use super::packages::{self, Packages};
use super::{FOLDER, tools};
use crate::step;

/// The package that names Debian's kernel.
const PACKAGE: &str = "linux-image-amd64";
/// The oldest that has the trace events of DMA.
const OLDEST: (u32, u32) = (6, 12);

/// A kernel with its modules, in a folder as Debian's packages fill it.
#[derive(Debug)]
pub(crate) struct Kernel {
    root: PathBuf,
    version: String,
}

impl Kernel {
    /// The kernel that is named, in a package file or a folder; otherwise the one that was fetched before, or Debian's.
    pub(crate) fn find(named: Option<&Path>) -> anyhow::Result<Self> {
        let kernel = match named {
            Some(file) if file.extension() == Some(OsStr::new("deb")) => {
                Self::in_folder(unpacked(file, &Path::new(FOLDER).join("named"), |file, to| {
                    packages::unpack(&[file.to_owned()], to)
                })?)
            }
            Some(folder) => Self::in_folder(folder.to_owned()),
            None => Self::in_folder(fetched()?),
        }?;
        kernel.completed()
    }

    /// The kernel of a version, as `7.3.4-amd64`, that Debian has in some suites; or the one that was fetched before.
    pub(crate) fn of_version(version: &str, suites: &[&str]) -> anyhow::Result<Self> {
        let root = Path::new(FOLDER).join("versions").join(version);
        if !root.is_dir() {
            let packages = Packages::of_suites(suites)?;
            let image = format!("linux-image-{version}");
            // Newer ones are in several packages.
            let parts = packages.depends(&image)?;
            let prefixes = ["linux-base-", "linux-binary-", "linux-modules-"];
            let is_part = |name: &String| prefixes.iter().any(|prefix| name.starts_with(prefix));
            let all = parts.into_iter().filter(is_part).chain([image]);
            packages.unpack(&all.collect::<Vec<_>>(), &root)?;
        }
        Self::in_folder(root)?.completed()
    }

    fn completed(self) -> anyhow::Result<Self> {
        let kernel = self;
        // A package comes without; on a machine where it is installed, they are there.
        if !kernel.modules().join("modules.dep").is_file() {
            kernel.depmod(&kernel.root)?;
        }
        Ok(kernel)
    }

    fn in_folder(root: PathBuf) -> anyhow::Result<Self> {
        let root = root.canonicalize().with_context(|| format!("no kernel in {}", root.display()))?;
        link_modules(&root)?;
        let modules = fs::read_dir(root.join("lib/modules"));
        let names = modules.into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut versions: Vec<_> = names.filter(|version| image(&root, version).is_file()).collect();
        match versions.len() {
            1 => Ok(Self { version: versions.remove(0), root }),
            0 => bail!("{}: no boot/vmlinuz-VERSION with a lib/modules/VERSION", root.display()),
            _ => bail!("{}: which one? {}; name a package file", root.display(), versions.join(", ")),
        }
    }

    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// The file to boot.
    pub(crate) fn image(&self) -> PathBuf {
        image(&self.root, &self.version)
    }

    /// The kernel itself, which starts sooner than the image that unpacks it, in a file of this name in the folder of VMs.
    /// An emulator boots it if it can be booted by PVH, as Debian's can.
    pub(crate) fn unpack_image(&self, name: &str) -> anyhow::Result<PathBuf> {
        let image = self.image();
        let bytes = fs::read(&image).with_context(|| format!("cannot read {}", image.display()))?;
        let packed = payload(&bytes).with_context(|| format!("{} is no bzImage", image.display()))?;
        let file = Path::new(FOLDER).join(name);
        unpack(packed, &file).with_context(|| format!("cannot unpack {}", image.display()))?;
        Ok(file)
    }

    /// The folder of its modules.
    fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.version)
    }

    /// Copies some modules into a root file system, and those that they need.
    pub(crate) fn install_modules(&self, names: &[&str], to: &Path) -> anyhow::Result<()> {
        let modules = self.modules().canonicalize()?;
        let target = to.join("lib/modules").join(&self.version);
        fs::create_dir_all(&target)?;
        link_modules(to)?;
        for list in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
            fs::copy(modules.join(list), target.join(list)).with_context(|| format!("no {list} of this kernel"))?;
        }
        for name in names {
            for file in self.closure(name)? {
                let within = file.strip_prefix(&modules).with_context(|| format!("{} is elsewhere", file.display()))?;
                install_module(&file, &target.join(within))?;
            }
        }
        self.depmod(to)
    }

    /// Whether it has a module of that name, or that built in.
    pub(crate) fn knows(&self, name: &str) -> bool {
        self.closure(name).is_ok()
    }

    /// The files of a module and of those that it needs; none if it is built in.
    fn closure(&self, name: &str) -> anyhow::Result<Vec<PathBuf>> {
        let mut command = Command::new(tools::of_system("modprobe"));
        command.arg("-d").arg(&self.root).args(["-S", &self.version, "--show-depends", name]);
        let lines = step::output_of(&mut command, &format!("modprobe --show-depends {name}"))?;
        let file = |line: &str| Some(PathBuf::from(line.strip_prefix("insmod ")?.split_whitespace().next()?));
        lines.lines().filter_map(file).map(|file| Ok(file.canonicalize()?)).collect()
    }

    /// Copies a module that is not of this kernel's own into a root file system.
    pub(crate) fn add_module(&self, module: &Path, to: &Path) -> anyhow::Result<()> {
        let folder = to.join("lib/modules").join(&self.version).join("updates");
        fs::create_dir_all(&folder)?;
        let name = module.file_name().context("a module without a name")?;
        fs::copy(module, folder.join(name)).with_context(|| format!("cannot copy {}", module.display()))?;
        self.depmod(to)
    }

    fn depmod(&self, root: &Path) -> anyhow::Result<()> {
        let mut command = Command::new(tools::of_system("depmod"));
        step::output_of(command.arg("-b").arg(root).arg(&self.version), "depmod").map(drop)
    }
}

/// Makes modules be found in lib and in usr/lib. Which of them a package fills depends on its release, and where
/// modprobe and depmod look depends on theirs.
fn link_modules(root: &Path) -> anyhow::Result<()> {
    for (has, lacks, link) in [
        ("usr/lib/modules", "lib/modules", "../usr/lib/modules"),
        ("lib/modules", "usr/lib/modules", "../../lib/modules"),
    ] {
        let lacks = root.join(lacks);
        if root.join(has).is_dir() && !lacks.exists() {
            lacks.parent().map_or(Ok(()), fs::create_dir_all)?;
            symlink(link, &lacks).with_context(|| format!("cannot make the link {}", lacks.display()))?;
        }
    }
    Ok(())
}

/// Where the image of a kernel is: newer ones have it beside their modules.
fn image(root: &Path, version: &str) -> PathBuf {
    let beside = root.join("lib/modules").join(version).join("vmlinuz");
    if beside.is_file() { beside } else { root.join("boot").join(format!("vmlinuz-{version}")) }
}

/// The packed kernel in an image (Documentation/arch/x86/boot.rst). Its length comes last.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let number = |at: usize| image.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    (image.get(0x202..0x206)? == b"HdrS").then_some(())?;
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = usize::try_from(number(0x248)?).ok()?.checked_add((sectors + 1) * 512)?;
    let end = usize::try_from(number(0x24c)?).ok()?.checked_add(start)?;
    image.get(start..end)
}

fn unpack(packed: &[u8], to: &Path) -> anyhow::Result<()> {
    let (tool, packed) = match packed {
        [0x28, 0xb5, 0x2f, 0xfd, .., _, _, _, _] => ("zstd", &packed[..packed.len() - 4]),
        [0xfd, b'7', b'z', .., _, _, _, _] => ("xz", &packed[..packed.len() - 4]),
        // To which the length belongs.
        [0x1f, 0x8b, ..] => ("gzip", packed),
        _ => bail!("it is packed in a way that is not known here"),
    };
    let mut input = tempfile::tempfile()?;
    input.write_all(packed)?;
    input.rewind()?;
    let status = Command::new(tool).args(["-d", "-c"]).stdin(input).stdout(fs::File::create(to)?).status();
    let status = status.with_context(|| format!("cannot run {tool}"))?;
    ensure!(status.success(), "{tool}: {status}");
    Ok(())
}

/// Where a package file is unpacked, in a folder of such: anew, if it is not the one that was unpacked there before.
fn unpacked(
    file: &Path,
    folder: &Path,
    unpack: impl FnOnce(&Path, &Path) -> anyhow::Result<()>,
) -> anyhow::Result<PathBuf> {
    let is = fs::metadata(file).with_context(|| format!("cannot read {}", file.display()))?;
    let origin = format!("{}\n{} bytes\n{:?}\n", file.display(), is.len(), is.modified()?);
    let root = folder.join(file.file_stem().unwrap_or_default());
    // Written last: what is without was not finished.
    let of = root.join("unpacked-from");
    if fs::read_to_string(&of).is_ok_and(|before| before == origin) {
        return Ok(root);
    }
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    unpack(file, &root)?;
    fs::write(&of, origin).with_context(|| format!("cannot write {}", of.display()))?;
    Ok(root)
}

/// Copies a module, unpacked.
fn install_module(from: &Path, to: &Path) -> anyhow::Result<()> {
    let unpack = match from.extension().and_then(OsStr::to_str) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => "cat",
    };
    let to = if unpack == "cat" { to.to_owned() } else { to.with_extension("") };
    fs::create_dir_all(to.parent().context("a module in no folder")?)?;
    let mut command = Command::new(unpack);
    if unpack != "cat" {
        command.args(["-d", "-c"]);
    }
    let status = command.arg(from).stdout(fs::File::create(&to)?).status();
    let status = status.with_context(|| format!("cannot run {unpack}"))?;
    ensure!(status.success(), "{unpack} {}: {status}", from.display());
    Ok(())
}

/// The folder of Debian's kernel: the one that was fetched before, or the oldest of this release and its backports that is
/// new enough.
fn fetched() -> anyhow::Result<PathBuf> {
    let kernels = Path::new(FOLDER).join("kernels");
    let before = fs::read_dir(&kernels).into_iter().flatten().flatten().map(|entry| entry.path());
    if let Some(before) = before.max() {
        return Ok(before);
    }
    let packages = Packages::update()?;
    let versions = packages.versions(PACKAGE)?;
    let version = oldest_that_will_do(&versions).with_context(|| {
        format!(
            "{PACKAGE} has versions {}: none is {}.{} or newer; see --kernel",
            versions.join(", "),
            OLDEST.0,
            OLDEST.1
        )
    })?;
    let depends = packages.depends(&format!("{PACKAGE}={version}"))?;
    let image = depends.iter().find(|name| name.starts_with("linux-image-"));
    let image = image.with_context(|| format!("{PACKAGE} {version} depends on no kernel"))?;
    let root = kernels.join(image);
    packages.unpack(&[format!("{image}={version}")], &root)?;
    Ok(root)
}

fn oldest_that_will_do(versions: &[String]) -> Option<&str> {
    let number = |version: &str| -> Option<(u32, u32)> {
        let mut parts = version.split(['.', '-', '~', '+']);
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    let numbers = versions.iter().filter_map(|version| Some((number(version)?, version)));
    numbers.filter(|(number, _)| *number >= OLDEST).min().map(|(_, version)| version.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_kernel_with_dma_events_will_do() {
        let of = |versions: &[&str]| {
            let versions: Vec<_> = versions.iter().map(|&version| version.to_owned()).collect();
            oldest_that_will_do(&versions).map(ToOwned::to_owned)
        };
        assert_eq!(of(&["6.1.176-1", "6.12.95-1~bpo12+1"]).as_deref(), Some("6.12.95-1~bpo12+1"));
        assert_eq!(of(&["7.3.1-1~bpo13+1", "6.12.48-1"]).as_deref(), Some("6.12.48-1"));
        assert_eq!(of(&["6.1.176-1", "6.9.7-1", "strange"]), None);
    }

    #[test]
    fn a_folder_has_one_kernel_with_its_modules() {
        let folder = tempfile::tempdir().unwrap();
        let find = || Kernel::in_folder(folder.path().to_owned());
        assert!(find().unwrap_err().to_string().contains("no boot/vmlinuz-VERSION"));
        for (version, has_modules) in [("6.1", false), ("6.12", true), ("7.3", true)] {
            fs::create_dir_all(folder.path().join("boot")).unwrap();
            fs::write(folder.path().join("boot/vmlinuz-").with_file_name(format!("vmlinuz-{version}")), "").unwrap();
            if has_modules {
                fs::create_dir_all(folder.path().join("lib/modules").join(version)).unwrap();
            }
            match version {
                "6.1" => assert!(find().unwrap_err().to_string().contains("no boot/vmlinuz-VERSION")),
                "6.12" => assert_eq!(find().unwrap().version(), "6.12"),
                _ => assert!(find().unwrap_err().to_string().contains("which one? ")),
            }
        }
    }

    #[test]
    fn the_kernel_is_taken_out_of_its_image() {
        let folder = tempfile::tempdir().unwrap();
        let pack = |with: &str| {
            let line = format!("printf kernel | {with}");
            Command::new("sh").args(["-c", &line]).output().unwrap().stdout
        };
        let packed = [&pack("xz -c")[..], &6u32.to_le_bytes()].concat();
        let mut image = vec![0; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x1f1] = 1;
        image[0x248..0x24c].copy_from_slice(&2u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(packed.len()).unwrap().to_le_bytes());
        image.extend([&[0, 0], &packed[..]].concat());
        assert_eq!(payload(&image), Some(&packed[..]));
        assert_eq!(payload(&image[..image.len() - 1]), None, "it is cut off");
        let file = folder.path().join("vmlinux");
        for packed in [payload(&image).unwrap(), &pack("gzip -c")] {
            unpack(packed, &file).unwrap();
            assert_eq!(fs::read(&file).unwrap(), b"kernel");
        }
        assert!(unpack(b"what is this", &file).is_err());
        image[0x202] = 0;
        assert_eq!(payload(&image), None);
    }

    #[test]
    fn modules_are_found_in_lib_and_in_usr_lib() {
        for (has, lacks, has_both) in [
            ("lib/modules", "usr/lib/modules", false),
            ("usr/lib/modules", "lib/modules", false),
            ("usr/lib/modules", "lib/modules", true),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let root = folder.path();
            fs::create_dir_all(root.join("boot")).unwrap();
            fs::write(root.join("boot/vmlinuz-7.3"), "").unwrap();
            fs::create_dir_all(root.join(has).join("7.3")).unwrap();
            fs::write(root.join(has).join("7.3/modules.order"), has).unwrap();
            if has_both {
                // Each has something of the package.
                fs::create_dir_all(root.join("lib/firmware")).unwrap();
            }
            for _ in 0..2 {
                let kernel = Kernel::in_folder(root.to_owned()).unwrap();
                assert_eq!(fs::read_to_string(kernel.modules().join("modules.order")).unwrap(), has);
                assert_eq!(fs::read_to_string(root.join(lacks).join("7.3/modules.order")).unwrap(), has);
            }
        }
    }

    #[test]
    fn a_package_file_that_has_changed_is_unpacked_anew() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("linux.deb");
        let named = folder.path().join("named");
        // Unpacking here is copying.
        let mut unpacks = 0;
        let mut find = || {
            let unpack = |from: &Path, to: &Path| {
                unpacks += 1;
                fs::create_dir_all(to)?;
                ensure!(!to.join("kernel").exists(), "the old one is in the way");
                fs::copy(from, to.join("kernel")).map(drop).context("cannot copy")
            };
            let root = unpacked(&file, &named, unpack).map_err(|error| format!("{error:#}"))?;
            Ok::<_, String>((fs::read_to_string(root.join("kernel")).unwrap(), unpacks))
        };
        assert!(find().unwrap_err().starts_with("cannot read "));
        fs::write(&file, "one").unwrap();
        assert_eq!(find().unwrap(), ("one".to_owned(), 1));
        assert_eq!(find().unwrap(), ("one".to_owned(), 1));
        fs::write(&file, "another").unwrap();
        assert_eq!(find().unwrap(), ("another".to_owned(), 2));
        fs::remove_file(named.join("linux/unpacked-from")).unwrap();
        assert_eq!(find().unwrap(), ("another".to_owned(), 3), "the last one did not finish");
    }
}
