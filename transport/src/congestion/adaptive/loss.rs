//! How much is lost, and in what pieces.

/// Weight of the newest round, and of the newest loss.
const NEWEST: f64 = 0.25;
const NEWEST_BURST: f64 = 1.0 / 16.0;

/// Share lost beyond the usual that is worth a reaction.
const UNUSUAL: f64 = 0.03;

/// Loss by rounds.
#[derive(Clone, Debug)]
pub(super) struct Losses {
    acked: u64,
    lost: u64,
    share: f64,
    burst: f64,
    /// What is lost while nothing is tried.
    usual: f64,
}

impl Losses {
    pub(super) fn new() -> Self {
        Self {
            acked: 0,
            lost: 0,
            share: 0.0,
            burst: 1.0,
            usual: 0.0,
        }
    }

    pub(super) fn acknowledged(&mut self, bytes: u64) {
        self.acked += bytes;
    }

    /// `bytes` in packets of `mtu` bytes were found lost at once.
    pub(super) fn lost(&mut self, bytes: u64, mtu: f64) {
        self.lost += bytes;
        let packets = (bytes as f64 / mtu).max(1.0);
        self.burst += (packets - self.burst) * NEWEST_BURST;
    }

    /// Bytes lost in the round under way.
    pub(super) fn lost_in_round(&self) -> f64 {
        self.lost as f64
    }

    /// Whether the round under way, of packets of `mtu` bytes, has lost so much more than usual that chance
    /// does not explain it.
    pub(super) fn is_unusual(&self, mtu: f64) -> bool {
        let packets = (self.acked + self.lost) as f64 / mtu;
        let expected = self.usual * packets;
        // Four standard deviations of a number of bursts, and a few packets.
        let chance = 4.0 * self.burst * expected.sqrt() + 8.0;
        self.lost as f64 / mtu > expected + chance.max(UNUSUAL * packets)
    }

    /// Ends a round; the share of its bytes that were lost. `trying` says that the window was growing.
    pub(super) fn end_round(&mut self, trying: bool) -> f64 {
        let total = self.acked + self.lost;
        let lost = match total {
            0 => 0.0,
            total => self.lost as f64 / total as f64,
        };
        self.share += (lost - self.share) * NEWEST;
        if !trying {
            self.usual += (lost - self.usual) * NEWEST;
        }
        self.acked = 0;
        self.lost = 0;
        lost
    }

    /// Ends a round that tells nothing.
    pub(super) fn forget_round(&mut self) {
        self.acked = 0;
        self.lost = 0;
    }

    /// Share of bytes lost, smoothed over rounds.
    pub(super) fn share(&self) -> f64 {
        self.share
    }

    /// The same over rounds in which the window did not grow.
    pub(super) fn usual(&self) -> f64 {
        self.usual
    }

    /// Packets that are lost together, on average; 1 where losses are independent.
    pub(super) fn burst(&self) -> f64 {
        self.burst
    }
}
