//! A progress bar on a terminal, for traces that take a while.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::trace::Progress;

/// A bar on standard error, if that is a terminal, until it is dropped.
#[derive(Debug)]
pub(super) struct Bar {
    bar: ProgressBar,
    stop: Arc<AtomicBool>,
    drawer: Option<JoinHandle<()>>,
}

impl Bar {
    /// Nothing shows for this long: most traces are done by then.
    const PATIENCE: Duration = Duration::from_millis(300);
    const REDRAW: Duration = Duration::from_millis(100);

    /// Follows the reading of a trace.
    pub(super) fn show(progress: Progress) -> Self {
        let bar = match progress.total() {
            Some(bytes) => ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr())
                .with_style(style("{bar:40} {bytes}/{total_bytes}, {eta} left")),
            None => ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr())
                .with_style(style("{spinner} {bytes} read, {elapsed}")),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let drawer = (!bar.is_hidden()).then(|| {
            let (bar, stop) = (bar.clone(), Arc::clone(&stop));
            thread::spawn(move || {
                thread::park_timeout(Self::PATIENCE);
                while !stop.load(Relaxed) {
                    bar.set_position(progress.read());
                    bar.tick();
                    thread::park_timeout(Self::REDRAW);
                }
            })
        });
        Self { bar, stop, drawer }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(drawer) = self.drawer.take() {
            drawer.thread().unpark();
            // The bar is only for show: a drawer that panicked has said so.
            let _ = drawer.join();
        }
        self.bar.finish_and_clear();
    }
}
