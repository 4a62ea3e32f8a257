//! Figures of several runs, and what they say of each other.

use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::cache::Cache;
use crate::report::Report;

/// One thing that was measured, several times.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Row {
    /// What it is.
    pub name: &'static str,
    /// What the page cache held before every run.
    pub cache: Cache,
    /// How it was done.
    pub how: String,
    /// Bytes of each run over the time it took, in 1e9 bytes a second; `None` where no run could be measured.
    pub gb_per_s: Option<Spread>,
    /// CPU time of the process, the kernel's work for it included, for 1e9 bytes: the median.
    pub cpu_seconds_per_gb: Option<f64>,
    /// For loads: the name of the row that no load can pass.
    pub ceiling: Option<&'static str>,
    /// For loads: the median over that row's median.
    pub ceiling_fraction: Option<f64>,
    /// For loads: the most staging memory in use (pinned, for a device).
    pub peak_staging_bytes: Option<u64>,
    /// Every run.
    pub runs: Vec<Run>,
    /// Why there is no run, or no further one.
    pub why: Option<String>,
}

/// One run.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Run {
    /// Bytes it moved.
    pub bytes: u64,
    /// The time it took.
    pub seconds: f64,
    /// `bytes` by `seconds`, in 1e9 bytes a second.
    pub gb_per_s: f64,
    /// CPU time of the process meanwhile.
    pub cpu_seconds: f64,
    /// What a load says of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<Box<Report>>,
}

/// Figures of several runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The one in the middle; of an even number, the mean of the two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Spread {
    /// Returns `None` for no values.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let half = values.len() / 2;
        let lower = values[(values.len() - 1) / 2];
        Some(Spread { median: (lower + values[half]) / 2.0, min, max })
    }
}

impl Row {
    pub(super) fn new(name: &'static str, cache: Cache, how: impl Into<String>) -> Row {
        Row {
            name,
            cache,
            how: how.into(),
            gb_per_s: None,
            cpu_seconds_per_gb: None,
            ceiling: None,
            ceiling_fraction: None,
            peak_staging_bytes: None,
            runs: Vec::new(),
            why: None,
        }
    }

    /// Fills in what follows from the runs.
    pub(super) fn summarize(&mut self) {
        self.gb_per_s = Spread::of(self.runs.iter().map(|run| run.gb_per_s));
        let cpu = |run: &Run| run.cpu_seconds * 1e9 / run.bytes.max(1) as f64;
        self.cpu_seconds_per_gb = Spread::of(self.runs.iter().map(cpu)).map(|spread| spread.median);
        let reports = self.runs.iter().filter_map(|run| run.report.as_deref());
        self.peak_staging_bytes = reports.map(|report| report.peak_staging_bytes).max();
    }

    /// Compares with the best of each group of ceilings, and of those bests with the least: what all bytes pass
    /// through one after the other is as fast as the slowest of it.
    pub(super) fn compare(&mut self, groups: &[&[&Row]]) {
        let median = |row: &&Row| row.gb_per_s.map(|spread| (row.name, spread.median));
        let best = |group: &&[&Row]| group.iter().filter_map(median).max_by(|a, b| a.1.total_cmp(&b.1));
        let least = groups.iter().filter_map(best).min_by(|a, b| a.1.total_cmp(&b.1));
        self.ceiling = least.map(|(name, _)| name);
        self.ceiling_fraction = least.zip(self.gb_per_s).map(|((_, ceiling), own)| own.median / ceiling);
    }
}

/// A run being measured.
pub(super) struct Meter {
    start: Instant,
    cpu_seconds: f64,
}

impl Meter {
    pub(super) fn start() -> Meter {
        Meter { cpu_seconds: cpu_seconds(), start: Instant::now() }
    }

    pub(super) fn stop(self, bytes: u64) -> Run {
        let seconds = self.start.elapsed().as_secs_f64();
        let cpu_seconds = cpu_seconds() - self.cpu_seconds;
        let gb_per_s = bytes as f64 / seconds.max(1e-9) / 1e9;
        Run { bytes, seconds, gb_per_s, cpu_seconds, report: None }
    }

    /// A load keeps the time itself: its figure ends with the last byte, not with the collecting of tensors.
    pub(super) fn stop_load(self, report: Report) -> Run {
        let Report { bytes, seconds, gb_per_s, .. } = report;
        Run { bytes, seconds, gb_per_s, report: Some(Box::new(report)), ..self.stop(bytes) }
    }
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &'static str, gb_per_s: &[f64]) -> Row {
        let mut row = Row::new(name, Cache::Unused, "");
        let run = |gb_per_s: &f64| Run {
            bytes: 1_000_000_000,
            seconds: 1.0 / gb_per_s,
            gb_per_s: *gb_per_s,
            cpu_seconds: 0.5,
            report: None,
        };
        row.runs = gb_per_s.iter().map(run).collect();
        row.summarize();
        row
    }

    #[test]
    fn medians_of_odd_and_even_counts() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]).map(|spread| spread.median), Some(2.5));
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn the_ceiling_is_the_least_of_the_bests_and_rows_without_runs_are_none() {
        let (threads, deep, link) =
            (row("threads", &[2.0]), row("deep", &[4.0, 3.0, 5.0]), row("link", &[8.0]));
        let mut load = row("load", &[3.0]);
        load.compare(&[&[&threads, &deep], &[&link]]);
        assert_eq!((load.ceiling, load.ceiling_fraction), (Some("deep"), Some(0.75)));
        load.compare(&[&[&threads, &deep], &[&row("link", &[])]]);
        assert_eq!(load.ceiling, Some("deep"));
        load.compare(&[&[&row("none", &[])]]);
        assert_eq!((load.ceiling, load.ceiling_fraction), (None, None));
        assert_eq!(load.cpu_seconds_per_gb, Some(0.5));
    }
}
