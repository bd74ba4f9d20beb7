//! BBR version 1 as in Linux (`tcp_bbr.c`), but for its detector of policers.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::model::PACKET;
use crate::rivals::Acks;

const HIGH_GAIN: f64 = 2.885;
const CYCLE: [f64; 8] = [1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
/// Rounds over which the largest delivery rate counts, and those of the largest surplus of acknowledgements.
const RATE_ROUNDS: u64 = 10;
const EXTRA_ROUNDS: u64 = 10;
/// How long the shortest round trip counts, and how long the queue is emptied to learn it anew.
const MIN_RTT_AGE: Duration = Duration::from_secs(10);
const PROBE_RTT: Duration = Duration::from_millis(200);
/// Share of the known rate that is paced.
const MARGIN: f64 = 0.99;
/// Packets that segmentation offload keeps on top, as a share of a millisecond and a bit at the rate.
const OFFLOAD: f64 = 3.0 * 0.001;
const LEAST: f64 = 4.0;

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Startup,
    Drain,
    ProbeBandwidth,
    ProbeRtt,
}

/// The state when a packet was sent.
#[derive(Clone, Copy)]
struct Sent {
    at: Duration,
    delivered: u64,
    delivered_at: Duration,
    since: Duration,
}

/// In packets.
pub struct Bbr {
    mode: Mode,
    sent: BTreeMap<u64, Sent>,
    delivered: u64,
    delivered_at: Duration,
    first_sent: Duration,
    round: u64,
    round_ends: u64,
    /// Round and packets/s.
    rates: VecDeque<(u64, f64)>,
    full_rate: f64,
    flat: u32,
    full: bool,
    min_rtt: f64,
    min_rtt_at: Duration,
    probe_rtt_ends: Option<Duration>,
    probe_rtt_round: u64,
    phase: usize,
    phase_at: Duration,
    window: f64,
    window_before: f64,
    /// Recovery lasts until this packet; its first round keeps what is in flight.
    recovery: Option<u64>,
    conserving: bool,
    extra: VecDeque<(u64, f64)>,
    epoch_at: Duration,
    epoch_acked: f64,
}

impl Bbr {
    pub fn new() -> Self {
        Self {
            mode: Mode::Startup,
            sent: BTreeMap::new(),
            delivered: 0,
            delivered_at: Duration::ZERO,
            first_sent: Duration::ZERO,
            round: 0,
            round_ends: 0,
            rates: VecDeque::new(),
            full_rate: 0.0,
            flat: 0,
            full: false,
            min_rtt: f64::INFINITY,
            min_rtt_at: Duration::ZERO,
            probe_rtt_ends: None,
            probe_rtt_round: 0,
            phase: 2,
            phase_at: Duration::ZERO,
            window: 10.0,
            window_before: 0.0,
            recovery: None,
            conserving: false,
            extra: VecDeque::new(),
            epoch_at: Duration::ZERO,
            epoch_acked: 0.0,
        }
    }

    fn rate(&self) -> f64 {
        self.rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max)
    }

    /// Bytes/s.
    pub fn pace(&self) -> f64 {
        let gain = match self.mode {
            Mode::Startup => HIGH_GAIN,
            Mode::Drain => 1.0 / HIGH_GAIN,
            Mode::ProbeBandwidth => CYCLE[self.phase],
            Mode::ProbeRtt => 1.0,
        };
        let known = match self.rate() {
            0.0 => 10.0 / 0.001,
            rate => rate,
        };
        gain * known * MARGIN * PACKET as f64
    }

    pub fn window(&self) -> u64 {
        (self.window * PACKET as f64) as u64
    }

    /// Packets in flight for a gain.
    fn target(&self, gain: f64) -> f64 {
        if !self.min_rtt.is_finite() {
            return 10.0;
        }
        let rate = self.rate();
        let probing = self.mode == Mode::ProbeBandwidth && self.phase == 0;
        gain * rate * self.min_rtt + OFFLOAD * rate + if probing { 2.0 } else { 0.0 }
    }

    pub fn on_sent(&mut self, now: Duration, number: u64, in_flight: u64) {
        if in_flight == 0 {
            self.first_sent = now;
            self.delivered_at = now;
        }
        let sent = Sent {
            at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
            since: self.first_sent,
        };
        self.sent.insert(number, sent);
    }

    pub fn on_acks(&mut self, now: Duration, acks: &Acks<'_>) {
        for number in acks.lost {
            self.sent.remove(number);
        }
        let mut newest: Option<Sent> = None;
        for (number, _) in acks.acked {
            self.delivered += 1;
            if let Some(sent) = self.sent.remove(number) {
                newest = Some(newest.map_or(sent, |a| if a.at > sent.at { a } else { sent }));
            }
        }
        let acked = acks.acked.len() as f64;
        let mut round_began = false;
        if let Some(sent) = newest {
            self.delivered_at = now;
            self.first_sent = sent.at;
            if sent.delivered >= self.round_ends {
                self.round_ends = self.delivered;
                self.round += 1;
                round_began = true;
                self.conserving = false;
            }
            let sending = sent.at.saturating_sub(sent.since);
            let hearing = now.saturating_sub(sent.delivered_at);
            let interval = sending.max(hearing).as_secs_f64();
            // A sample over less than the shortest round trip is none.
            if !self.min_rtt.is_finite() || interval >= self.min_rtt {
                let rate = (self.delivered - sent.delivered) as f64 / interval;
                self.rates.push_back((self.round, rate));
                // Only what is larger than all that is newer can still be the largest.
                while self.rates.len() > 1 && self.rates[self.rates.len() - 2].1 <= rate {
                    self.rates.remove(self.rates.len() - 2);
                }
            }
            while self
                .rates
                .front()
                .is_some_and(|(round, _)| round + RATE_ROUNDS <= self.round)
            {
                self.rates.pop_front();
            }
        }
        self.note_surplus(now, acked);
        self.next_phase(now, acks);
        if round_began && !self.full {
            let rate = self.rate();
            if rate >= 1.25 * self.full_rate {
                self.full_rate = rate;
                self.flat = 0;
            } else {
                self.flat += 1;
                self.full = self.flat >= 3;
            }
        }
        if self.mode == Mode::Startup && self.full {
            self.mode = Mode::Drain;
        }
        if self.mode == Mode::Drain && acks.in_flight as f64 <= self.target(1.0) {
            self.probe_bandwidth(now);
        }
        self.note_min_rtt(now, acks, round_began);
        self.set_window(acks, acked);
    }

    /// Acknowledgements that come in lumps leave nothing in flight but for a surplus.
    fn note_surplus(&mut self, now: Duration, acked: f64) {
        let expected = self.rate() * now.saturating_sub(self.epoch_at).as_secs_f64();
        let expected = if self.epoch_acked <= expected {
            self.epoch_at = now;
            self.epoch_acked = 0.0;
            0.0
        } else {
            expected
        };
        self.epoch_acked += acked;
        let extra = (self.epoch_acked - expected).clamp(0.0, self.window);
        self.extra.push_back((self.round, extra));
        while self.extra.len() > 1 && self.extra[self.extra.len() - 2].1 <= extra {
            self.extra.remove(self.extra.len() - 2);
        }
        while self
            .extra
            .front()
            .is_some_and(|(round, _)| round + EXTRA_ROUNDS <= self.round)
        {
            self.extra.pop_front();
        }
    }

    fn next_phase(&mut self, now: Duration, acks: &Acks<'_>) {
        if self.mode != Mode::ProbeBandwidth {
            return;
        }
        let long = now.saturating_sub(self.phase_at).as_secs_f64() > self.min_rtt;
        let before = acks.in_flight as f64 + acks.acked.len() as f64;
        let over = match self.phase {
            0 => long && (!acks.lost.is_empty() || before >= self.target(1.25)),
            1 => long || before <= self.target(1.0),
            _ => long,
        };
        if over {
            self.phase = (self.phase + 1) % CYCLE.len();
            self.phase_at = now;
        }
    }

    fn probe_bandwidth(&mut self, now: Duration) {
        self.mode = Mode::ProbeBandwidth;
        // Linux draws any but the one that drains.
        self.phase = 2 + (self.round % 6) as usize;
        self.phase_at = now;
    }

    fn note_min_rtt(&mut self, now: Duration, acks: &Acks<'_>, round_began: bool) {
        let expired = now > self.min_rtt_at + MIN_RTT_AGE;
        if let Some(rtt) = acks.rtt(now)
            && (rtt <= self.min_rtt || expired)
        {
            self.min_rtt = rtt;
            self.min_rtt_at = now;
        }
        if expired && self.mode != Mode::ProbeRtt {
            self.mode = Mode::ProbeRtt;
            self.window_before = self.window_before.max(self.window);
            self.probe_rtt_ends = None;
        }
        if self.mode != Mode::ProbeRtt {
            return;
        }
        match self.probe_rtt_ends {
            None if acks.in_flight as f64 <= LEAST => {
                self.probe_rtt_ends = Some(now + PROBE_RTT);
                self.probe_rtt_round = self.round;
                self.round_ends = self.delivered;
            }
            Some(end) if now >= end && (round_began || self.round > self.probe_rtt_round) => {
                self.min_rtt_at = now;
                self.window = self.window.max(self.window_before);
                self.window_before = 0.0;
                if self.full {
                    self.probe_bandwidth(now);
                } else {
                    self.mode = Mode::Startup;
                }
            }
            _ => {}
        }
    }

    fn set_window(&mut self, acks: &Acks<'_>, acked: f64) {
        let lost = acks.lost.len() as f64;
        if lost > 0.0 {
            self.window = (self.window - lost).max(1.0);
            if self.recovery.is_none() {
                self.recovery = Some(acks.next);
                self.conserving = true;
                self.window_before = self.window_before.max(self.window + lost);
                self.window = acks.in_flight as f64 + acked;
                self.round_ends = self.delivered;
            }
        }
        if let Some(end) = self.recovery
            && acks.acked.iter().any(|(number, _)| *number >= end)
        {
            self.recovery = None;
            self.conserving = false;
            if self.mode != Mode::ProbeRtt {
                self.window = self.window.max(self.window_before);
                self.window_before = 0.0;
            }
        }
        if self.conserving {
            self.window = self.window.max(acks.in_flight as f64 + acked);
        } else {
            let gain = if self.mode == Mode::ProbeBandwidth {
                2.0
            } else {
                HIGH_GAIN
            };
            let extra = self
                .extra
                .iter()
                .map(|(_, extra)| *extra)
                .fold(0.0, f64::max);
            let extra = if self.full {
                extra.min(0.1 * self.rate())
            } else {
                0.0
            };
            let target = self.target(gain) + extra;
            if self.full {
                self.window = (self.window + acked).min(target);
            } else {
                self.window += acked;
            }
        }
        self.window = self.window.max(LEAST);
        if self.mode == Mode::ProbeRtt {
            self.window = self.window.min(LEAST);
        }
    }
}
