//! The receiving half of a link. Takes every stream off QUIC as it comes, keeps what is complete by
//! lane, hands out the highest lane first. What it holds is bounded by the credit it has granted;
//! a peer that sends more has broken the protocol.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

use super::credit::{CreditSender, LANES, index};
use super::urgent::driver::{STREAM_HEADER, Urgent};
use super::{Incoming, Shared, kind};
use crate::codec::MAX_BATCH;
use crate::config::{LaneWindows, MAX_STREAMS};
use crate::error::LinkError;
use crate::frame::{MAX_MESSAGE, decode_message};
use crate::lane::Lane;

/// Longest stream that any kind allows, kind byte and all; parcels on streams are far shorter.
const MAX_STREAM: u64 = (if MAX_MESSAGE > MAX_BATCH {
    MAX_MESSAGE
} else {
    MAX_BATCH
}) as u64
    + 1;

/// Bytes from which on a stream's length says something about the next one's.
const LONG: usize = 16 << 10;

/// See the module's text.
pub(super) struct Inbound {
    shared: Arc<Shared>,
    urgent: Arc<Urgent>,
    windows: [u64; 3],
    queues: Mutex<Queues>,
    arrived: Notify,
    taken: Notify,
    /// Bytes held, complete or not.
    held: AtomicU64,
    /// Bytes that may be held.
    limit: u64,
    /// Length of the last stream that was longer than a few packets.
    usual: AtomicUsize,
}

#[derive(Default)]
struct Queues {
    waiting: [VecDeque<(u64, Incoming)>; 3],
    /// Bytes that the application has taken, by lane.
    taken: [u64; 3],
}

impl Inbound {
    pub(super) fn new(shared: Arc<Shared>, windows: LaneWindows, urgent: Arc<Urgent>) -> Self {
        // Headers are not counted as credit, and what is urgent may be held twice for a moment: as
        // pieces, and on the stream that repeats them.
        let uncounted = u64::from(MAX_STREAMS) * STREAM_HEADER as u64 + windows.urgent;
        Self {
            shared,
            urgent,
            windows: windows.to_array(),
            queues: Mutex::default(),
            arrived: Notify::new(),
            taken: Notify::new(),
            held: AtomicU64::new(0),
            limit: windows.total() + uncounted,
            usual: AtomicUsize::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        // Whole items are pushed and popped: sound even after a panic elsewhere.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads every stream of the peer until the link ends.
    pub(super) async fn accept_streams(self: Arc<Self>) {
        // The number of tasks is bounded by MAX_STREAMS: QUIC admits no more streams at once.
        while let Ok(stream) = self.shared.connection.accept_uni().await {
            let inbound = self.clone();
            tokio::spawn(async move { inbound.read_stream(stream).await });
        }
    }

    /// Grants new credit as the application takes what has arrived.
    pub(super) async fn grant_credit(self: Arc<Self>, mut credit: CreditSender) {
        let mut granted = [0_u64; 3];
        loop {
            self.taken.notified().await;
            let taken = self.lock().taken;
            for (i, lane) in LANES.into_iter().enumerate() {
                // In steps: an update for every batch would be as many packets.
                if taken[i] - granted[i] >= self.windows[i] / 16 {
                    granted[i] = taken[i];
                    let limit = taken[i] + self.windows[i];
                    if credit.grant(lane, limit).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// The next complete batch or message, of the highest lane that has one.
    pub(super) async fn next(&self) -> Result<Incoming, LinkError> {
        loop {
            let arrived = self.arrived.notified();
            if let Some(incoming) = self.pop() {
                return Ok(incoming);
            }
            tokio::select! {
                () = arrived => {}
                error = self.shared.connection.closed() => {
                    return self.pop().ok_or_else(|| self.shared.explain(error));
                }
            }
        }
    }

    fn pop(&self) -> Option<Incoming> {
        let mut queues = self.lock();
        let (lane, (len, incoming)) = queues
            .waiting
            .iter_mut()
            .enumerate()
            .find_map(|(lane, queue)| Some((lane, queue.pop_front()?)))?;
        queues.taken[lane] += len;
        let more = queues.waiting.iter().any(|queue| !queue.is_empty());
        drop(queues);
        self.release(len + 1);
        self.taken.notify_one();
        if more {
            self.arrived.notify_one();
        }
        Some(incoming)
    }

    async fn read_stream(&self, mut stream: quinn::RecvStream) {
        let mut bytes = Vec::new();
        loop {
            // Out of order: a lost packet holds up neither the stream's memory in QUIC nor its
            // flow control.
            match stream.read_chunk(usize::MAX, false).await {
                Ok(Some(chunk)) => {
                    if !self.put(&mut bytes, chunk.offset, &chunk.bytes) {
                        return;
                    }
                }
                Ok(None) => break,
                Err(quinn::ReadError::Reset(_)) => {
                    self.shared.violation("it reset a stream");
                    return;
                }
                // The link is gone; what was incomplete is of no use.
                Err(_) => return,
            }
        }
        if bytes.len() > LONG {
            self.usual.store(bytes.len(), Ordering::Relaxed);
        }
        if let Err(what) = self.take(bytes.into()) {
            self.shared.violation(what);
        }
    }

    /// Takes a complete stream.
    fn take(&self, stream: Bytes) -> Result<(), String> {
        let kind = *stream.first().ok_or("an empty stream")?;
        if kind != kind::PARCEL {
            return self.deliver(kind, stream.slice(1..));
        }
        match self.urgent.take_stream(&stream, self) {
            Ok(Some((kind, contents))) => self.deliver(kind, contents),
            Ok(None) => Ok(()),
            Err(malformed) => Err(malformed.to_string()),
        }
    }

    /// Keeps complete contents for the application. They have been accounted for by [`Self::hold`],
    /// with one byte for their kind.
    pub(super) fn deliver(&self, kind: u8, contents: Bytes) -> Result<(), String> {
        let (lane, len, incoming) = understand(kind, contents)?;
        self.lock().waiting[lane].push_back((len, incoming));
        self.arrived.notify_one();
        Ok(())
    }

    /// Accounts for bytes that are held from now on; false when the peer has sent too much.
    pub(super) fn hold(&self, bytes: u64) -> bool {
        let fits = self.held.fetch_add(bytes, Ordering::Relaxed) + bytes <= self.limit;
        if !fits {
            self.shared.violation("more was sent than credit was given");
        }
        fits
    }

    /// Takes back some of what [`Self::hold`] was told.
    pub(super) fn release(&self, bytes: u64) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Copies a piece of a stream to its place; false when the peer has sent too much.
    fn put(&self, bytes: &mut Vec<u8>, offset: u64, piece: &[u8]) -> bool {
        let end = offset.saturating_add(piece.len() as u64);
        if end > MAX_STREAM {
            self.shared
                .violation(format!("a stream of more than {MAX_STREAM} bytes"));
            return false;
        }
        let (start, end) = (offset as usize, end as usize);
        if end > bytes.len() {
            let grown = (end - bytes.len()) as u64;
            if !self.hold(grown) {
                return false;
            }
            if end > bytes.capacity() {
                // Long streams of one size follow each other: what the last one took is taken at
                // once, and few bytes are moved again because their stream grows.
                let usual = self.usual.load(Ordering::Relaxed);
                let room = if end > LONG { usual } else { 0 };
                let room = room.max(2 * end).min(MAX_STREAM as usize);
                bytes.reserve_exact(room - bytes.len());
            }
            if start == bytes.len() {
                bytes.extend_from_slice(piece);
                return true;
            }
            bytes.resize(end, 0);
        }
        bytes[start..end].copy_from_slice(piece);
        true
    }
}

/// What complete contents are: index of the lane, bytes of credit, meaning.
fn understand(kind: u8, body: Bytes) -> Result<(usize, u64, Incoming), String> {
    let lane_of = |base: u8| {
        let lane = Lane::of_batch(kind.checked_sub(base)?)?;
        Some((lane, index(lane)?))
    };
    let len = body.len() as u64;
    if let Some((lane, index)) = lane_of(kind::BATCH) {
        if body.len() > MAX_BATCH {
            return Err(format!("a batch of {len} bytes"));
        }
        return Ok((index, len, Incoming::Batch { lane, bytes: body }));
    }
    if let Some((_, index)) = lane_of(kind::MESSAGE) {
        let message = decode_message(&body).map_err(|error| error.to_string())?;
        return Ok((index, len, Incoming::Message(message)));
    }
    Err(format!("a stream of unknown kind {kind}"))
}
