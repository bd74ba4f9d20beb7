//! A link that others use as well: how [`Adaptive`] notices them, what it claims beside them, and how it finds
//! out what the link carries for all of them together.
//!
//! A window that stays as it is makes no queue. If one comes nevertheless, and goes, and comes again, somebody else
//! makes it: a BBR that tries, a CUBIC that grows. To yield to it would be to leave the link to them, a little more
//! each time. So the window grows until the queue stands, unless nothing but a queue comes of that: more in
//! flight brings a share of what others have, if there are others.
//!
//! Beside a queue that stands, the window holds a share of what the link carries. Who came first knows that. Who came
//! second knows what was left over, and learns the rest from yielding with half of the window: the queue
//! becomes shorter by the time that the link takes for what was not sent. Until then a claim grows fast.

use super::loss::Losses;
use super::rates::Rates;
use super::{Adaptive, LOSS_LIMIT, Mode, Round};

/// What the window holds of what the link can carry.
const SHARE: f64 = 0.5;
/// The same where no queue stands: less, so that a link that has become half as fast is no shared one.
const STEADY_SHARE: f64 = 0.45;
/// Share of bytes lost beyond the usual that means that others lose as well.
const LOSS_OF_CLAIM: f64 = 0.005;
/// Growth of a claim per round without such loss, and what is left of it after one with it, …
const CLAIM: (f64, f64) = (1.03, 0.75);
/// … and the same while it is not known what the link carries.
const UNPROVEN_CLAIM: (f64, f64) = (1.25, 0.85);
/// Every how many rounds of sharing the window yields to see whether the queue is one.
const PROBE_ROUNDS: u32 = 8;
/// The window while it yields.
const PROBE: f64 = 0.5;
/// A yielding that shortens the queue by less than this share of the round trip has shown nothing.
const PROBE_SEEN: f64 = 0.02;
/// Such yieldings in a row after which the path counts as longer, if what it carries is not known.
const UNSEEN_PROBES: u32 = 3;
/// Share of the queue before that is left where it has ended, so that it tells no rate.
const ENDED: f64 = 0.2;
/// What a link carries is not believed to be more than this multiple of what it has delivered to us …
const DISCOVERY: f64 = 3.0;
/// … nor than this one of what is known already.
const STEP: f64 = 1.25;

/// Seconds by which a queue must have become longer, beyond noise, for others to have made it.
const JUMP: f64 = 0.004;
/// Where less is delivered than this share of what the link carries, somebody may have taken it.
const LESS: f64 = 0.9;
/// So many such queues lately mean that others are there; how many are counted, and the share that is
/// forgotten in a round.
const CROWDED: f64 = 1.5;
const MOST_CROWDED: f64 = 6.0;
const FORGOTTEN: f64 = 1.0 / 32.0;
/// Nobody is there below this, and after so many rounds of it that deliver the peak, that is what the link carries.
const ALONE: f64 = 0.5;
const ALONE_ROUNDS: u32 = 20;
/// Growth per round trip in spite of such queues.
const COMPETING_GROWTH: f64 = 0.1;
/// Growth after which that is judged, and the share of it that delivery must have grown.
const JUDGED: f64 = 1.15;
const GAINED: f64 = 0.25;

/// What was before a probe.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Probed {
    /// In seconds.
    rtt: f64,
    window: f64,
    /// Delivery in bytes/s.
    rate: f64,
}

/// What is known of others on the link.
#[derive(Clone, Debug, Default)]
pub(super) struct Others {
    /// What the window does not yield below, in bytes.
    pub(super) claim: f64,
    /// Queues lately that came although the window did not grow.
    crowd: f64,
    /// The last of them in seconds while it lasts, else 0.
    spike: f64,
    /// The last round's queue in seconds, and the flights of a few in bytes, newest first.
    queue: f64,
    flights: [f64; 3],
    /// Flight and rate from which on more is tried.
    tried: Option<(f64, f64)>,
    /// Whether the peak is what the link carries, and not what others have left; rounds alone at it.
    proven: bool,
    alone_rounds: u32,
    /// Probes that have shown nothing.
    unseen: u32,
}

impl Others {
    /// Whether they were seen lately.
    pub(super) fn are_there(&self) -> bool {
        self.crowd >= CROWDED
    }

    /// Takes in a round in which nothing stood in the way of the window; `unrest` is noise in the smallest
    /// round trip `min`, in seconds, and `rate` was delivered, in bytes/s.
    pub(super) fn note(&mut self, round: &Round, rates: &Rates, min: f64, unrest: f64, rate: f64) {
        self.crowd -= self.crowd * FORGOTTEN;
        let flight = self.flights.into_iter().fold(f64::INFINITY, f64::min);
        let all_there = rates.known() >= LESS * rates.peak();
        if self.spike > 0.0 {
            // Each counts once.
            if round.queue < 0.5 * self.spike {
                self.spike = 0.0;
            }
        } else if flight > 0.0 && !all_there {
            // What was added has made a queue of at most its share of a round trip.
            let own = (round.flight / flight - 1.0).max(0.0) * min;
            if round.queue > self.queue + own + unrest + JUMP {
                self.crowd = (self.crowd + 1.0).min(MOST_CROWDED);
                self.spike = round.queue;
            }
        }
        self.queue = round.queue;
        self.flights.rotate_right(1);
        self.flights[0] = round.flight;
        self.alone_rounds = if all_there && self.crowd < ALONE {
            self.alone_rounds + 1
        } else {
            0
        };
        self.proven |= self.alone_rounds >= ALONE_ROUNDS;
        self.judge(round.flight, rate);
    }

    fn judge(&mut self, flight: f64, rate: f64) {
        self.tried = match self.tried {
            _ if !self.are_there() => None,
            Some((from, before)) if flight > JUDGED * from => {
                if rate < before * (1.0 + GAINED * (flight / from - 1.0)) {
                    self.crowd = 0.0;
                }
                None
            }
            None => Some((flight, rate)),
            tried => tried,
        };
    }

    /// The flight to try next where others are seen, though there may be a queue, if any: up to a `share`
    /// of what the link carries, if that is known. All in bytes.
    pub(super) fn competing(&self, flight: f64, share: f64) -> Option<f64> {
        let wanted = self.are_there() && (!self.proven || flight < share);
        wanted.then_some(flight * (1.0 + COMPETING_GROWTH))
    }

    /// Claims more than the `window` that a round has had, or less where the share `lost` is unusual.
    fn claim(&mut self, window: f64, lost: f64, losses: &Losses, held: bool) {
        let (growth, cut) = if self.proven { CLAIM } else { UNPROVEN_CLAIM };
        let unusual = lost > losses.usual() + LOSS_OF_CLAIM;
        self.claim = window
            * match (unusual, held) {
                (true, _) => cut,
                (false, true) => 1.0,
                (false, false) => growth,
            };
    }
}

impl Adaptive {
    /// What the window does not yield below, and grows to, where there is no queue for long.
    pub(super) fn steady_share(&self) -> f64 {
        self.product(STEADY_SHARE * self.rates.peak())
    }

    /// What the window holds of a link with a queue that others use as well.
    pub(super) fn fair_share(&self) -> f64 {
        self.flight(SHARE * self.rates.peak(), self.rtts.newest)
    }

    /// Ends a round of sharing in which `rate` was delivered and `lost` is the share that was not.
    pub(super) fn end_shared_round(&mut self, rounds: u32, rate: f64, lost: f64) {
        // Beyond the fair share the others decide, by the loss that both make: as they do.
        self.others
            .claim(self.window, lost, &self.losses, self.held);
        self.mode = Mode::Shared(rounds + 1);
        if (rounds + 1).is_multiple_of(PROBE_ROUNDS) {
            self.mode = Mode::Probe(Probed {
                rtt: self.rtts.newest,
                window: self.window,
                rate,
            });
            self.window = self.bounded(PROBE * self.window);
        }
    }

    /// What others have in flight hardly changes within a round trip, so that the queue becomes shorter by
    /// the time that the link takes for what was not sent.
    pub(super) fn end_probe(&mut self, before: Probed, round: &Round, lost: f64) {
        let shorter = before.rtt - round.rtt;
        if shorter > (PROBE_SEEN * self.rtts.min).max(self.rtts.noise) {
            let most = DISCOVERY * before.rate;
            let seen = (1.0 - PROBE) * before.window / shorter;
            let ended = round.rtt - self.rtts.min < ENDED * (before.rtt - self.rtts.min);
            let believed = match (ended, self.others.proven) {
                // What was not sent would have shortened a longer queue by more.
                (true, _) => self.rates.peak(),
                (false, true) => STEP * self.rates.peak(),
                (false, false) => most,
            };
            self.others.proven = seen < most;
            self.rates
                .set_peak(seen.min(believed).clamp(before.rate, most));
            self.mode = Mode::Shared(0);
        } else if lost > LOSS_LIMIT && self.rates.latest() < 0.8 * before.rate {
            // Others fill the queue whatever is taken out of it.
            self.mode = Mode::Shared(0);
        } else if lost > LOSS_LIMIT {
            // Half was still too much: the link is not what it was.
            self.rates.forget_above(self.rates.latest());
            self.rates.settle();
            self.forget_queue();
            self.drain();
        } else if !self.others.proven && self.others.unseen < UNSEEN_PROBES {
            // Too little of the queue is ours for half of it to show: of more it would.
            self.others.unseen += 1;
            self.mode = Mode::Shared(0);
        } else {
            // The path itself is longer than it was, or next to nothing of the queue is ours.
            self.rtts.min = round.rtt;
            self.mode = Mode::Steady;
            self.forget_queue();
        }
    }
}
