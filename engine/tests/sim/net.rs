//! The link: one bottleneck in each direction with strict priorities, delay, jitter that reorders
//! batches (never messages of the control lane), and cuts.

use std::collections::VecDeque;
use std::time::Duration;

use hybridmig_engine::session::io::Lane;
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
#[derive(Debug, Default)]
pub struct Direction {
    queues: [VecDeque<Item>; 4],
    /// The transmitter works on something.
    pub busy: bool,
    /// The control lane delivers in order.
    pub last_control: Duration,
}

impl Direction {
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
        *self = Self::default();
    }
}

/// Bytes of an item on the wire.
pub fn size(item: &Item) -> u64 {
    match item {
        Item::Message(_) => 120,
        Item::Batch(batch) => batch.bytes,
        Item::Close => 40,
    }
}
