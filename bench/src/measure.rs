//! From a guest's ticks to what its user felt: downtime, lost work, when its speed was back. Pure: it knows
//! ticks and the moments of a migration, and nothing of how these came about.

use serde::{Deserialize, Serialize};

use crate::link::Side;

/// One tick, as a host's clock saw it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Seconds since the migration started; negative before it.
    pub at: f64,
    /// The guest's own clock, in ms.
    pub guest_ms: u64,
    /// The guest's page operations since its boot.
    pub operations: u64,
    /// On which host's console.
    pub side: Side,
}

/// What the ticks show. Times in seconds; moments count from the start of the migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Guest's speed before the migration, v0, in page operations per second.
    pub v0: f64,
    /// The tick's own period before the migration (median).
    pub tick: f64,
    /// Migration started → the engine says completed, and the guest's ticks come from the destination.
    pub total: Option<f64>,
    /// When the engine had ended, or was given up.
    pub ended: f64,
    /// Longest gap between two ticks from the start on, less the tick's own period.
    pub downtime: f64,
    /// When that gap began.
    pub downtime_at: f64,
    /// Last tick at the source before the guest ran at the destination.
    pub freeze: Option<f64>,
    /// First tick at the destination.
    pub destination_up: Option<f64>,
    /// Freeze → speed is at least 95 % of v0 and stays there.
    pub t95_from_freeze: Option<f64>,
    /// Migration started → the same.
    pub t95_from_start: Option<f64>,
    /// Lost work L = ∫ (1 − v/v0) dt from the start of the migration to its end.
    pub lost_work: f64,
    /// The same from the freeze to the end.
    pub lost_work_from_freeze: Option<f64>,
    /// Width of the bins of `speed`.
    pub bin: f64,
    /// Guest's speed over time: the bin's beginning, v/v0 in it.
    pub speed: Vec<(f64, f64)>,
}

/// Width of a bin of the speed's series; more where a run takes long.
const BIN: f64 = 0.1;
/// The most bins kept.
const MAX_BINS: f64 = 400.0;
/// "At least 95 % of v0" means over every stretch of this length: single ticks vary more than 5 %.
const WINDOW: f64 = 1.0;
/// Stretches that the speed before the migration is taken from.
const STRETCH: f64 = 0.25;
/// Back to speed.
const BACK: f64 = 0.95;

/// Why ticks cannot be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MeasureError {
    /// Without a speed before the migration nothing can be said.
    #[error("the guest ticked {0} times before the migration; at least 5 are needed")]
    TooFewTicks(usize),
    /// The guest did nothing before the migration.
    #[error(
        "the guest did no page operations before the migration: there is no speed to compare with"
    )]
    NoSpeed,
}

/// A guest that ran twice, or was set back.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("the guest has run twice, or back in time: {later:?} does not follow {earlier:?}")]
pub struct TwoLives {
    /// The tick before.
    pub earlier: Sample,
    /// The one that does not follow it.
    pub later: Sample,
}

/// Fails unless the guest's clock and work have only ever grown, from the first tick at the source to the last one
/// at the destination. A source that goes on after the guest has left has passed what the destination
/// began with.
pub fn one_life(samples: &[Sample]) -> Result<(), TwoLives> {
    for pair in samples.windows(2) {
        let (earlier, later) = (pair[0], pair[1]);
        if later.guest_ms <= earlier.guest_ms || later.operations < earlier.operations {
            return Err(TwoLives { earlier, later });
        }
    }
    Ok(())
}

/// Measures a run. `samples` are in the order of the guest's life and of time; the migration ended at `end` (or was
/// given up then),
/// with the guest at the destination if `moved`.
pub fn measure(samples: &[Sample], end: f64, moved: bool) -> Result<Measured, MeasureError> {
    let before = samples.partition_point(|sample| sample.at <= 0.0);
    if before < 5 {
        return Err(MeasureError::TooFewTicks(before));
    }
    let v0 = speed_before(&samples[..before]);
    if v0 <= 0.0 {
        return Err(MeasureError::NoSpeed);
    }
    let mut periods: Vec<_> = samples[..before]
        .windows(2)
        .map(|pair| pair[1].at - pair[0].at)
        .collect();
    periods.sort_by(f64::total_cmp);
    let tick = periods[periods.len() / 2];
    let work = Work { samples, tick, v0 };

    // The gap that was open when the migration started counts from there on.
    let gaps = samples[before - 1..]
        .windows(2)
        .map(|pair| (pair[1].at - pair[0].at, pair[0].at));
    // A guest that never ticks again has been down until it was given up.
    let seen = samples[samples.len() - 1].at;
    let silence = (!moved && end > seen).then_some((end - seen, seen));
    let (gap, downtime_at) = gaps
        .chain(silence)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .unwrap_or((0.0, 0.0));

    let up = samples
        .iter()
        .position(|sample| sample.side == Side::Destination);
    let destination_up = up.map(|up| samples[up].at);
    let freeze = up.and_then(|up| up.checked_sub(1)).map(|up| samples[up].at);
    // Where the engine says so before the guest's first sign of life, that is the end.
    let end = end.max(destination_up.unwrap_or(end));
    let back = if moved {
        freeze.and_then(|freeze| work.back_to_speed(freeze))
    } else {
        None
    };
    let span = seen.max(end) - samples[0].at;
    let bin = BIN.max((span / MAX_BINS / BIN).ceil() * BIN);
    Ok(Measured {
        v0,
        tick,
        total: moved.then_some(end),
        ended: end,
        downtime: (gap - tick).max(0.0),
        downtime_at,
        freeze,
        destination_up,
        t95_from_freeze: back.zip(freeze).map(|(back, freeze)| back - freeze),
        t95_from_start: back,
        lost_work: work.lost(0.0, end),
        lost_work_from_freeze: freeze.map(|freeze| work.lost(freeze, end)),
        bin,
        speed: work.speed(bin, seen.max(end)),
    })
}

/// Speed before the migration: the mean of the middle half of stretches of [`STRETCH`], so that a moment in which
/// the machine did something else does not count.
fn speed_before(samples: &[Sample]) -> f64 {
    let mut speeds = Vec::new();
    let mut first = samples[0];
    for sample in samples {
        if sample.at - first.at >= STRETCH {
            let work = sample.operations as f64 - first.operations as f64;
            speeds.push(work / (sample.at - first.at));
            first = *sample;
        }
    }
    if speeds.is_empty() {
        let last = samples[samples.len() - 1];
        return (last.operations as f64 - first.operations as f64) / (last.at - first.at);
    }
    speeds.sort_by(f64::total_cmp);
    let cut = speeds.len() / 4;
    let middle = &speeds[cut..speeds.len() - cut];
    middle.iter().sum::<f64>() / middle.len() as f64
}

/// The guest's work over time.
struct Work<'a> {
    samples: &'a [Sample],
    tick: f64,
    v0: f64,
}

impl Work<'_> {
    /// Page operations up to `at`. Between two ticks they are spread evenly; in a gap that is longer
    /// than that, over one tick's time before its end: a guest that did not tick did not work.
    fn until(&self, at: f64) -> f64 {
        let next = self.samples.partition_point(|sample| sample.at <= at);
        let Some(before) = next.checked_sub(1).map(|index| self.samples[index]) else {
            return self.samples[0].operations as f64;
        };
        let Some(after) = self.samples.get(next) else {
            return before.operations as f64;
        };
        let gap = after.at - before.at;
        let working = if gap > 2.0 * self.tick {
            self.tick
        } else {
            gap
        };
        let share = ((at - (after.at - working)) / working).clamp(0.0, 1.0);
        let (done, then) = (before.operations as f64, after.operations as f64);
        done + share * (then - done)
    }

    /// L = ∫ (1 − v/v0) dt = the time, less what the work done in it takes at full speed.
    fn lost(&self, from: f64, to: f64) -> f64 {
        (to - from) - (self.until(to) - self.until(from)) / self.v0
    }

    fn speed(&self, bin: f64, end: f64) -> Vec<(f64, f64)> {
        let first = (self.samples[0].at / bin).ceil() as i64;
        let last = (end / bin).floor() as i64;
        let round = |value: f64| (value * 1e4).round() / 1e4;
        (first..last)
            .map(|index| {
                let at = index as f64 * bin;
                let work = self.until(at + bin) - self.until(at);
                (round(at), round(work / bin / self.v0))
            })
            .collect()
    }

    /// The earliest tick after `freeze` from which on no stretch of [`WINDOW`] has less than [`BACK`]
    /// of the speed; `None` if the last stretch seen has less.
    fn back_to_speed(&self, freeze: f64) -> Option<f64> {
        let seen = self.samples[self.samples.len() - 1].at;
        let mut back = None;
        for sample in self.samples.iter().rev() {
            if sample.at <= freeze {
                break;
            }
            if sample.at + WINDOW > seen {
                continue;
            }
            let work = self.until(sample.at + WINDOW) - self.until(sample.at);
            if work / WINDOW / self.v0 < BACK {
                break;
            }
            back = Some(sample.at);
        }
        back
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: f64 = 0.02;
    /// Page operations in a tick at full speed.
    const FULL: u64 = 40;

    /// Ticks from −2 s on: stretches of (seconds, share of the speed, where). Speed 0 does not tick.
    fn ticks(stretches: &[(f64, f64, Side)]) -> Vec<Sample> {
        let (mut at, mut operations) = (-2.0, 1000);
        let sample = |at: f64, operations, side| Sample {
            at,
            guest_ms: ((at + 2.0) * 1e3).round() as u64,
            operations,
            side,
        };
        let mut samples = vec![sample(at, operations, Side::Source)];
        for (seconds, speed, side) in stretches {
            for _ in 0..(seconds / TICK).round() as u64 {
                at += TICK;
                if *speed > 0.0 {
                    operations += (FULL as f64 * speed) as u64;
                    samples.push(sample(at, operations, *side));
                }
            }
        }
        samples
    }

    fn close(value: f64, expected: f64, by: f64) {
        assert!(
            (value - expected).abs() <= by,
            "{value}, expected {expected} ± {by}"
        );
    }

    #[test]
    fn pre_copy_with_one_gap() {
        use Side::{Destination, Source};
        let samples = ticks(&[
            (2.0, 1.0, Source),
            (3.0, 1.0, Source),
            (0.5, 0.0, Source),
            (3.0, 1.0, Destination),
        ]);
        let measured = measure(&samples, 3.4, true).unwrap();
        close(measured.v0, FULL as f64 / TICK, 1e-6);
        close(measured.tick, TICK, 1e-9);
        close(measured.downtime, 0.5, 1e-9);
        close(measured.downtime_at, 3.0, 1e-9);
        close(measured.freeze.unwrap(), 3.0, 1e-9);
        close(measured.destination_up.unwrap(), 3.52, 1e-9);
        // The engine's word came before the guest's first tick.
        close(measured.total.unwrap(), 3.52, 1e-9);
        close(measured.lost_work, 0.5, 1e-6);
        close(measured.lost_work_from_freeze.unwrap(), 0.5, 1e-6);
        close(measured.t95_from_freeze.unwrap(), 0.52, 1e-6);
        close(measured.t95_from_start.unwrap(), 3.52, 1e-6);
        let at = |wanted: f64| {
            let bins = measured.speed.iter();
            bins.filter(|(at, _)| (at - wanted).abs() < 1e-6)
                .map(|(_, v)| *v)
                .next()
                .unwrap()
        };
        close(at(-1.0), 1.0, 1e-3);
        close(at(3.2), 0.0, 1e-3);
        close(at(4.0), 1.0, 1e-3);
    }

    #[test]
    fn post_copy_slows_down_before_and_after() {
        use Side::{Destination, Source};
        let samples = ticks(&[
            (2.0, 1.0, Source),
            (1.0, 0.5, Source),
            (0.1, 0.0, Source),
            (2.0, 0.25, Destination),
            // The longest gap is not the freeze: the guest waits for a page.
            (1.0, 0.0, Destination),
            (3.0, 1.0, Destination),
        ]);
        let measured = measure(&samples, 4.2, true).unwrap();
        close(measured.downtime, 1.0, 1e-9);
        close(measured.downtime_at, 3.1, 1e-9);
        close(measured.freeze.unwrap(), 1.0, 1e-9);
        close(measured.destination_up.unwrap(), 1.12, 1e-9);
        close(
            measured.lost_work_from_freeze.unwrap(),
            0.1 + 1.5 + 1.0,
            1e-6,
        );
        close(measured.lost_work, 0.5 + 0.1 + 1.5 + 1.0, 1e-6);
        // A window of 1 s may begin up to 5 % of it before the speed is back.
        close(measured.t95_from_freeze.unwrap(), 3.12, 0.06);
    }

    #[test]
    fn a_migration_that_was_given_up_has_no_end() {
        let samples = ticks(&[(2.0, 1.0, Side::Source), (5.0, 0.9, Side::Source)]);
        let measured = measure(&samples, 5.0, false).unwrap();
        assert_eq!(measured.total, None);
        assert_eq!(measured.t95_from_start, None);
        assert_eq!(measured.freeze, None);
        close(measured.lost_work, 0.5, 1e-6);
        close(measured.downtime, 0.0, 1e-9);
    }

    #[test]
    fn silence_until_the_end_is_downtime() {
        let samples = ticks(&[(2.0, 1.0, Side::Source), (1.0, 1.0, Side::Source)]);
        let measured = measure(&samples, 11.0, false).unwrap();
        close(measured.downtime, 10.0 - TICK, 1e-6);
        close(measured.lost_work, 10.0, 1e-6);
    }

    #[test]
    fn a_speed_that_never_comes_back_is_said() {
        use Side::{Destination, Source};
        let samples = ticks(&[
            (2.0, 1.0, Source),
            (1.0, 1.0, Source),
            (0.2, 0.0, Source),
            (4.0, 0.5, Destination),
        ]);
        let measured = measure(&samples, 1.2, true).unwrap();
        assert_eq!(measured.t95_from_freeze, None);
    }

    #[test]
    fn long_runs_have_wider_bins() {
        let samples = ticks(&[(2.0, 1.0, Side::Source), (90.0, 1.0, Side::Source)]);
        let measured = measure(&samples, 90.0, false).unwrap();
        assert!(measured.speed.len() as f64 <= MAX_BINS);
        close(measured.bin, 0.3, 1e-9);
    }

    #[test]
    fn a_moment_of_other_work_is_not_the_speed_before() {
        use Side::Source;
        let samples = ticks(&[
            (1.0, 1.0, Source),
            (0.2, 0.0, Source),
            (0.8, 1.0, Source),
            (1.0, 1.0, Source),
        ]);
        let measured = measure(&samples, 1.0, false).unwrap();
        close(measured.v0, FULL as f64 / TICK, 1e-6);
        close(measured.lost_work, 0.0, 1e-6);
    }

    #[test]
    fn two_lives_are_seen() {
        use Side::{Destination, Source};
        let moved = ticks(&[
            (2.0, 1.0, Source),
            (0.2, 0.0, Source),
            (1.0, 1.0, Destination),
        ]);
        assert_eq!(one_life(&moved), Ok(()));
        let (source, destination) = moved.split_at(101);
        assert_eq!(destination[0].side, Destination);
        // The source goes on for three ticks.
        let mut both = source.to_vec();
        for index in 1..4 {
            let last = both[both.len() - 1];
            let guest_ms = destination[0].guest_ms - 10 + index * 20;
            both.push(Sample { guest_ms, ..last });
        }
        both.extend(destination);
        assert!(
            one_life(&both)
                .unwrap_err()
                .to_string()
                .contains("run twice")
        );
    }

    #[test]
    fn too_few_ticks_are_refused() {
        let samples = ticks(&[(2.0, 1.0, Side::Source)]);
        assert_eq!(
            measure(&samples[..3], 1.0, false),
            Err(MeasureError::TooFewTicks(3))
        );
        assert_eq!(measure(&[], 1.0, false), Err(MeasureError::TooFewTicks(0)));
        let idle: Vec<_> = samples
            .iter()
            .map(|s| Sample {
                operations: 7,
                ..*s
            })
            .collect();
        assert_eq!(measure(&idle, 1.0, false), Err(MeasureError::NoSpeed));
    }
}
