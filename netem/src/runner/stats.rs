//! What has happened on an emulated link, and whether the emulator itself kept up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::Dropped;

/// Buckets of the lateness histogram; see [`lateness_bound`].
pub const LATENESS_BUCKETS: usize = 16;

/// The upper bound of a bucket: 64 µs · 2^index; the last has none.
pub fn lateness_bound(index: usize) -> Duration {
    Duration::from_micros(64 << index)
}

/// A packet that is delivered this much later than due is late on a short link; see [`late`].
pub const LATE: Duration = Duration::from_micros(1024);

/// From when on a packet is late on a link with this round-trip time: the largest bound of the histogram
/// that is not more than 2 % of it, at least [`LATE`].
pub fn late(rtt: Duration) -> Duration {
    let bounds = (0..LATENESS_BUCKETS - 1).map(lateness_bound);
    let tolerated = bounds.take_while(|bound| *bound <= rtt / 50).last();
    tolerated.unwrap_or(LATE).max(LATE)
}

/// The share of late packets that a valid measurement may have.
pub const LATE_SHARE: f64 = 0.01;

/// The latest that a packet may be in a valid measurement.
pub const LATEST: Duration = Duration::from_millis(40);

/// The share of packets that the emulator itself may fail to carry in a valid measurement.
const FAILED_SHARE: f64 = 1e-4;

/// What has happened on a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkStats {
    /// From the near end to the far one (relay: from the clients to the target).
    pub forward: DirectionStats,
    /// From the far end to the near one.
    pub back: DirectionStats,
}

impl LinkStats {
    /// Why a measurement over this link, whose round-trip time is `rtt`, is one of the emulator
    /// instead, if it is.
    pub fn invalid(&self, rtt: Duration) -> Option<String> {
        let judge = |name: &str, direction: &DirectionStats| {
            let why = direction.invalid(rtt)?;
            Some(format!("{name}: {why}"))
        };
        judge("forward", &self.forward).or_else(|| judge("back", &self.back))
    }
}

/// What has happened in one direction. Bytes are IP-level, all headers included (relay: payload plus
/// [`UDP_OVERHEAD`](crate::model::UDP_OVERHEAD)); packets are those of the link's MTU, however
/// large the pieces are that the kernel hands over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DirectionStats {
    /// Packets that came to the link.
    pub packets: u64,
    /// Bytes that came to the link.
    pub bytes: u64,
    /// Packets passed on, copies included.
    pub delivered_packets: u64,
    /// Bytes passed on.
    pub delivered_bytes: u64,
    /// Packets lost at random.
    pub dropped_loss: u64,
    /// Packets that found the queue full.
    pub dropped_queue: u64,
    /// Packets lost to a cut, under way or on arrival.
    pub dropped_down: u64,
    /// Packets that the emulator itself failed to carry: its own bounds, a refused send, a device
    /// whose queue overflowed. A measurement with many of them is not one of the link.
    pub dropped_relay: u64,
    /// Packets of which a bit was flipped.
    pub corrupted: u64,
    /// Packets that were doubled.
    pub duplicated: u64,
    /// Sum over delivered packets of how much later than due they were sent.
    pub lateness_total: Duration,
    /// The largest of these.
    pub lateness_max: Duration,
    /// Delivered packets by lateness: those in bucket i were less late than [`lateness_bound`]`(i)`
    /// and not less than the bound before.
    pub lateness: [u64; LATENESS_BUCKETS],
}

impl DirectionStats {
    /// How much later than due a packet was sent on average. A measurement of a link with a large
    /// figure here is one of the machine instead.
    pub fn lateness_mean(&self) -> Duration {
        let packets = self.delivered_packets.max(1);
        Duration::from_nanos((self.lateness_total.as_nanos() / u128::from(packets)) as u64)
    }

    /// Share of the delivered packets that were [`late`] on a link with this round-trip time.
    pub fn late_share(&self, rtt: Duration) -> f64 {
        let late = late(rtt);
        let in_time = (0..LATENESS_BUCKETS).take_while(|index| lateness_bound(*index) <= late);
        let in_time: u64 = in_time.map(|index| self.lateness[index]).sum();
        let late = self.lateness.iter().sum::<u64>() - in_time;
        late as f64 / self.delivered_packets.max(1) as f64
    }

    /// Why a measurement over this direction is one of the emulator instead, if it is; `rtt` is the
    /// link's round-trip time.
    pub fn invalid(&self, rtt: Duration) -> Option<String> {
        let failed = self.dropped_relay as f64 / self.packets.max(1) as f64;
        if failed > FAILED_SHARE {
            return Some(format!(
                "the emulator failed to carry {} of {} packets",
                self.dropped_relay, self.packets
            ));
        }
        if self.lateness_max > LATEST {
            return Some(format!(
                "a packet was {:?} late, more than {LATEST:?}",
                self.lateness_max
            ));
        }
        let late = self.late_share(rtt);
        (late > LATE_SHARE).then(|| {
            format!(
                "{:.1} % of the packets were more than {:?} late, more than {:.0} %",
                late * 100.0,
                self::late(rtt),
                LATE_SHARE * 100.0
            )
        })
    }
}

/// [`DirectionStats`] as its one thread counts and everybody reads.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub packets: AtomicU64,
    pub bytes: AtomicU64,
    delivered_packets: AtomicU64,
    delivered_bytes: AtomicU64,
    dropped_loss: AtomicU64,
    dropped_queue: AtomicU64,
    pub dropped_down: AtomicU64,
    pub dropped_relay: AtomicU64,
    pub corrupted: AtomicU64,
    pub duplicated: AtomicU64,
    lateness_total: AtomicU64,
    lateness_max: AtomicU64,
    lateness: [AtomicU64; LATENESS_BUCKETS],
}

impl Counters {
    /// Adds to one of the counters.
    pub fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }

    /// Counts a packet that the link did not take.
    pub fn dropped(&self, why: Dropped) {
        let counter = match why {
            Dropped::Down => &self.dropped_down,
            Dropped::Loss => &self.dropped_loss,
            Dropped::Queue => &self.dropped_queue,
            Dropped::Overflow => &self.dropped_relay,
        };
        Self::add(counter, 1);
    }

    /// Counts packets that were passed on together, `late` after they were due.
    pub fn delivered(&self, packets: u64, bytes: u64, late: Duration) {
        let nanos = late.as_nanos() as u64;
        Self::add(&self.delivered_packets, packets);
        Self::add(&self.delivered_bytes, bytes);
        Self::add(&self.lateness_total, nanos * packets);
        self.lateness_max.fetch_max(nanos, Ordering::Relaxed);
        // 64 µs are 2^16 ns, as nearly as a histogram needs.
        let bucket = (nanos / 64_000).checked_ilog2().map_or(0, |log| log + 1);
        let bucket = (bucket as usize).min(LATENESS_BUCKETS - 1);
        Self::add(&self.lateness[bucket], packets);
    }

    /// What was counted so far.
    pub fn snapshot(&self) -> DirectionStats {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DirectionStats {
            packets: load(&self.packets),
            bytes: load(&self.bytes),
            delivered_packets: load(&self.delivered_packets),
            delivered_bytes: load(&self.delivered_bytes),
            dropped_loss: load(&self.dropped_loss),
            dropped_queue: load(&self.dropped_queue),
            dropped_down: load(&self.dropped_down),
            dropped_relay: load(&self.dropped_relay),
            corrupted: load(&self.corrupted),
            duplicated: load(&self.duplicated),
            lateness_total: Duration::from_nanos(load(&self.lateness_total)),
            lateness_max: Duration::from_nanos(load(&self.lateness_max)),
            lateness: std::array::from_fn(|index| load(&self.lateness[index])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    #[test]
    fn a_long_link_bears_more() {
        let late = |millis| late(Duration::from_millis(millis)).as_micros();
        assert_eq!(
            [late(0), late(50), late(100), late(150)],
            [1024, 1024, 1024, 2048]
        );
        assert_eq!(
            [late(205), late(300), late(100_000)],
            [4096, 4096, 1_048_576]
        );
    }

    fn seen(lateness: &[(u64, u64)]) -> DirectionStats {
        let counters = Counters::default();
        for (packets, micros) in lateness {
            Counters::add(&counters.packets, *packets);
            counters.delivered(*packets, 1500 * packets, Duration::from_micros(*micros));
        }
        counters.snapshot()
    }

    #[test]
    fn lateness_is_sorted_into_buckets() {
        for (index, micros) in [
            (0, 0),
            (0, 63),
            (1, 64),
            (1, 127),
            (2, 128),
            (4, 1023),
            (5, 1024),
        ] {
            let stats = seen(&[(3, micros)]);
            assert_eq!(stats.lateness[index], 3, "{micros} µs");
            assert!(Duration::from_micros(micros) < lateness_bound(index));
        }
        let stats = seen(&[(1, 10_000_000)]);
        assert_eq!(stats.lateness[LATENESS_BUCKETS - 1], 1);
        let stats = seen(&[(3, 100), (1, 500)]);
        assert_eq!(stats.lateness_mean(), Duration::from_micros(200));
        assert_eq!(stats.lateness_max, Duration::from_micros(500));
    }

    #[test]
    fn a_late_emulator_makes_a_measurement_invalid() {
        assert_eq!(seen(&[(1000, 50), (9, 2000)]).invalid(SHORT), None);
        let late = seen(&[(1000, 50), (20, 2000)]);
        // 2 ms are nothing on a link of 200.
        assert_eq!(late.invalid(Duration::from_millis(200)), None);
        let late = late.invalid(SHORT).unwrap();
        assert!(late.contains("2.0 %"), "{late}");
        let stalled = seen(&[(100_000, 50), (1, 50_000)]).invalid(SHORT).unwrap();
        assert!(stalled.contains("50ms late"), "{stalled}");
        let mut failed = seen(&[(1000, 50)]);
        failed.dropped_relay = 1;
        assert!(failed.invalid(SHORT).unwrap().contains("failed to carry 1"));
        assert_eq!(DirectionStats::default().invalid(SHORT), None);
        let stats = LinkStats {
            forward: DirectionStats::default(),
            back: failed,
        };
        assert!(stats.invalid(SHORT).unwrap().starts_with("back: "));
    }
}
