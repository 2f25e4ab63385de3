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
    sources: PathBuf,
    options: Vec<String>,
}

impl Packages {
    /// Reads the lists of this machine's release, and of its backports if it has some.
    pub(crate) fn update() -> anyhow::Result<Self> {
        let Debian { codename, mirror } = Debian::here()?;
        let backports = format!("{codename}-backports");
        Self::read(&mirror, &[&codename, &backports]).or_else(|error| {
            // A release that is very new, or very old, has none.
            eprintln!("{error:#}: once more, without {backports}");
            Self::read(&mirror, &[&codename])
        })
    }

    /// Reads the lists of these suites.
    pub(crate) fn of_suites(suites: &[&str]) -> anyhow::Result<Self> {
        Self::read(&Debian::here()?.mirror, suites)
    }

    fn read(mirror: &str, suites: &[&str]) -> anyhow::Result<Self> {
        let folder = Path::new(FOLDER).join("apt").join(suites.join(","));
        for folder in ["lists/partial", "archives/partial"].map(|path| folder.join(path)) {
            fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let folder = folder.canonicalize()?;
        let sources = folder.join("sources.list");
        fs::write(&sources, suites.iter().map(|suite| source(mirror, suite)).collect::<String>())?;
        let option = |(key, path): (&str, &Path)| ["-o".to_owned(), format!("{key}={}", path.display())];
        let options = [
            ("Dir::Etc::SourceList", &*sources),
            ("Dir::Etc::SourceParts", Path::new("/dev/null")),
            ("Dir::State::Lists", &*folder.join("lists")),
            ("Dir::Cache", &*folder),
            // Whoever runs this may read the folder; apt's own user need not.
            ("APT::Sandbox::User", Path::new("root")),
        ];
        let options = options.into_iter().flat_map(option).collect();
        let packages = Self { sources, options };
        packages.fetch_lists()?;
        Ok(packages)
    }

    /// The file that names the suites and their mirror.
    pub(crate) fn sources(&self) -> &Path {
        &self.sources
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

    /// The newest version of a package whose version is of a series: `6.1` is not that of 6.12.
    pub(crate) fn newest(&self, package: &str, series: &str) -> anyhow::Result<String> {
        let versions = self.versions(package)?;
        let newest = newest(&versions, series);
        let newest = newest.with_context(|| format!("no {package} of {series} in {}", self.sources.display()))?;
        Ok(newest.to_owned())
    }

    /// What a package, `NAME` or `NAME=VERSION`, depends on, by name.
    pub(crate) fn depends(&self, package: &str) -> anyhow::Result<Vec<String>> {
        let line = format!("apt-cache show {package}");
        let text = step::output_of(self.command("apt-cache").args(["show", package]), &line)?;
        let depends = text.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
        Ok(depends.split(", ").filter_map(|one| Some(one.split_whitespace().next()?.to_owned())).collect())
    }

    /// Fetches some packages, each as `NAME` or `NAME=VERSION`, and unpacks them into one folder.
    pub(crate) fn unpack(&self, packages: &[String], to: &Path) -> anyhow::Result<()> {
        let scratch = folder::scratch()?;
        let mut command = self.command("apt-get");
        command.args(["-q", "download"]).args(packages).current_dir(&scratch);
        step::finish(&mut command, &format!("apt-get download {}", packages.join(" ")))?;
        let files: Vec<PathBuf> = fs::read_dir(&scratch)?.flatten().map(|entry| entry.path()).collect();
        ensure!(files.len() == packages.len(), "`apt-get download` left {} files", files.len());
        unpack(&files, to)
    }
}

/// Unpacks package files. What is half done is never found under its name.
pub(crate) fn unpack(files: &[PathBuf], to: &Path) -> anyhow::Result<()> {
    let scratch = folder::scratch()?;
    for file in files {
        let line = format!("dpkg-deb -x {}", file.display());
        step::output_of(Command::new("dpkg-deb").arg("-x").arg(file).arg(scratch.path()), &line)?;
    }
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::rename(scratch.keep(), to).with_context(|| format!("cannot make {}", to.display()))
}

fn newest<'a>(versions: &'a [String], series: &str) -> Option<&'a str> {
    let number = |version: &str| -> Option<u32> {
        version.strip_prefix(series)?.strip_prefix('.')?.split(['-', '~', '+']).next()?.parse().ok()
    };
    let found = versions.iter().filter_map(|version| Some((number(version)?, version.as_str())));
    found.max().map(|(_, version)| version)
}

/// This machine's release, and where its apt has it from.
struct Debian {
    codename: String,
    mirror: String,
}

impl Debian {
    fn here() -> anyhow::Result<Self> {
        let release = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
        let codename = codename(&release).context("/etc/os-release names no release")?;
        let mut index = Command::new("apt-get");
        // Others may call a release by the same name, and sign it with keys of their own.
        index.args(["indextargets", "--format", "$(CODENAME)|$(SITE)", "Created-By: Packages", "Origin: Debian"]);
        let index = step::output_of(&mut index, "apt-get indextargets")?;
        Ok(Self { codename: codename.to_owned(), mirror: mirror(&index, codename)?.to_owned() })
    }
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
    fn the_newest_of_a_series_is_found() {
        let versions = ["6.1.176-1", "6.1.192-2", "6.12.95-1~bpo12+1", "6.12.9-1", "7.3.4-1~bpo13+1"].map(String::from);
        assert_eq!(newest(&versions, "6.1"), Some("6.1.192-2"));
        assert_eq!(newest(&versions, "6.12"), Some("6.12.95-1~bpo12+1"));
        assert_eq!(newest(&versions, "7.3"), Some("7.3.4-1~bpo13+1"));
        assert_eq!(newest(&versions, "6.9"), None);
    }

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
