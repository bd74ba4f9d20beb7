//! The receiving half of a link. Takes every stream off QUIC as it comes, keeps what is complete by
//! lane, hands out the highest lane first. What it holds is bounded by the credit it has granted;
//! a peer that sends more has broken the protocol.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use super::control::Copies;
use super::credit::{CreditSender, LANES, index};
use super::repair::wire::Parity;
use super::repair::{Arriving, Register};
use super::urgent::driver::{STREAM_HEADER, Urgent};
use super::urgent::wire::Malformed;
use super::{Incoming, Shared, kind};
use crate::codec::MAX_BATCH;
use crate::config::{LaneWindows, MAX_STREAMS};
use crate::error::LinkError;
use crate::frame::{MAX_MESSAGE, decode_message};
use crate::lane::Lane;

/// Longest stream that any kind allows, kind byte and all; parcels on streams are far shorter.
pub(super) const MAX_STREAM: u64 = (if MAX_MESSAGE > MAX_BATCH {
    MAX_MESSAGE
} else {
    MAX_BATCH
}) as u64
    + 1;

/// Bytes from which on a stream's length says something about the next one's.
const LONG: usize = 16 << 10;

/// A stream whose parity is here, and of which nothing has come for this long, waits for what was lost:
/// packets of one stream follow each other.
const QUIET: Duration = Duration::from_millis(3);

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
    register: Mutex<Register>,
    restored: AtomicU64,
    copies: Arc<Copies>,
}

#[derive(Default)]
struct Queues {
    waiting: [VecDeque<(u64, Incoming)>; 3],
    /// Bytes that the application has taken, by lane.
    taken: [u64; 3],
}

impl Inbound {
    pub(super) fn new(
        shared: Arc<Shared>,
        windows: LaneWindows,
        urgent: Arc<Urgent>,
        copies: Arc<Copies>,
    ) -> Self {
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
            register: Mutex::default(),
            restored: AtomicU64::new(0),
            copies,
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
            let number = stream.id().index();
            let arriving = inbound.register().begin(number);
            tokio::spawn(async move {
                inbound.read_stream(stream, &arriving).await;
                inbound.register().end(number);
            });
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

    fn register(&self) -> MutexGuard<'_, Register> {
        // Single entries are put in and taken out: sound even after a panic elsewhere.
        self.register.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Streams that were restored with parity.
    pub(super) fn restored(&self) -> u64 {
        self.restored.load(Ordering::Relaxed)
    }

    async fn read_stream(&self, mut stream: quinn::RecvStream, arriving: &Arriving) {
        let mut waited = false;
        loop {
            // Only where new parity, or something new besides, is here is a timer of use.
            let quiet = !waited && arriving.lock().has_parity();
            // Out of order: a lost packet holds up neither the stream's memory in QUIC nor its
            // flow control.
            let chunk = tokio::select! {
                chunk = stream.read_chunk(usize::MAX, false) => chunk,
                () = arriving.helped.notified(), if !quiet => {
                    waited = false;
                    continue;
                }
                () = tokio::time::sleep(QUIET), if quiet => {
                    if !self.restore(arriving, true) {
                        return;
                    }
                    waited = true;
                    continue;
                }
            };
            waited = false;
            match chunk {
                Ok(Some(chunk)) => {
                    if !self.put(arriving, chunk.offset, &chunk.bytes)
                        || !self.restore(arriving, false)
                    {
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
        let mut assembly = arriving.lock();
        if assembly.is_taken() {
            return;
        }
        let released = assembly.parity_held();
        let bytes = assembly.take();
        drop(assembly);
        self.register().released(released);
        if bytes.len() > LONG {
            self.usual.store(bytes.len(), Ordering::Relaxed);
        }
        if let Err(what) = self.take(bytes) {
            self.shared.violation(what);
        }
    }

    /// Takes parity of a stream.
    pub(super) fn parity(&self, parity: &Parity) -> Result<(), Malformed> {
        let Some(arriving) = self.register().parity(parity)? else {
            return Ok(());
        };
        arriving.helped.notify_one();
        // An error has closed the link.
        self.restore(&arriving, false);
        Ok(())
    }

    /// Takes a stream as soon as parity makes up for what it lacks; false when the peer broke a rule.
    fn restore(&self, arriving: &Arriving, quiet: bool) -> bool {
        let mut assembly = arriving.lock();
        if !assembly.restorable(quiet) {
            return true;
        }
        let complete = assembly.is_complete();
        let lacking = assembly.lacking() as u64;
        let released = assembly.parity_held();
        let restored = assembly.restore();
        drop(assembly);
        self.register().released(released);
        if !self.hold(lacking) {
            return false;
        }
        let taken = restored
            .map_err(|malformed| malformed.to_string())
            .and_then(|bytes| self.take(bytes));
        if let Err(what) = taken {
            self.shared.violation(what);
            return false;
        }
        self.restored
            .fetch_add(u64::from(!complete), Ordering::Relaxed);
        true
    }

    /// Takes a complete stream.
    fn take(&self, stream: Bytes) -> Result<(), String> {
        let kind = *stream.first().ok_or("an empty stream")?;
        if kind != kind::PARCEL {
            return self.deliver(kind, stream.slice(1..));
        }
        match self.urgent.take_stream(&stream, self) {
            Ok(Some((kind, contents))) => self.deliver_parcel(kind, contents),
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

    /// Keeps the contents of a parcel likewise; copies of control messages for whoever reads these.
    pub(super) fn deliver_parcel(&self, kind: u8, contents: Bytes) -> Result<(), String> {
        if kind != kind::CONTROL_COPY {
            return self.deliver(kind, contents);
        }
        let len = contents.len() as u64;
        self.copies.take(&contents)?;
        if let Some(urgent) = index(Lane::Urgent) {
            self.lock().taken[urgent] += len;
        }
        self.release(len + 1);
        self.taken.notify_one();
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
    fn put(&self, arriving: &Arriving, offset: u64, piece: &[u8]) -> bool {
        let end = offset.saturating_add(piece.len() as u64);
        if end > MAX_STREAM {
            self.shared
                .violation(format!("a stream of more than {MAX_STREAM} bytes"));
            return false;
        }
        let mut assembly = arriving.lock();
        let grown = assembly.growth(end as usize) as u64;
        if !self.hold(grown) {
            return false;
        }
        // Long streams of one size follow each other: what the last one took is taken at once, and
        // few bytes are moved again because their stream grows.
        let usual = self.usual.load(Ordering::Relaxed);
        let room = if end as usize > LONG { usual } else { 0 };
        let room = room.max(2 * end as usize).min(MAX_STREAM as usize);
        assembly.put(offset as usize, piece, room);
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
