//! The start of [`Adaptive`], while the rate is unknown: grows until the link is full.

use std::time::Duration;

use super::{Adaptive, DEAF_ROUNDS, LOSS_LIMIT, Mode, Round};

/// Growth of the window per round trip while the rate is unknown. More than the usual two is safe because
/// the first sign of a queue ends it at once, in the middle of a round.
const STARTUP_GAIN: f64 = 3.0;
/// The same above so many bytes, and while a guest waits: by the time the queue shows, more than the link
/// holds is in flight by that factor.
const LARGE_GAIN: f64 = 2.0;
const LARGE: f64 = (1 << 20) as f64;
/// While the rate is unknown, this many round trips in a row that are all longer than the smallest one by
/// [`STARTUP_QUEUE`] of it, and by [`STARTUP_MARGIN`] seconds, mean that the link is full.
const STARTUP_SAMPLES: u32 = 16;
const STARTUP_QUEUE: f64 = 0.125;
const STARTUP_MARGIN: f64 = 0.008;
/// Startup has found the rate when it has grown by less than this factor …
const GROWTH: f64 = 1.25;
/// … for this many rounds that were not limited by the application.
const FLAT_ROUNDS: u32 = 2;
/// Packets lost in a round, at least, where a queue has overflowed.
const LOST_PACKETS: f64 = 48.0;
/// Window over the product of rate and round trip while a standing queue drains.
const DRAIN: f64 = 0.95;

impl Adaptive {
    pub(super) fn startup_gain(&self) -> f64 {
        if self.window > LARGE || self.held {
            LARGE_GAIN
        } else {
            STARTUP_GAIN
        }
    }

    /// Ends the start as soon as a queue shows, with the rate at which the full link delivers.
    pub(super) fn look_for_queue(&mut self, now: Duration, rtt: f64) {
        let excess = rtt - self.rtts.min;
        let queued = excess > STARTUP_QUEUE * self.rtts.min && excess > STARTUP_MARGIN;
        self.queued_samples = if queued { self.queued_samples + 1 } else { 0 };
        if self.queued_samples < STARTUP_SAMPLES || !self.lately.is_full(now) {
            return;
        }
        // Acknowledgements that come in a lump look like a fast link: what the window has asked for is
        // the most that can be believed.
        let rate = self.short_rate(now).min(self.window / self.rtts.min);
        self.rates.push(rate.max(self.round.rate), false);
        self.drain();
    }

    /// Ends a round of which that share, and that many packets, were lost.
    pub(super) fn end_startup_round(&mut self, round: &Round, lost: f64, lost_packets: f64) {
        let overflow = lost_packets > LOST_PACKETS && lost > LOSS_LIMIT;
        // Lost in numbers, and much slower growth than was asked for: the queue is too short to show.
        let falls_short = round.rate < self.startup_rate * LARGE_GAIN * 0.9;
        if round.rate > self.startup_rate * GROWTH {
            self.startup_rate = round.rate;
            self.flat_rounds = 0;
        } else if !round.limited && round.rate > 0.0 {
            self.flat_rounds += 1;
        }
        if self.flat_rounds >= FLAT_ROUNDS || (overflow && falls_short) {
            self.drain();
        }
    }

    pub(super) fn drain(&mut self) {
        self.mode = Mode::Drain;
        self.deaf_rounds = DEAF_ROUNDS;
        self.window = self.bounded(DRAIN * self.product(self.rates.known()));
    }
}
