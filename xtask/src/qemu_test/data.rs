//! Random bytes that guests copy, and whether the copies are like them.

use std::fs::{self, File};
use std::io::{BufReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::step;
use crate::vm::FOLDER;

/// How much there is, in MiB.
pub(super) const SOURCE: u64 = 200;

/// The file of them.
pub(super) fn source() -> anyhow::Result<PathBuf> {
    let path = Path::new(FOLDER).join("source.img");
    if !fs::metadata(&path).is_ok_and(|meta| meta.len() == SOURCE << 20) {
        step::run(&format!("dd if=/dev/urandom of={} bs=1M count={SOURCE} status=none", path.display()))?;
    }
    Ok(path)
}

/// The SHA-256 sum of the first of them, as `sha256sum` writes it.
pub(super) fn sum(mib: u64) -> anyhow::Result<String> {
    let line = format!("head -c {mib}M {} | sha256sum", source()?.display());
    let sum = step::output_of(Command::new("sh").args(["-c", &line]), &line)?;
    Ok(sum.split_whitespace().next().unwrap_or_default().to_owned())
}

/// What is wrong with a copy of the first bytes, which begins at `at` in an image of that name.
pub(super) fn wrong_bytes(name: &str, at: u64, bytes: u64) -> anyhow::Result<Option<String>> {
    let wrong = wrong_pages(&source()?, &Path::new(FOLDER).join(name), at, bytes)?;
    Ok((wrong > 0)
        .then(|| format!("{wrong} pages of {} MiB in {name}, from {at:#x} on, have wrong bytes", bytes >> 20)))
}

/// In how many pages a copy of a file, which begins at `at`, is not like it.
fn wrong_pages(source: &Path, copy: &Path, at: u64, bytes: u64) -> anyhow::Result<usize> {
    let open = |path: &Path| File::open(path).with_context(|| format!("cannot read {}", path.display()));
    let (mut source, copy) = (BufReader::new(open(source)?), open(copy)?);
    let (mut want, mut is) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut wrong = 0;
    for done in (0..bytes).step_by(1 << 20) {
        source.read_exact(&mut want)?;
        copy.read_exact_at(&mut is, at + done)?;
        wrong += want.chunks(4096).zip(is.chunks(4096)).filter(|(want, is)| want != is).count();
    }
    Ok(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_not_alike_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let [source, copy] = ["source", "copy"].map(|name| folder.path().join(name));
        let mut bytes = vec![7; 2 << 20];
        fs::write(&source, &bytes).unwrap();
        bytes[5] = 0;
        bytes[(1 << 20) + 4095] = 0;
        bytes[(1 << 20) + 4096] = 0;
        fs::write(&copy, [vec![0; 4096], bytes].concat()).unwrap();
        assert_eq!(wrong_pages(&source, &copy, 4096, 1 << 20).unwrap(), 1);
        assert_eq!(wrong_pages(&source, &copy, 4096, 2 << 20).unwrap(), 3);
        assert!(wrong_pages(&source, &copy, 1 << 20, 2 << 20).is_err(), "the copy is too short");
    }
}
