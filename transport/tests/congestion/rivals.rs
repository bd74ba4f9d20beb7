//! What other senders on the link do: CUBIC (RFC 9438) and BBR's main loop (draft-cardwell, version 1), as far
//! as sharing a bottleneck asks for it.

use std::collections::VecDeque;
use std::time::Duration;

use crate::model::PACKET;

/// CUBIC in packets.
pub struct Cubic {
    window: f64,
    threshold: f64,
    most: f64,
    since: Duration,
    /// No second cut within a round trip.
    cut_at: Option<Duration>,
}

impl Cubic {
    pub fn new() -> Self {
        Self {
            window: 10.0,
            threshold: f64::INFINITY,
            most: 0.0,
            since: Duration::ZERO,
            cut_at: None,
        }
    }

    pub fn window(&self) -> u64 {
        (self.window * PACKET as f64) as u64
    }

    pub fn on_acks(&mut self, now: Duration, acked: u64, lost: u64, rtt: f64) {
        let recent = |at: Duration| now.saturating_sub(at).as_secs_f64() < rtt;
        if lost > 0 && !self.cut_at.is_some_and(recent) {
            self.most = self.window;
            self.window = (0.7 * self.window).max(2.0);
            self.threshold = self.window;
            self.cut_at = Some(now);
            self.since = now;
        } else if self.window < self.threshold {
            self.window += acked as f64;
        } else {
            let elapsed = now.saturating_sub(self.since).as_secs_f64() + rtt;
            let k = (self.most * 0.3 / 0.4).cbrt();
            let cubic = 0.4 * (elapsed - k).powi(3) + self.most;
            let reno = 0.7 * self.most + 0.53 * elapsed / rtt;
            let target = cubic.max(reno).min(1.5 * self.window);
            self.window += ((target - self.window) / self.window).max(0.0) * acked as f64;
        }
    }
}

/// BBR version 1 in bytes.
pub struct Bbr {
    rates: VecDeque<(Duration, f64)>,
    min_rtt: f64,
    acked: VecDeque<(Duration, u64)>,
    started: bool,
    flat: u32,
    best: f64,
    round_ends: Duration,
    phase: usize,
}

impl Bbr {
    pub fn new() -> Self {
        Self {
            rates: VecDeque::new(),
            min_rtt: 0.1,
            acked: VecDeque::new(),
            started: false,
            flat: 0,
            best: 0.0,
            round_ends: Duration::ZERO,
            phase: 0,
        }
    }

    fn rate(&self) -> f64 {
        self.rates
            .iter()
            .map(|(_, rate)| *rate)
            .fold(10.0 * PACKET as f64 / 0.1, f64::max)
    }

    pub fn pace(&self) -> f64 {
        const CYCLE: [f64; 8] = [1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        self.rate()
            * if self.started {
                CYCLE[self.phase % 8]
            } else {
                2.885
            }
    }

    pub fn window(&self) -> u64 {
        let gain = if self.started { 2.0 } else { 2.885 };
        ((gain * self.rate() * self.min_rtt) as u64).max(10 * PACKET)
    }

    pub fn on_acks(&mut self, now: Duration, acked: u64, rtt: f64) {
        self.min_rtt = self.min_rtt.min(rtt);
        self.acked.push_back((now, acked));
        let round = Duration::from_secs_f64(rtt);
        while self
            .acked
            .front()
            .is_some_and(|(at, _)| now.saturating_sub(*at) > round)
        {
            self.acked.pop_front();
        }
        let bytes: u64 = self.acked.iter().map(|(_, packets)| packets * PACKET).sum();
        if now < self.round_ends {
            return;
        }
        self.round_ends = now + round;
        self.phase += 1;
        let rate = bytes as f64 / rtt;
        self.rates.push_back((now, rate));
        while self
            .rates
            .front()
            .is_some_and(|(at, _)| now.saturating_sub(*at) > 10 * round)
        {
            self.rates.pop_front();
        }
        if rate > 1.25 * self.best {
            self.best = rate;
            self.flat = 0;
        } else {
            self.flat += 1;
            self.started |= self.flat >= 3;
        }
    }
}
