//! The inputs in `corpus/` pass.

use std::fs;

use coiommu_cli_fuzz::trace;

#[test]
fn every_input_passes() {
    let mut inputs = 0;
    for entry in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/trace")).unwrap() {
        trace(&fs::read(entry.unwrap().path()).unwrap());
        inputs += 1;
    }
    assert!(inputs > 0);
}
