//! What of a machine the user may choose.

use std::path::PathBuf;

use super::{Accel, tools};
use crate::paths;

/// Options of every task that boots a machine.
#[derive(Debug, clap::Args)]
pub(crate) struct Choices {
    /// The kernel: a Debian package, or a folder with boot/vmlinuz-VERSION and lib/modules/VERSION, where modules.dep is made
    /// if it is missing [default: Debian's]
    #[arg(long, value_name = "PATH", value_parser = paths::path())]
    pub(crate) kernel: Option<PathBuf>,
    /// The emulator
    #[arg(long, value_name = "PROGRAM", value_parser = paths::program(), default_value = tools::QEMU.0)]
    pub(crate) qemu: PathBuf,
    /// Who runs the machine's instructions
    #[arg(long, default_value = "tcg")]
    pub(crate) accel: Accel,
}
