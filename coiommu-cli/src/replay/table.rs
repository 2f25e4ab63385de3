//! The table that a person decides from.

use std::fmt::Write;

use coiommu_dtt::PAGE_SIZE;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, CellAlignment, Table};

use super::report::{PolicyFigures, Report};

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

#[allow(clippy::cast_precision_loss, reason = "for people")]
fn bytes(bytes: u64) -> String {
    size(bytes as f64)
}

/// Bytes for people.
#[allow(clippy::cast_precision_loss, reason = "for people")]
pub(super) fn size(bytes: f64) -> String {
    let (unit, name) = [(1_u64 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")]
        .into_iter()
        .find(|(unit, _)| bytes >= *unit as f64)
        .unwrap_or((1 << 10, "KiB"));
    let value = bytes / unit as f64;
    let decimals = if value >= 99.95 || value == 0.0 { 0 } else { 1 };
    format!("{value:.decimals$} {name}")
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

/// A number with commas.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(
            [0, 7, 999, 1000, 65_535, 1_234_567].map(grouped),
            ["0", "7", "999", "1,000", "65,535", "1,234,567"]
        );
        let sizes = [0.0, 512.0, 4096.0, 99.96 * 1024.0, 1048576.0, 1.5 * 1073741824.0, 1e15];
        assert_eq!(sizes.map(size), ["0 KiB", "0.5 KiB", "4.0 KiB", "100 KiB", "1.0 MiB", "1.5 GiB", "909 TiB"]);
        assert_eq!(
            [0.0, 0.0004, 0.05, 0.123, 1.0, 2.5].map(share),
            ["0 %", "0.04 %", "5.00 %", "12.3 %", "100 %", "250 %"]
        );
    }
}
