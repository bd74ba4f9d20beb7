//! What a link does to packets, under virtual time: no clock, no socket, no thread in here. Time is
//! a `Duration` since an instant of the caller's choice and must never go back; the same seed
//! and the same calls give the same fates.
//!
//! One [`Link`] is one direction. A packet meets, in the order of `tc netem`: the cut, random loss,
//! the drop-tail queue of the bottleneck, its rate, the propagation delay. So what is lost at
//! random takes no share of the rate.

use std::collections::VecDeque;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::spec::LinkSpec;

/// Bytes of an IPv4 and a UDP header, which count against the rate beside the payload.
pub const UDP_OVERHEAD: usize = 28;

/// Bounds what may be under way on a link without a rate, in packets: 1 Gbit/s of full packets
/// over more than 700 ms.
pub const MAX_IN_FLIGHT: usize = 1 << 16;

/// Bounds what may be under way, in bytes.
pub const MAX_BYTES_IN_FLIGHT: usize = 128 << 20;

/// Why a packet does not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dropped {
    /// The link is down.
    Down,
    /// Random loss.
    Loss,
    /// The bottleneck's queue was full.
    Queue,
    /// More under way than [`MAX_IN_FLIGHT`] or [`MAX_BYTES_IN_FLIGHT`]: the emulator's own limit.
    Overflow,
}

/// One direction of a link, with the packets that are under way. `T` is whatever stands for a packet.
#[derive(Debug)]
pub struct Link<T> {
    spec: LinkSpec,
    rng: SmallRng,
    down: bool,
    /// When the bottleneck has sent all that it has taken so far.
    busy_until: Duration,
    /// Packets past the bottleneck's admission, in the order of arrival at the far end.
    in_flight: VecDeque<InFlight<T>>,
    bytes_in_flight: usize,
}

#[derive(Debug)]
struct InFlight<T> {
    due: Duration,
    bytes: usize,
    packet: T,
}

impl<T> Link<T> {
    /// An idle link.
    pub fn new(spec: LinkSpec, seed: u64) -> Self {
        Self {
            spec,
            rng: SmallRng::seed_from_u64(seed),
            down: false,
            busy_until: Duration::ZERO,
            in_flight: VecDeque::new(),
            bytes_in_flight: 0,
        }
    }

    /// What the link does.
    pub fn spec(&self) -> &LinkSpec {
        &self.spec
    }

    /// Changes what the link does to packets from now on. Packets under way keep their time, and
    /// none overtakes them.
    pub fn set_spec(&mut self, spec: LinkSpec) {
        self.spec = spec;
    }

    /// Puts a packet of `bytes` (all headers included) onto the link at `now`. On success returns
    /// when it will arrive; [`Self::pop_due`] hands it out from then on.
    pub fn push(&mut self, now: Duration, bytes: usize, packet: T) -> Result<Duration, Dropped> {
        if self.down {
            return Err(Dropped::Down);
        }
        // No draw on a link without loss, so that loss can be switched on without shifting the
        // fates of what comes after a switch back.
        if self.spec.loss > 0.0 && self.rng.random::<f64>() < self.spec.loss {
            return Err(Dropped::Loss);
        }
        if self.in_flight.len() >= MAX_IN_FLIGHT
            || self.bytes_in_flight + bytes > MAX_BYTES_IN_FLIGHT
        {
            return Err(Dropped::Overflow);
        }
        let sent = self.admit(now, bytes)?;
        let mut due = sent + self.spec.delay;
        if let Some(last) = self.in_flight.back() {
            due = due.max(last.due);
        }
        self.bytes_in_flight += bytes;
        self.in_flight.push_back(InFlight { due, bytes, packet });
        Ok(due)
    }

    /// Passes a packet through the bottleneck: when its last bit has left, or that it finds the
    /// queue full. An idle bottleneck always takes a packet, however short its queue is.
    fn admit(&mut self, now: Duration, bytes: usize) -> Result<Duration, Dropped> {
        let Some(rate) = self.spec.rate else {
            return Ok(now);
        };
        let transmission = transmission_time(bytes, rate);
        let backlog = self.busy_until.saturating_sub(now);
        if !backlog.is_zero() && backlog + transmission > self.spec.queue {
            return Err(Dropped::Queue);
        }
        self.busy_until = self.busy_until.max(now) + transmission;
        Ok(self.busy_until)
    }

    /// When [`Self::pop_due`] will have something next, if nothing is pushed before.
    pub fn next_due(&self) -> Option<Duration> {
        self.in_flight.front().map(|packet| packet.due)
    }

    /// The next packet that has arrived by `now`, and when it did.
    pub fn pop_due(&mut self, now: Duration) -> Option<(Duration, T)> {
        if self.next_due()? > now {
            return None;
        }
        let InFlight { due, bytes, packet } = self.in_flight.pop_front()?;
        self.bytes_in_flight -= bytes;
        Some((due, packet))
    }

    /// Cuts the link or joins it again. A cut loses everything under way: the number of packets is
    /// returned.
    pub fn set_down(&mut self, down: bool) -> usize {
        self.down = down;
        if !down {
            return 0;
        }
        let lost = self.in_flight.len();
        self.in_flight.clear();
        self.bytes_in_flight = 0;
        self.busy_until = Duration::ZERO;
        lost
    }

    /// Whether the link is cut.
    pub fn is_down(&self) -> bool {
        self.down
    }

    /// Bytes that wait before the bottleneck at `now`: (busy until − now) · rate.
    pub fn backlog_bytes(&self, now: Duration) -> u64 {
        let waiting = self.busy_until.saturating_sub(now).as_nanos();
        let bits = waiting * u128::from(self.spec.rate.unwrap_or(0)) / 1_000_000_000;
        (bits / 8) as u64
    }

    /// Packets under way.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }
}

/// How long a link of `rate` bits per second takes to send `bytes`.
pub fn transmission_time(bytes: usize, rate: u64) -> Duration {
    let bits = bytes as u128 * 8;
    Duration::from_nanos((bits * 1_000_000_000 / u128::from(rate.max(1))) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn link(spec: &str) -> Link<u32> {
        Link::new(spec.parse().unwrap(), 7)
    }

    #[test]
    fn delay_is_exact_and_order_is_kept() {
        let mut link = link("delay 25ms");
        for i in 0..10 {
            assert_eq!(link.push(MS * i, 1500, i), Ok(MS * (25 + i)));
        }
        assert_eq!(link.pop_due(Duration::from_nanos(24_999_999)), None);
        for i in 0..10 {
            assert_eq!(link.next_due(), Some(MS * (25 + i)));
            assert_eq!(link.pop_due(MS * 40), Some((MS * (25 + i), i)));
        }
        assert_eq!(link.pop_due(MS * 1000), None);
    }

    #[test]
    fn rate_spaces_packets() {
        // 1250 bytes at 10 Mbit/s: 1 ms each.
        let mut link = link("delay 5ms rate 10mbit limit 100ms");
        for i in 0..20 {
            assert_eq!(link.push(Duration::ZERO, 1250, i), Ok(MS * (1 + i + 5)));
        }
        assert_eq!(link.backlog_bytes(Duration::ZERO), 20 * 1250);
        assert_eq!(link.backlog_bytes(MS * 5), 15 * 1250);
        // Idle again: the next one waits for nobody.
        assert_eq!(link.push(MS * 50, 1250, 99), Ok(MS * 56));
    }

    #[test]
    fn queue_drops_at_its_tail() {
        let mut link = link("rate 10mbit limit 10ms");
        for i in 0..10 {
            assert!(link.push(Duration::ZERO, 1250, i).is_ok());
        }
        assert_eq!(link.push(Duration::ZERO, 1250, 10), Err(Dropped::Queue));
        assert_eq!(link.push(MS / 2, 1250, 11), Err(Dropped::Queue));
        // A smaller packet still fits where half a packet has drained.
        assert!(link.push(MS / 2, 625, 12).is_ok());
        assert_eq!(link.push(MS / 2, 1, 13), Err(Dropped::Queue));
    }

    #[test]
    fn overload_passes_exactly_the_rate() {
        // Offered 4 × the rate for one second: 10 Mbit/s of 1250 bytes are 1000 packets, and the
        // queue holds 50 more.
        let mut link = link("rate 10mbit limit 50ms");
        let taken = (0..4000u32)
            .filter(|i| link.push(MS * *i / 4, 1250, *i).is_ok())
            .count();
        assert!((1049..=1051).contains(&taken), "{taken}");
    }

    #[test]
    fn idle_bottleneck_takes_a_packet_longer_than_its_queue() {
        let mut link = link("rate 1mbit limit 1ms");
        assert_eq!(link.push(MS, 1250, 0), Ok(MS * 11));
        assert_eq!(link.push(MS, 1250, 1), Err(Dropped::Queue));
        assert!(link.push(MS * 11, 1250, 2).is_ok());
    }

    #[test]
    fn loss_has_the_share_asked_for_and_follows_the_seed() {
        let fates = |seed| -> Vec<bool> {
            let mut link = Link::new("loss 2%".parse().unwrap(), seed);
            (0..50_000u64)
                .map(|i| {
                    let fate = link.push(MS * i as u32, 1500, ()).is_err();
                    link.pop_due(MS * i as u32);
                    fate
                })
                .collect()
        };
        let lost = fates(1).iter().filter(|lost| **lost).count() as f64;
        // Binomial: mean 1000, σ = √(50 000 · 0.02 · 0.98) = 31.3.
        assert!((lost - 1000.0).abs() < 4.0 * 31.3, "{lost}");
        assert_eq!(fates(1), fates(1));
        assert_ne!(fates(1), fates(2));
    }

    #[test]
    fn lost_packets_take_no_share_of_the_rate() {
        let mut link = link("rate 10mbit loss 100%");
        for i in 0..1000 {
            assert_eq!(link.push(Duration::ZERO, 1250, i), Err(Dropped::Loss));
        }
        assert_eq!(link.backlog_bytes(Duration::ZERO), 0);
    }

    #[test]
    fn cut_loses_what_is_under_way() {
        let mut link = link("delay 10ms rate 10mbit");
        for i in 0..5 {
            link.push(Duration::ZERO, 1250, i).unwrap();
        }
        assert_eq!(link.set_down(true), 5);
        assert_eq!(link.push(MS, 1250, 5), Err(Dropped::Down));
        assert_eq!(link.pop_due(MS * 100), None);
        assert_eq!(link.set_down(false), 0);
        // The queue is empty after the cut.
        assert_eq!(link.push(MS * 2, 1250, 6), Ok(MS * 13));
    }

    #[test]
    fn shorter_delay_does_not_reorder() {
        let mut link = link("delay 50ms");
        link.push(Duration::ZERO, 100, 0).unwrap();
        link.set_spec("delay 1ms".parse().unwrap());
        assert_eq!(link.push(MS, 100, 1), Ok(MS * 50));
    }

    #[test]
    fn memory_is_bounded_without_a_rate() {
        let mut link = link("delay 1s");
        let fates = (0..=MAX_IN_FLIGHT as u32).map(|i| link.push(Duration::ZERO, 100, i));
        assert_eq!(fates.last(), Some(Err(Dropped::Overflow)));
        assert_eq!(link.in_flight(), MAX_IN_FLIGHT);
    }
}
