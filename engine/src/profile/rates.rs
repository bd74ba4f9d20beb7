//! How often the blocks of a level are written and accessed: counted, not assumed.
//!
//! Of n blocks that had level h at one scan, d were written by the next, τ seconds later. If each block of a
//! level is written by a Poisson process of rate w, the likelihood of all such counts is
//! `∏ (1 − e^(−wτ))^d · e^(−wτ(n−d))`, and the w that makes it greatest is the estimate
//! (unequal intervals are what scans within rounds and at their ends give). Accesses are estimated in the same
//! way from samples of blocks that were watched.
//!
//! Levels with few blocks borrow from those like them (as recent, as often), and what was never counted
//! is guessed from the bits themselves.

use std::collections::VecDeque;

/// Levels.
pub const LEVELS: usize = 256;
/// Level of a block that was read lately and not written (disks).
pub const READ: u8 = 1;
/// Intervals of a level that are remembered: a guest changes what it does.
const REMEMBERED: usize = 6;
/// Blocks that a level must have been counted on, to be believed by itself.
const ENOUGH: f64 = 24.0;
/// Accesses per write where reads were not seen: most memory is read more often than it is written.
const ACCESSES_PER_WRITE: f64 = 3.0;
/// Accesses per second of a block that was not written lately, where reads were not seen.
const COLD_ACCESSES: f64 = 0.002;
/// Seconds in which a block of a disk that counts as read lately was read at least once.
const READ_WITHIN: f64 = 60.0;
/// Blocks that a guess counts for, beside those that were counted.
const PRIOR: f64 = 8.0;
/// The greatest rate that is told apart from "always", per second.
const FASTEST: f64 = 1e4;

/// Blocks of one level over one interval.
#[derive(Clone, Copy, Debug)]
struct Count {
    seconds: f64,
    blocks: f64,
    hits: f64,
}

/// Counts of each level.
#[derive(Clone, Debug)]
struct Counts(Vec<VecDeque<Count>>);

impl Default for Counts {
    fn default() -> Self {
        Self(vec![VecDeque::new(); LEVELS])
    }
}

impl Counts {
    fn note(&mut self, blocks: &[u64], hits: &[u64], seconds: f64) {
        for (level, counts) in self.0.iter_mut().enumerate() {
            let (all, hit) = (blocks[level], hits[level].min(blocks[level]));
            if all == 0 {
                continue;
            }
            if counts.len() == REMEMBERED {
                counts.pop_front();
            }
            counts.push_back(Count {
                seconds: seconds.max(1e-3),
                blocks: all as f64,
                hits: hit as f64,
            });
        }
    }

    /// The rate of a level by its own counts, by those of levels like it, or not at all.
    fn rate(&self, level: usize, prior: Count) -> Option<f64> {
        let own = &self.0[level];
        if blocks(own) >= ENOUGH {
            return Some(likeliest(own.iter().chain([&prior])));
        }
        let alike = |other: &usize| kin(*other as u8) == kin(level as u8);
        let pooled = (0..LEVELS).filter(alike).flat_map(|other| &self.0[other]);
        let pooled: Vec<Count> = pooled.copied().collect();
        (pooled.iter().map(|count| count.blocks).sum::<f64>() >= ENOUGH)
            .then(|| likeliest(pooled.iter().chain([&prior])))
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(VecDeque::is_empty)
    }
}

fn blocks(counts: &VecDeque<Count>) -> f64 {
    counts.iter().map(|count| count.blocks).sum()
}

/// Levels that are alike: written as lately, and as often.
fn kin(level: u8) -> (u32, u32) {
    (level.leading_zeros(), level.count_ones())
}

/// The rate under which the counts are likeliest.
fn likeliest<'a>(counts: impl Iterator<Item = &'a Count> + Clone) -> f64 {
    let exposure: f64 = counts.clone().map(|c| c.blocks * c.seconds).sum();
    let hits: f64 = counts.clone().map(|c| c.hits).sum();
    if hits <= 0.0 {
        // None in all that time: a third of what would have shown with 63 %.
        return 0.3 / exposure.max(1e-9);
    }
    // Half a block that was not hit keeps "all of them" finite.
    let slope = |rate: f64| -> f64 {
        counts
            .clone()
            .map(|c| {
                let hits = c.hits.min(c.blocks - 0.5).max(0.0);
                let x = rate * c.seconds;
                // d/dw log(1 − e^(−wτ)) = τ / (e^(wτ) − 1)
                hits * c.seconds / x.exp_m1().max(1e-300) - (c.blocks - hits) * c.seconds
            })
            .sum()
    };
    let (mut low, mut high) = (1e-9_f64, FASTEST);
    for _ in 0..60 {
        let middle = f64::midpoint(low.ln(), high.ln()).exp();
        if slope(middle) > 0.0 {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

/// What is known of the rates of the blocks of one kind.
#[derive(Clone, Debug, Default)]
pub struct Rates {
    writes: Counts,
    accesses: Counts,
    /// Scans so far, and their mean interval.
    scans: u32,
    interval: f64,
}

impl Rates {
    /// A scan: of `blocks[h]` blocks that had level h before it, `written[h]` were written in the `seconds` since the
    /// scan before. Both slices have [`LEVELS`] entries.
    pub fn scanned(&mut self, blocks: &[u64], written: &[u64], seconds: f64) {
        self.writes.note(blocks, written, seconds);
        self.scans = self.scans.saturating_add(1);
        let weight = 1.0 / f64::from(self.scans.min(8));
        self.interval += weight * (seconds - self.interval);
    }

    /// A sample: of `blocks[h]` watched blocks of level h, `accessed[h]` were accessed within `seconds`.
    pub fn sampled(&mut self, blocks: &[u64], accessed: &[u64], seconds: f64) {
        self.accesses.note(blocks, accessed, seconds);
    }

    /// Whether samples have shown reads.
    pub fn reads_seen(&self) -> bool {
        !self.accesses.is_empty()
    }

    /// Number of scans.
    pub fn scans(&self) -> u32 {
        self.scans
    }

    /// Writes per second of a block of this level.
    pub fn writes(&self, level: u8) -> f64 {
        let guess = self.guess(level);
        self.writes
            .rate(usize::from(level), self.prior(guess))
            .unwrap_or(guess)
    }

    /// What the bits themselves say, as if a few blocks had been seen over a usual interval: one short interval
    /// without a write must not make a hot level cold.
    fn prior(&self, guess: f64) -> Count {
        let seconds = self.interval.max(1e-3);
        Count {
            seconds,
            blocks: PRIOR,
            hits: PRIOR * -(-guess * seconds).exp_m1(),
        }
    }

    /// Accesses per second of a block of this level: never fewer than its writes.
    pub fn accesses(&self, level: u8) -> f64 {
        let writes = self.writes(level);
        let cold = if level == READ {
            1.0 / READ_WITHIN
        } else {
            COLD_ACCESSES
        };
        let assumed = (writes * ACCESSES_PER_WRITE).max(cold);
        let seen = self.accesses.rate(usize::from(level), self.prior(assumed));
        seen.unwrap_or(assumed).max(writes)
    }

    /// From the bits alone: the share of scans that found it written, each scan weighing half as much as the one
    /// after it.
    fn guess(&self, level: u8) -> f64 {
        let share = f64::from(level) / 256.0;
        -(1.0 - share).ln() / self.interval.max(1e-3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(level: usize, value: u64) -> Vec<u64> {
        let mut all = vec![0; LEVELS];
        all[level] = value;
        all
    }

    fn near(value: f64, wanted: f64) -> bool {
        (value / wanted - 1.0).abs() < 0.02
    }

    #[test]
    fn unequal_intervals_give_one_rate() {
        let mut rates = Rates::default();
        for (seconds, blocks) in [(0.1, 40_000), (1.0, 30_000), (3.0, 20_000)] {
            let hits = (f64::from(blocks) * (1.0 - (-0.7f64 * seconds).exp())).round();
            rates.scanned(
                &one(0x80, u64::from(blocks as u32)),
                &one(0x80, hits as u64),
                seconds,
            );
        }
        assert!(near(rates.writes(0x80), 0.7), "{}", rates.writes(0x80));
    }

    #[test]
    fn always_and_never_stay_finite() {
        let mut rates = Rates::default();
        rates.scanned(&one(0xFF, 1000), &one(0xFF, 1000), 1.0);
        rates.scanned(&one(0, 1000), &one(0, 0), 1.0);
        let (always, never) = (rates.writes(0xFF), rates.writes(0));
        assert!((5.0..20.0).contains(&always), "{always}");
        assert!(never > 0.0 && never < 1e-3, "{never}");
    }

    #[test]
    fn few_blocks_borrow_from_those_like_them() {
        let mut rates = Rates::default();
        // Written at the last scan and at one other.
        rates.scanned(&one(0x90, 10_000), &one(0x90, 5000), 1.0);
        rates.scanned(&one(0x81, 2), &one(0x81, 2), 1.0);
        assert!(near(rates.writes(0x81), rates.writes(0x90)));
        // Nobody like it was ever counted.
        let guess = rates.writes(0xE0);
        assert!(guess.is_finite() && guess > 0.0, "{guess}");
    }

    #[test]
    fn reads_show_in_samples_only() {
        let mut rates = Rates::default();
        rates.scanned(&one(0x80, 10_000), &one(0x80, 1000), 1.0);
        let assumed = rates.accesses(0x80) / rates.writes(0x80);
        assert!(near(assumed, ACCESSES_PER_WRITE));
        assert!(!rates.reads_seen());
        rates.sampled(&one(0x80, 1000), &one(0x80, 632), 1.0);
        assert!(near(rates.accesses(0x80), 1.0), "{}", rates.accesses(0x80));
        assert!(rates.reads_seen());
        // Fewer accesses than writes cannot be.
        rates.sampled(&one(0x40, 1000), &one(0x40, 1), 1.0);
        rates.scanned(&one(0x40, 1000), &one(0x40, 900), 1.0);
        assert!(rates.accesses(0x40) >= rates.writes(0x40));
    }
}
