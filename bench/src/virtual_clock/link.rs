//! The link as the lanes see it: one bottleneck, bulk batches one after the other, what is urgent overtaking them; lost packets that
//! hold up the batch that they belong to where nothing makes up for them.

use std::time::Duration;

use hybridmig_engine::session::io::Lane;
use hybridmig_netem::LinkSpec;
use rand::Rng;
use rand::rngs::SmallRng;

use super::seconds;

/// Of the link's rate what batches get: headers, acknowledgements, what congestion control leaves.
const GOODPUT: f64 = 0.93;
/// What waits at the bottleneck before anything that overtakes, in seconds.
const QUEUE: f64 = 0.003;
/// What is given to it in advance, in seconds.
const AHEAD: f64 = 0.02;
/// Bytes of a packet.
const PACKET: f64 = 1400.0;
/// Answers to faults carry parity: bytes over those of the block.
const URGENT: f64 = 1.5;

/// One direction.
pub struct Direction {
    /// Bytes per second.
    pub rate: f64,
    delay: f64,
    jitter: f64,
    pub loss: f64,
    /// When what was given to it is out, by lane: what is above a lane is in its time, too.
    busy: [Duration; 4],
    last_control: Duration,
}

impl Direction {
    /// Of a link: forward, or back.
    pub fn new(link: &LinkSpec, forward: bool) -> Self {
        let spec = if forward { &link.forward } else { &link.back };
        Self {
            rate: spec.rate.map_or(125e6, |bits| bits as f64 / 8.0) * GOODPUT,
            delay: spec.delay.as_secs_f64(),
            jitter: spec.jitter.as_secs_f64(),
            loss: spec.loss.mean(),
            busy: [Duration::ZERO; 4],
            last_control: Duration::ZERO,
        }
    }

    /// Bulk begins no sooner: until then a window grows.
    pub fn begin(&mut self, at: Duration) {
        self.busy[Lane::Bulk as usize] = at;
    }

    /// Round trip over this direction and the other, with what waits at the bottleneck.
    pub fn rtt(&self, other: &Self) -> Duration {
        seconds(self.delay + other.delay + QUEUE)
    }

    /// Whether bulk waits for what is before it.
    pub fn is_busy(&self, now: Duration) -> bool {
        // So much ahead keeps it busy.
        self.busy[Lane::Bulk as usize] > now + seconds(AHEAD)
    }

    /// When the next bulk batch may be given to it.
    pub fn free(&self) -> Duration {
        self.busy[Lane::Bulk as usize].saturating_sub(seconds(AHEAD))
    }

    /// Sends: when it arrives. What is `awaited` has parity, so that a loss costs no time.
    pub fn send(
        &mut self,
        now: Duration,
        lane: Lane,
        bytes: f64,
        awaited: bool,
        rng: &mut SmallRng,
    ) -> Duration {
        let bytes = if lane == Lane::Urgent {
            bytes * URGENT
        } else {
            bytes
        };
        let takes = seconds(bytes / self.rate);
        let jitter = self.jitter * (rng.random::<f64>() - 0.5);
        let way = seconds(self.delay + jitter);
        let begin = self.busy[lane as usize].max(now);
        let waits = self.busy[Lane::Bulk as usize].saturating_sub(now);
        // What is of lower rank comes later by what this takes.
        for (rank, busy) in self.busy.iter_mut().enumerate() {
            if rank >= lane as usize {
                *busy = (*busy).max(begin) + takes;
            }
        }
        let mut arrival = begin + takes + way;
        if lane != Lane::Bulk {
            // It overtakes all but what is in the bottleneck's queue already.
            arrival += seconds(QUEUE).min(waits);
        }
        if lane == Lane::Bulk && !awaited {
            let packets = (bytes / PACKET).ceil();
            let lost = 1.0 - (1.0 - self.loss).powf(packets);
            if rng.random_bool(lost.clamp(0.0, 1.0)) {
                arrival += seconds(2.25 * self.delay);
            }
        }
        if lane == Lane::Control {
            arrival = arrival.max(self.last_control + Duration::from_nanos(1));
            self.last_control = arrival;
        }
        arrival
    }
}
