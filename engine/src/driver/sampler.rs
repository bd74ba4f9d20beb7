//! Samples of the work that a guest has done, at a steady interval, in bounded memory.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Time between two samples, before any thinning.
pub const INTERVAL: Duration = Duration::from_millis(10);

/// Samples kept at the most; when they are reached every second one goes and the interval doubles.
const MOST: usize = 1 << 16;

/// A growing series of (time, work done).
#[derive(Debug)]
pub struct Sampler {
    samples: Mutex<Samples>,
}

#[derive(Debug)]
struct Samples {
    kept: Vec<(Instant, u64)>,
    interval: Duration,
}

impl Default for Sampler {
    fn default() -> Self {
        Self {
            samples: Mutex::new(Samples {
                kept: Vec::new(),
                interval: INTERVAL,
            }),
        }
    }
}

impl Sampler {
    /// Takes note of the work done by `now`. Calls that come sooner than the interval count for
    /// nothing.
    pub fn note(&self, now: Instant, work: u64) {
        let mut samples = self
            .samples
            .lock()
            .expect("no holder of the samples panics");
        let interval = samples.interval;
        if samples
            .kept
            .last()
            .is_some_and(|(last, _)| now < *last + interval * 9 / 10)
        {
            return;
        }
        samples.kept.push((now, work));
        if samples.kept.len() >= MOST {
            let mut index = 0;
            samples.kept.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            samples.interval *= 2;
        }
    }

    /// Work per second between neighbouring samples, as (time of the later one, rate).
    pub fn rates(&self) -> Vec<(Instant, f64)> {
        self.rates_between(None)
    }

    /// The same from the first sample at or after `start`: a guest that is loaded brings the count
    /// of what it did elsewhere, which is no work of this host's.
    pub fn rates_since(&self, start: Instant) -> Vec<(Instant, f64)> {
        self.rates_between(Some(start))
    }

    fn rates_between(&self, start: Option<Instant>) -> Vec<(Instant, f64)> {
        let samples = self
            .samples
            .lock()
            .expect("no holder of the samples panics");
        samples
            .kept
            .windows(2)
            .filter(|pair| pair[1].0 > pair[0].0 && start.is_none_or(|start| pair[0].0 >= start))
            .map(|pair| {
                let span = pair[1].0 - pair[0].0;
                let work = pair[1].1.saturating_sub(pair[0].1);
                (pair[1].0, work as f64 / span.as_secs_f64())
            })
            .collect()
    }

    /// Mean work per second from `from` to `to`, if there are samples around both.
    pub fn mean_rate(&self, from: Instant, to: Instant) -> Option<f64> {
        let samples = self
            .samples
            .lock()
            .expect("no holder of the samples panics");
        let mut within = samples
            .kept
            .iter()
            .filter(|(at, _)| (from..=to).contains(at));
        let first = within.next()?;
        let last = within.next_back()?;
        let span = last.0.duration_since(first.0).as_secs_f64();
        (span > 0.0).then(|| last.1.saturating_sub(first.1) as f64 / span)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_come_from_neighbours() {
        let sampler = Sampler::default();
        let start = Instant::now();
        for step in 0..5_u32 {
            sampler.note(start + INTERVAL * step, u64::from(step) * 100);
        }
        let rates = sampler.rates();
        assert_eq!(rates.len(), 4);
        assert!(rates.iter().all(|(_, rate)| (rate - 10_000.0).abs() < 1e-6));
        let mean = sampler
            .mean_rate(start, start + INTERVAL * 4)
            .expect("samples on both ends");
        assert!((mean - 10_000.0).abs() < 1e-6);
    }

    #[test]
    fn what_was_done_elsewhere_does_not_count() {
        let sampler = Sampler::default();
        let start = Instant::now();
        sampler.note(start, 0);
        for step in 1..4_u32 {
            sampler.note(start + INTERVAL * step, 1_000_000 + u64::from(step) * 100);
        }
        let rates = sampler.rates_since(start + INTERVAL);
        assert_eq!(rates.len(), 2);
        assert!(rates.iter().all(|(_, rate)| (rate - 10_000.0).abs() < 1e-6));
    }

    #[test]
    fn memory_is_bounded_and_the_span_kept() {
        let sampler = Sampler::default();
        let start = Instant::now();
        let count = 4 * MOST as u32;
        for step in 0..count {
            sampler.note(start + INTERVAL * step, u64::from(step));
        }
        let rates = sampler.rates();
        assert!(rates.len() < MOST);
        let last = rates.last().expect("samples").0;
        assert!(last > start + INTERVAL * (count - 64));
    }
}
