//! What other senders on the link do: CUBIC (RFC 9438 with HyStart, as Linux) and, in [`bbr`], BBR.

use std::time::Duration;

use crate::model::PACKET;

/// What a TCP sender is told with an acknowledgement.
pub struct Acks<'a> {
    /// Numbers of the packets that have newly arrived, and when they were sent.
    pub acked: &'a [(u64, Duration)],
    /// Numbers of those that count as lost now.
    pub lost: &'a [u64],
    /// Packets still in flight.
    pub in_flight: u64,
    /// Number of the next packet to be sent.
    pub next: u64,
}

impl Acks<'_> {
    /// Round trip in seconds of the packet that was sent last.
    pub fn rtt(&self, now: Duration) -> Option<f64> {
        let newest = self.acked.iter().map(|(_, sent)| *sent).max()?;
        Some(now.saturating_sub(newest).as_secs_f64())
    }
}

/// Share of the window that is left after a loss, and the speed at which it grows.
const BETA: f64 = 0.7;
const C: f64 = 0.4;
/// HyStart: samples of a round, and by how many seconds it must be longer than the shortest.
const HYSTART_SAMPLES: u32 = 8;
const HYSTART_DELAY: (f64, f64) = (0.004, 0.016);

/// CUBIC in packets.
pub struct Cubic {
    window: f64,
    threshold: f64,
    /// The window before the last cut, and how long it takes to get back to the plateau.
    most: f64,
    plateau: f64,
    since: Option<Duration>,
    reno: f64,
    min_rtt: f64,
    /// Packets below this number were sent before the last cut: their loss is the same event.
    cut_at: u64,
    /// The round under way ends with this packet; its samples and the shortest.
    round: u64,
    samples: u32,
    shortest: f64,
}

impl Cubic {
    pub fn new() -> Self {
        Self {
            window: 10.0,
            threshold: f64::INFINITY,
            most: 0.0,
            plateau: 0.0,
            since: None,
            reno: 0.0,
            min_rtt: f64::INFINITY,
            cut_at: 0,
            round: 0,
            samples: 0,
            shortest: f64::INFINITY,
        }
    }

    pub fn window(&self) -> u64 {
        (self.window * PACKET as f64) as u64
    }

    pub fn on_acks(&mut self, now: Duration, acks: &Acks<'_>) {
        let rtt = acks.rtt(now).unwrap_or(self.min_rtt);
        self.min_rtt = self.min_rtt.min(rtt);
        if acks.lost.iter().any(|number| *number >= self.cut_at) {
            self.most = if self.window < self.most {
                self.window * (1.0 + BETA) / 2.0
            } else {
                self.window
            };
            self.window = (BETA * self.window).max(2.0);
            self.threshold = self.window;
            self.cut_at = acks.next;
            self.since = None;
        }
        let acked = acks.acked.len() as f64;
        let recovered = acks.acked.iter().any(|(number, _)| *number >= self.cut_at);
        if acked == 0.0 || (self.cut_at > 0 && !recovered) {
            return;
        }
        if self.window < self.threshold {
            self.hystart(acks, rtt);
            self.window += acked;
        } else {
            self.avoid_congestion(now, acked);
        }
    }

    fn hystart(&mut self, acks: &Acks<'_>, rtt: f64) {
        if acks.acked.iter().any(|(number, _)| *number >= self.round) {
            self.round = acks.next;
            self.samples = 0;
            self.shortest = f64::INFINITY;
        }
        self.shortest = self.shortest.min(rtt);
        self.samples += 1;
        let (least, most) = HYSTART_DELAY;
        let longer = self.min_rtt + (self.min_rtt / 8.0).clamp(least, most);
        if self.samples >= HYSTART_SAMPLES && self.window >= 16.0 && self.shortest > longer {
            self.threshold = self.window;
        }
    }

    fn avoid_congestion(&mut self, now: Duration, acked: f64) {
        let since = *self.since.get_or_insert_with(|| {
            if self.most <= self.window {
                self.most = self.window;
                self.plateau = 0.0;
            } else {
                self.plateau = ((self.most - self.window) / C).cbrt();
            }
            self.reno = self.window;
            now
        });
        let elapsed = now.saturating_sub(since).as_secs_f64() + self.min_rtt;
        let cubic = C * (elapsed - self.plateau).powi(3) + self.most;
        self.reno += 3.0 * (1.0 - BETA) / (1.0 + BETA) * acked / self.window;
        let target = cubic.max(self.reno).min(1.5 * self.window);
        // Linux never stands still: a hundredth of a packet at least.
        let growth = ((target - self.window) / self.window).max(0.01 / self.window);
        self.window += growth * acked;
    }
}
