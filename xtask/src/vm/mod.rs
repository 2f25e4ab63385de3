//! Virtual machines to test in: a Debian kernel, a file system made for one run, QEMU, and judges of what came out.
//!
//! | file | what |
//! | --- | --- |
//! | [`folder`] | where all of it is kept, by one run at a time |
//! | [`choices`] | what of a machine the user may choose |
//! | [`tools`] | programs of this machine, and the packages to install where one is missing |
//! | [`packages`] | Debian's packages, from the mirror that this machine's apt knows, kept under `target/vm` |
//! | [`kernel`] | a kernel with its modules |
//! | [`initramfs`] | the file system of a VM: `init.sh`, modules, programs, and the job that it is booted for |
//! | [`process`] | a program that ends when this one does |
//! | [`machine`] | QEMU: its command line, its time, what it says |
//! | [`console`] | whether the kernel of a VM was content |
//! | [`harness`] | whether test programs were |

pub(crate) mod choices;
pub(crate) mod console;
pub(crate) mod folder;
pub(crate) mod harness;
pub(crate) mod initramfs;
pub(crate) mod kernel;
pub(crate) mod machine;
pub(crate) mod packages;
pub(crate) mod process;
pub(crate) mod tools;

pub(crate) use choices::Choices;
pub(crate) use folder::{Claim, FOLDER};
pub(crate) use initramfs::Initramfs;
pub(crate) use kernel::Kernel;
pub(crate) use machine::{Accel, Ended, Machine};
