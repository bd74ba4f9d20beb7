//! What the link has delivered lately, round by round.

use std::collections::VecDeque;

/// Rounds over which the largest delivery rate counts.
const ROUNDS: usize = 10;

/// Delivery rates in bytes/s: of the last rounds, and the best for as long as nobody knows better.
#[derive(Clone, Debug, Default)]
pub(super) struct Rates {
    rounds: VecDeque<f64>,
    latest: f64,
    peak: f64,
}

impl Rates {
    /// A round has delivered at `rate`; `limited` says that more would have been possible.
    pub(super) fn push(&mut self, rate: f64, limited: bool) {
        self.latest = rate;
        if limited && rate <= self.known() {
            return;
        }
        self.rounds.push_back(rate);
        if self.rounds.len() > ROUNDS {
            self.rounds.pop_front();
        }
        self.peak = self.peak.max(rate);
    }

    /// The largest rate of the last rounds; 0 while nothing is known.
    pub(super) fn known(&self) -> f64 {
        self.rounds.iter().copied().fold(0.0, f64::max)
    }

    /// The last round's.
    pub(super) fn latest(&self) -> f64 {
        self.latest
    }

    /// The largest since [`Self::settle`]: what the link can carry, as far as others do not use it.
    pub(super) fn peak(&self) -> f64 {
        self.peak
    }

    /// What was delivered faster than `rate` says nothing about the link as it is now.
    pub(super) fn forget_above(&mut self, rate: f64) {
        for old in &mut self.rounds {
            *old = old.min(rate);
        }
    }

    /// What the link can carry, found by other means.
    pub(super) fn set_peak(&mut self, rate: f64) {
        self.peak = rate;
    }

    /// Nobody else is on the link: it carries what it has delivered to us.
    pub(super) fn settle(&mut self) {
        self.peak = self.known();
    }
}
