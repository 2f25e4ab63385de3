//! The inputs of a target: those that a fuzzer found, and those written by hand, which are among them.

use std::fs;
use std::path::Path;

/// Inputs written by hand, in pieces, each with a name.
pub type Seeds = &'static [(&'static str, &'static [&'static [u8]])];

/// Runs a target with every input in a folder, where there are as many as seeds at least.
///
/// # Panics
///
/// If the target does, or the folder cannot be read.
pub fn run_all(folder: &str, target: impl Fn(&[u8]), seeds: Seeds) {
    let mut inputs = 0;
    for entry in fs::read_dir(folder).expect(folder) {
        target(&fs::read(entry.expect(folder).path()).expect(folder));
        inputs += 1;
    }
    assert!(inputs >= seeds.len(), "{folder}");
}

/// Compares the seeds with the files that they are in; with `SEEDS` in the environment, writes them before.
///
/// # Panics
///
/// If a seed is not in the folder, or is another there.
pub fn check_seeds(folder: &str, seeds: Seeds) {
    for (name, pieces) in seeds {
        let input = pieces.concat();
        let file = Path::new(folder).join(format!("seed-{name}"));
        if std::env::var_os("SEEDS").is_some() {
            fs::write(&file, &input).expect(name);
        }
        assert_eq!(fs::read(&file).expect(name), input, "{name}");
    }
}
