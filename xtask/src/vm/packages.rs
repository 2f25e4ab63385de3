//! Debian's packages, from the mirror that this machine's apt knows: fetched and unpacked, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

use super::{FOLDER, folder};
use crate::step;

/// Signs Debian's releases; the package debian-archive-keyring has it, and every Debian has that.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt with lists of its own: this machine's stay as they are, whatever they lack.
pub(crate) struct Packages {
    options: Vec<String>,
}

impl Packages {
    /// Reads the lists of this machine's release, and of its backports if it has some.
    pub(crate) fn update() -> anyhow::Result<Self> {
        let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
        let codename = codename(&release).context("/etc/os-release names no release")?;
        let mut index = Command::new("apt-get");
        // Others may call a release by the same name, and sign it with keys of their own.
        index.args(["indextargets", "--format", "$(CODENAME)|$(SITE)", "Created-By: Packages", "Origin: Debian"]);
        let index = step::output_of(&mut index, "apt-get indextargets")?;
        let mirror = mirror(&index, codename)?;

        let folder = Path::new(FOLDER).join("apt");
        for folder in ["lists/partial", "archives/partial"].map(|path| folder.join(path)) {
            fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let folder = folder.canonicalize()?;
        let sources = folder.join("sources.list");
        let option = |(key, path): (&str, &Path)| ["-o".to_owned(), format!("{key}={}", path.display())];
        let options = [
            ("Dir::Etc::SourceList", &*sources),
            ("Dir::Etc::SourceParts", Path::new("/dev/null")),
            ("Dir::State::Lists", &*folder.join("lists")),
            ("Dir::Cache", &*folder),
            // Whoever runs this may read the folder; apt's own user need not.
            ("APT::Sandbox::User", Path::new("root")),
        ];
        let packages = Self { options: options.into_iter().flat_map(option).collect() };
        // A release that is very new, or very old, has none.
        let backports = format!("{codename}-backports");
        fs::write(&sources, source(mirror, codename) + &source(mirror, &backports))?;
        if let Err(error) = packages.fetch_lists() {
            eprintln!("{error:#}: once more, without {backports}");
            fs::write(&sources, source(mirror, codename))?;
            packages.fetch_lists()?;
        }
        Ok(packages)
    }

    fn fetch_lists(&self) -> anyhow::Result<()> {
        step::finish(self.command("apt-get").args(["-qq", "update"]), "apt-get update (lists of our own)")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.options);
        command
    }

    /// The versions that there are of a package.
    pub(crate) fn versions(&self, package: &str) -> anyhow::Result<Vec<String>> {
        let line = format!("apt-cache madison {package}");
        let table = step::output_of(self.command("apt-cache").args(["madison", package]), &line)?;
        Ok(table.lines().filter_map(|line| Some(line.split('|').nth(1)?.trim().to_owned())).collect())
    }

    /// What a package depends on, by name.
    pub(crate) fn depends(&self, package: &str, version: &str) -> anyhow::Result<Vec<String>> {
        let which = format!("{package}={version}");
        let text = step::output_of(self.command("apt-cache").args(["show", &which]), "apt-cache show")?;
        let depends = text.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
        Ok(depends.split(", ").filter_map(|one| Some(one.split_whitespace().next()?.to_owned())).collect())
    }

    /// Fetches and unpacks a package, the newest of the release itself unless a version is named.
    pub(crate) fn unpack(&self, package: &str, version: Option<&str>, to: &Path) -> anyhow::Result<()> {
        let scratch = folder::scratch()?;
        let which = version.map_or_else(|| package.to_owned(), |version| format!("{package}={version}"));
        let mut command = self.command("apt-get");
        command.args(["-q", "download", &which]).current_dir(&scratch);
        step::finish(&mut command, &format!("apt-get download {which}"))?;
        let files: Vec<PathBuf> = fs::read_dir(&scratch)?.flatten().map(|entry| entry.path()).collect();
        ensure!(files.len() == 1, "`apt-get download {which}` left {} files", files.len());
        unpack(&files[0], to)
    }
}

/// Unpacks a package file. What is half done is never found under its name.
pub(crate) fn unpack(file: &Path, to: &Path) -> anyhow::Result<()> {
    let scratch = folder::scratch()?;
    let line = format!("dpkg-deb -x {}", file.display());
    step::output_of(Command::new("dpkg-deb").arg("-x").arg(file).arg(scratch.path()), &line)?;
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::rename(scratch.keep(), to).with_context(|| format!("cannot make {}", to.display()))
}

/// The release's name in the text of /etc/os-release.
fn codename(os_release: &str) -> Option<&str> {
    os_release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).map(|name| name.trim_matches('"'))
}

/// Where this machine's apt has a release from, of lines of release and site. The error says what to do if it has not.
fn mirror<'a>(index: &'a str, codename: &str) -> anyhow::Result<&'a str> {
    ensure!(!index.trim().is_empty(), "this machine's apt has no lists of packages: run `apt-get update` first");
    let mut sites = index.lines().filter_map(|line| line.split_once('|'));
    let found = sites.find(|(name, _)| *name == codename).map(|(_, site)| site);
    found.with_context(|| {
        format!(
            "this machine's apt has no packages of {codename}: add `deb [signed-by={KEYRING}] URL {codename} main`, \
             with a Debian mirror's URL, to /etc/apt/sources.list, and run `apt-get update`"
        )
    })
}

/// The line of a list of sources for one suite.
fn source(mirror: &str, suite: &str) -> String {
    format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {suite} main\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_that_of_the_release() {
        let release = "NAME=\"Debian GNU/Linux\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(codename(release), Some("bookworm"));
        assert_eq!(codename("VERSION_CODENAME=\"trixie\"\n"), Some("trixie"));
        assert_eq!(codename("ID=debian\n"), None);
        let index = "bookworm-security|http://one/security\nbookworm|http://one/debian\nbookworm|http://two\n";
        assert_eq!(mirror(index, "bookworm").unwrap(), "http://one/debian");
        let error = |index, codename| mirror(index, codename).unwrap_err().to_string();
        assert!(error(index, "sid").contains("URL sid main`"), "a source is missing");
        assert!(error("\n", "bookworm").ends_with("run `apt-get update` first"), "its lists are empty");
    }
}
