//! A progress bar, on stderr and only where that is a terminal.

use std::fmt;
use std::io::{self, IsTerminal};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use tensorhaul::Progress;

/// A bar that is gone when it is dropped, so that what is printed next begins on a clean line.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    pub(crate) fn new() -> Bar {
        if !io::stderr().is_terminal() {
            return Bar(ProgressBar::hidden());
        }
        let style = match ProgressStyle::with_template(TEMPLATE) {
            Ok(style) => style.with_key("rate", write_rate).with_key("left", write_seconds_left),
            Err(error) => unreachable!("the template is constant and good: {error}"),
        };
        let target = ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND);
        Bar(ProgressBar::with_draw_target(None, target).with_style(style))
    }

    /// Returns what a load calls with its totals.
    pub(crate) fn follow(&self) -> impl Fn(Progress) + Send + Sync + 'static {
        let bar = self.0.clone();
        move |progress| {
            if bar.length() != Some(progress.total_bytes) {
                bar.set_length(progress.total_bytes);
            }
            bar.set_position(progress.read_bytes);
        }
    }
}

/// A line that tells what is being done, gone when it is dropped.
pub(crate) struct Step(ProgressBar);

impl Step {
    pub(crate) fn new() -> Step {
        match io::stderr().is_terminal() {
            true => Step(ProgressBar::new_spinner()),
            false => Step(ProgressBar::hidden()),
        }
    }

    /// Returns what is called with each step.
    pub(crate) fn follow(&self) -> impl Fn(&str) + Send + Sync + 'static {
        let line = self.0.clone();
        move |step| {
            line.set_message(step.to_owned());
            line.tick();
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// The mean from the beginning, as in the figures of the end. The bar's own smoothed rate takes longer to come
/// near the truth than most loads take.
fn bytes_per_second(state: &ProgressState) -> f64 {
    state.pos() as f64 / state.elapsed().as_secs_f64().max(1e-9)
}

fn write_rate(state: &ProgressState, line: &mut dyn fmt::Write) {
    // A line that cannot be formatted is drawn shorter.
    let _ = write!(line, "{:.2} GB/s", bytes_per_second(state) / 1e9);
}

fn write_seconds_left(state: &ProgressState, line: &mut dyn fmt::Write) {
    let left = state.len().unwrap_or(0).saturating_sub(state.pos()) as f64 / bytes_per_second(state).max(1.0);
    let _ = write!(line, "{left:.0} s");
}

const TEMPLATE: &str = "{bar:30} {decimal_bytes} of {decimal_total_bytes}  {rate}  ETA {left}";

const DRAWS_PER_SECOND: u8 = 10;
