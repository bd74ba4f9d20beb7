//! What a link does to packets, under virtual time: no clock, no socket, no thread in here. Time is
//! a `Duration` since an instant of the caller's choice and must never go back; the same seed
//! and the same calls give the same fates.
//!
//! [`Path`] decides what becomes of a packet in one direction, [`InFlight`] keeps those that are
//! under way, [`Link`] is both. A packet meets, in the order of `tc netem` (Linux,
//! `net/sched/sch_netem.c`): the cut, duplication, random loss, corruption, the drop-tail queue of the
//! bottleneck, its rate, the propagation delay with its jitter. So what is lost at random takes no
//! share of the rate.

mod in_flight;
mod jitter;
mod loss;
mod path;

use std::time::Duration;

pub use in_flight::{InFlight, MAX_BYTES_IN_FLIGHT, MAX_IN_FLIGHT};
pub use path::{Fate, Path};

use crate::spec::DirectionSpec;

/// Bytes of an IPv4 and a UDP header, which count against the rate beside the payload.
pub const UDP_OVERHEAD: usize = 28;

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
    path: Path,
    in_flight: InFlight<(T, Option<u64>)>,
}

/// A packet that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival<T> {
    /// When it did.
    pub due: Duration,
    /// The packet.
    pub packet: T,
    /// One bit of it is to be flipped; which one follows from this random number.
    pub corrupt: Option<u64>,
}

impl<T> Link<T> {
    /// An idle link.
    pub fn new(spec: &DirectionSpec, seed: u64) -> Self {
        Self {
            path: Path::new(spec, seed),
            in_flight: InFlight::new(),
        }
    }

    /// What the link does.
    pub fn spec(&self) -> &DirectionSpec {
        self.path.spec()
    }

    /// Changes what the link does to packets from `now` on. Packets under way keep their time.
    pub fn set_spec(&mut self, now: Duration, spec: &DirectionSpec) {
        self.path.set_spec(now, spec);
    }

    /// When [`Self::pop_due`] will have something next, if nothing is pushed before.
    pub fn next_due(&self) -> Option<Duration> {
        self.in_flight.next_due()
    }

    /// The next packet that has arrived by `now`.
    pub fn pop_due(&mut self, now: Duration) -> Option<Arrival<T>> {
        let (due, (packet, corrupt)) = self.in_flight.pop_due(now)?;
        Some(Arrival {
            due,
            packet,
            corrupt,
        })
    }

    /// Cuts the link or joins it again. A cut loses everything under way: the number of packets is
    /// returned.
    pub fn set_down(&mut self, down: bool) -> usize {
        self.path.set_down(down);
        if down { self.in_flight.clear() } else { 0 }
    }

    /// Whether the link is cut.
    pub fn is_down(&self) -> bool {
        self.path.is_down()
    }

    /// Bytes that wait before the bottleneck at `now`: (busy until − now) · rate.
    pub fn backlog_bytes(&self, now: Duration) -> u64 {
        self.path.backlog_bytes(now)
    }

    /// Packets under way.
    pub fn in_flight(&self) -> usize {
        self.in_flight.held()
    }
}

impl<T: Clone> Link<T> {
    /// Puts a packet of `bytes` (all headers included) onto the link at `now`. On success returns
    /// when it will arrive; [`Self::pop_due`] hands it out from then on, twice if it is duplicated.
    pub fn push(&mut self, now: Duration, bytes: usize, packet: T) -> Result<Duration, Dropped> {
        if !self.in_flight.has_room(bytes) {
            return Err(Dropped::Overflow);
        }
        let fate = self.path.admit(now, bytes, self.in_flight.held())?;
        if let Some(due) = fate.duplicate
            && self.in_flight.has_room(2 * bytes)
        {
            let copy = (packet.clone(), None);
            self.in_flight.push(due, bytes, 1, copy);
        }
        let packet = (packet, fate.corrupt);
        self.in_flight.push(fate.due, bytes, 1, packet);
        Ok(fate.due)
    }
}

/// How long a link of `rate` bits per second takes to send `bytes`.
pub fn transmission_time(bytes: usize, rate: u64) -> Duration {
    const NANO_BITS: u64 = 8_000_000_000;
    let rate = rate.max(1);
    let nanos = match (bytes as u64).checked_mul(NANO_BITS) {
        Some(product) => product / rate,
        None => (bytes as u128 * u128::from(NANO_BITS) / u128::from(rate)) as u64,
    };
    Duration::from_nanos(nanos)
}

#[cfg(test)]
mod tests;
