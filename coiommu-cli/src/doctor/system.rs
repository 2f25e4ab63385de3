//! The system that is looked at: its files, and what it says of this process.

use std::fs;
use std::path::{Path, PathBuf};

use coiommu_vfio::type1::{Memlock, OpenError};
use coiommu_vfio::{DmaMapper as _, Limits, Type1};

/// Where the kernel shows its modules.
const MODULES: &str = "sys/module";

/// A system; in tests, one that is made up.
pub(super) struct System<'a> {
    /// The folder that `sys`, `proc` and `dev` are in.
    pub(super) root: &'a Path,
    /// In bytes.
    pub(super) page_size: u64,
    pub(super) memlock: Memlock,
    /// The number of the user who runs this.
    pub(super) user: u32,
    /// Opens a device and closes it again: what its container says of itself.
    pub(super) open: &'a dyn Fn(&str) -> Result<Limits, OpenError>,
}

impl System<'static> {
    /// The one that this runs on.
    pub(super) fn this() -> Self {
        Self {
            root: Path::new("/"),
            page_size: rustix::param::page_size() as u64,
            memlock: Memlock::of_this_process(),
            user: rustix::process::geteuid().as_raw(),
            open: &|address| Type1::open([address]).map(|container| container.limits()),
        }
    }
}

impl System<'_> {
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// What is in a file, without the space around; `None`: it cannot be read.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        Some(fs::read_to_string(self.path(path)).ok()?.trim().to_owned())
    }

    /// What is in a folder, in order; nothing if there is none.
    pub(super) fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(folder)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Whether a module is there: loaded, or built in, as those show that have parameters.
    pub(super) fn has_module(&self, name: &str) -> bool {
        self.path(MODULES).join(name).is_dir()
    }

    /// What a parameter of VFIO's type1 is set to.
    pub(super) fn type1_parameter(&self, name: &str) -> Option<String> {
        self.text(&format!("{MODULES}/vfio_iommu_type1/parameters/{name}"))
    }
}
