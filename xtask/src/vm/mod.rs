//! Virtual machines to test in: a Debian kernel, a file system made for one run, QEMU, and judges of what came out.
//!
//! | file | what |
//! | --- | --- |
//! | [`folder`] | where all of it is kept, by one run at a time |
//! | [`choices`] | what of a machine the user may choose |
//! | [`tools`] | programs of this machine, and the packages to install where one is missing |
//! | [`packages`] | Debian's packages, from the mirror that this machine's apt knows, kept under `target/vm` |
//! | [`tree`] | another Debian release in a folder: a newer emulator, headers and compilers of kernels |
//! | [`emulator`] | QEMU: which one, and how it is started |
//! | [`kernel`] | a kernel with its modules |
//! | [`initramfs`] | the file system of a VM: `init.sh`, modules, programs, and the job that it is booted for |
//! | [`process`] | a program that ends when this one does |
//! | [`machine`] | QEMU: its command line, its time, what it says |
//! | [`monitor`] | QEMU's monitor: a machine is stopped and goes on |
//! | [`console`] | whether the kernel of a VM was content |
//! | [`harness`] | whether test programs were |

pub(crate) mod choices;
pub(crate) mod console;
pub(crate) mod emulator;
pub(crate) mod folder;
pub(crate) mod harness;
pub(crate) mod initramfs;
pub(crate) mod kernel;
pub(crate) mod machine;
pub(crate) mod monitor;
pub(crate) mod packages;
pub(crate) mod process;
pub(crate) mod tools;
pub(crate) mod tree;

pub(crate) use choices::Choices;
pub(crate) use emulator::Emulator;
pub(crate) use folder::{Claim, FOLDER};
pub(crate) use initramfs::Initramfs;
pub(crate) use kernel::Kernel;
pub(crate) use machine::{Accel, Answer, Ended, Machine};
pub(crate) use monitor::Monitor;
pub(crate) use tree::Tree;
