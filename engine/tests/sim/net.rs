//! The link: one bottleneck in each direction with strict priorities before a path of the emulated WAN
//! (`hybridmig_netem::model`), the same that real traffic is put through: delay, jitter that
//! reorders batches (never messages of the control lane), loss in bursts, which the transport
//! repairs and so turns into delay.

use std::collections::VecDeque;
use std::time::Duration;

use hybridmig_engine::session::io::Lane;
use hybridmig_netem::model::{Dropped, Path, transmission_time};
use hybridmig_transport::message::Message;

use super::guest::{Block, Content};

/// A batch on its way.
#[derive(Clone, Debug)]
pub struct Batch {
    pub id: u64,
    pub pass: u32,
    pub may_refer: bool,
    pub blocks: Vec<(Block, Content)>,
    /// A piece of the device state: offset, length, and which state it is of.
    pub state: Option<(u64, u32, u64)>,
    pub bytes: u64,
}

/// What a direction carries.
#[derive(Clone, Debug)]
pub enum Item {
    Message(Message),
    Batch(Batch),
    /// The sender has closed the connection.
    Close,
}

/// One direction.
#[derive(Debug)]
pub struct Direction {
    path: Path,
    /// Of the bottleneck, in bits per second.
    rate: u64,
    /// What a lost item waits until it is sent again.
    recovery: Duration,
    queues: [VecDeque<Item>; 4],
    /// The transmitter works on something.
    pub busy: bool,
    /// The control lane delivers in order.
    last_control: Duration,
}

impl Direction {
    /// `path` has no rate: the transmitter works before it, one item after the other.
    pub fn new(path: Path, rate: u64, recovery: Duration) -> Self {
        Self {
            path,
            rate,
            recovery,
            queues: Default::default(),
            busy: false,
            last_control: Duration::ZERO,
        }
    }

    /// Sends an item at `now`: when the transmitter is free again, and when the item arrives.
    pub fn carry(&mut self, now: Duration, lane: Lane, item: &Item) -> (Duration, Duration) {
        let bytes = size(item) as usize;
        let sent = now + transmission_time(bytes, self.rate);
        let mut late = Duration::ZERO;
        let mut arrival = loop {
            match self.path.admit(sent, bytes, 0) {
                Ok(fate) => break fate.due + late,
                Err(Dropped::Loss) => late += self.recovery,
                Err(other) => unreachable!("a path without a rate and a cut drops: {other:?}"),
            }
        };
        if lane == Lane::Control {
            arrival = arrival.max(self.last_control + Duration::from_nanos(1));
            self.last_control = arrival;
        }
        (sent, arrival)
    }

    pub fn push(&mut self, lane: Lane, item: Item) {
        self.queues[lane as usize].push_back(item);
    }

    pub fn pop(&mut self) -> Option<(Lane, Item)> {
        Lane::ALL
            .into_iter()
            .find_map(|lane| Some((lane, self.queues[lane as usize].pop_front()?)))
    }

    pub fn queued(&self, lane: Lane) -> usize {
        self.queues[lane as usize].len()
    }

    pub fn clear(&mut self) {
        self.queues = Default::default();
        self.busy = false;
        self.last_control = Duration::ZERO;
    }
}

/// Bytes of an item on the wire.
fn size(item: &Item) -> u64 {
    match item {
        Item::Message(_) => 120,
        Item::Batch(batch) => batch.bytes,
        Item::Close => 40,
    }
}
