//! How much redundancy a parcel needs, and how far apart its pieces go: from the loss of the path and
//! from how it clusters. A pure function of numbers.

use std::time::Duration;

use super::wire::MAX_PIECES;

/// Chance that a parcel does not arrive at the first try, at most, where the bounds below allow it.
/// A request and its reply are two.
pub const TARGET: f64 = 0.000_5;
/// Most copies beside the first of contents that fit one piece.
pub const MAX_COPIES: usize = 5;
/// Contents up to this length (requests, mostly) have two copies at least: they cost next to nothing.
const SMALL: usize = 300;
/// Shortest time between data and parity, or between copies.
const GAP: Duration = Duration::from_millis(1);
/// Share of a round trip that this time may grow to.
const GAP_SHARE: u32 = 20;

/// The path, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Path {
    /// Smoothed round-trip time.
    pub srtt: Duration,
    /// Share of packets lost, 0 to 1.
    pub loss: f64,
    /// Mean length of a run of lost packets; 1 / (1 − loss) where losses know nothing of each other.
    pub burst: f64,
    /// Time between two packets of this side, lately.
    pub packet_gap: Duration,
}

/// See the module's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redundancy {
    /// Parity pieces, or copies beside the first.
    pub parity: usize,
    /// Time from the last data piece to the parity, which goes together; for contents of one piece,
    /// from copy to copy.
    pub gap: Duration,
}

/// Redundancy for contents of `len` bytes in `data` pieces.
pub fn redundancy(data: usize, len: usize, path: &Path) -> Redundancy {
    let chain = Chain::new(path.loss, path.burst);
    let packet_gap = path.packet_gap.as_secs_f64().clamp(1e-5, 0.02);
    // A run of losses should be over before what repairs it goes out.
    let apart = Duration::from_secs_f64(chain.memory() * packet_gap);
    let gap = apart.min(path.srtt / GAP_SHARE).max(GAP);
    let lag = 1.0 + gap.as_secs_f64() / packet_gap;
    let (least, most) = match data {
        0 | 1 if len <= SMALL => (2, MAX_COPIES),
        0 | 1 => (1, MAX_COPIES),
        _ => (1, data.min(MAX_PIECES - data)),
    };
    let fails = |parity: usize| {
        let lags =
            (1..data + parity).map(|index| if index == data || data <= 1 { lag } else { 1.0 });
        chain.more_lost_than(parity, lags)
    };
    let parity = (least..most).find(|parity| fails(*parity) <= TARGET);
    Redundancy {
        parity: parity.unwrap_or(most),
        gap,
    }
}

/// Packets as a chain of two states, lost and not, as Gilbert and Elliott have it.
pub(in crate::link) struct Chain {
    loss: f64,
    /// Correlation of the fates of neighbours.
    memory: f64,
}

impl Chain {
    pub(in crate::link) fn new(loss: f64, burst: f64) -> Self {
        let loss = loss.clamp(0.0, 0.5);
        let memory = 1.0 - 1.0 / (burst.max(1.0) * (1.0 - loss));
        Self {
            loss,
            memory: memory.clamp(0.0, 0.98),
        }
    }

    /// Packets after which nine tenths of the correlation are gone.
    fn memory(&self) -> f64 {
        if self.memory < 0.1 {
            0.0
        } else {
            0.1_f64.ln() / self.memory.ln()
        }
    }

    /// Chance that more than `few` are lost of one packet and those that follow it, each `lags`
    /// packets after the one before.
    pub(in crate::link) fn more_lost_than(
        &self,
        few: usize,
        lags: impl Iterator<Item = f64>,
    ) -> f64 {
        // By number lost so far: chance that this is it and the last one was (lost, not lost).
        let mut lost = vec![0.0; few + 1];
        let mut kept = vec![0.0; few + 1];
        kept[0] = 1.0 - self.loss;
        let mut over = self.loss;
        if let Some(one) = lost.get_mut(1) {
            *one = self.loss;
            over = 0.0;
        }
        for lag in lags {
            let correlation = self.memory.powf(lag);
            let lost_again = self.loss + (1.0 - self.loss) * correlation;
            let lost_anew = self.loss * (1.0 - correlation);
            let mut next_lost = vec![0.0; few + 1];
            let mut next_kept = vec![0.0; few + 1];
            for count in 0..=few {
                let losing = lost[count] * lost_again + kept[count] * lost_anew;
                next_kept[count] = lost[count] + kept[count] - losing;
                match next_lost.get_mut(count + 1) {
                    Some(next) => *next = losing,
                    None => over += losing,
                }
            }
            (lost, kept) = (next_lost, next_kept);
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(loss: f64, burst: f64) -> Path {
        Path {
            srtt: Duration::from_millis(100),
            loss,
            burst,
            packet_gap: Duration::from_micros(116),
        }
    }

    #[test]
    fn a_page_gets_what_its_path_needs() {
        for (loss, burst, wanted) in [
            (0.0, 1.0, 1),
            (0.002, 1.0, 1),
            (0.015, 1.0, 2),
            (0.04, 1.0, 3),
            (0.012, 4.0, 4),
            (0.5, 1.0, 4),
        ] {
            let plan = redundancy(4, 4126, &path(loss, burst));
            assert_eq!(plan.parity, wanted, "{loss} {burst}");
        }
    }

    #[test]
    fn a_request_gets_copies() {
        assert_eq!(redundancy(1, 40, &path(0.0, 1.0)).parity, 2);
        assert_eq!(redundancy(1, 900, &path(0.0, 1.0)).parity, 1);
        assert_eq!(redundancy(1, 900, &path(0.04, 1.0)).parity, 2);
        assert_eq!(redundancy(1, 40, &path(0.5, 8.0)).parity, MAX_COPIES);
    }

    #[test]
    fn clustered_loss_spreads_the_pieces_and_a_short_path_does_not() {
        assert_eq!(redundancy(4, 4126, &path(0.01, 1.0)).gap, GAP);
        let mut slow = path(0.01, 4.0);
        slow.packet_gap = Duration::from_millis(1);
        assert_eq!(redundancy(4, 4126, &slow).gap, Duration::from_millis(5));
        slow.srtt = Duration::from_millis(20);
        assert_eq!(redundancy(4, 4126, &slow).gap, GAP);
    }

    #[test]
    fn the_chain_agrees_with_trials() {
        use rand::{Rng as _, SeedableRng as _};
        let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
        for (loss, burst) in [(0.05, 1.0 / 0.95), (0.05, 4.0), (0.2, 2.0)] {
            // Leaves the lost state with 1 / burst.
            let exit = 1.0 / burst;
            let enter = loss * exit / (1.0 - loss);
            let trials = 200_000;
            let mut failed = 0;
            for _ in 0..trials {
                let mut lost = rng.random_bool(loss);
                let mut count = u32::from(lost);
                for _ in 1..6 {
                    lost = rng.random_bool(if lost { 1.0 - exit } else { enter });
                    count += u32::from(lost);
                }
                failed += u32::from(count > 2);
            }
            let seen = f64::from(failed) / f64::from(trials);
            let told = Chain::new(loss, burst).more_lost_than(2, [1.0; 5].into_iter());
            assert!((seen - told).abs() < 0.1 * told + 1e-4, "{seen} {told}");
        }
    }

    #[test]
    fn the_target_is_kept_wherever_the_bounds_allow() {
        for data in 2..=15 {
            for loss in [0.0, 0.001, 0.01, 0.03, 0.1] {
                for burst in [1.0, 2.0, 4.0, 8.0] {
                    let path = path(loss, burst);
                    let plan = redundancy(data, data * 1000, &path);
                    assert!((1..=data).contains(&plan.parity));
                    let packets = 1.0 + plan.gap.as_secs_f64() / path.packet_gap.as_secs_f64();
                    let lags = (1..data + plan.parity)
                        .map(|index| if index == data { packets } else { 1.0 });
                    let fails = Chain::new(loss, burst).more_lost_than(plan.parity, lags);
                    assert!(plan.parity == data || fails <= TARGET);
                }
            }
        }
    }
}
