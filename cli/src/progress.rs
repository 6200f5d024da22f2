//! Progress on stderr: a bar with ETA on a terminal, a plain line now and then elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

/// Time between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// One long piece of work.
pub(crate) struct Progress {
    bar: ProgressBar,
    what: String,
    lines: bool,
    start: Instant,
    last_line: Instant,
}

impl Progress {
    /// Starts a bar called `what`; `quiet` shows nothing at all.
    pub(crate) fn new(what: &str, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let target = if quiet || !terminal {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        let style = ProgressStyle::with_template(
            "{prefix:<12} [{bar:32}] {percent:>3}%  {elapsed} elapsed, {eta} left  {wide_msg}",
        );
        bar.set_style(
            style
                .expect("the template is a constant")
                .progress_chars("=> "),
        );
        bar.set_prefix(what.to_string());
        let now = Instant::now();
        Self {
            bar,
            what: what.into(),
            lines: !quiet && !terminal,
            start: now,
            last_line: now,
        }
    }

    /// Shows `done` of `total`, and what is at hand.
    pub(crate) fn set(&mut self, done: u64, total: u64, message: &str) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.bar.set_message(message.to_string());
        if self.lines && self.last_line.elapsed() >= LINE_EVERY && done > 0 {
            self.last_line = Instant::now();
            let left = self
                .start
                .elapsed()
                .mul_f64(total.saturating_sub(done) as f64 / done as f64);
            let percent = done * 100 / total.max(1);
            eprintln!(
                "{}: {percent}%, about {} s left  {message}",
                self.what,
                left.as_secs()
            );
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
    }
}
