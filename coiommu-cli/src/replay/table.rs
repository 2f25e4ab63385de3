//! The table that a person decides from.

use std::fmt::Write;

use coiommu_dtt::PAGE_SIZE;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, CellAlignment, Table};

use super::report::{PolicyFigures, Report};
use crate::units::{bytes, grouped, size};

/// Mappings that one VFIO container has by default (`dma_entry_limit`).
const VFIO_MAPPINGS: u64 = 65_535;

/// The report as text.
pub(super) fn render(report: &Report) -> String {
    let mut text = summary(report);
    let _ = writeln!(text, "\n{}\n", figures(report));
    for note in notes(report) {
        let _ = writeln!(text, "{note}");
    }
    text
}

fn summary(report: &Report) -> String {
    let trace = &report.trace;
    format!(
        "{} events in {:.1} s: {} map calls, {} unmap calls\n\
         {} pages ({}) were mapped at some time, {} ({}) at once, {} at the end\n",
        grouped(trace.events),
        trace.seconds,
        grouped(trace.map_calls),
        grouped(trace.unmap_calls),
        grouped(trace.distinct_pages),
        bytes(trace.distinct_pages * PAGE_SIZE),
        grouped(trace.peak_mapped_pages),
        bytes(trace.peak_mapped_pages * PAGE_SIZE),
        grouped(trace.final_mapped_pages),
    )
}

fn figures(report: &Report) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([
        "policy",
        "peak\npinned",
        "of\nRAM",
        "mean\npinned",
        "of\nRAM",
        "pin\nrequests",
        "of map\ncalls",
        "IOMMU\ncalls",
        "mappings\nat peak",
        "of\n65,535",
    ]);
    let (all, whole) = (bytes(report.guest_memory_bytes), share(1.0));
    let none = || "-".to_owned();
    let mut rows = vec![vec![
        "full pinning".to_owned(),
        all.clone(),
        whole.clone(),
        all,
        whole,
        "0".to_owned(),
        share(0.0),
        none(),
        none(),
        none(),
    ]];
    rows.extend(report.policies.iter().map(|policy| row(report, policy)));
    for row in rows {
        let mut cells = row.into_iter().map(Cell::new);
        let name = cells.next();
        table.add_row(name.into_iter().chain(cells.map(|cell| cell.set_alignment(CellAlignment::Right))));
    }
    table
}

#[allow(clippy::cast_precision_loss, reason = "shares")]
fn row(report: &Report, policy: &PolicyFigures) -> Vec<String> {
    let peak = policy.peak_pinned_pages as f64;
    let mean = policy.mean_pinned_pages;
    let page = PAGE_SIZE as f64;
    vec![
        // The extent on a line, the rest on the next: the table fits more screens.
        policy.label().replacen(',', ",\n  ", 1),
        size(peak * page),
        share(report.share_of_ram(peak)),
        size(mean * page),
        share(report.share_of_ram(mean)),
        grouped(policy.pin_requests),
        share(policy.pin_requests as f64 / report.trace.map_calls.max(1) as f64),
        grouped(policy.iommu_map_calls + policy.iommu_unmap_calls),
        grouped(policy.peak_mappings),
        share(policy.peak_mappings as f64 / VFIO_MAPPINGS as f64),
    ]
}

/// What a reader has to know to trust the table, or not.
fn notes(report: &Report) -> Vec<String> {
    let trace = &report.trace;
    let mut notes = Vec::new();
    if report.memory_is_a_guess {
        let ram = bytes(report.guest_memory_bytes);
        notes.push(format!("RAM of {ram} is a guess, the highest address seen: say --memory SIZE if you know better."));
    }
    notes.push(
        "A map call without a pin request costs the guest no exit. Full pinning maps all RAM at start.".to_owned(),
    );
    for policy in &report.policies {
        if policy.failed_pins > 0 {
            let failed = grouped(policy.failed_pins);
            notes.push(format!("{}: {failed} map calls failed for want of room to pin.", policy.label()));
        }
        if policy.dma_faults > 0 {
            let faults = grouped(policy.dma_faults);
            notes.push(format!("{}: {faults} DMA faults: this is a bug of coiommu, please report it.", policy.label()));
        }
    }
    for (count, what) in [
        (trace.lost_events, "events were lost while recording: what they mapped is missing."),
        (trace.skipped_lines, "lines were skipped: not dma events, or not ones that can be played."),
        (trace.unmatched_unmaps, "unmaps were of mappings made before the trace began, or lost."),
        (report.truncated_lists, "scatter lists are cut in the trace: their ends are missing."),
    ] {
        if count > 0 {
            notes.push(format!("{} {what}", grouped(count)));
        }
    }
    notes
}

fn share(share: f64) -> String {
    let percent = share * 100.0;
    let decimals = match percent {
        _ if percent == 0.0 || percent >= 99.95 => 0,
        9.95.. => 1,
        _ => 2,
    };
    format!("{percent:.decimals$} %")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_written_for_people() {
        assert_eq!(
            [0.0, 0.0004, 0.05, 0.123, 1.0, 2.5].map(share),
            ["0 %", "0.04 %", "5.00 %", "12.3 %", "100 %", "250 %"]
        );
    }
}
