//! `coiommu top`: what a server has pinned, as it changes.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::text::Line;
use ratatui::widgets::{Block, Gauge, Paragraph, RenderDirection, Sparkline, Wrap};
use ratatui::{DefaultTerminal, Frame};

use crate::control::{Code, Command, Failure, Stats};
use crate::ctl::client::Client;

/// Show what a `coiommu serve` has pinned, as it changes
///
/// It goes on from one VMM to the next, if the server does. q ends it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: coiommu top --control /run/vm1.ctl")]
pub struct Args {
    /// The server's control socket
    #[arg(long, value_name = "PATH")]
    control: PathBuf,

    /// From one look to the next, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = parse_interval)]
    interval: f64,
}

fn parse_interval(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.ok_or_else(|| "expected seconds, 0.1 to 3600".to_owned())
}

/// Shows it until somebody has seen enough.
///
/// # Errors
///
/// There is no server, or it has ended, or there is no terminal.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut client = Client::connect(&args.control)?;
    // What is wrong is better said on a terminal that is as it was.
    let mut history = History::new(look(&mut client)?);
    let mut terminal = ratatui::try_init()?;
    let shown = show(&mut terminal, &mut client, &mut history, Duration::from_secs_f64(args.interval));
    ratatui::restore();
    shown
}

/// The figures, if a VMM is connected.
fn look(client: &mut Client) -> anyhow::Result<Option<Stats>> {
    let is_no_guest = |failure: &Failure| failure.code == Code::NoGuest;
    match client.ask(Command::Stats) {
        Err(error) if error.downcast_ref().is_some_and(is_no_guest) => Ok(None),
        stats => stats.map(Some),
    }
}

fn show(
    terminal: &mut DefaultTerminal,
    client: &mut Client,
    history: &mut History,
    interval: Duration,
) -> anyhow::Result<()> {
    let mut next = Instant::now() + interval;
    loop {
        terminal.draw(|frame| draw(frame, history))?;
        while event::poll(next.saturating_duration_since(Instant::now()))? {
            match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Press && is_end(key.code, key.modifiers) => return Ok(()),
                _ => terminal.draw(|frame| draw(frame, history)).map(drop)?,
            }
        }
        history.add(look(client)?);
        next = Instant::now() + interval;
    }
}

fn is_end(code: KeyCode, modifiers: KeyModifiers) -> bool {
    matches!(code, KeyCode::Char('q') | KeyCode::Esc)
        || code == KeyCode::Char('c') && modifiers.contains(KeyModifiers::CONTROL)
}

/// Figures of now and of before.
#[derive(Debug)]
struct History {
    /// None: no VMM is connected.
    now: Option<Stats>,
    at: Instant,
    /// A second, since the look before.
    requests: f64,
    unpinned: f64,
    /// Pinned bytes, the newest first.
    pinned: VecDeque<u64>,
}

impl History {
    /// As many as any terminal is wide.
    const LOOKS: usize = 500;

    fn new(now: Option<Stats>) -> Self {
        let pinned = VecDeque::from([pinned_bytes(now.as_ref())]);
        Self { now, at: Instant::now(), requests: 0.0, unpinned: 0.0, pinned }
    }

    fn add(&mut self, now: Option<Stats>) {
        let seconds = self.at.elapsed().as_secs_f64();
        let both = now.as_ref().zip(self.now.as_ref());
        let rate = |of: fn(&Stats) -> u64| {
            both.map_or(0.0, |(now, before)| per_second(of(now).saturating_sub(of(before)), seconds))
        };
        (self.requests, self.unpinned) = (rate(requests), rate(unpinned));
        self.pinned.push_front(pinned_bytes(now.as_ref()));
        self.pinned.truncate(Self::LOOKS);
        (self.now, self.at) = (now, Instant::now());
    }
}

fn pinned_bytes(stats: Option<&Stats>) -> u64 {
    stats.map_or(0, |stats| stats.pinned_bytes)
}

#[allow(clippy::cast_precision_loss, reason = "for people to look at")]
fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

fn requests(stats: &Stats) -> u64 {
    stats.requests_pinned + stats.requests_failed + stats.requests_refused + stats.requests_timed_out
}

fn unpinned(stats: &Stats) -> u64 {
    stats.pages_unpinned_idle + stats.pages_unpinned_for_room + stats.pages_unpinned_forced
}

fn draw(frame: &mut Frame<'_>, history: &History) {
    let areas = Layout::vertical([Constraint::Length(3), Constraint::Min(3), Constraint::Length(10)]);
    let [gauge, curve, figures] = areas.areas(frame.area());
    let (pinned, all) = history.now.as_ref().map_or((0, 0), |stats| (stats.pinned_bytes, stats.guest_memory_bytes));
    let share = share(pinned, all);
    let label = format!("{:.1} of {:.0} MiB", mib(pinned), mib(all));
    frame.render_widget(Gauge::default().block(Block::bordered().title("pinned")).ratio(share).label(label), gauge);
    let line = Sparkline::default().direction(RenderDirection::RightToLeft).data(&history.pinned);
    frame.render_widget(line.block(Block::bordered().title("over time")), curve);
    let lines: Vec<Line<'_>> = figures_of(history).into_iter().map(Line::from).collect();
    frame.render_widget(
        Paragraph::new(lines).wrap(Wrap { trim: true }).block(Block::bordered().title("q ends")),
        figures,
    );
}

fn figures_of(History { now, requests, unpinned, .. }: &History) -> Vec<String> {
    let Some(now) = now else { return vec!["no VMM is connected".to_owned()] };
    let state = match (&now.failure, now.active) {
        (Some(failure), _) => format!("the workers have ended: {failure}"),
        (None, true) => "the guest's driver is active".to_owned(),
        (None, false) => "the guest's driver is not active".to_owned(),
    };
    let mut lines = vec![
        state,
        format!("policy     {}", now.policy),
        format!("mappings   {}", now.mappings),
        format!(
            "requests   {requests:.0} a second; {} pinned, {} failed, {} refused, {} timed out",
            now.requests_pinned, now.requests_failed, now.requests_refused, now.requests_timed_out
        ),
        format!("answers    {} us p50, {} us p99 since the VMM connected", now.answer_p50_us, now.answer_p99_us),
        format!(
            "unpinned   {unpinned:.0} pages a second; {} idle, {} for room, {} by force",
            now.pages_unpinned_idle, now.pages_unpinned_for_room, now.pages_unpinned_forced
        ),
        format!("parked     {:.1} s; anomalies {}", now.parked_seconds, now.anomalies),
    ];
    if !now.passed.is_empty() {
        let devices = now.passed.iter().map(|device| format!("{} {}", device.host, device.bus_mastering()));
        lines.push(format!("DMA        {}", devices.collect::<Vec<_>>().join(", ")));
    }
    lines
}

#[allow(clippy::cast_precision_loss, reason = "for people to look at")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { (mib(part) / mib(whole)).clamp(0.0, 1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use crate::control::Passed;

    fn stats(pinned_bytes: u64, requests_pinned: u64) -> Stats {
        Stats { pinned_bytes, requests_pinned, guest_memory_bytes: 4 << 20, ..Stats::default() }
    }

    fn screen(history: &History, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, history)).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn it_shows_what_is_pinned() {
        let mut history = History::new(Some(stats(1 << 20, 0)));
        assert!(screen(&history, 80, 24).contains("1.0 of 4 MiB"));
        std::thread::sleep(Duration::from_millis(10));
        history.add(Some(stats(3 << 20, 5)));
        assert!(history.requests > 0.0 && history.requests < 500.0);
        assert!(screen(&history, 80, 24).contains("3.0 of 4 MiB"));
        assert_eq!(history.pinned, [3 << 20, 1 << 20]);
    }

    #[test]
    fn it_shows_which_devices_may_do_dma() {
        let passed =
            Passed { host: "0000:03:00.0".into(), guest: "00:05.0".into(), bus_master_wished: true, bus_master: false };
        let history = History::new(Some(Stats { passed: vec![passed], ..stats(0, 0) }));
        assert!(screen(&history, 80, 24).contains("0000:03:00.0 held"));
    }

    #[test]
    fn vmms_come_and_go() {
        let mut history = History::new(None);
        assert!(screen(&history, 80, 24).contains("no VMM is connected"));
        history.add(Some(stats(1 << 20, 7)));
        assert!(history.requests.abs() < f64::EPSILON, "those were before");
        let shown = screen(&history, 80, 24);
        assert!(shown.contains("1.0 of 4 MiB") && shown.contains("since the VMM connected"), "{shown}");
        history.add(None);
        let shown = screen(&history, 80, 24);
        assert!(shown.contains("no VMM is connected") && shown.contains("0.0 of 0 MiB"), "{shown}");
        assert_eq!(history.pinned, [0, 1 << 20, 0]);
    }

    #[test]
    fn a_terminal_may_have_any_size() {
        let history = History::new(Some(stats(0, 0)));
        for (width, height) in [(1, 1), (2, 40), (300, 2), (20, 20)] {
            screen(&history, width, height);
        }
        assert!((share(5, 0), share(9, 3)) == (0.0, 1.0));
    }
}
