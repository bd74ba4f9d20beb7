//! Round trips by slices: the smallest one, the newest one, and how restless they are. Knows no queue.

use std::time::Duration;

use super::history::Sample;

/// Slices of which the median counts.
const RECENT: usize = 5;
/// Slices without which nothing is known.
const ENOUGH: usize = 3;
/// Samples of a slice: with fewer, one that overtook others would count; more would not tell more.
pub(super) const MIN_SAMPLES: usize = 16;
const MAX_SAMPLES: usize = 512;
/// Standard deviation of independent samples over the mean of their swings; queue to aim at over the former
/// (the smallest of many samples is as far below them); and the largest such queue, as a share of the round
/// trip and in seconds.
const NOISE_SCALE: f64 = 2.0;
const NOISE_TARGET: f64 = 5.0;
const NOISE: f64 = 0.25;
const NOISE_FLOOR: f64 = 0.01;
/// Weight of the newest slice in what is noise.
const NEWEST: f64 = 1.0 / 16.0;

/// A fraction of a round trip: its samples, of which the median counts.
#[derive(Clone, Debug)]
pub(super) struct Slice {
    pub(super) began: Duration,
    pub(super) samples: Vec<Sample>,
    pub(super) limited: bool,
}

impl Slice {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            began: now,
            samples: Vec::new(),
            limited: false,
        }
    }

    pub(super) fn restart(&mut self, now: Duration) {
        self.began = now;
        self.samples.clear();
        self.limited = false;
    }

    pub(super) fn add(&mut self, sample: Sample) {
        if self.samples.len() < MAX_SAMPLES {
            self.samples.push(sample);
        }
    }

    /// The sample whose round trip is the first quartile: packets that wait for others to be acknowledged
    /// with them do not count, nor do those that overtake others.
    /// With it, the distance of the quartiles.
    pub(super) fn typical(&mut self) -> Option<(Sample, f64)> {
        let last = self.samples.len().checked_sub(1)?;
        let order = |a: &Sample, b: &Sample| a.rtt.total_cmp(&b.rtt);
        let (_, upper, _) = self.samples.select_nth_unstable_by(last * 3 / 4, order);
        let upper = upper.rtt;
        let (_, typical, _) = self.samples.select_nth_unstable_by(last / 4, order);
        Some((*typical, upper - typical.rtt))
    }
}

/// See the module's text. In seconds.
#[derive(Clone, Debug)]
pub(super) struct RoundTrips {
    /// The smallest median of a few slices; infinite while nothing is known.
    pub(super) min: f64,
    /// The newest slice's.
    pub(super) newest: f64,
    /// How much that goes to and fro from slice to slice: noise that is no queue.
    pub(super) noise: f64,
    last_change: f64,
    /// Distance of the quartiles within slices, as jitter makes it.
    spread: f64,
    slices: usize,
    /// The newest slices', newest first.
    recent: [f64; RECENT],
}

impl RoundTrips {
    pub(super) fn new() -> Self {
        Self {
            min: f64::INFINITY,
            newest: 0.0,
            noise: 0.0,
            last_change: 0.0,
            spread: 0.0,
            slices: 0,
            recent: [0.0; RECENT],
        }
    }

    /// Takes in a slice's round trip and its spread; the median of the last few. The smallest one is the
    /// smallest of these, so that neither noise nor an acknowledgement that overtakes others makes it too
    /// small.
    pub(super) fn note(&mut self, rtt: f64, spread: f64) -> f64 {
        if self.slices > 0 {
            self.note_noise(rtt - self.newest);
        }
        self.spread += (spread - self.spread) * NEWEST;
        self.newest = rtt;
        self.recent.rotate_right(1);
        self.recent[0] = rtt;
        self.slices += 1;
        let mut recent = self.recent;
        let known = &mut recent[..self.slices.min(RECENT)];
        known.sort_unstable_by(f64::total_cmp);
        let median = known[known.len() / 2];
        self.min = match self.slices {
            0..ENOUGH => f64::INFINITY,
            ENOUGH..RECENT => median,
            _ => self.min.min(median),
        };
        median
    }

    /// A queue that grows or drains changes the round trip one way; what goes to and fro is noise.
    fn note_noise(&mut self, change: f64) {
        let last = std::mem::replace(&mut self.last_change, change);
        let swing = if change * last < 0.0 {
            change.abs().min(last.abs())
        } else {
            0.0
        };
        self.noise += (NOISE_SCALE * swing - self.noise) * NEWEST;
    }

    /// The queue below which nothing can be told from noise.
    pub(super) fn unrest(&self) -> f64 {
        let most = (NOISE * self.min).max(NOISE_FLOOR);
        (NOISE_TARGET * self.noise).max(self.spread).min(most)
    }
}
