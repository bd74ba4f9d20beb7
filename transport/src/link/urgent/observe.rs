//! What is known of a path's losses: from QUIC's counters, and from which pieces of parcels arrived,
//! which also tells whether losses come in runs. It only estimates.

use std::time::Duration;

use super::plan::Path;
use super::wire::Shape;

/// What QUIC knows at a moment. Counters are of the path's whole life.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Network {
    /// Smoothed round-trip time.
    pub srtt: Duration,
    /// Smallest round-trip time seen.
    pub min_rtt: Duration,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets taken for lost.
    pub lost_packets: u64,
    /// Mean length of a run of lost packets, where somebody else has measured it.
    pub burst: Option<f64>,
}

/// Packets that make a sample of QUIC's loss.
const SAMPLE: u64 = 500;
/// Weight of such a sample.
const WEIGHT: f64 = 0.1;
/// Loss assumed before anything was measured, with the weight of this many pieces.
const ASSUMED_LOSS: f64 = 0.01;
const ASSUMED_PIECES: f64 = 50.0;
/// Chance assumed at first that the packet after a lost one is lost too, and its weight in pairs.
const ASSUMED_RUN: f64 = 0.3;
const ASSUMED_PAIRS: f64 = 3.0;
/// Pieces and pairs that count; older ones fade.
const MEMORY: f64 = 2000.0;
const PAIR_MEMORY: f64 = 200.0;
/// Shortest time over which the rate of packets means something.
const RATE_SPAN: Duration = Duration::from_millis(50);

/// See the module's text.
#[derive(Debug)]
pub struct Observer {
    quic: f64,
    /// (sent, lost) at the last sample.
    sampled: (u64, u64),
    pieces: f64,
    lost: f64,
    /// Neighbours of which the first was lost, and of which both were.
    after_lost: f64,
    both_lost: f64,
    /// (when, packets sent) of the last look at the rate.
    looked: Option<(Duration, u64)>,
    packet_gap: Duration,
    srtt: Duration,
    foreign_burst: Option<f64>,
}

impl Default for Observer {
    fn default() -> Self {
        Self {
            quic: ASSUMED_LOSS,
            sampled: (0, 0),
            pieces: ASSUMED_PIECES,
            lost: ASSUMED_PIECES * ASSUMED_LOSS,
            after_lost: ASSUMED_PAIRS,
            both_lost: ASSUMED_PAIRS * ASSUMED_RUN,
            looked: None,
            packet_gap: Duration::from_millis(1),
            srtt: Duration::from_millis(100),
            foreign_burst: None,
        }
    }
}

impl Observer {
    /// QUIC's figures as they are now.
    pub fn network(&mut self, now: Duration, network: &Network) {
        self.srtt = network.srtt;
        self.foreign_burst = network.burst;
        let (sent, lost) = self.sampled;
        // A new path begins to count anew.
        let fresh = network.sent_packets.saturating_sub(sent);
        if network.sent_packets < sent || network.lost_packets < lost {
            self.sampled = (network.sent_packets, network.lost_packets);
        } else if fresh >= SAMPLE {
            let share = (network.lost_packets - lost) as f64 / fresh as f64;
            // A long time without a look makes a large sample.
            let weight = (WEIGHT * fresh as f64 / SAMPLE as f64).min(1.0);
            self.quic += weight * (share.min(1.0) - self.quic);
            self.sampled = (network.sent_packets, network.lost_packets);
        }
        let (since, packets) = *self.looked.get_or_insert((now, network.sent_packets));
        let elapsed = now.saturating_sub(since);
        if elapsed >= RATE_SPAN {
            let count = network
                .sent_packets
                .saturating_sub(packets)
                .clamp(1, 1 << 30);
            self.packet_gap = elapsed / count as u32;
            self.looked = Some((now, network.sent_packets));
        }
    }

    /// Which pieces of a parcel arrived; its data pieces were neighbours on the wire.
    pub fn parcel(&mut self, shape: &Shape, seen: u32) {
        let lost = |index: usize| seen & (1 << index) == 0;
        let total = shape.pieces();
        self.pieces += total as f64;
        self.lost += (0..total).filter(|index| lost(*index)).count() as f64;
        for index in 1..usize::from(shape.data) {
            if lost(index - 1) {
                self.after_lost += 1.0;
                self.both_lost += f64::from(u8::from(lost(index)));
            }
        }
        if self.pieces > MEMORY {
            self.pieces /= 2.0;
            self.lost /= 2.0;
        }
        if self.after_lost > PAIR_MEMORY {
            self.after_lost /= 2.0;
            self.both_lost /= 2.0;
        }
    }

    /// The path to plan for: on the safe side of what was seen.
    pub fn path(&self) -> Path {
        let seen = self.quic.max(self.lost / self.pieces);
        Path {
            srtt: self.srtt,
            loss: (1.25 * seen + 0.002).min(0.5),
            burst: self.burst(),
            packet_gap: self.packet_gap,
        }
    }

    /// Mean length of a run of losses.
    fn burst(&self) -> f64 {
        let run = (self.both_lost / self.after_lost).min(0.95);
        let own = 1.0 / (1.0 - run);
        self.foreign_burst.map_or(own, |foreign| foreign.max(own))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng as _, SeedableRng as _};

    fn network(sent_packets: u64, lost_packets: u64) -> Network {
        Network {
            srtt: Duration::from_millis(100),
            min_rtt: Duration::from_millis(100),
            sent_packets,
            lost_packets,
            burst: None,
        }
    }

    #[test]
    fn the_loss_of_the_path_is_learnt_from_quic() {
        let mut observer = Observer::default();
        for step in 0..100 {
            let now = Duration::from_millis(100 * step);
            observer.network(now, &network(1000 * step, 30 * step));
        }
        let path = observer.path();
        assert!((0.03..0.05).contains(&path.loss), "{path:?}");
        assert_eq!(path.packet_gap, Duration::from_micros(100));
    }

    #[test]
    fn a_new_path_is_not_taken_for_a_loss() {
        let mut observer = Observer::default();
        observer.network(Duration::ZERO, &network(100_000, 10));
        observer.network(Duration::from_secs(1), &network(5, 0));
        observer.network(Duration::from_secs(2), &network(1005, 0));
        assert!(observer.path().loss < 0.015);
    }

    #[test]
    fn runs_are_told_from_single_losses() {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(3);
        for (exit, wanted) in [(0.99, 0.9..1.3), (0.25, 2.5..5.5)] {
            let mut observer = Observer::default();
            let mut shape = Shape::of(17, &[1; 4126]);
            shape.parity = 2;
            let mut lost = false;
            for _ in 0..5000 {
                let mut seen = 0;
                for index in 0..6 {
                    lost = rng.random_bool(if lost { 1.0 - exit } else { 0.01 * exit });
                    seen |= u32::from(!lost) << index;
                }
                observer.parcel(&shape, seen);
            }
            let burst = observer.path().burst;
            assert!(wanted.contains(&burst), "{burst} for {exit}");
        }
    }
}
