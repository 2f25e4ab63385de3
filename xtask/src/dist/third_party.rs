//! The licences of what is linked into the program: their terms ask that they go with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::TARGET;
use crate::files::{copy, files, write};
use crate::step;

/// What names of files with a licence begin with.
const LICENCES: [&str; 6] = ["license", "licence", "copying", "copyright", "notice", "unlicense"];

/// Where crates have the licence of code of others that is in them.
const BUNDLED: [&str; 1] = ["zstd/LICENSE"];

/// The C library of the target, which comes with the toolchain, without its licence.
const MUSL: &str = "\
musl libc (https://musl.libc.org), MIT

Copyright © 2005-2020 Rich Felker, et al.

Permission is hereby granted, free of charge, to any person obtaining
a copy of this software and associated documentation files (the
\"Software\"), to deal in the Software without restriction, including
without limitation the rights to use, copy, modify, merge, publish,
distribute, sublicense, and/or sell copies of the Software, and to
permit persons to whom the Software is furnished to do so, subject to
the following conditions:

The above copyright notice and this permission notice shall be
included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED \"AS IS\", WITHOUT WARRANTY OF ANY KIND,
EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT.
IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY
CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT,
TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE
SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
";

/// A crate that is linked into the program.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Crate {
    name: String,
    version: String,
    /// As its manifest has it.
    licence: String,
    repository: String,
    folder: PathBuf,
}

/// Writes the licences of the crates, of C libraries and of Rust's own library into a folder.
pub(super) fn write_to(folder: &Path) -> anyhow::Result<()> {
    let crates = crates()?;
    let texts = crates.iter().map(texts).collect::<anyhow::Result<Vec<_>>>()?;
    let listed: Vec<_> = crates.iter().zip(texts).collect();
    write(&folder.join("third-party.txt"), document(&listed))?;
    let sysroot = step::output("rustc --print sysroot")?;
    let library = Path::new(sysroot.trim()).join("share/doc/rust/COPYRIGHT-library.html");
    copy(&library, &folder.join("rust-library.html"))
}

/// The crates of others that are linked: not those that only build.
fn crates() -> anyhow::Result<BTreeSet<Crate>> {
    let line = format!(
        "cargo tree --locked --package coiommu-cli --target {TARGET} --edges normal,no-proc-macro --prefix none \
         --format {{p}}"
    );
    let tree = step::output(&line)?;
    let linked: BTreeSet<_> = tree.lines().filter_map(name_and_version).collect();
    let line = format!("cargo metadata --locked --format-version 1 --filter-platform {TARGET}");
    let metadata: Value =
        serde_json::from_str(&step::output(&line)?).context("cannot read what cargo metadata says")?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let (mut crates, mut found) = (BTreeSet::new(), BTreeSet::new());
    for package in packages {
        let it = crate_of(package).with_context(|| format!("{} has no licence in its manifest", package["id"]))?;
        if !linked.contains(&it.id()) {
            continue;
        }
        found.insert(it.id());
        // Ours have none.
        if !package["source"].is_null() {
            crates.insert(it);
        }
    }
    ensure!(found == linked, "cargo metadata does not know all that cargo tree lists");
    Ok(crates)
}

/// Of `zstd v0.14.4 (/where/it/is)` or `zstd v0.14.4 (*)`.
fn name_and_version(line: &str) -> Option<(String, String)> {
    let mut words = line.split_whitespace();
    Some((words.next()?.to_owned(), words.next()?.strip_prefix('v')?.to_owned()))
}

fn crate_of(package: &Value) -> Option<Crate> {
    let text = |key: &str| Some(package[key].as_str()?.to_owned());
    Some(Crate {
        name: text("name")?,
        version: text("version")?,
        licence: text("license")?,
        repository: text("repository").unwrap_or_default(),
        folder: Path::new(package["manifest_path"].as_str()?).parent()?.to_owned(),
    })
}

impl Crate {
    fn id(&self) -> (String, String) {
        (self.name.clone(), self.version.clone())
    }
}

/// The licences in a crate's package.
fn texts(of: &Crate) -> anyhow::Result<Vec<String>> {
    let own = files(&of.folder)?.into_iter().filter(|file| is_licence(file));
    let bundled = BUNDLED.map(|path| of.folder.join(path));
    let all = own.chain(bundled).filter(|file| file.is_file());
    all.map(|file| fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))).collect()
}

fn is_licence(file: &Path) -> bool {
    let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_lowercase();
    LICENCES.iter().any(|begin| name.starts_with(begin))
}

/// A list of the crates, then each text once, with the crates that it came with.
fn document(crates: &[(&Crate, Vec<String>)]) -> String {
    let mut document = String::from("What is linked into this program, and its licences. The texts follow.\n\n");
    // The same text, whatever its lines are cut at.
    let mut of: BTreeMap<String, (&str, Vec<String>)> = BTreeMap::new();
    for (it, texts) in crates {
        let Crate { name, version, licence, repository, .. } = it;
        let missing = if texts.is_empty() { ", whose package has no text of it" } else { "" };
        document += &format!("{name} {version}: {licence}{missing}; {repository}\n");
        for text in texts {
            let key = text.split_whitespace().collect::<Vec<_>>().join(" ");
            of.entry(key).or_insert((text, Vec::new())).1.push(format!("{name} {version}"));
        }
    }
    document += "Rust's library: MIT OR Apache-2.0, and what rust-library.html says\n";
    let mut sections: Vec<_> = of.into_values().collect();
    sections.sort_by(|a, b| a.1.cmp(&b.1));
    for (text, mut names) in sections {
        names.dedup();
        document += &format!("\n{}\n{}\n\n{}\n", "=".repeat(80), names.join(", "), text.trim_end());
    }
    document += &format!("\n{}\n{MUSL}", "=".repeat(80));
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Crate {
        Crate {
            name: name.into(),
            version: "1.0.0".into(),
            licence: "MIT".into(),
            repository: "https://example.org".into(),
            folder: PathBuf::new(),
        }
    }

    #[test]
    fn each_text_is_there_once() {
        let (one, two, none) = (named("one"), named("two"), named("none"));
        let text = |text: &str| vec![text.to_owned()];
        let document =
            document(&[(&none, vec![]), (&one, text("Do what\nyou like.\n")), (&two, text("Do  what you like."))]);
        assert_eq!(document.matches("you like.").count(), 1, "{document}");
        assert!(document.contains("\none 1.0.0, two 1.0.0\n\nDo what\nyou like.\n"), "{document}");
        assert!(document.contains("\nnone 1.0.0: MIT, whose package has no text of it; https://example.org\n"));
    }

    #[test]
    fn crates_of_a_tree_are_named_with_their_versions() {
        let id = |name: &str, version: &str| Some((name.to_owned(), version.to_owned()));
        assert_eq!(name_and_version("zstd v0.14.4"), id("zstd", "0.14.4"));
        assert_eq!(name_and_version("zstd-sys v2.1.3+zstd.1.5.7 (*)"), id("zstd-sys", "2.1.3+zstd.1.5.7"));
        assert_eq!(name_and_version(""), None);
    }

    #[test]
    fn licences_are_known_by_their_names() {
        for (name, is) in [("LICENSE-MIT", true), ("COPYING", true), ("Licence.md", true), ("lib.rs", false)] {
            assert_eq!(is_licence(Path::new(name)), is, "{name}");
        }
    }
}
