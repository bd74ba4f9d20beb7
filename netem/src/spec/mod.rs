//! How a link is described, in the words of `tc netem`: [`DirectionSpec`] for one direction,
//! [`LinkSpec`] for both with what changes on the way. Only description: it must never know how
//! packets travel.
//!
//! # Grammar
//! ```text
//! LINK      := [NAME] SECTION { ";" SECTION }      NAME of the ladder, see `ladder`
//! SECTION   := SETTING…                            both directions
//!            | "forward" SETTING… | "back" SETTING…
//!            | "at" TIME ["forward" | "back"] ( SETTING… | "down" | "up" )
//! SETTING   := "delay" TIME [ JITTER [ CORRELATION ] ]
//!            | "distribution" ( "uniform" | "normal" | "pareto" | "paretonormal" )
//!            | "rate" ( RATE | "unlimited" )
//!            | "loss" [ "random" ] PERCENT [ CORRELATION ]
//!            | "loss" "state" P13 [ P31 [ P32 [ P23 [ P14 ] ] ] ]
//!            | "loss" "gemodel" P [ R [ 1-H [ 1-K ] ] ]
//!            | "corrupt" PERCENT [ CORRELATION ] | "duplicate" PERCENT [ CORRELATION ]
//!            | "reorder" PERCENT [ CORRELATION ] [ "gap" N ]
//!            | "slot" TIME [ TIME ]
//!            | "limit" ( PACKETS | BYTES | TIME )
//! ```
//! Settings mean what tc-netem(8) says, with three differences. `limit` as a time or in bytes is the
//! bottleneck's own queue, which tc cannot name (as a number of packets it is tc's: all that are
//! queued or under way). Times need their unit. With a `rate`, jitter never reorders packets (tc
//! behaves the same), and is applied behind the bottleneck.

mod link;
mod parse;
mod show;
mod units;

use std::time::Duration;

pub use link::{Change, Directions, LinkSpec, MAX_CHANGES, Stage, What};
pub use parse::SpecError;

/// What a link does to the packets of one direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DirectionSpec {
    /// One-way propagation delay; half of the round trip of a symmetric link.
    pub delay: Duration,
    /// How far a packet's delay strays from `delay`; what that means is said by `distribution`.
    pub jitter: Duration,
    /// How much a packet's jitter resembles that of the packet before, 0 to 1.
    pub delay_correlation: f64,
    /// How the jitter is distributed.
    pub distribution: Distribution,
    /// Which packets are lost on the way, other than by a full queue.
    pub loss: Loss,
    /// Packets of which one bit is flipped.
    pub corrupt: Chance,
    /// Packets that arrive twice.
    pub duplicate: Chance,
    /// Packets that skip the delay and so overtake others.
    pub reorder: Option<Reorder>,
    /// IP-level rate of the bottleneck in bits per second; `None` is not limited.
    pub rate: Option<u64>,
    /// Packets leave in bursts only.
    pub slot: Option<Slot>,
    /// How much may wait.
    pub limit: Limit,
}

impl Default for DirectionSpec {
    /// A direction that does nothing: no delay, no limit, no loss.
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            delay_correlation: 0.0,
            distribution: Distribution::Uniform,
            loss: Loss::None,
            corrupt: Chance::NEVER,
            duplicate: Chance::NEVER,
            reorder: None,
            rate: None,
            slot: None,
            limit: DEFAULT_LIMIT,
        }
    }
}

impl DirectionSpec {
    /// Depth of the bottleneck's queue as time at its rate; `None` without a rate, and when the
    /// limit is a number of packets, which bounds more than the queue.
    pub fn queue(&self) -> Option<Duration> {
        match (self.rate, self.limit) {
            (Some(_), Limit::Time(time)) => Some(time),
            (Some(rate), Limit::Bytes(bytes)) => {
                Some(crate::model::transmission_time(bytes as usize, rate))
            }
            _ => None,
        }
    }

    /// Replaces what `setting` names.
    pub(crate) fn set(&mut self, setting: Setting) {
        match setting {
            Setting::Delay(delay, jitter, correlation) => {
                self.delay = delay;
                self.jitter = jitter;
                self.delay_correlation = correlation;
            }
            Setting::Distribution(distribution) => self.distribution = distribution,
            Setting::Rate(rate) => self.rate = rate,
            Setting::Loss(loss) => self.loss = loss,
            Setting::Corrupt(chance) => self.corrupt = chance,
            Setting::Duplicate(chance) => self.duplicate = chance,
            Setting::Reorder(reorder) => self.reorder = Some(reorder),
            Setting::Slot(slot) => self.slot = Some(slot),
            Setting::Limit(limit) => self.limit = limit,
        }
    }

    /// What must be set to get from nothing to this: delay and limit always, the rest where it
    /// is not the default.
    pub(crate) fn settings(&self) -> Vec<Setting> {
        let mut settings = vec![Setting::Delay(
            self.delay,
            self.jitter,
            self.delay_correlation,
        )];
        let default = Self::default();
        if self.distribution != default.distribution {
            settings.push(Setting::Distribution(self.distribution));
        }
        if self.rate.is_some() {
            settings.push(Setting::Rate(self.rate));
        }
        if self.loss != default.loss {
            settings.push(Setting::Loss(self.loss));
        }
        if self.corrupt != default.corrupt {
            settings.push(Setting::Corrupt(self.corrupt));
        }
        if self.duplicate != default.duplicate {
            settings.push(Setting::Duplicate(self.duplicate));
        }
        settings.extend(self.reorder.map(Setting::Reorder));
        settings.extend(self.slot.map(Setting::Slot));
        settings.push(Setting::Limit(self.limit));
        settings
    }
}

/// One setting of a direction, as one clause of the grammar gives it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Setting {
    /// Delay, jitter, correlation.
    Delay(Duration, Duration, f64),
    /// Of the jitter.
    Distribution(Distribution),
    /// Bits per second; `None` is unlimited.
    Rate(Option<u64>),
    /// Loss on the way.
    Loss(Loss),
    /// A flipped bit.
    Corrupt(Chance),
    /// Two copies.
    Duplicate(Chance),
    /// Overtaking.
    Reorder(Reorder),
    /// Bursts.
    Slot(Slot),
    /// The queue.
    Limit(Limit),
}

/// The queue when a spec names none.
pub const DEFAULT_LIMIT: Limit = Limit::Time(Duration::from_millis(50));

/// How jitter is distributed; the tables are those of tc (iproute2, `netem/`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Distribution {
    /// Evenly over `delay ± jitter`.
    #[default]
    Uniform,
    /// Standard deviation `jitter`, cut at four of them.
    Normal,
    /// `delay + jitter · 4/3 · (u^(−1/3) − 1.5)`, u uniform, cut at four jitters: a long tail
    /// upwards.
    Pareto,
    /// A quarter normal, three quarters Pareto.
    ParetoNormal,
}

/// A share of packets, chosen at random.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chance {
    /// Probability, 0 to 1.
    pub probability: f64,
    /// How much a packet's draw resembles the draw before, 0 to 1. As in the kernel each draw is
    /// a moving average, which pulls draws towards the middle: with correlation fewer packets
    /// are hit than `probability` says, where that is below a half.
    pub correlation: f64,
}

impl Chance {
    /// No packet.
    pub const NEVER: Self = Self {
        probability: 0.0,
        correlation: 0.0,
    };
}

/// How packets are lost on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Loss {
    /// None is.
    #[default]
    None,
    /// Each by chance.
    Random(Chance),
    /// A Markov chain of four states (tc's `state`): 1 good, 2 good within a burst, 3 lost within a
    /// burst, 4 lost alone.
    State {
        /// Probability to go from 1 to 3, and so on.
        p13: f64,
        /// From 3 to 1.
        p31: f64,
        /// From 3 to 2.
        p32: f64,
        /// From 2 to 3.
        p23: f64,
        /// From 1 to 4 (from which the next packet leads back to 1).
        p14: f64,
    },
    /// Gilbert and Elliott's chain of two states (tc's `gemodel`).
    Gemodel {
        /// Probability to go from good to bad.
        p: f64,
        /// From bad to good.
        r: f64,
        /// Loss in the bad state, tc's 1−h.
        bad: f64,
        /// Loss in the good state, tc's 1−k.
        good: f64,
    },
}

impl Loss {
    /// Share of packets lost in the long run, 0 to 1. With correlation it is the one asked for,
    /// not the smaller one that comes out (see [`Chance::correlation`]).
    pub fn mean(&self) -> f64 {
        match *self {
            Self::None => 0.0,
            Self::Random(chance) => chance.probability,
            Self::State {
                p13,
                p31,
                p32,
                p23,
                p14,
            } => {
                // Stationary shares relative to state 1.
                let lost_in_burst = ratio(p13, p31);
                let good_in_burst = ratio(lost_in_burst * p32, p23);
                let all = 1.0 + lost_in_burst + good_in_burst + p14;
                if all.is_finite() {
                    (lost_in_burst + p14) / all
                } else if p32 > 0.0 {
                    // Bursts never end.
                    p23 / (p23 + p32)
                } else {
                    1.0
                }
            }
            Self::Gemodel { p, r, bad, good } => {
                let share_bad = if p + r > 0.0 { p / (p + r) } else { 0.0 };
                share_bad * bad + (1.0 - share_bad) * good
            }
        }
    }
}

/// a/b, where nothing of nothing is nothing.
fn ratio(a: f64, b: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a / b }
}

/// Packets that skip the delay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reorder {
    /// Which of the candidates.
    pub chance: Chance,
    /// Every `gap`-th packet is a candidate; 1 means all.
    pub gap: u32,
}

/// Bursts: packets leave at the ends of slots, whose lengths are uniform between the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The shortest; not zero.
    pub min: Duration,
    /// The longest.
    pub max: Duration,
}

/// How much a direction holds before it drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Packets queued or under way, as tc counts.
    Packets(u32),
    /// Bytes in the bottleneck's queue.
    Bytes(u64),
    /// The bottleneck's queue as time at its rate, so that a slower link does not get a longer
    /// queue.
    Time(Duration),
}
