//! `cargo xtask fuzz wire`; without a fuzzer, a program that runs the inputs in the files it is given.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|input: &[u8]| coiommu_vfio_user_fuzz::wire(input));

#[cfg(not(fuzzing))]
fn main() -> std::io::Result<()> {
    for file in std::env::args_os().skip(1) {
        coiommu_vfio_user_fuzz::wire(&std::fs::read(file)?);
    }
    Ok(())
}
