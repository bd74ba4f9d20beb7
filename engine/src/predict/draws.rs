//! The distribution of outcomes: the fluid model under drawn parameters.
//!
//! What is not known exactly is drawn: the bandwidth and the round trip of the link, what the steps cost, the rates
//! of access and of writing. Faults come at random on top: their number is overdispersed (one brings others:
//! locality, several threads), with a variance [`CLUSTERING`] times that of a Poisson variable. Draws are the same
//! for every plan, so that two plans differ by what they are and not by luck.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::fluid::Frozen;
use super::{Cost, Interval, Outcome, Prediction, Situation};

/// Draws of one prediction.
pub const DRAWS: usize = 128;
/// Standard deviation of the logarithm of the rates of access, of all classes together.
const ACCESS_SPREAD: f64 = 0.4;
/// The same of the rates of writing, which are counted.
const WRITE_SPREAD: f64 = 0.15;
/// Variance of the number of faults over that of a Poisson variable.
const CLUSTERING: f64 = 4.0;
/// What the model itself errs by, where all that it is told is right, as relative standard deviations: of a downtime,
/// of the time after it, of bytes. From simulations of the embedded guest (`bench virtual`).
const MODEL: (f64, f64, f64) = (0.11, 0.25, 0.02);

/// A standard normal variable (Box and Muller, 1958).
fn normal(rng: &mut SmallRng) -> f64 {
    let u: f64 = rng.random_range(f64::EPSILON..1.0);
    let v: f64 = rng.random_range(0.0..std::f64::consts::TAU);
    (-2.0 * u.ln()).sqrt() * v.cos()
}

/// A factor with mean 1 and this relative standard deviation, lognormal.
fn factor(rng: &mut SmallRng, cv: f64) -> f64 {
    let sigma = (1.0 + cv * cv).ln().sqrt();
    (sigma * normal(rng) - sigma * sigma / 2.0).exp()
}

fn drawn_cost(rng: &mut SmallRng, cost: &Cost) -> Cost {
    let cv = cost.sd / cost.mean.max(1e-6);
    Cost {
        mean: cost.mean * factor(rng, cv.min(3.0)),
        ..*cost
    }
}

/// The situation as it may be as well.
fn drawn(situation: &Situation, rng: &mut SmallRng) -> (Situation, Luck) {
    let mut one = situation.clone();
    one.link.bandwidth *= factor(rng, situation.link.bandwidth_cv);
    one.link.rtt *= factor(rng, situation.link.rtt_cv);
    let accesses = (ACCESS_SPREAD * normal(rng)).exp();
    let writes = (WRITE_SPREAD * normal(rng)).exp();
    for kind in [&mut one.memory, &mut one.disks] {
        for class in &mut kind.classes {
            class.accesses *= accesses;
            class.writes *= writes;
        }
    }
    let costs = &mut one.costs;
    for cost in [
        &mut costs.stop,
        &mut costs.scan,
        &mut costs.save,
        &mut costs.overhead,
        &mut costs.load,
        &mut costs.finish,
    ] {
        *cost = drawn_cost(rng, cost);
    }
    let luck = Luck {
        faults: normal(rng),
        downtime: factor(rng, MODEL.0),
        rest: factor(rng, MODEL.1),
        bytes: factor(rng, MODEL.2),
    };
    (one, luck)
}

/// What no parameter of the situation tells.
struct Luck {
    /// Faults beyond those expected, in standard deviations.
    faults: f64,
    /// Factors of the downtime, of the time after it, and of bytes.
    downtime: f64,
    rest: f64,
    bytes: f64,
}

/// What a plan comes to: `rounds` more rounds, and then a freeze in which the share of each class moves that `frozen`
/// has of what is stale in `reached`.
pub fn predict(
    situation: &Situation,
    rounds: u32,
    reached: &Situation,
    frozen: &Frozen,
) -> Prediction {
    let shares: Vec<Vec<f64>> = reached
        .kinds()
        .iter()
        .zip(&frozen.0)
        .map(|(kind, frozen)| {
            let of = |(class, frozen): (&super::Class, &f64)| {
                if class.stale > 0.0 {
                    (frozen / class.stale).min(1.0)
                } else {
                    0.0
                }
            };
            kind.classes.iter().zip(frozen).map(of).collect()
        })
        .collect();
    let mut rng = SmallRng::seed_from_u64(1);
    let mut outcomes = Vec::with_capacity(DRAWS);
    for _ in 0..DRAWS {
        let (mut one, luck) = drawn(situation, &mut rng);
        for _ in 0..rounds {
            one = one.after_round();
        }
        let moved = Frozen(std::array::from_fn(|k| {
            let classes = &one.kinds()[k].classes;
            classes
                .iter()
                .zip(&shares[k])
                .map(|(class, share)| class.stale * share)
                .collect()
        }));
        outcomes.push(luck.with(one.freeze_now(&moved), &one));
    }
    summary(&outcomes)
}

impl Luck {
    /// An outcome under it.
    fn with(&self, expected: Outcome, situation: &Situation) -> Outcome {
        let mut outcome = expected;
        let off = self.faults * (CLUSTERING * expected.faults).sqrt();
        outcome.faults = (expected.faults + off).max(0.0);
        outcome.downtime *= self.downtime;
        outcome.remote_up += outcome.downtime - expected.downtime;
        let rest = self.rest * (expected.total - expected.remote_up);
        outcome.total = outcome.remote_up + rest;
        // Each fault more or less than expected holds up one thread.
        let threads = situation.memory.parallelism.max(1.0);
        let more = (outcome.faults - expected.faults) * expected.stall / threads;
        let lost = self.rest * (expected.lost_work - expected.downtime) + more;
        outcome.lost_work = outcome.downtime + lost.clamp(0.0, rest.max(0.0));
        outcome.bytes *= self.bytes;
        outcome.t95 = outcome.downtime + self.rest * (expected.t95 - expected.downtime);
        outcome
    }
}

/// Quantiles of outcomes.
fn summary(outcomes: &[Outcome]) -> Prediction {
    let interval = |of: fn(&Outcome) -> f64| {
        let mut values: Vec<f64> = outcomes.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let index = share * (values.len().saturating_sub(1)) as f64;
            values.get(index.round() as usize).copied().unwrap_or(0.0)
        };
        Interval {
            mean: values.iter().sum::<f64>() / values.len().max(1) as f64,
            p10: at(0.1),
            p50: at(0.5),
            p90: at(0.9),
        }
    };
    Prediction {
        total: interval(|o| o.total),
        downtime: interval(|o| o.downtime),
        remote_up: interval(|o| o.remote_up),
        degradation: interval(|o| o.degradation),
        lost_work: interval(|o| o.lost_work),
        t95: interval(|o| o.t95),
        bytes: interval(|o| o.bytes),
        faults: interval(|o| o.faults),
        stall: interval(|o| o.stall),
    }
}
