//! Our own congestion control: keeps about one bandwidth-delay product in flight, whatever is lost
//! at random. Plain numbers in, a window out: no clock, no connection, no QUIC types.
//!
//! Loss says little on a long link, so it does not steer. The two things that do are measured:
//! the delivery rate B (largest of the last rounds) and the propagation time R (smallest round trip
//! of the last seconds). The window is
//!
//! ```text
//! W = gain · B · R / (1 − loss) + slack
//! ```
//!
//! It is a window, not a rate, because the QUIC stack below paces at 1.25 · W / srtt on its own.
//! With a gain a little above 1, W probes by itself: on a link with room to spare B grows with
//! every round, on a full one the excess waits in the queue, 5 % of a round trip. A queue that stays
//! longer than that belongs to someone else or to a wrong estimate: then W yields. While no queue
//! shows at all, something else holds the sender back (late wake-ups, mostly), and the gain grows.

use std::collections::VecDeque;
use std::time::Duration;

/// Window over one bandwidth-delay product in steady state.
const GAIN: f64 = 1.05;
/// Largest gain, for senders whose pacing runs late: below it wakes once in a few milliseconds, and
/// what a late wake-up does not send is not made up for, so that a window of one product would not
/// be filled.
const MAX_GAIN: f64 = 1.6;
/// Change of the gain per round.
const GAIN_STEP: f64 = 1.04;
/// A queue of less than this share of the round trip says that the link is not full …
const EMPTY: f64 = 0.02;
/// … unless more than this is lost, as where a policer drops what a queue would hold.
const EMPTY_LOSS: f64 = 0.05;
/// Growth per round while the rate is unknown.
const STARTUP_GAIN: f64 = 2.0;
/// Window while a standing queue drains.
const DRAIN_GAIN: f64 = 0.85;
/// Startup has found the rate when it has grown by less than this factor …
const GROWTH: f64 = 1.25;
/// … for this many rounds that were not limited by the application.
const FLAT_ROUNDS: u32 = 2;
/// Rounds over which the largest delivery rate counts.
const RATE_ROUNDS: usize = 10;
/// Time for which the smallest round trip counts.
const MIN_RTT_AGE: Duration = Duration::from_secs(20);
/// A round trip above this multiple of the smallest one means a queue …
const QUEUE_RATIO: f64 = 1.2;
/// … if it is also longer by this: acknowledgements are late by a few milliseconds.
const QUEUE_MARGIN: f64 = 0.008;
/// Rounds with a queue before the window yields.
const QUEUE_ROUNDS: u32 = 3;
/// Share lost in a round that, with a falling rate, means congestion.
const LOSS_LIMIT: f64 = 0.12;
/// Share lost that the window makes up for, at most.
const LOSS_MADE_UP: f64 = 0.12;
/// Time of delivery that stays in flight because acknowledgements come in groups.
const SLACK_TIME: f64 = 0.003;
/// Acknowledgements come at least this often while data flows.
const ACK_GAP: Duration = Duration::from_millis(10);
/// Smallest window, in packets.
const MIN_PACKETS: f64 = 8.0;
/// Window at the start without hints, in packets (RFC 9002 allows ten; the link was chosen to carry
/// a guest).
const INITIAL_PACKETS: f64 = 32.0;
/// Records of what was sent when; bounds memory at a few hundred thousand packets in flight.
const MAX_SENT: usize = 1 << 18;

/// What is known before the first packet.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hints {
    /// Bottleneck rate in bytes/s.
    pub bandwidth: Option<f64>,
    /// Round-trip time in seconds.
    pub rtt: Option<f64>,
    /// Hard cap in bytes/s.
    pub rate_limit: Option<f64>,
}

/// Where the controller stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Doubling until the delivery rate stops growing.
    Startup,
    /// Less than the link carries, until the round that began here has passed.
    Drain,
    /// Holding the window.
    Steady,
}

/// Delivery as it stood when a packet was sent.
#[derive(Clone, Copy, Debug)]
struct Sent {
    at: Duration,
    delivered: u64,
    delivered_at: Duration,
}

/// See the module's text. All times are since an origin of the caller's choice.
#[derive(Clone, Debug)]
pub struct Adaptive {
    hints: Hints,
    mtu: f64,
    mode: Mode,
    gain: f64,
    /// Bytes acknowledged so far, and when the last were.
    delivered: u64,
    delivered_at: Duration,
    sent: VecDeque<Sent>,
    /// The round under way: it ends when a packet sent after `round_delivered` is acknowledged.
    round_delivered: u64,
    round_rate: f64,
    round_limited: bool,
    round_rtt: f64,
    round_acked: u64,
    round_lost: u64,
    rates: VecDeque<f64>,
    min_rtt: f64,
    min_rtt_at: Duration,
    /// Share of bytes lost, smoothed over rounds.
    loss: f64,
    startup_rate: f64,
    flat_rounds: u32,
    queue_rounds: u32,
    window: f64,
}

impl Adaptive {
    /// A controller for packets of `mtu` bytes.
    pub fn new(hints: Hints, mtu: u16) -> Self {
        let mut adaptive = Self {
            hints,
            mtu: f64::from(mtu),
            mode: Mode::Startup,
            gain: STARTUP_GAIN,
            delivered: 0,
            delivered_at: Duration::ZERO,
            sent: VecDeque::new(),
            round_delivered: 0,
            round_rate: 0.0,
            round_limited: false,
            round_rtt: f64::INFINITY,
            round_acked: 0,
            round_lost: 0,
            rates: VecDeque::new(),
            min_rtt: f64::INFINITY,
            min_rtt_at: Duration::ZERO,
            loss: 0.0,
            startup_rate: 0.0,
            flat_rounds: 0,
            queue_rounds: 0,
            window: 0.0,
        };
        // A hint is only a start: at half of what it says a wrong one does no harm.
        let hinted = hints
            .bandwidth
            .zip(hints.rtt)
            .map_or(0.0, |(bandwidth, rtt)| bandwidth * rtt / 2.0);
        adaptive.window = adaptive.capped(hinted.max(INITIAL_PACKETS * adaptive.mtu));
        adaptive
    }

    /// Bytes that may be in flight.
    pub fn window(&self) -> u64 {
        self.window as u64
    }

    /// Estimated bottleneck rate in bytes/s, 0 while unknown.
    pub fn bandwidth(&self) -> f64 {
        self.rates.iter().copied().fold(self.round_rate, f64::max)
    }

    /// Smallest round trip in seconds, if one is known.
    pub fn min_rtt(&self) -> Option<f64> {
        self.min_rtt.is_finite().then_some(self.min_rtt)
    }

    /// Share of bytes lost, 0 to 1, smoothed.
    pub fn loss(&self) -> f64 {
        self.loss
    }

    /// Whether the rate is still being looked for.
    pub fn in_startup(&self) -> bool {
        self.mode == Mode::Startup
    }

    /// Packets can be larger or smaller from now on.
    pub fn on_mtu(&mut self, mtu: u16) {
        self.mtu = f64::from(mtu);
        self.window = self.capped(self.window);
    }

    /// A packet was sent at `now`.
    pub fn on_sent(&mut self, now: Duration) {
        if self.sent.back().is_some_and(|sent| sent.at >= now) {
            return;
        }
        if self.sent.len() == MAX_SENT {
            self.sent.pop_front();
        }
        self.sent.push_back(Sent {
            at: now,
            delivered: self.delivered,
            delivered_at: self.delivered_at,
        });
    }

    /// A packet of `bytes`, sent at `sent`, was acknowledged at `now`. `app_limited` says that more
    /// could have been in flight had there been something to send.
    pub fn on_ack(&mut self, now: Duration, sent: Duration, bytes: u64, app_limited: bool) {
        self.delivered += bytes;
        self.delivered_at = now;
        self.round_acked += bytes;
        self.round_limited |= app_limited;
        let rtt = now.saturating_sub(sent).as_secs_f64().max(1e-6);
        if rtt <= self.min_rtt {
            self.min_rtt = rtt;
            self.min_rtt_at = now;
        }
        self.round_rtt = self.round_rtt.min(rtt);
        self.sample(now, sent, app_limited);
    }

    /// All acknowledgements that arrived together have been told.
    pub fn on_acks_done(&mut self) {
        self.update_window();
    }

    /// Packets of `bytes` in all were lost.
    pub fn on_loss(&mut self, bytes: u64) {
        self.round_lost += bytes;
    }

    /// Delivery rate since the packet was sent, and whether a round has passed.
    fn sample(&mut self, now: Duration, sent: Duration, app_limited: bool) {
        let index = self.sent.partition_point(|record| record.at <= sent);
        let Some(record) = index.checked_sub(1).and_then(|i| self.sent.get(i)).copied() else {
            return;
        };
        // What is older than this packet by far more than any reordering is not needed again.
        self.sent.drain(..index.saturating_sub(64));
        let delivered = self.delivered - record.delivered;
        // From the acknowledgement before the packet was sent: a burst of acknowledgements must not
        // look like a fast link. After a pause that acknowledgement is long past and says nothing.
        let gap = record.at.saturating_sub(record.delivered_at).min(ACK_GAP);
        let start = record.at.saturating_sub(gap);
        let elapsed = now.saturating_sub(start).as_secs_f64();
        if elapsed >= self.min_rtt * 0.9 && elapsed > 0.0 {
            let rate = delivered as f64 / elapsed;
            if !app_limited || rate > self.bandwidth() {
                self.round_rate = self.round_rate.max(rate);
            }
        }
        if record.delivered >= self.round_delivered {
            self.end_round(now);
        }
    }

    fn end_round(&mut self, now: Duration) {
        let before = self.bandwidth_of_rounds();
        let total = self.round_acked + self.round_lost;
        let lost = if total == 0 {
            0.0
        } else {
            self.round_lost as f64 / total as f64
        };
        self.loss += (lost - self.loss) * 0.25;
        let rate = self.round_rate;
        if !self.round_limited || rate > before {
            self.rates.push_back(rate);
            if self.rates.len() > RATE_ROUNDS {
                self.rates.pop_front();
            }
        }
        let queued = self.round_rtt > self.min_rtt * QUEUE_RATIO
            && self.round_rtt > self.min_rtt + QUEUE_MARGIN;
        match self.mode {
            Mode::Startup => self.end_startup_round(rate, queued, lost),
            Mode::Drain => {
                self.mode = Mode::Steady;
                self.gain = GAIN;
                self.queue_rounds = 0;
            }
            Mode::Steady => self.end_steady_round(rate, before, queued, lost),
        }
        self.age_min_rtt(now);
        self.round_delivered = self.delivered;
        self.round_rate = 0.0;
        self.round_limited = false;
        self.round_rtt = f64::INFINITY;
        self.round_acked = 0;
        self.round_lost = 0;
    }

    fn end_startup_round(&mut self, rate: f64, queued: bool, lost: f64) {
        if rate > self.startup_rate * GROWTH {
            self.startup_rate = rate;
            self.flat_rounds = 0;
        } else if !self.round_limited {
            self.flat_rounds += 1;
        }
        // A full queue, or one that overflows, is as good a sign as a flat rate: the rate that was
        // delivered through it is the link's.
        let overflows = queued && lost > LOSS_LIMIT;
        if self.flat_rounds >= FLAT_ROUNDS || overflows || (queued && self.flat_rounds >= 1) {
            self.drain();
        }
    }

    fn end_steady_round(&mut self, rate: f64, before: f64, queued: bool, lost: f64) {
        self.queue_rounds = if queued { self.queue_rounds + 1 } else { 0 };
        if self.queue_rounds >= QUEUE_ROUNDS {
            // The queue outlives what our own excess explains. The largest rate of the past is
            // the suspect: only what is delivered now counts.
            self.forget_rates_above(rate);
            self.drain();
        } else if lost > LOSS_LIMIT && rate < before * 0.9 && !self.round_limited {
            self.forget_rates_above(rate);
            self.drain();
        } else if !self.round_limited {
            let queue = self.round_rtt - self.min_rtt;
            self.gain = if queue < EMPTY * self.min_rtt && lost < EMPTY_LOSS {
                (self.gain * GAIN_STEP).min(MAX_GAIN)
            } else {
                (self.gain / GAIN_STEP).max(GAIN)
            };
        }
    }

    fn drain(&mut self) {
        self.mode = Mode::Drain;
        self.gain = DRAIN_GAIN;
    }

    fn forget_rates_above(&mut self, rate: f64) {
        for old in &mut self.rates {
            *old = old.min(rate);
        }
    }

    /// Looks for the propagation time anew now and then: the path may have changed.
    fn age_min_rtt(&mut self, now: Duration) {
        if self.mode == Mode::Steady
            && now.saturating_sub(self.min_rtt_at) > MIN_RTT_AGE
            && self.round_rtt.is_finite()
        {
            // Our own excess of a few per cent is in every sample; without draining it first the
            // estimate would creep upwards.
            self.min_rtt = self.round_rtt;
            self.min_rtt_at = now;
            self.drain();
        }
    }

    fn bandwidth_of_rounds(&self) -> f64 {
        self.rates.iter().copied().fold(0.0, f64::max)
    }

    fn update_window(&mut self) {
        let bandwidth = self.bandwidth();
        if bandwidth <= 0.0 || !self.min_rtt.is_finite() {
            return;
        }
        let product = bandwidth * self.min_rtt;
        let slack = (bandwidth * SLACK_TIME).max(4.0 * self.mtu);
        let made_up = 1.0 - self.loss.min(LOSS_MADE_UP);
        let wanted = self.gain * product / made_up + slack;
        // While the rate is unknown the window only grows.
        self.window = match self.mode {
            Mode::Startup => self.capped(wanted.max(self.window)),
            _ => self.capped(wanted),
        };
    }

    /// The window within its bounds: never so small that acknowledgements cease, never more than
    /// the operator's cap allows per round trip.
    fn capped(&self, window: f64) -> f64 {
        let rtt = if self.min_rtt.is_finite() {
            self.min_rtt
        } else {
            self.hints.rtt.unwrap_or(0.1)
        };
        let cap = self
            .hints
            .rate_limit
            .map_or(f64::INFINITY, |limit| limit * rtt);
        window.min(cap).max(MIN_PACKETS * self.mtu)
    }
}
