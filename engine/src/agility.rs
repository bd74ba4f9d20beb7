//! Performance restoration agility: how soon a guest is itself again after it was stopped. Pure
//! arithmetic over samples of its speed.
//!
//! The name is from the literature, where its formula is not public; the definitions here are this
//! project's own. With v(t) the guest's speed, v₀ its speed before the migration, t = 0 at the
//! freeze and E when the last block was in place:
//!
//! - lost work `L = ∫₀ᴱ (1 − v(t)/v₀) dt`, in seconds: the downtime counts in full, slow running in
//!   part. A guest that runs faster than before makes up for it.
//! - `PRA = 1/L`, in 1/s: larger is better.
//! - `T₉₅`: time from the freeze until the speed stays at [`RESTORED`] of v₀ or above.
//! - degradation over an interval: `1 −` mean of v/v₀ in it.

use serde::{Deserialize, Serialize};

/// Share of v₀ from which on the guest counts as restored.
pub const RESTORED: f64 = 0.95;

/// The guest's mean speed since the sample before (the first: since the freeze).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SpeedSample {
    /// End of the interval, in seconds since the freeze.
    pub t: f64,
    /// Mean v/v₀ over it.
    pub ratio: f64,
}

/// What the samples come to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Agility {
    /// L in seconds.
    pub lost_work: f64,
    /// PRA in 1/s; `None` when no work was lost.
    pub pra: Option<f64>,
    /// T₉₅ in seconds; `None` when the speed was not restored by the last sample.
    pub t95: Option<f64>,
}

/// Works out L, PRA and T₉₅ of samples that begin at the freeze. Samples that are not finite or not
/// after their predecessor are passed over; `None` if nothing is left.
pub fn agility(samples: &[SpeedSample]) -> Option<Agility> {
    let mut lost_work = 0.0;
    let mut restored_at = 0.0;
    let mut restored = true;
    let mut any = false;
    for interval in intervals(samples) {
        any = true;
        lost_work += (1.0 - interval.ratio) * (interval.end - interval.start);
        restored = interval.ratio >= RESTORED;
        if !restored {
            restored_at = interval.end;
        }
    }
    any.then_some(Agility {
        lost_work,
        pra: (lost_work > 0.0).then(|| 1.0 / lost_work),
        t95: restored.then_some(restored_at),
    })
}

/// Degradation between two times (seconds since the freeze): 0 for full speed, 1 for standstill.
/// `None` if no sample covers any of it.
pub fn degradation(samples: &[SpeedSample], from: f64, to: f64) -> Option<f64> {
    let (mut work, mut time) = (0.0, 0.0);
    for interval in intervals(samples) {
        let overlap = interval.end.min(to) - interval.start.max(from);
        if overlap > 0.0 {
            work += interval.ratio * overlap;
            time += overlap;
        }
    }
    (time > 0.0).then(|| 1.0 - work / time)
}

struct Interval {
    start: f64,
    end: f64,
    ratio: f64,
}

fn intervals(samples: &[SpeedSample]) -> impl Iterator<Item = Interval> + '_ {
    let mut start = 0.0;
    samples.iter().filter_map(move |sample| {
        let valid = sample.t.is_finite() && sample.ratio.is_finite() && sample.t > start;
        valid.then(|| Interval {
            start: std::mem::replace(&mut start, sample.t),
            end: sample.t,
            ratio: sample.ratio,
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn samples(points: &[(f64, f64)]) -> Vec<SpeedSample> {
        points
            .iter()
            .map(|(t, ratio)| SpeedSample {
                t: *t,
                ratio: *ratio,
            })
            .collect()
    }

    fn close(one: f64, other: f64) -> bool {
        (one - other).abs() < 1e-9
    }

    #[test]
    fn downtime_counts_in_full_and_slow_running_in_part() {
        let run = samples(&[(0.2, 0.0), (1.2, 0.5), (3.0, 1.0)]);
        let agility = agility(&run).expect("there are samples");
        assert!(close(agility.lost_work, 0.7));
        assert!(close(agility.pra.expect("work was lost"), 1.0 / 0.7));
        assert!(close(agility.t95.expect("restored"), 1.2));
        let slow = degradation(&run, 0.2, 1.2).expect("covered");
        assert!(close(slow, 0.5));
        let mixed = degradation(&run, 0.0, 3.0).expect("covered");
        assert!(close(mixed, 0.7 / 3.0));
    }

    #[test]
    fn restored_means_staying_so() {
        let relapse = samples(&[(0.1, 0.0), (1.0, 1.0), (1.5, 0.3), (9.0, 0.96)]);
        let t95 = agility(&relapse).expect("there are samples").t95;
        assert!(close(t95.expect("restored"), 1.5));
        let never = samples(&[(0.1, 0.0), (5.0, 0.9)]);
        assert_eq!(agility(&never).expect("there are samples").t95, None);
    }

    #[test]
    fn without_samples_or_loss_there_is_no_figure() {
        assert_eq!(agility(&[]), None);
        assert_eq!(agility(&samples(&[(f64::NAN, 1.0), (-1.0, 0.0)])), None);
        assert_eq!(degradation(&[], 0.0, 1.0), None);
        let smooth = agility(&samples(&[(1.0, 1.0)])).expect("there is a sample");
        assert_eq!((smooth.pra, smooth.t95), (None, Some(0.0)));
    }

    proptest! {
        #[test]
        fn cutting_an_interval_changes_nothing(
            steps in prop::collection::vec((0.01f64..2.0, 0.0f64..1.2), 1..20),
            at in 0.1f64..0.9,
        ) {
            let mut t = 0.0;
            let (mut whole, mut cut) = (Vec::new(), Vec::new());
            for (dt, ratio) in steps {
                cut.push(SpeedSample { t: t + at * dt, ratio });
                t += dt;
                cut.push(SpeedSample { t, ratio });
                whole.push(SpeedSample { t, ratio });
            }
            let whole = agility(&whole).expect("there are samples");
            let cut = agility(&cut).expect("there are samples");
            prop_assert!((whole.lost_work - cut.lost_work).abs() < 1e-9);
            prop_assert_eq!(whole.t95, cut.t95);
        }

        #[test]
        fn no_more_is_lost_than_there_was(
            steps in prop::collection::vec((0.01f64..2.0, 0.0f64..=1.0), 1..20),
        ) {
            let mut t = 0.0;
            let run: Vec<SpeedSample> = steps
                .into_iter()
                .map(|(dt, ratio)| {
                    t += dt;
                    SpeedSample { t, ratio }
                })
                .collect();
            let agility = agility(&run).expect("there are samples");
            prop_assert!(agility.lost_work >= -1e-9 && agility.lost_work <= t + 1e-9);
            prop_assert!(agility.t95.is_none_or(|t95| t95 <= t));
        }
    }
}
