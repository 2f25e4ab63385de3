//! Pinned memory over time, as a drawing.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow};
use coiommu_dtt::PAGE_SIZE;
use plotters::prelude::*;
use tempfile::NamedTempFile;

use super::report::Report;
use crate::units::size;

const SIZE: (u32, u32) = (1000, 560);
/// Full pinning is black; these are told apart by people who see no red or green too.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(213, 94, 0),
    RGBColor(86, 180, 233),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
];

/// A drawing that is to be: a file beside the one it will replace.
#[derive(Debug)]
pub(super) struct Drawing<'a> {
    file: &'a Path,
    draft: NamedTempFile,
}

impl<'a> Drawing<'a> {
    /// Makes sure that there will be a place for it.
    ///
    /// # Errors
    ///
    /// No file can be made there.
    pub(super) fn create(file: &'a Path) -> anyhow::Result<Self> {
        let folder = file.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
        let draft = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .with_context(|| format!("cannot draw {}", file.display()))?;
        Ok(Self { file, draft })
    }

    /// Draws one line a policy, and full pinning.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub(super) fn draw(mut self, report: &Report) -> anyhow::Result<()> {
        let mut svg = String::new();
        // The library's errors borrow from the drawing.
        render(report, &mut svg).map_err(|error| anyhow!("cannot draw {}: {error}", self.file.display()))?;
        let written = self.draft.write_all(svg.as_bytes());
        written
            .and_then(|()| Ok(self.draft.persist(self.file)?))
            .with_context(|| format!("cannot draw {}", self.file.display()))?;
        Ok(())
    }
}

#[allow(clippy::cast_precision_loss, reason = "a drawing")]
fn render(report: &Report, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let seconds = report.trace.seconds.max(1e-6);
    let most = report.policies.iter().map(|policy| policy.peak_pinned_pages * PAGE_SIZE).max().unwrap_or(0);
    let ram = report.guest_memory_bytes;
    // Full pinning dwarfs everything: a logarithmic scale shows both.
    let scale = (PAGE_SIZE as f64..most.max(ram).max(PAGE_SIZE) as f64 * 2.0).log_scale().base(4.0);
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("Memory pinned for the devices", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(80)
        .build_cartesian_2d(0.0..seconds, scale)?;
    chart
        .configure_mesh()
        .x_desc("seconds since the trace's first event")
        .y_desc("pinned (logarithmic)")
        .y_label_formatter(&|bytes| size(*bytes))
        .draw()?;
    let whole = [(0.0, ram as f64), (seconds, ram as f64)];
    chart
        .draw_series(LineSeries::new(whole, BLACK.stroke_width(2)))?
        .label("full pinning")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], BLACK.stroke_width(2)));
    for (policy, colour) in report.policies.iter().zip(COLOURS.into_iter().cycle()) {
        chart
            .draw_series(LineSeries::new(steps(&policy.curve, seconds), colour.stroke_width(2)))?
            .label(policy.label())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}

/// A curve of pages as corners of steps in bytes; nothing pinned is drawn at the scale's end, a page.
#[allow(clippy::cast_precision_loss, reason = "a drawing")]
fn steps(curve: &[(Duration, u64)], end: f64) -> Vec<(f64, f64)> {
    let mut corners: Vec<(f64, f64)> = Vec::new();
    for &(at, pages) in curve {
        let (x, y) = (at.as_secs_f64().min(end), (pages.max(1) * PAGE_SIZE) as f64);
        match corners.last() {
            Some(&(_, before)) if before == y => {}
            Some(&(_, before)) => corners.extend([(x, before), (x, y)]),
            None => corners.push((x, y)),
        }
    }
    if let Some(&(_, last)) = corners.last() {
        corners.push((end, last));
    }
    corners
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_drawn_in_steps_to_the_end() {
        let second = Duration::from_secs;
        let corners = steps(&[(second(0), 1), (second(1), 1), (second(2), 3), (second(9), 0)], 8.0);
        assert_eq!(
            corners,
            [(0.0, 4096.0), (2.0, 4096.0), (2.0, 12288.0), (8.0, 12288.0), (8.0, 4096.0), (8.0, 4096.0)]
        );
        assert!(steps(&[], 1.0).is_empty());
    }
}
