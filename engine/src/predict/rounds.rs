//! Rounds of pre-copy in expectation: what the guest makes stale while stale pages move.

use super::fluid::with_stale;
use super::{Class, Situation};

/// Round trips that a round takes beside its bytes: until its end is seen.
const CLOSING: f64 = 0.5;

impl Situation {
    /// How long moving what is stale takes, in seconds.
    pub fn round_seconds(&self) -> f64 {
        let bytes: f64 = self
            .kinds()
            .iter()
            .map(|kind| kind.stale() * kind.bytes_stale)
            .sum();
        let sending = bytes / self.link.bandwidth.max(1.0);
        (sending + CLOSING * self.link.rtt).max(self.min_round)
    }

    /// The situation after one more round, or after what is left of the one under way.
    ///
    /// Pages that were current become stale by being written. Pages that were stale are sent once; those sent early
    /// can be written again. Where the round is long enough for scans within it, what was written goes last, and takes
    /// its own time then.
    #[must_use]
    pub fn after_round(&self) -> Self {
        let seconds = self.round_seconds();
        let mut next = self.clone();
        let rewriting = self.rewriting;
        let scanned = seconds > 1.5 * self.scan_interval;
        let hot: f64 = self
            .kinds()
            .iter()
            .map(|kind| {
                let of = |class: &Class| class.stale * -(-class.writes * seconds).exp_m1();
                kind.bytes_stale * kind.classes.iter().map(of).sum::<f64>()
            })
            .sum();
        // A scan's interval at least: what is written after the last scan is not known to be hot.
        let last = (hot / self.link.bandwidth.max(1.0))
            .max(self.scan_interval)
            .min(seconds);
        let mut bytes = 0.0;
        for kind in [&mut next.memory, &mut next.disks] {
            bytes += kind.stale() * kind.bytes_stale;
            kind.bytes_stale = kind.bytes_again;
            kind.classes = with_stale(&kind.classes, |class| {
                let rate = class.writes * seconds;
                let current = (class.content - class.stale - class.unsent).max(0.0);
                let again = current * -(-rate).exp_m1();
                let exposed = if scanned {
                    // Written before their turn: they go at the end, and have that long to be written once more.
                    let hot = -(-rate).exp_m1();
                    hot * mean_exposure(class.writes * last) + (1.0 - hot) * mean_exposure(rate)
                } else {
                    mean_exposure(rate)
                };
                rewriting * (again + class.stale * exposed)
            });
        }
        next.elapsed += seconds;
        next.precopied += seconds;
        next.sent += bytes;
        next
    }
}

/// Probability that a page which is sent at some moment of an interval is written in the rest of it, `x` being the
/// mean number of writes in all of it: 1 − (1 − e^(−x))/x.
fn mean_exposure(x: f64) -> f64 {
    if x < 1e-6 {
        x / 2.0
    } else {
        1.0 - -(-x).exp_m1() / x
    }
}
