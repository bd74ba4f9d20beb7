//! Our own congestion control: keeps the bottleneck busy with a queue of a few milliseconds, whatever is
//! lost at random. Plain numbers in, a window out: no clock, no connection, no QUIC types.
//!
//! Loss says little on a long link, so it does not steer. The queue does. A packet that was sent with F
//! bytes in flight and came back after the propagation time R and q more has seen a bottleneck that F fills
//! beyond need; the flight that would leave a queue of t is
//!
//! ```text
//! W = F · (R + t) / (R + q)
//! ```
//!
//! (the rule of FAST TCP, Wei, Jin, Low, Hegde 2006, without its smoothing). It needs no estimate of a rate,
//! so that acknowledgements that come in lumps do not disturb it. q is taken from a few *slices*, fractions of
//! a round trip, and R is the smallest such value ever, which no packet that overtakes others can spoil.
//! While q stays below t the window grows, by a few per cent in the first round trip, faster in every further
//! one: links get faster, and others leave. While q is near t nothing is tried. t follows what is noise: a
//! host that wakes up late, or jitter, looks like a queue.
//!
//! A queue that outlives the window's yielding belongs to someone else, or the path has become longer. Then
//! the window holds a share of what the link is known to carry ([`sharing`]), and yields for one round trip now
//! and then: if that shortens nothing, there is no queue, and R was wrong.
//!
//! It is a window, not a rate, because the QUIC stack below paces at 1.25 · W / srtt on its own.

mod history;
mod loss;
mod rates;
mod round_trips;
mod sharing;
mod startup;

use std::time::Duration;

use history::{History, Lately, Sample};
use loss::Losses;
use rates::Rates;
use round_trips::{MIN_SAMPLES, RoundTrips, Slice};
use sharing::{Others, Probed};

/// Queue to aim at, as a share of the round trip and in seconds, and the same while a guest waits for pages.
const TARGET: f64 = 0.02;
const TARGET_RANGE: (f64, f64) = (0.0015, 0.004);
const HELD_TARGET: f64 = 0.008;
const HELD_RANGE: (f64, f64) = (0.0008, 0.002);
/// Length of a slice as a share of the round trip, and its range in seconds.
const SLICE: f64 = 0.125;
const SLICE_RANGE: (f64, f64) = (0.004, 0.04);
/// Slices in a row with too long a queue before the window yields: one may be a late wake-up.
const QUEUED_SLICES: u32 = 2;
/// Share of what the link is known to carry from which on more is tried.
const NEARLY: f64 = 0.97;
/// Growth in the first round trip without a queue, its factor with each further one, and the largest.
const FIRST_GROWTH: f64 = 0.02;
const NEXT_GROWTH: f64 = 3.0;
/// Growth while there is a queue that is shorter than wanted.
const NEAR_GROWTH: f64 = 0.005;
const LARGEST_GROWTH: f64 = 0.25;
/// Slices in a row without one before nobody else is thought to make it.
const CLEAR_SLICES: u32 = 6;
/// Share of a window that must have been in flight for a small queue to be its doing.
const TRIED: f64 = 0.9;
/// Window over rate · round trip, at most; more can only be a mistake.
const CEILING: f64 = 2.0;
/// The same for a window that does not get full.
const UNFILLED_CEILING: f64 = 1.6;
/// Time of delivery that may be in flight beyond that, for groups of acknowledgements.
const SLACK_TIME: f64 = 0.005;
/// Share of what the link is known to carry that the window does not yield below: as long as that is not
/// known to be less, a queue is an accident.
const FLOOR: f64 = 0.85;
/// A queue of this share of the round trip, for this many slices, says that the link has become slower.
const SLOWER: f64 = 0.1;
const SLOWER_SLICES: u32 = 4;
/// What is left of a rate at least when a link has become slower, as far as one round can tell.
const LEAST_FALL: f64 = 0.45;
/// Packets that a queue always has room for.
const PACKETS_QUEUED: f64 = 2.5;
/// Share lost in a round that, with a falling rate, means congestion.
const LOSS_LIMIT: f64 = 0.12;
/// Share lost that the window makes up for, at most.
const LOSS_MADE_UP: f64 = 0.12;
/// Rounds without growth after it did not help; doubles up to the largest.
const REST: u32 = 16;
const LONGEST_REST: u32 = 64;

/// Rounds with a queue that does not yield before it counts as someone else's.
const SHARED_ROUNDS: u32 = 5;
/// How long what the link could carry is remembered while nobody else uses it.
const PEAK_AGE: f64 = 60.0;
/// Silence of so many round trips and seconds is an outage: what was in flight then tells nothing.
const OUTAGE: (f64, f64) = (1.0, 0.1);
/// Rounds after it, or after the start, in which what was lost in it may be told.
const DEAF_ROUNDS: u32 = 3;

/// Smallest window, in packets.
const MIN_PACKETS: f64 = 8.0;
/// Window at the start without hints, in packets (RFC 9002 allows ten; the link was chosen to carry
/// a guest).
const INITIAL_PACKETS: f64 = 128.0;

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
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    /// Growing until the link is full.
    Startup,
    /// Less than the link carries, until the round that began here has passed.
    Drain,
    /// Steered by the queue.
    Steady,
    /// Steered by a share of the link, since the queue is not ours; rounds so far.
    Shared(u32),
    /// One round of that with half the window.
    Probe(Probed),
    /// The round in which that shows.
    ProbeSeen(Probed),
}

/// A round trip: it ends when a packet sent after it began is acknowledged.
#[derive(Clone, Copy, Debug)]
struct Round {
    began: Duration,
    delivered: u64,
    /// Largest rate of a sample, in bytes/s.
    rate: f64,
    limited: bool,
    /// Whether every slice had too long a queue; whether one had any at all, or one that was too long.
    queued: bool,
    occupied: bool,
    long: bool,
    /// Whether the link has become slower in this round, and whether more was tried than it was known for.
    slower: bool,
    tried: bool,
    /// Smallest median of a slice.
    rtt: f64,
    /// Largest flight in bytes and queue in seconds of a slice.
    flight: f64,
    queue: f64,
}

/// See the module's text. All times are since an origin of the caller's choice.
#[derive(Clone, Debug)]
pub struct Adaptive {
    hints: Hints,
    held: bool,
    mtu: f64,
    mode: Mode,
    history: History,
    round: Round,
    slice: Slice,
    rates: Rates,
    losses: Losses,
    rtts: RoundTrips,
    last_ack: Duration,
    /// Packets sent before tell nothing: the path was dead. Rounds in which loss and delivery tell of what was
    /// before: of that, or of the queue that the start has filled.
    alive_since: Duration,
    deaf_rounds: u32,
    /// When the link was last seen to carry its peak, or shared.
    peak_at: Duration,
    /// Slices in a row with too long a queue, rounds in a row with and without one.
    queued_slices: u32,
    clear_slices: u32,
    queued_rounds: u32,
    empty_rounds: u32,
    /// Rounds until growth is tried again, and how many that were at the last time.
    rest: u32,
    last_rest: u32,
    others: Others,
    startup_rate: f64,
    flat_rounds: u32,
    queued_samples: u32,
    lately: Lately,
    window: f64,
}

impl Adaptive {
    /// A controller for packets of `mtu` bytes.
    pub fn new(hints: Hints, mtu: u16) -> Self {
        let mut adaptive = Self {
            hints,
            held: false,
            mtu: f64::from(mtu),
            mode: Mode::Startup,
            history: History::default(),
            round: Round::new(Duration::ZERO, 0),
            slice: Slice::new(Duration::ZERO),
            rates: Rates::default(),
            losses: Losses::new(),
            rtts: RoundTrips::new(),
            last_ack: Duration::ZERO,
            alive_since: Duration::ZERO,
            deaf_rounds: 0,
            peak_at: Duration::ZERO,
            queued_slices: 0,
            clear_slices: 0,
            queued_rounds: 0,
            empty_rounds: 0,
            rest: 0,
            last_rest: 0,
            others: Others::default(),
            startup_rate: 0.0,
            flat_rounds: 0,
            queued_samples: 0,
            lately: Lately::default(),
            window: 0.0,
        };
        // A hint is only a start: at half of what it says a wrong one does no harm.
        let hinted = hints
            .bandwidth
            .zip(hints.rtt)
            .map_or(0.0, |(bandwidth, rtt)| bandwidth * rtt / 2.0);
        adaptive.window = adaptive.bounded(hinted.max(INITIAL_PACKETS * adaptive.mtu));
        adaptive
    }

    /// Bytes that may be in flight.
    pub fn window(&self) -> u64 {
        self.window as u64
    }

    /// Estimated bottleneck rate in bytes/s, 0 while unknown.
    pub fn bandwidth(&self) -> f64 {
        match self.mode {
            Mode::Startup => self.rates.known().max(self.round.rate),
            _ => self.rates.known(),
        }
    }

    /// Smallest round trip in seconds, if one is known.
    pub fn min_rtt(&self) -> Option<f64> {
        self.rtts.min.is_finite().then_some(self.rtts.min)
    }

    /// Shortest round trip of the last fraction of one, in seconds; 0 while unknown.
    pub fn rtt(&self) -> f64 {
        self.rtts.newest
    }

    /// Queue at the bottleneck lately, in seconds.
    pub fn queue(&self) -> f64 {
        match self.min_rtt() {
            Some(min) => (self.rtt() - min).max(0.0),
            None => 0.0,
        }
    }

    /// Share of bytes lost, 0 to 1, smoothed.
    pub fn loss(&self) -> f64 {
        self.losses.share()
    }

    /// Packets that are lost together, on average; 1 where losses are independent.
    pub fn burst(&self) -> f64 {
        self.losses.burst()
    }

    /// Whether others use the link as well.
    pub fn is_shared(&self) -> bool {
        matches!(
            self.mode,
            Mode::Shared(_) | Mode::Probe(_) | Mode::ProbeSeen(_)
        )
    }

    /// Packets can be larger or smaller from now on.
    pub fn on_mtu(&mut self, mtu: u16) {
        self.mtu = f64::from(mtu);
        self.window = self.bounded(self.window);
    }

    /// Another hard cap in bytes/s, or none.
    pub fn set_rate_limit(&mut self, limit: Option<f64>) {
        if self.hints.rate_limit != limit {
            self.hints.rate_limit = limit;
            self.window = self.bounded(self.window);
        }
    }

    /// Says whether a guest waits for pages: then nothing is tried that could lengthen the queue.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// A packet of `bytes` was sent at `now`.
    pub fn on_sent(&mut self, now: Duration, bytes: u64) {
        self.history.sent(now, bytes, self.window);
    }

    /// A packet of `bytes`, sent at `sent`, was acknowledged at `now`. `app_limited` says that more
    /// could have been in flight had there been something to send.
    pub fn on_ack(&mut self, now: Duration, sent: Duration, bytes: u64, app_limited: bool) {
        self.notice_outage(now);
        self.losses.acknowledged(bytes);
        self.round.limited |= app_limited;
        self.slice.limited |= app_limited;
        let Some(sample) = self.history.acknowledged(now, sent, bytes) else {
            return;
        };
        if sent < self.alive_since {
            return;
        }
        self.slice.add(sample);
        if sample.span >= self.rtts.min * 0.9 && (!app_limited || sample.rate > self.bandwidth()) {
            self.round.rate = self.round.rate.max(sample.rate);
        }
        self.lately
            .note(now, self.history.delivered(), self.rtts.min);
        if self.mode == Mode::Startup {
            self.look_for_queue(now, sample.rtt);
        }
        if sample.delivered_before >= self.round.delivered {
            self.end_round(now);
        }
    }

    /// All acknowledgements that arrived together at `now` have been told; `in_flight` bytes are left.
    pub fn on_acks_done(&mut self, now: Duration, in_flight: u64) {
        self.history.set_flight(in_flight);
        let sliced = now.saturating_sub(self.slice.began).as_secs_f64();
        if sliced >= self.slice_length() && self.slice.samples.len() >= MIN_SAMPLES {
            self.end_slice(now);
            self.slice.restart(now);
        }
        if self.mode == Mode::Startup && self.rtts.min.is_finite() {
            let rate = self.bandwidth();
            let wanted = self.startup_gain() * self.product(rate) + self.slack(rate);
            // While the rate is unknown the window only grows.
            self.window = self.bounded(wanted.max(self.window));
        }
    }

    /// What was in flight while nothing came back says nothing about the link, and its loss neither.
    fn notice_outage(&mut self, now: Duration) {
        let silence = now.saturating_sub(self.last_ack).as_secs_f64();
        self.last_ack = now;
        if self.rtts.min.is_finite() && silence > OUTAGE.0 * self.rtts.min + OUTAGE.1 {
            self.alive_since = now;
            self.slice.restart(now);
            self.lately.clear();
            self.round = Round::new(now, self.history.delivered());
            self.deaf_rounds = DEAF_ROUNDS;
        }
    }

    /// Packets of `bytes` in all were lost.
    pub fn on_loss(&mut self, bytes: u64) {
        self.losses.lost(bytes, self.mtu);
        self.history.lost(bytes);
    }

    /// Bytes in flight that carry `rate` without a queue.
    fn product(&self, rate: f64) -> f64 {
        if !self.rtts.min.is_finite() {
            return 0.0;
        }
        self.flight(rate, self.rtts.min)
    }

    /// Bytes in flight that carry `rate` on a round trip of `rtt` seconds, with what is lost made up for.
    fn flight(&self, rate: f64, rtt: f64) -> f64 {
        rate * rtt / made_up(self.losses.share())
    }

    fn slack(&self, rate: f64) -> f64 {
        (rate * SLACK_TIME).max(4.0 * self.mtu)
    }

    fn slice_length(&self) -> f64 {
        if self.rtts.min.is_finite() {
            (SLICE * self.rtts.min).clamp(SLICE_RANGE.0, SLICE_RANGE.1)
        } else {
            SLICE_RANGE.0
        }
    }

    /// The queue to aim at, in seconds.
    fn target(&self) -> f64 {
        let (share, (least, most)) = if self.held {
            (HELD_TARGET, HELD_RANGE)
        } else {
            (TARGET, TARGET_RANGE)
        };
        let rate = self.rates.known();
        let packets = if rate > 0.0 {
            PACKETS_QUEUED * self.mtu / rate
        } else {
            0.0
        };
        let noise = self.rtts.unrest();
        (share * self.rtts.min)
            .clamp(least, most)
            .max(noise)
            .max(packets)
    }

    fn end_slice(&mut self, now: Duration) {
        let Some((typical, spread)) = self.slice.typical() else {
            return;
        };
        let standing = typical.rtt >= self.rtts.newest;
        let median = self.rtts.note(typical.rtt, spread);
        self.round.rtt = self.round.rtt.min(typical.rtt);
        if !self.rtts.min.is_finite() {
            return;
        }
        let (queue, target) = (median - self.rtts.min, self.target());
        let too_long = queue > 1.5 * target + 0.000_5;
        (self.queued_slices, self.clear_slices) = if too_long {
            (self.queued_slices + 1, 0)
        } else {
            (0, self.clear_slices + 1)
        };
        self.round.flight = self.round.flight.max(typical.flight);
        self.round.queue = self.round.queue.max(typical.rtt - self.rtts.min);
        self.round.queued &= too_long;
        self.round.long |= too_long;
        self.round.occupied |= queue > 0.5 * target;
        let share = self.steady_share();
        let ideal = typical.flight * (self.rtts.min + target) / (self.rtts.min + queue);
        let competing = self.others.competing(typical.flight, share);
        match (self.mode, competing) {
            (Mode::Startup | Mode::Drain | Mode::Probe(_) | Mode::ProbeSeen(_), _) => {}
            (Mode::Shared(_), _) if self.clear_slices >= CLEAR_SLICES => {
                // It was ours after all, or they have gone.
                self.mode = Mode::Steady;
                self.forget_queue();
            }
            (Mode::Shared(_), _) => {
                self.peak_at = now;
                self.window = self.bounded(ideal.max(self.fair_share()).max(self.others.claim));
            }
            (Mode::Steady, Some(flight)) if !self.held => {
                // The queue is not of our making: it goes by itself, or it stands and counts as shared.
                self.window = self.bounded(self.window.max(flight));
            }
            (Mode::Steady, _) if self.queued_slices >= QUEUED_SLICES => {
                let slower = queue > SLOWER * self.rtts.min && queue > 3.0 * self.rtts.noise;
                let long = self.queued_slices >= SLOWER_SLICES && standing;
                if slower && long && !self.round.slower && self.deaf_rounds == 0 {
                    // All that comes back now has passed through a bottleneck that never rested. How fast, a
                    // host that is late may get wrong, so that it is believed by and by.
                    self.round.slower = true;
                    let rate = self.short_rate(now).max(LEAST_FALL * self.rates.known());
                    self.rates.forget_above(rate);
                }
                // What was never in flight has made no queue.
                if slower || typical.flight >= TRIED * typical.window {
                    let floor = FLOOR * self.product(self.rates.known());
                    if ideal < share {
                        // It is not known whose queue that is: the link is not taken for what is left of it.
                        self.peak_at = now;
                    }
                    self.window = self.bounded(self.window.min(ideal.max(floor).max(share)));
                }
            }
            (Mode::Steady, _) => {
                let queue = queue.max(typical.rtt - self.rtts.min);
                if queue <= target {
                    self.grow(typical, queue <= 0.5 * target);
                }
            }
        }
    }

    /// The link had room for what was in flight a round trip ago.
    fn grow(&mut self, sample: Sample, empty: bool) {
        let known = self.product(self.rates.known());
        let target = 1.0 + self.target() / self.rtts.min;
        // Up to what the link was seen to carry there is nothing to try out.
        let trusted = (known * target).max(self.steady_share());
        // A window that was not full has shown nothing, unless it never gets full (late wake-ups).
        let full = sample.flight >= TRIED * sample.window;
        let tried = if full || self.empty_rounds >= 2 {
            sample.window
        } else {
            sample.flight
        };
        if tried < NEARLY * trusted {
            let grown = (tried * (1.0 + LARGEST_GROWTH)).min(trusted);
            self.window = self.bounded(self.window.max(grown));
        } else if !self.slice.limited && self.rest == 0 {
            let steps = self.empty_rounds.min(8) as i32;
            // While a guest waits for pages only what is too little for a queue is tried.
            let growth = if empty && self.held && tried < NEARLY * self.product(self.rates.peak()) {
                FIRST_GROWTH
            } else if empty && !self.held {
                (FIRST_GROWTH * NEXT_GROWTH.powi(steps)).min(LARGEST_GROWTH)
            } else {
                NEAR_GROWTH
            };
            let most = if full { CEILING } else { UNFILLED_CEILING };
            let ceiling = most * known + self.slack(self.rates.known());
            let grown = (tried * (1.0 + growth)).min(ceiling);
            self.round.tried = true;
            self.window = self.bounded(self.window.max(grown));
        }
    }

    fn end_round(&mut self, now: Duration) {
        let trying = self.mode == Mode::Steady && self.round.tried;
        let lost_packets = self.losses.lost_in_round() / self.mtu;
        let round = std::mem::replace(&mut self.round, Round::new(now, self.history.delivered()));
        if self.deaf_rounds > 0 {
            self.deaf_rounds -= 1;
            self.losses.forget_round();
            if self.mode == Mode::Drain {
                self.mode = Mode::Steady;
                self.forget_queue();
            }
            return;
        }
        let unusual = trying && self.losses.is_unusual(self.mtu);
        let lost = self.losses.end_round(trying || self.is_shared());
        let elapsed = now.saturating_sub(round.began).as_secs_f64();
        let mean = (self.history.delivered() - round.delivered) as f64 / elapsed.max(1e-6);
        let before = self.rates.known();
        if self.mode == Mode::Startup {
            self.rates.push(round.rate, round.limited);
            self.end_startup_round(&round, lost, lost_packets);
            return;
        }
        let rate = if round.slower {
            mean.min(self.short_rate(now))
        } else {
            mean
        };
        self.rates.push(rate, round.limited);
        if mean >= self.rates.peak() {
            self.peak_at = now;
        }
        match self.mode {
            Mode::Startup | Mode::Drain => {}
            Mode::Steady => {
                if now.saturating_sub(self.peak_at).as_secs_f64() > PEAK_AGE {
                    self.rates.settle();
                    self.peak_at = now;
                }
                self.end_steady_round(&round, mean, before, lost, unusual);
            }
            Mode::Shared(rounds) => self.end_shared_round(rounds, mean, lost),
            Mode::Probe(before) => self.mode = Mode::ProbeSeen(before),
            Mode::ProbeSeen(before) => self.end_probe(before, &round, lost),
        }
    }

    fn forget_queue(&mut self) {
        self.queued_slices = 0;
        self.queued_rounds = 0;
        self.empty_rounds = 0;
    }

    fn end_steady_round(
        &mut self,
        round: &Round,
        rate: f64,
        before: f64,
        lost: f64,
        unusual: bool,
    ) {
        let unrest = self.rtts.unrest();
        self.others
            .note(round, &self.rates, self.rtts.min, unrest, rate);
        self.rest = self.rest.saturating_sub(1);
        self.empty_rounds = match (round.occupied, round.queued) {
            (false, _) => self.empty_rounds + 1,
            (true, false) => self.empty_rounds / 2,
            (true, true) => 0,
        };
        self.queued_rounds = if round.queued && round.occupied {
            self.queued_rounds + 1
        } else {
            0
        };
        if self.queued_rounds >= 2 {
            // The largest rate of the past is the suspect: only what is delivered now counts.
            self.rates.forget_above(rate);
        }
        if self.queued_rounds >= SHARED_ROUNDS {
            self.mode = Mode::Shared(0);
            self.others.claim = 0.0;
        }
        if lost > LOSS_LIMIT && rate < before * 0.9 && !round.limited {
            self.rates.forget_above(rate);
            self.window = self.bounded(self.window.min(self.product(rate)));
        } else if unusual && !round.long {
            // What was tried is dropped before it queues.
            self.last_rest = (2 * self.last_rest).clamp(REST, LONGEST_REST);
            self.rest = self.last_rest;
            let usual = rate * self.rtts.min / made_up(self.losses.usual());
            self.window = self.bounded(self.window.min(usual));
            self.rates.forget_above(rate);
        } else if round.occupied {
            self.last_rest = 0;
        }
    }

    /// Bytes/s delivered over the last fraction of a round trip.
    fn short_rate(&self, now: Duration) -> f64 {
        let rate = self.lately.rate(now, self.history.delivered());
        rate.unwrap_or(self.rates.latest())
    }

    /// The window within its bounds: never so small that acknowledgements cease, never more than
    /// the operator's cap allows per round trip.
    fn bounded(&self, window: f64) -> f64 {
        let rtt = if self.rtts.min.is_finite() {
            self.rtts.min
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

/// Share of what is sent that arrives, as far as the window makes up for the rest.
fn made_up(lost: f64) -> f64 {
    1.0 - lost.min(LOSS_MADE_UP)
}

impl Round {
    fn new(now: Duration, delivered: u64) -> Self {
        Self {
            began: now,
            delivered,
            rate: 0.0,
            limited: false,
            queued: true,
            occupied: false,
            long: false,
            slower: false,
            tried: false,
            rtt: f64::INFINITY,
            flight: 0.0,
            queue: 0.0,
        }
    }
}
