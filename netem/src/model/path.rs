//! One direction of a link: what becomes of each packet. It stores none.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::jitter::{Correlated, deviation};
use super::loss::LossState;
use super::{Dropped, transmission_time};
use crate::spec::{DirectionSpec, Limit, Slot};

/// Decides the fates of the packets of one direction.
#[derive(Debug)]
pub struct Path {
    spec: DirectionSpec,
    rng: SmallRng,
    down: bool,
    loss: LossState,
    jitter: Correlated,
    corruption: Correlated,
    duplication: Correlated,
    reordering: Correlated,
    /// Packets since the last one that was reordered.
    since_reordered: u32,
    /// When the bottleneck has sent all that it has taken so far.
    busy_until: Duration,
    /// When the last packet arrives, which others must not overtake.
    last_due: Duration,
    /// When the current slot ends.
    slot_end: Duration,
}

/// What becomes of a packet that is not lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    /// When it arrives.
    pub due: Duration,
    /// When a second copy of it arrives.
    pub duplicate: Option<Duration>,
    /// One bit of it is flipped; which one follows from this random number.
    pub corrupt: Option<u64>,
}

impl Path {
    /// An idle path. `seed` determines all that is drawn.
    pub fn new(spec: &DirectionSpec, seed: u64) -> Self {
        Self {
            spec: *spec,
            rng: SmallRng::seed_from_u64(seed),
            down: false,
            loss: LossState::default(),
            jitter: Correlated::default(),
            corruption: Correlated::default(),
            duplication: Correlated::default(),
            reordering: Correlated::default(),
            since_reordered: 0,
            busy_until: Duration::ZERO,
            last_due: Duration::ZERO,
            slot_end: Duration::ZERO,
        }
    }

    /// What the path does.
    pub fn spec(&self) -> &DirectionSpec {
        &self.spec
    }

    /// Changes what the path does to packets from `now` on. What waits before the bottleneck is
    /// sent at the new rate, as far as those behind it are concerned.
    pub fn set_spec(&mut self, now: Duration, spec: &DirectionSpec) {
        if self.spec.rate != spec.rate {
            let backlog = self.backlog_bytes(now) as usize;
            self.busy_until = match spec.rate {
                Some(rate) => now + transmission_time(backlog, rate),
                None => Duration::ZERO,
            };
        }
        self.spec = *spec;
    }

    /// Cuts the path or joins it again; its queue is empty afterwards.
    pub fn set_down(&mut self, down: bool) {
        self.down = down;
        if down {
            self.busy_until = Duration::ZERO;
            self.last_due = Duration::ZERO;
        }
    }

    /// Whether the path is cut.
    pub fn is_down(&self) -> bool {
        self.down
    }

    /// Bytes that wait before the bottleneck at `now`: (busy until − now) · rate.
    pub fn backlog_bytes(&self, now: Duration) -> u64 {
        let waiting = self.busy_until.saturating_sub(now).as_nanos();
        let bits = waiting * u128::from(self.spec.rate.unwrap_or(0)) / 1_000_000_000;
        (bits / 8) as u64
    }

    /// Decides about a packet of `bytes` (all headers included) that comes at `now`, while `held`
    /// packets are queued or under way.
    pub fn admit(&mut self, now: Duration, bytes: usize, held: usize) -> Result<Fate, Dropped> {
        if self.down {
            return Err(Dropped::Down);
        }
        // As in the kernel: of a packet that is both doubled and lost one copy remains.
        let twice = self.duplication.hits(self.spec.duplicate, &mut self.rng);
        let lost = self.loss.loses(&self.spec.loss, &mut self.rng);
        if lost && !twice {
            return Err(Dropped::Loss);
        }
        let mut held = held;
        let mut duplicate = None;
        if twice && !lost && !self.loss.loses(&self.spec.loss, &mut self.rng) {
            duplicate = self.carry(now, bytes, held).ok();
            held += usize::from(duplicate.is_some());
        }
        let corrupt = self
            .corruption
            .hits(self.spec.corrupt, &mut self.rng)
            .then(|| self.rng.random());
        match self.carry(now, bytes, held) {
            Ok(due) => Ok(Fate {
                due,
                duplicate,
                corrupt,
            }),
            // The copy got the last place.
            Err(_) if duplicate.is_some() => Ok(Fate {
                due: duplicate.expect("just seen"),
                duplicate: None,
                corrupt,
            }),
            Err(dropped) => Err(dropped),
        }
    }

    /// Passes a packet through queue, bottleneck and delay: when it arrives.
    fn carry(&mut self, now: Duration, bytes: usize, held: usize) -> Result<Duration, Dropped> {
        if let Limit::Packets(packets) = self.spec.limit
            && held >= packets as usize
        {
            return Err(Dropped::Queue);
        }
        if self.overtakes() {
            return Ok(now);
        }
        let sent = self.send(now, bytes)?;
        let mut due = self.delayed(sent);
        // Jitter reorders only where no bottleneck keeps the order.
        if self.spec.jitter.is_zero() || self.spec.rate.is_some() {
            due = due.max(self.last_due);
        }
        if let Some(slot) = self.spec.slot {
            due = self.end_of_slot(slot, due);
        }
        self.last_due = self.last_due.max(due);
        Ok(due)
    }

    /// When the bottleneck has sent the packet, or that it finds the queue full. An idle
    /// bottleneck always takes a packet, however short its queue is.
    fn send(&mut self, now: Duration, bytes: usize) -> Result<Duration, Dropped> {
        let Some(rate) = self.spec.rate else {
            return Ok(now);
        };
        let transmission = transmission_time(bytes, rate);
        let backlog = self.busy_until.saturating_sub(now);
        let fits = match self.spec.limit {
            Limit::Packets(_) => true,
            Limit::Time(time) => backlog + transmission <= time,
            Limit::Bytes(limit) => self.backlog_bytes(now) + bytes as u64 <= limit,
        };
        if !fits && !backlog.is_zero() {
            return Err(Dropped::Queue);
        }
        self.busy_until = self.busy_until.max(now) + transmission;
        Ok(self.busy_until)
    }

    fn delayed(&mut self, sent: Duration) -> Duration {
        let DirectionSpec { delay, jitter, .. } = self.spec;
        if jitter.is_zero() {
            return sent + delay;
        }
        let u = self.jitter.draw(self.spec.delay_correlation, &mut self.rng);
        let strayed = jitter.as_nanos() as f64 * deviation(self.spec.distribution, u);
        // A float becomes an integer by saturation: less than nothing is nothing.
        sent + Duration::from_nanos((delay.as_nanos() as f64 + strayed) as u64)
    }

    /// Whether the packet skips queue and delay.
    fn overtakes(&mut self) -> bool {
        let Some(reorder) = self.spec.reorder else {
            return false;
        };
        if self.since_reordered + 1 >= reorder.gap
            && self.reordering.hits(reorder.chance, &mut self.rng)
        {
            self.since_reordered = 0;
            return true;
        }
        self.since_reordered = self.since_reordered.saturating_add(1);
        false
    }

    fn end_of_slot(&mut self, slot: Slot, due: Duration) -> Duration {
        // After a pause the slots begin anew; only a busy link walks through all of them.
        if due > self.slot_end + 16 * slot.max {
            self.slot_end = due;
        }
        while self.slot_end < due {
            let length = self.rng.random_range(slot.min..=slot.max);
            self.slot_end += length;
        }
        self.slot_end
    }
}
