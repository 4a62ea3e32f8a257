//! How many requests to keep in flight: more for as long as more bring more bytes a second.

use std::time::{Duration, Instant};

/// Doubles the depth while that pays, then stays.
///
/// A disk's best depth is its throughput times its latency (Little's law), and neither is known before
/// reading. Too shallow starves it; too deep only pins more pages, so the search goes up from a depth
/// that any local disk needs and stops at the first doubling that brings less than [`GAIN_MIN`].
#[derive(Debug)]
pub(crate) struct Pacer {
    depth: u32,
    depth_max: u32,
    settled: bool,
    /// Bytes a second at half the depth.
    rate_before: f64,
    window: Option<(Instant, u64, u32)>,
}

impl Pacer {
    pub(crate) fn new(depth: u32, depth_max: u32) -> Pacer {
        Pacer {
            depth: depth.min(depth_max),
            depth_max,
            settled: depth >= depth_max,
            rate_before: 0.0,
            window: None,
        }
    }

    /// Returns how many requests may be in flight now.
    pub(crate) fn depth(&self) -> u32 {
        self.depth
    }

    /// Takes note of bytes that arrived.
    pub(crate) fn arrived(&mut self, len_bytes: u64, now: Instant) {
        if self.settled {
            return;
        }
        let (since, bytes, requests) = self.window.get_or_insert((now, 0, 0));
        *bytes += len_bytes;
        *requests += 1;
        let elapsed = now - *since;
        // Two turns of the whole depth, so that what was queued at the old depth no longer counts.
        if *requests >= 2 * self.depth && elapsed >= WINDOW_MIN {
            let rate = *bytes as f64 / elapsed.as_secs_f64();
            self.window = None;
            self.judge(rate);
        }
    }

    fn judge(&mut self, rate: f64) {
        if rate < self.rate_before * GAIN_MIN {
            (self.depth, self.settled) = (self.depth / 2, true);
        } else if self.depth >= self.depth_max {
            self.settled = true;
        } else {
            (self.rate_before, self.depth) = (rate, (self.depth * 2).min(self.depth_max));
        }
    }
}

/// Shorter windows measure the scheduler, not the disk.
const WINDOW_MIN: Duration = Duration::from_millis(10);

/// A doubling that brings less than 5% is noise.
const GAIN_MIN: f64 = 1.05;

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds a pacer from a disk with this latency and limit until it settles; returns the depth.
    fn settles_at(latency_us: f64, limit_bytes_per_us: f64) -> u32 {
        let mut pacer = Pacer::new(8, 128);
        let mut now = Instant::now();
        for _ in 0..100_000 {
            let rate = (f64::from(pacer.depth()) * REQUEST as f64 / latency_us).min(limit_bytes_per_us);
            now += Duration::from_nanos((REQUEST as f64 / rate * 1000.0) as u64);
            pacer.arrived(REQUEST, now);
        }
        pacer.depth()
    }

    const REQUEST: u64 = 1 << 20;

    #[test]
    fn depth_grows_until_the_disk_is_the_limit() {
        // 1 MiB in 1 ms each, 64 at once: 67 GB/s; the limit is 20 GB/s, which takes 20 in flight.
        assert_eq!(settles_at(1000.0, 20_000.0), 32);
        // A slow disk is full at the first depth.
        assert_eq!(settles_at(1000.0, 2_000.0), 8);
        // A network with 50 ms wants all it can get.
        assert_eq!(settles_at(50_000.0, 20_000.0), 128);
    }
}
