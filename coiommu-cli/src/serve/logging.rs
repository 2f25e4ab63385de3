//! Where logs go: to standard error, as text or as JSON lines; and that nobody can fill them.

use std::env;
use std::io::{IsTerminal as _, stderr};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::anyhow;
use clap::ValueEnum;
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer};

/// How logs look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people
    Text,
    /// A JSON object a line
    Json,
}

/// Starts logging, for the libraries' messages too. What the environment's RUST_LOG says is logged, or what is worth an
/// administrator's time.
pub(crate) fn start(format: LogFormat) -> anyhow::Result<()> {
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env()?;
    let filter =
        if env::var_os(EnvFilter::DEFAULT_ENV).is_some() { filter } else { filter.add_directive(QUIET.parse()?) };
    let logs = tracing_subscriber::fmt::layer().with_ansi(stderr().is_terminal()).with_writer(stderr);
    let logs = match format {
        LogFormat::Text => logs.with_target(false).boxed(),
        LogFormat::Json => logs.json().flatten_event(true).boxed(),
    };
    let all = tracing_subscriber::registry().with(filter).with(Limit::new()).with(logs);
    all.try_init().map_err(|error| anyhow!("cannot start logging: {error}"))
}

/// It cannot take a group out of a container while a VMM has a device of it, which is as it should be, and calls that an error.
const QUIET: &str = "vfio_ioctls=off";

/// So many messages may come at once from one place in the code, and one a second from then on: what a guest or a VMM
/// does over and over is not told over and over, and keeps nothing else from being told.
const AT_ONCE: NonZeroU32 = NonZeroU32::new(100).expect("it is not 0");
const A_SECOND: NonZeroU32 = NonZeroU32::MIN;

/// What is said about the limit has none.
const OF_THE_LIMIT: &str = "coiommu_cli::limit";

/// Lets so many messages pass, and says how many it did not.
struct Limit {
    /// By place; there are as many as the program has.
    places: DefaultKeyedRateLimiter<Identifier>,
    left_out: AtomicU64,
}

impl Limit {
    fn new() -> Self {
        let places = RateLimiter::keyed(Quota::per_second(A_SECOND).allow_burst(AT_ONCE));
        Self { places, left_out: AtomicU64::new(0) }
    }
}

impl<S: Subscriber> Layer<S> for Limit {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        if event.metadata().target() == OF_THE_LIMIT {
            return true;
        }
        // Who asks for more than these levels wants all of it.
        let is_limited = *event.metadata().level() <= Level::INFO;
        if is_limited && self.places.check_key(&event.metadata().callsite()).is_err() {
            self.left_out.fetch_add(1, Relaxed);
            return false;
        }
        let left_out = self.left_out.swap(0, Relaxed);
        if left_out > 0 {
            tracing::warn!(target: OF_THE_LIMIT, "{left_out} messages were left out: there were too many");
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_flood_is_cut_off_and_said() {
        let lines = Lines::default();
        let writer = lines.clone();
        let logs = tracing_subscriber::fmt::layer().with_writer(move || writer.clone()).with_ansi(false);
        // Global, as the program's: what a layer says of itself is heard only then.
        tracing_subscriber::registry().with(Limit::new()).with(logs).init();
        for n in 0..1000 {
            tracing::warn!("no {n}");
        }
        tracing::warn!("this is something else");
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let count = text.lines().filter(|line| line.contains("no ")).count();
        // One a second, on a machine however slow.
        assert!((100..200).contains(&count), "{count}");
        assert!(text.contains(" messages were left out"), "{text}");
        assert!(text.contains("this is something else"), "{text}");
    }
}
