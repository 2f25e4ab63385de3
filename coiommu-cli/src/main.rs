//! The `coiommu` program; all of it is in the library, where tests and fuzzers reach it.

use std::process::ExitCode;

fn main() -> ExitCode {
    coiommu_cli::cli::main()
}
