//! Chooses how many more rounds, when to freeze and what moves in the freeze: the plan under which the guest loses
//! least, within the operator's limits.

use hybridmig_transport::message::RegionKind;
use serde::{Deserialize, Serialize};

use crate::predict::draws::predict;
use crate::predict::fluid::{Frozen, candidates};
use crate::predict::{Outcome, Prediction, Situation};

/// Rounds that are looked ahead.
const AHEAD: u32 = 8;
/// A further round must gain so much: a share of what is lost, and seconds. Predictions err, and rounds cost bytes.
const GAIN: (f64, f64) = (0.02, 0.004);
/// Plans that cost so little more than the best, as a share and in seconds, count as equal to it.
const TIE: (f64, f64) = (0.05, 0.01);
/// Predicted downtimes and totals must keep so much below the operator's limits.
const MARGIN: f64 = 0.9;

/// What the operator allows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bounds {
    /// The longest downtime, in seconds.
    pub max_downtime: Option<f64>,
    /// The longest migration, in seconds.
    pub max_total: Option<f64>,
    /// Rounds that may still be made.
    pub rounds: u32,
}

impl Bounds {
    /// How far an outcome is beyond the limits, in seconds; 0 within them.
    pub(super) fn excess(&self, outcome: &Outcome) -> f64 {
        let over = |value: f64, limit: Option<f64>| {
            limit.map_or(0.0, |limit| (value - MARGIN * limit).max(0.0))
        };
        over(outcome.downtime, self.max_downtime) + over(outcome.total, self.max_total)
    }
}

/// A plan, and what it comes to in expectation.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Rounds before the freeze; 0: now.
    pub rounds: u32,
    /// Where things stand at the freeze.
    pub reached: Situation,
    /// What moves in it.
    pub frozen: Frozen,
    /// What it comes to.
    pub outcome: Outcome,
}

/// A plan in words and figures, as it is shown and kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// What it does, in a few words.
    pub what: String,
    /// Rounds before the freeze, from when the plan was made.
    pub rounds: u32,
    /// Share of the memory with content that is at the destination when the guest resumes.
    pub mem_frac: f64,
    /// The same of the disks.
    pub disk_frac: f64,
    /// Pages that move in the freeze, of memory and of disks.
    pub freeze_pages: (f64, f64),
    /// What it comes to.
    pub prediction: Prediction,
}

/// What one plan costs: what the guest loses, before the freeze and from it on.
fn cost(outcome: &Outcome) -> f64 {
    outcome.lost_work + outcome.before
}

/// The best plan.
pub fn choose(situation: &Situation, bounds: &Bounds) -> Choice {
    look_ahead(situation, bounds, |at| best_freeze(at, bounds))
}

/// All that is stale moves in the freeze, after as many rounds as gain something: what pre-copy does, whatever the
/// limits.
pub fn everything(situation: &Situation, bounds: &Bounds) -> Choice {
    let free = Bounds {
        rounds: bounds.rounds,
        ..Bounds::default()
    };
    look_ahead(situation, &free, |at| {
        let frozen = Frozen::everything(at);
        let outcome = at.freeze_now(&frozen);
        (frozen, outcome)
    })
}

/// The best number of further rounds, `freeze` telling what a freeze then would move and come to.
fn look_ahead(
    situation: &Situation,
    bounds: &Bounds,
    freeze: impl Fn(&Situation) -> (Frozen, Outcome),
) -> Choice {
    let choice = |rounds, at: &Situation| {
        let (frozen, outcome) = freeze(at);
        Choice {
            rounds,
            reached: at.clone(),
            frozen,
            outcome,
        }
    };
    let mut best = choice(0, situation);
    let mut at = situation.clone();
    for rounds in 1..=bounds.rounds.min(AHEAD) {
        at = at.after_round();
        let later = choice(rounds, &at);
        if later.is_better_than(&best, bounds) {
            best = later;
        }
    }
    best
}

/// The best division of what is stale, if the guest is frozen as things stand. What is predicted to cost about the
/// same is not the same: of those the plan with the fewest faults, because faults are what is known least.
pub fn best_freeze(at: &Situation, bounds: &Bounds) -> (Frozen, Outcome) {
    let scored: Vec<(f64, Frozen, Outcome)> = candidates(at)
        .into_iter()
        .map(|frozen| {
            let outcome = at.freeze_now(&frozen);
            (bounds.excess(&outcome), frozen, outcome)
        })
        .collect();
    let least = scored.iter().map(|s| s.0).fold(f64::INFINITY, f64::min);
    let allowed = || scored.iter().filter(|s| s.0 <= least + 1e-9);
    let best = allowed().map(|s| cost(&s.2)).fold(f64::INFINITY, f64::min);
    let near = allowed().filter(|s| cost(&s.2) <= best * (1.0 + TIE.0) + TIE.1);
    let chosen = near.min_by(|a, b| {
        let faults = a.2.faults.total_cmp(&b.2.faults);
        faults.then(cost(&a.2).total_cmp(&cost(&b.2)))
    });
    let (_, frozen, outcome) = chosen.expect("there is one candidate at least: nothing");
    (frozen.clone(), *outcome)
}

/// The guest is frozen now and nothing moves in the freeze.
pub fn nothing(situation: &Situation) -> Choice {
    let frozen = Frozen::nothing(situation);
    Choice {
        rounds: 0,
        reached: situation.clone(),
        outcome: situation.freeze_now(&frozen),
        frozen,
    }
}

impl Choice {
    /// Whether it gains enough over another one to be taken instead.
    pub fn is_better_than(&self, other: &Self, bounds: &Bounds) -> bool {
        let (mine, theirs) = (bounds.excess(&self.outcome), bounds.excess(&other.outcome));
        let (own, their) = (cost(&self.outcome), cost(&other.outcome));
        mine + 1e-9 < theirs || (mine <= theirs + 1e-9 && own < their * (1.0 - GAIN.0) - GAIN.1)
    }

    /// What it does, in a few words.
    pub fn words(&self) -> String {
        let rounds = match self.rounds {
            0 => "freeze now".to_owned(),
            1 => "freeze after one more round".to_owned(),
            more => format!("freeze after {more} more rounds"),
        };
        let pages = |kind| self.frozen.pages(kind);
        let all: f64 = self
            .reached
            .kinds()
            .iter()
            .map(|k| k.stale() + k.unsent())
            .sum();
        let moved = pages(RegionKind::Memory) + pages(RegionKind::Disk);
        format!("{rounds}, {moved:.0} of {all:.0} missing pages in the freeze")
    }

    /// With its distribution. `situation` is where it was made.
    pub fn planned(&self, situation: &Situation, what: impl Into<String>) -> Planned {
        let share = |kind: RegionKind| {
            let state = self.reached.kinds()[super::heat::index(kind)];
            let content = state.content();
            let behind = state.stale() + state.unsent() - self.frozen.pages(kind);
            if content > 0.0 {
                (1.0 - behind / content).clamp(0.0, 1.0)
            } else {
                1.0
            }
        };
        Planned {
            what: what.into(),
            rounds: self.rounds,
            mem_frac: share(RegionKind::Memory),
            disk_frac: share(RegionKind::Disk),
            freeze_pages: (
                self.frozen.pages(RegionKind::Memory),
                self.frozen.pages(RegionKind::Disk),
            ),
            prediction: predict(situation, self.rounds, &self.reached, &self.frozen),
        }
    }
}
