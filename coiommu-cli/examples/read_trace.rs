//! Reads a trace of the kernel's dma events and counts what each device maps: the reader of `coiommu replay`, for analyses
//! of your own.
//!
//! `cargo run -p coiommu-cli --example read_trace -- coiommu-cli/traces/linux-7.3-nvme-e1000e.trace.zst`

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;

use coiommu_cli::trace::{Event, TraceReader};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).map(PathBuf::from).ok_or("which trace? (- for standard input)")?;
    let mut reader = TraceReader::open(&path)?;
    let mut devices: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    while let Some(record) = reader.next()? {
        if let Event::Map { segments, .. } = record.event {
            let (calls, bytes) = devices.entry(record.device.to_owned()).or_default();
            *calls += 1;
            *bytes += segments.iter().map(|segment| segment.size()).sum::<u64>();
        }
    }
    let counts = reader.finish()?;
    for (device, (calls, bytes)) in devices {
        println!("{device}: {calls} map calls, {bytes} bytes");
    }
    println!("{} lines, {} skipped", counts.lines, counts.skipped_lines);
    Ok(())
}
