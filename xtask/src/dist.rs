//! `cargo xtask dist`: the package that users unpack.
//!
//! | file | what |
//! | --- | --- |
//! | `dist.rs` | builds the program, and packs it with all that goes with it |
//! | [`third_party`] | the licences of what is linked into it |
//! | [`check`] | whether what was made is what it should be |

mod check;
mod third_party;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, ensure};

use crate::files::{copy, make_empty, write};
use crate::step;

/// Make the package: a static program, its manual, completions, a systemd unit, the guest driver; and check it
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask dist            into target/dist
  cargo xtask dist --quick    into target/dist/quick, not optimised: for checks, not for users

Two runs on the same commit make the same bytes, wherever they are made. What is in the package is as old as the commit, or
as SOURCE_DATE_EPOCH says.")]
pub(crate) struct Args {
    /// Do not optimise: sooner done, and not for users
    #[arg(long)]
    quick: bool,
}

const TARGET: &str = "x86_64-unknown-linux-musl";
const VERSION: &str = env!("CARGO_PKG_VERSION");
const FOLDER: &str = "target/dist";
/// Apart from other builds: its flags are its own.
const BUILD: &str = "target/dist/build";

/// What is packed as it is in the tree, and where.
const FILES: [(&str, &str); 11] = [
    ("dist/INSTALL.md", "INSTALL.md"),
    ("README.md", "README.md"),
    ("CHANGELOG.md", "CHANGELOG.md"),
    ("SECURITY.md", "SECURITY.md"),
    ("LICENSE-APACHE", "LICENSE-APACHE"),
    ("LICENSE-BSD-3-Clause", "LICENSE-BSD-3-Clause"),
    ("docs/control.md", "docs/control.md"),
    // What README.md links to for options and metrics.
    ("coiommu-cli/README.md", "coiommu-cli/README.md"),
    ("dist/coiommu-serve@.service", "lib/systemd/system/coiommu-serve@.service"),
    ("dist/sysusers.conf", "lib/sysusers.d/coiommu.conf"),
    ("dist/examples", "share/doc/coiommu/examples"),
];

/// A shell, and where it looks for completions.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "share/bash-completion/completions/coiommu"),
    ("zsh", "share/zsh/site-functions/_coiommu"),
    ("fish", "share/fish/vendor_completions.d/coiommu.fish"),
];

/// A package in the making.
struct Package {
    /// Where it is made.
    folder: PathBuf,
    /// What its archive and the folder in it are called.
    name: String,
    /// When all of it was last changed, in seconds since 1970.
    time: u64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let folder = if args.quick { format!("{FOLDER}/quick") } else { FOLDER.to_owned() };
    let package = Package { folder: folder.into(), name: format!("coiommu-{VERSION}-x86_64-linux"), time: time()? };
    let program = build(args.quick)?;
    package.stage(&program)?;
    package.pack()?;
    check::all(&package, &program)?;
    println!("{} is made, and checked", package.archive().display());
    Ok(ExitCode::SUCCESS)
}

/// The commit's time, if nobody says another.
fn time() -> anyhow::Result<u64> {
    let text = match env::var("SOURCE_DATE_EPOCH") {
        Ok(time) => time,
        Err(_) => step::output("git log -1 --format=%ct")?,
    };
    text.trim().parse().with_context(|| format!("{text:?} is no time in seconds since 1970"))
}

/// Builds the program, and says where it is.
fn build(quick: bool) -> anyhow::Result<PathBuf> {
    let libdir = step::output(&format!("rustc --print target-libdir --target {TARGET}"))?;
    if !Path::new(libdir.trim()).is_dir() {
        step::run(&format!("rustup target add {TARGET}"))?;
    }
    let line = format!(
        "cargo build --package coiommu-cli --bin coiommu --profile dist --target {TARGET} --target-dir {BUILD} --locked"
    );
    let mut command = step::command(&line);
    // zstd is written in C.
    command.env(format!("CC_{}", TARGET.replace('-', "_")), "musl-gcc");
    command.env("CARGO_ENCODED_RUSTFLAGS", flags()?.join("\x1f"));
    if quick {
        command.env("CARGO_PROFILE_DIST_OPT_LEVEL", "0").env("CARGO_PROFILE_DIST_LTO", "off");
        command.env("CARGO_PROFILE_DIST_CODEGEN_UNITS", "16");
    }
    step::finish(&mut command, &line).context("is musl-gcc there? It comes with musl-tools")?;
    Ok(Path::new(BUILD).join(TARGET).join("dist/coiommu"))
}

/// Flags that keep paths of this machine out of the program.
fn flags() -> anyhow::Result<Vec<String>> {
    let mut flags = vec![format!("--remap-path-prefix={}=.", env::current_dir()?.display())];
    let registries = cargo_home()?.join("registry/src");
    for registry in fs::read_dir(&registries).into_iter().flatten() {
        flags.push(format!("--remap-path-prefix={}=crates", registry?.path().display()));
    }
    Ok(flags)
}

fn cargo_home() -> anyhow::Result<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    home.or_else(|| Some(env::home_dir()?.join(".cargo"))).context("no home directory")
}

impl Package {
    /// The folder that is packed.
    fn stage_folder(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    fn archive(&self) -> PathBuf {
        self.folder.join(format!("{}.tar.gz", self.name))
    }

    /// Puts all that is packed in its place.
    fn stage(&self, program: &Path) -> anyhow::Result<()> {
        let stage = self.stage_folder();
        make_empty(&stage)?;
        copy(program, &stage.join("bin/coiommu"))?;
        for (from, to) in FILES {
            for file in tracked(from)? {
                let beneath = Path::new(&file).strip_prefix(from)?;
                // Of a file, nothing is beneath it.
                let to = if beneath == Path::new("") { stage.join(to) } else { stage.join(to).join(beneath) };
                copy(Path::new(&file), &to)?;
            }
        }
        for file in tracked("linux-guest")? {
            copy(Path::new(&file), &stage.join(&file))?;
        }
        let manual = stage.join("share/man/man1");
        fs::create_dir_all(&manual).with_context(|| format!("cannot make {}", manual.display()))?;
        step::output(&format!("{} man --all {}", program.display(), manual.display()))?;
        for (shell, path) in COMPLETIONS {
            write(&stage.join(path), step::output(&format!("{} completions {shell}", program.display()))?)?;
        }
        third_party::write_to(&stage.join("licences"))
    }

    /// Packs the folder, the same way whoever does it, when and where.
    fn pack(&self) -> anyhow::Result<()> {
        let Self { folder, name, time } = self;
        let tar = folder.join(format!("{name}.tar"));
        step::run(&format!(
            "tar --create --file {} --directory {} --format=ustar --sort=name --owner=0 --group=0 --numeric-owner \
             --mode=u=rwX,go=rX --mtime=@{time} {name}",
            tar.display(),
            folder.display()
        ))?;
        step::run(&format!("gzip --best --no-name --force {}", tar.display()))?;
        let archive = self.archive();
        let archive = archive.file_name().and_then(|name| name.to_str()).context("an archive without a name")?;
        let line = format!("sha256sum {archive}");
        let sums = step::output_of(step::command(&line).current_dir(folder), &line)?;
        write(&folder.join("SHA256SUMS"), sums)
    }
}

/// The files of the tree at a path: not what was built among them.
fn tracked(path: &str) -> anyhow::Result<Vec<String>> {
    let line = format!("git ls-files {path}");
    let files: Vec<_> = step::output(&line)?.lines().map(str::to_owned).collect();
    ensure!(!files.is_empty(), "{path} has no files that git knows of");
    Ok(files)
}

/// Whether a program is there to be run.
fn has(program: &str) -> bool {
    let paths = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&paths).any(|folder| folder.join(program).is_file())
}

/// The output of a prepared command, its complaints included, whatever it exits with; and whether that was 0.
fn said(command: &mut Command, line: &str) -> anyhow::Result<(bool, String)> {
    eprintln!("$ {line}");
    let output = command.output().with_context(|| format!("cannot run `{line}`"))?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.success(), String::from_utf8_lossy(&text).into_owned()))
}
