//! The folder of all that VMs are made of, and leave: one run at a time uses it.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::Path;

use anyhow::Context as _;
use tempfile::TempDir;

/// Where packages, kernels and what VMs say are kept.
pub(crate) const FOLDER: &str = "target/vm";

/// What the names of folders that last no longer than a run begin with.
const SCRATCH: &str = "scratch-";

/// Leave to use the folder, as long as this or a share of it is open.
#[derive(Debug)]
pub(crate) struct Claim(File);

impl Claim {
    /// Waits until nobody else uses the folder, and sweeps out what killed runs left.
    pub(crate) fn take() -> anyhow::Result<Self> {
        let folder = Path::new(FOLDER);
        let claim = match Self::try_take(folder)? {
            Ok(claim) => claim,
            Err(lock) => {
                eprintln!("another run is using {FOLDER}: waiting until it ends");
                lock.lock().with_context(|| format!("cannot lock {FOLDER}"))?;
                Self(lock)
            }
        };
        sweep(folder)?;
        Ok(claim)
    }

    /// The file to wait on, if somebody else has it.
    fn try_take(folder: &Path) -> anyhow::Result<Result<Self, File>> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join("lock");
        let lock = File::options().create(true).append(true).open(&path);
        let lock = lock.with_context(|| format!("cannot open {}", path.display()))?;
        match lock.try_lock() {
            Ok(()) => Ok(Ok(Self(lock))),
            Err(TryLockError::WouldBlock) => Ok(Err(lock)),
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
        }
    }

    /// For another process: nobody else gets the folder before it, too, has ended.
    pub(crate) fn share(&self) -> io::Result<File> {
        self.0.try_clone()
    }
}

/// A folder that lasts no longer than the run.
pub(crate) fn scratch() -> anyhow::Result<TempDir> {
    scratch_in(Path::new(FOLDER))
}

fn scratch_in(folder: &Path) -> anyhow::Result<TempDir> {
    let made = tempfile::Builder::new().prefix(SCRATCH).tempdir_in(folder);
    made.with_context(|| format!("cannot make a folder in {}", folder.display()))
}

fn sweep(folder: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(SCRATCH.as_bytes()) {
            fs::remove_dir_all(entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_run_at_a_time_has_the_folder() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("made/anew");
        let claim = Claim::try_take(&folder).unwrap().unwrap();
        let share = claim.share().unwrap();
        Claim::try_take(&folder).unwrap().unwrap_err();
        drop(claim);
        let lock = Claim::try_take(&folder).unwrap().expect_err("another process still uses it");
        drop(share);
        lock.lock().unwrap();
        Claim::try_take(&folder).unwrap().expect_err("who waited has it");
        drop(lock);
        Claim::try_take(&folder).unwrap().unwrap();
    }

    #[test]
    fn what_killed_runs_left_is_swept_out() {
        let root = tempfile::tempdir().unwrap();
        let left = scratch_in(root.path()).unwrap().keep();
        fs::create_dir(left.join("bin")).unwrap();
        fs::write(left.join("bin/busybox"), "").unwrap();
        fs::create_dir(root.path().join("kernels")).unwrap();
        fs::write(root.path().join("console.log"), "").unwrap();
        sweep(root.path()).unwrap();
        assert!(!left.exists());
        assert!(root.path().join("kernels").is_dir() && root.path().join("console.log").is_file());
    }
}
