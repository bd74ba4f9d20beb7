//! The sending half of a link: who may send how much when. A lane waits for its own credit and, if
//! it is bulk, for the queue in front of the network to be short; nothing else.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Notify, oneshot};

use super::credit::{CreditReceiver, LANES, index};
use super::urgent::driver::Urgent;
use super::{Shared, kind};
use crate::codec::MAX_BATCH;
use crate::config::{LaneWindows, WINDOW_RESERVE};
use crate::error::LinkError;
use crate::frame::encode_message;
use crate::lane::Lane;
use crate::message::Message;

/// Streams that a lane may have unacknowledged at once. Together they stay below what the receiver
/// allows (`MAX_STREAMS`), so that no lane waits for the streams of another.
const OPEN_STREAMS: u32 = 1024;
/// Bulk bytes beyond what the network holds that QUIC may have: what is queued there cannot be
/// taken back, and delays the end of a pass.
const BULK_AHEAD: u64 = 1 << 20;
/// Windows of bulk bytes in flight and on their way to be acknowledged.
const IN_FLIGHT: f64 = 2.0;
/// QUIC's and UDP's share beside the contents, for the rate limit.
const OVERHEAD: f64 = 1.05;

/// See the module's text. Clones are the same.
#[derive(Clone)]
pub(super) struct Outbound {
    shared: Arc<Shared>,
    gates: Arc<[Gate; 3]>,
    limiter: Arc<Mutex<Limiter>>,
    urgent: Arc<Urgent>,
}

/// The state of one lane.
struct Gate {
    /// Held by the one sender that waits; the others wait for it, in order.
    turn: tokio::sync::Mutex<()>,
    state: Mutex<GateState>,
    changed: Notify,
}

struct GateState {
    sent: u64,
    limit: u64,
    unacknowledged: u64,
    open: u32,
}

impl Gate {
    fn new() -> Self {
        Self {
            turn: tokio::sync::Mutex::new(()),
            state: Mutex::new(GateState {
                sent: 0,
                // Nothing goes out before the peer has said what it takes.
                limit: 0,
                unacknowledged: 0,
                open: 0,
            }),
            changed: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        // Plain counters, changed in single steps: they are sound even after a panic elsewhere.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outbound {
    pub(super) fn new(shared: Arc<Shared>, urgent: Arc<Urgent>) -> Self {
        Self {
            shared,
            gates: Arc::new([Gate::new(), Gate::new(), Gate::new()]),
            limiter: Arc::new(Mutex::new(Limiter::new(Instant::now()))),
            urgent,
        }
    }

    /// The peer has accepted this side and takes this much on its lanes.
    pub(super) fn open(&self, windows: LaneWindows) {
        // What the peer's lanes take must fit QUIC's send buffer, or one lane would wait for
        // another's bytes to be acknowledged.
        let send_window = windows.total().saturating_add(WINDOW_RESERVE);
        self.shared.connection.set_send_window(send_window);
        for (gate, limit) in self.gates.iter().zip(windows.to_array()) {
            gate.lock().limit = limit;
            gate.changed.notify_one();
        }
    }

    pub(super) async fn send_batch(
        &self,
        lane: Lane,
        bytes: Bytes,
        parity: bool,
    ) -> Result<(), LinkError> {
        if bytes.len() > MAX_BATCH || bytes.is_empty() {
            return Err(LinkError::Unsendable(format!(
                "a batch of {} bytes; 1 to {MAX_BATCH} are allowed",
                bytes.len()
            )));
        }
        self.send(lane, kind::BATCH, bytes, parity).await
    }

    pub(super) async fn send_message(
        &self,
        lane: Lane,
        message: &Message,
    ) -> Result<(), LinkError> {
        let bytes =
            encode_message(message).map_err(|error| LinkError::Unsendable(error.to_string()))?;
        self.send(lane, kind::MESSAGE, bytes.into(), false).await
    }

    async fn send(
        &self,
        lane: Lane,
        kind: u8,
        bytes: Bytes,
        parity: bool,
    ) -> Result<(), LinkError> {
        let Some(gate) = index(lane) else {
            return Err(LinkError::Unsendable(
                "the control lane is a stream of its own; see open_control".to_owned(),
            ));
        };
        self.respect_limit(lane, bytes.len()).await;
        let mut pass = self.enter(lane, gate, bytes.len() as u64).await?;
        let kind = kind + lane.to_wire();
        if lane == Lane::Urgent {
            match self.urgent.send(kind, &bytes, pass) {
                None => return Ok(()),
                Some(unused) => pass = unused,
            }
        }
        let (written, wait) = oneshot::channel();
        // In a task of its own: a caller that stops waiting must not leave half a batch behind.
        tokio::spawn(write(
            self.shared.clone(),
            lane,
            Bytes::copy_from_slice(&[kind]),
            bytes.clone(),
            written,
            pass,
        ));
        let Ok(written) = wait.await else {
            return Err(self.shared.error());
        };
        let stream = written?;
        if parity {
            let sent = self.urgent.add_parity(stream, kind, &bytes);
            if self.shared.steering.rate_limit().is_some() {
                self.limiter().take(sent as f64);
            }
        }
        Ok(())
    }

    /// Sends a copy of a part of the control stream as a parcel, if that is possible at once.
    pub(super) fn send_copy(&self, copy: Bytes) {
        let Some(gate) = index(Lane::Urgent) else {
            return;
        };
        let len = copy.len() as u64;
        if !self.try_enter(Lane::Urgent, gate, len) {
            return;
        }
        let pass = Pass {
            gates: self.gates.clone(),
            gate,
            len,
        };
        if let Some(unused) = self.urgent.send(kind::CONTROL_COPY, &copy, pass) {
            // Nothing was sent that the receiver could count.
            self.gates[gate].lock().sent -= len;
            drop(unused);
        }
    }

    fn limiter(&self) -> MutexGuard<'_, Limiter> {
        // Plain numbers, sound even after a panic elsewhere.
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the lane may send `len` bytes more.
    async fn enter(&self, lane: Lane, gate: usize, len: u64) -> Result<Pass, LinkError> {
        let _turn = self.gates[gate].turn.lock().await;
        loop {
            let changed = self.gates[gate].changed.notified();
            if self.try_enter(lane, gate, len) {
                return Ok(Pass {
                    gates: self.gates.clone(),
                    gate,
                    len,
                });
            }
            tokio::select! {
                () = changed => {}
                error = self.shared.connection.closed() => return Err(self.shared.explain(error)),
            }
        }
    }

    fn try_enter(&self, lane: Lane, gate: usize, len: u64) -> bool {
        let ahead = match lane {
            Lane::Bulk => self.bulk_ahead(),
            _ => u64::MAX,
        };
        let mut state = self.gates[gate].lock();
        let fits = state.sent.saturating_add(len) <= state.limit
            && state.open < OPEN_STREAMS
            && (state.unacknowledged == 0 || state.unacknowledged.saturating_add(len) <= ahead);
        if fits {
            state.sent += len;
            state.unacknowledged += len;
            state.open += 1;
        }
        fits
    }

    /// Unacknowledged bulk bytes that a full network needs. A stream counts until its last lost packet has come
    /// again: with a share p of n packets lost at random that takes about ln n / ln (1/p) more round trips.
    fn bulk_ahead(&self) -> u64 {
        let path = self.shared.connection.stats().path;
        let lost = path.lost_packets as f64 / path.sent_packets.max(1) as f64;
        let packets = MAX_BATCH as f64 / f64::from(path.current_mtu.max(1200));
        let again = packets.ln() / -lost.clamp(1e-4, 0.2).ln();
        (path.cwnd as f64 * (IN_FLIGHT + again)) as u64 + BULK_AHEAD
    }

    async fn respect_limit(&self, lane: Lane, len: usize) {
        let lock = || self.limiter();
        let rate = || self.shared.steering.rate_limit().map(|rate| rate as f64);
        // Demand paging does not wait; what it takes, the others go without.
        if lane != Lane::Urgent {
            while let Some(rate) = rate() {
                let wait = lock().wait(Instant::now(), rate);
                if wait.is_zero() {
                    break;
                }
                tokio::time::sleep(wait).await;
            }
        }
        if rate().is_some() {
            lock().take(len as f64 * OVERHEAD);
        }
    }

    /// Takes in the peer's credit until the link ends.
    pub(super) async fn follow_credit(self, mut credit: CreditReceiver) {
        while let Ok((lane, limit)) = credit.update(&self.shared).await {
            let gate = &self.gates[index(lane).unwrap_or(LANES.len() - 1)];
            let mut state = gate.lock();
            if limit < state.limit {
                drop(state);
                self.shared.violation("it took credit back");
                return;
            }
            state.limit = limit;
            drop(state);
            gate.changed.notify_one();
        }
    }
}

/// What a stream takes of its lane's shares; gives back on drop what comes back.
pub(super) struct Pass {
    gates: Arc<[Gate; 3]>,
    gate: usize,
    len: u64,
}

impl Drop for Pass {
    fn drop(&mut self) {
        let gate = &self.gates[self.gate];
        let mut state = gate.lock();
        state.unacknowledged -= self.len;
        state.open -= 1;
        drop(state);
        gate.changed.notify_one();
    }
}

/// Writes one stream, tells its number among those opened, and waits until the peer has all of it.
pub(super) async fn write(
    shared: Arc<Shared>,
    lane: Lane,
    header: Bytes,
    bytes: Bytes,
    written: oneshot::Sender<Result<u64, LinkError>>,
    pass: Pass,
) {
    let give = async {
        let mut stream = shared.connection.open_uni().await.ok()?;
        stream.set_priority(lane.priority()).ok()?;
        let mut chunks = [header, bytes];
        stream.write_all_chunks(&mut chunks).await.ok()?;
        stream.finish().ok()?;
        Some(stream)
    };
    let Some(stream) = give.await else {
        // Without a connection error, the peer has stopped the stream, which it never may.
        let error = match shared.connection.close_reason() {
            Some(reason) => shared.explain(reason),
            None => shared.violation("it stopped a stream"),
        };
        // Nobody to tell is fine: the link's end is told to whoever asks.
        let _unheard = written.send(Err(error));
        return;
    };
    let _unheard = written.send(Ok(stream.id().index()));
    // An error means that the link is gone, which everyone learns by themselves.
    if let Ok(Some(_)) = stream.stopped().await {
        shared.violation("it stopped a stream");
    }
    drop(pass);
}

/// A token bucket that may go into debt by one batch.
struct Limiter {
    tokens: f64,
    filled: Instant,
}

impl Limiter {
    /// Time for which unused tokens are kept.
    const BURST: f64 = 0.05;
    /// Longest wait at once, in seconds: the rate, or another lane, may change the debt meanwhile.
    const WAIT: f64 = 0.1;

    fn new(now: Instant) -> Self {
        Self {
            tokens: 0.0,
            filled: now,
        }
    }

    /// Time until something may be sent at `rate` bytes/s; zero for now.
    fn wait(&mut self, now: Instant, rate: f64) -> Duration {
        let elapsed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        self.tokens = (self.tokens + elapsed * rate).min(rate * Self::BURST);
        if self.tokens >= 0.0 {
            Duration::ZERO
        } else {
            Duration::from_secs_f64((-self.tokens / rate).clamp(0.000_5, Self::WAIT))
        }
    }

    fn take(&mut self, bytes: f64) {
        self.tokens -= bytes;
    }
}
