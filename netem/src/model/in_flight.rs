//! What is under way, in the order of arrival. Nothing is decided here.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

/// Bounds what may be under way on a link without a rate, in packets: 1 Gbit/s of full packets
/// over more than 700 ms.
pub const MAX_IN_FLIGHT: usize = 1 << 16;

/// Bounds what may be under way, in bytes.
pub const MAX_BYTES_IN_FLIGHT: usize = 128 << 20;

/// Items with their time of arrival, bounded. An item may stand for several packets.
#[derive(Debug)]
pub struct InFlight<T> {
    /// Those that arrive in the order in which they came: nearly all, on nearly all links.
    queue: VecDeque<Item<T>>,
    /// Those that overtake others.
    overtakers: BinaryHeap<Overtaker<T>>,
    /// Items so far: equal times keep the order in which they came.
    count: u64,
    packets: usize,
    bytes: usize,
}

#[derive(Debug)]
struct Item<T> {
    due: Duration,
    number: u64,
    bytes: usize,
    packets: usize,
    what: T,
}

/// An item in a heap that gives the earliest first.
#[derive(Debug)]
struct Overtaker<T>(Item<T>);

impl<T> Overtaker<T> {
    fn key(&self) -> (Duration, u64) {
        (self.0.due, self.0.number)
    }
}

impl<T> PartialEq for Overtaker<T> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<T> Eq for Overtaker<T> {}

impl<T> PartialOrd for Overtaker<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Overtaker<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        other.key().cmp(&self.key())
    }
}

impl<T> Default for InFlight<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> InFlight<T> {
    /// Nothing.
    pub fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            overtakers: BinaryHeap::new(),
            count: 0,
            packets: 0,
            bytes: 0,
        }
    }

    /// Whether one more packet of `bytes` is within the bounds.
    pub fn has_room(&self, bytes: usize) -> bool {
        self.packets < MAX_IN_FLIGHT && self.bytes + bytes <= MAX_BYTES_IN_FLIGHT
    }

    /// Adds an item that stands for `packets` packets of `bytes` together. The caller has asked
    /// [`Self::has_room`].
    pub fn push(&mut self, due: Duration, bytes: usize, packets: usize, what: T) {
        let item = Item {
            due,
            number: self.count,
            bytes,
            packets,
            what,
        };
        self.count += 1;
        self.packets += packets;
        self.bytes += bytes;
        if self.queue.back().is_none_or(|last| last.due <= due) {
            self.queue.push_back(item);
        } else {
            self.overtakers.push(Overtaker(item));
        }
    }

    /// When the next item arrives.
    pub fn next_due(&self) -> Option<Duration> {
        let first = self.queue.front().map(|item| item.due);
        let overtaker = self.overtakers.peek().map(|item| item.0.due);
        match (first, overtaker) {
            (Some(first), Some(overtaker)) => Some(first.min(overtaker)),
            (first, overtaker) => first.or(overtaker),
        }
    }

    /// Takes the next item that has arrived by `now`, with the time when it did.
    pub fn pop_due(&mut self, now: Duration) -> Option<(Duration, T)> {
        let due = self.next_due().filter(|due| *due <= now)?;
        let key = |item: &Item<T>| (item.due, item.number);
        let first = self.queue.front().map(key);
        let overtaker = self.overtakers.peek().map(|item| key(&item.0));
        let overtakes = match (first, overtaker) {
            (Some(first), Some(overtaker)) => overtaker < first,
            (first, _) => first.is_none(),
        };
        let item = if overtakes {
            self.overtakers.pop().map(|item| item.0)
        } else {
            self.queue.pop_front()
        }?;
        self.packets -= item.packets;
        self.bytes -= item.bytes;
        Some((due, item.what))
    }

    /// Loses everything; the number of packets that were under way is returned.
    pub fn clear(&mut self) -> usize {
        self.queue.clear();
        self.overtakers.clear();
        self.bytes = 0;
        std::mem::take(&mut self.packets)
    }

    /// Packets under way.
    pub fn held(&self) -> usize {
        self.packets
    }
}
