//! Carries between the parcels' machines and QUIC: datagrams, timers, streams as the last resort. It
//! decides nothing about redundancy or time.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::sync::{Notify, oneshot};

use super::super::inbound::Inbound;
use super::super::outbound::{Pass, write};
use super::super::repair::{RepairStats, plan, wire::parity_of};
use super::super::{Shared, kind};
use super::UrgentStats;
use super::observe::Network;
use super::receiver::Receiver;
use super::sender::{Backlog, Fallback, Sender};
use super::wire::{Datagram, HEADER, MAX_PIECE, Malformed, decode};
use crate::lane::Lane;

/// Bytes before the contents of a parcel on a stream, the kind of the stream among them: it, the
/// parcel's id, the kind of the contents.
pub(in crate::link) const STREAM_HEADER: usize = 10;

/// Bytes of parity of streams that may wait for QUIC to have room. What is beyond is not sent: with so
/// much before it, it would come late.
const PARITY_WAITING: usize = 1 << 20;
/// QUIC's bytes in a packet beside a stream's.
const AROUND_STREAM: usize = 45;

/// The urgent lane's datagrams of one link.
pub(in crate::link) struct Urgent {
    shared: Arc<Shared>,
    origin: Instant,
    /// Room in QUIC's buffer of datagrams when it is empty.
    room: usize,
    machines: Mutex<Machines>,
    /// There may be something to send, or to wait for.
    wake: Notify,
}

#[derive(Default)]
struct Machines {
    sender: Sender,
    receiver: Receiver,
    /// What the parcels on their way have taken of the lane.
    passes: HashMap<u64, Pass>,
    /// Parity of streams, after all that is urgent.
    parity: VecDeque<Bytes>,
    parity_waiting: usize,
    repair: RepairStats,
    /// Datagrams passed once and do not any more.
    broken: bool,
    streams: u64,
}

/// What is to be done next.
enum Next {
    /// Wait until QUIC has room for this one.
    Squeeze(Bytes),
    /// Wait for a time, if there is one to wait for.
    Wait(Option<Duration>),
}

impl Urgent {
    pub(in crate::link) fn new(shared: Arc<Shared>) -> Self {
        // Its tables take a while to build the first time, in any process.
        tokio::task::spawn_blocking(super::parcel::prepare);
        Self {
            origin: Instant::now(),
            room: shared.connection.datagram_send_buffer_space(),
            machines: Mutex::default(),
            wake: Notify::new(),
            shared,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Machines> {
        // Whole datagrams are taken and given: what a panic elsewhere left is a loss at worst.
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn network(&self) -> Network {
        let path = self.shared.connection.stats().path;
        Network {
            srtt: path.rtt,
            min_rtt: path.min_rtt,
            sent_packets: path.sent_packets,
            lost_packets: path.lost_packets,
            burst: self.shared.steering.loss_burst(),
        }
    }

    /// Length of the longest datagram, if parcels can travel here.
    fn largest(&self) -> Option<usize> {
        let largest = self.shared.connection.max_datagram_size()?;
        (largest >= HEADER + MAX_PIECE).then_some(largest)
    }

    /// Sends contents of a kind as a parcel. Gives the pass back if they must go on a stream.
    pub(in crate::link) fn send(&self, kind: u8, contents: &Bytes, pass: Pass) -> Option<Pass> {
        self.shared.steering.touch();
        let network = self.network();
        let fits = self.largest().is_some();
        let mut machines = self.lock();
        // On a link that is no more, a stream says so.
        let ended = self.shared.connection.close_reason().is_some();
        if ended || !fits || machines.broken {
            machines.streams += 1;
            return Some(pass);
        }
        let now = self.now();
        let Some(id) = machines.sender.send(now, kind, contents.clone(), &network) else {
            return Some(pass);
        };
        machines.passes.insert(id, pass);
        self.flush(&mut machines, now);
        drop(machines);
        // For the later pieces and the timers.
        self.wake.notify_one();
        None
    }

    /// Sends parity of a stream of this kind that QUIC has; the bytes of it. Nothing where datagrams do not
    /// pass: the stream is repaired by QUIC all the same.
    pub(in crate::link) fn add_parity(&self, stream: u64, kind: u8, contents: &Bytes) -> usize {
        let network = self.network();
        let Some(largest) = self.largest() else {
            return 0;
        };
        let mut machines = self.lock();
        if machines.broken {
            return 0;
        }
        machines.sender.network(self.now(), &network);
        let mut path = machines.sender.path();
        drop(machines);
        // Of runs of losses, whoever sees every packet knows more than a few parcels tell.
        path.burst = network.burst.unwrap_or(path.burst);
        let len = contents.len() + 1;
        let mtu = usize::from(self.shared.connection.stats().path.current_mtu);
        let pieces = plan::parity(len, mtu.saturating_sub(AROUND_STREAM), &path);
        let parity = match parity_of(stream, &[&[kind], contents], pieces, largest) {
            Ok(parity) => parity,
            Err(error) => {
                tracing::debug!("no parity of stream {stream}: {error}");
                return 0;
            }
        };
        let mut machines = self.lock();
        machines.repair.streams += 1;
        machines.repair.stream_bytes += len as u64;
        let mut bytes = 0;
        for parity in parity {
            // What repeats a short stream should not share a packet with it, nor with another copy.
            let short = parity.shape.data() * 2 <= largest / super::super::repair::wire::PIECE;
            let datagram = parity.encode(if short { largest } else { 0 });
            if machines.parity_waiting + datagram.len() > PARITY_WAITING {
                machines.repair.dropped += 1;
                continue;
            }
            machines.parity_waiting += datagram.len();
            bytes += datagram.len();
            machines.parity.push_back(datagram);
        }
        machines.repair.parity_bytes += bytes as u64;
        self.flush(&mut machines, self.now());
        drop(machines);
        self.wake.notify_one();
        bytes
    }

    pub(in crate::link) fn repair_stats(&self) -> RepairStats {
        self.lock().repair
    }

    /// Gives QUIC what is due and fits its buffer, which would drop the oldest otherwise. Only this
    /// side of the lock sends, so that the room can but grow meanwhile. True if something is left.
    fn flush(&self, machines: &mut Machines, now: Duration) -> bool {
        let Some(largest) = self.largest() else {
            return false;
        };
        loop {
            let room = self.shared.connection.datagram_send_buffer_space();
            if room < largest {
                return true;
            }
            let Some(datagram) = machines.pop(now, largest, room < self.room) else {
                return false;
            };
            if self.shared.connection.send_datagram(datagram).is_err() {
                // Lost like any other: the parcel is tried again, or goes on a stream.
                return false;
            }
        }
    }

    /// Sends later pieces, repeats, and falls back, until the link ends.
    pub(in crate::link) async fn keep_sending(self: Arc<Self>) {
        loop {
            let (next, fallbacks) = self.next();
            for fallback in fallbacks {
                self.clone().stream(fallback);
            }
            let pause = async {
                match next {
                    Next::Squeeze(datagram) => {
                        let room = self.shared.connection.send_datagram_wait(datagram);
                        // Lost like any other.
                        let _lost = room.await;
                    }
                    Next::Wait(None) => self.wake.notified().await,
                    Next::Wait(Some(at)) => {
                        let at = tokio::time::Instant::from_std(self.origin + at);
                        tokio::select! {
                            () = tokio::time::sleep_until(at) => {}
                            () = self.wake.notified() => {}
                        }
                    }
                }
            };
            tokio::select! {
                () = pause => {}
                _ended = self.shared.connection.closed() => return,
            }
        }
    }

    fn next(&self) -> (Next, Vec<Fallback>) {
        let network = self.network();
        let largest = self.largest();
        let now = self.now();
        let mut machines = self.lock();
        let Some(largest) = largest else {
            // The path has become too narrow, or never took any.
            machines.broken = true;
            return (Next::Wait(None), machines.sender.give_up());
        };
        // Before anything new is given to it.
        let idle = self.shared.connection.datagram_send_buffer_space() >= self.room;
        let backlog = match (self.flush(&mut machines, now), idle) {
            (true, _) => Backlog::Full,
            (false, false) => Backlog::Some,
            (false, true) => Backlog::None,
        };
        machines.sender.network(now, &network);
        let fallbacks = machines.sender.timeout(now, backlog);
        // What is tried again is due at once.
        let blocked = self.flush(&mut machines, now);
        if blocked && let Some(datagram) = machines.pop(now, largest, true) {
            return (Next::Squeeze(datagram), fallbacks);
        }
        let due = machines.sender.next_due().map(|(at, _)| at);
        let times = [
            due,
            machines.sender.next_timeout(),
            machines.receiver.next_ack(),
        ];
        let until = times.into_iter().flatten().min();
        (Next::Wait(until), fallbacks)
    }

    /// Sends contents on a stream that is marked with their parcel.
    fn stream(self: Arc<Self>, fallback: Fallback) {
        let Fallback { id, kind, contents } = fallback;
        let Some(pass) = self.lock().passes.remove(&id) else {
            return;
        };
        let mut header = BytesMut::with_capacity(STREAM_HEADER);
        header.extend_from_slice(&[kind::PARCEL]);
        header.extend_from_slice(&id.to_le_bytes());
        header.extend_from_slice(&[kind]);
        tokio::spawn(async move {
            // Nobody waits for it to be written.
            let (written, _unheard) = oneshot::channel();
            let shared = self.shared.clone();
            write(
                shared,
                Lane::Urgent,
                header.freeze(),
                contents,
                written,
                pass,
            )
            .await;
            self.lock().sender.streamed(id);
        });
    }

    /// Takes every datagram off QUIC until the link ends.
    pub(in crate::link) async fn keep_receiving(self: Arc<Self>, inbound: Arc<Inbound>) {
        while let Ok(first) = self.shared.connection.read_datagram().await {
            let mut next = Some(first);
            while let Some(datagram) = next {
                if let Err(Malformed(what)) = self.take(&datagram, &inbound) {
                    self.shared.violation(what);
                    return;
                }
                // Those that came together are acknowledged together.
                let mut context = Context::from_waker(Waker::noop());
                next = match pin!(self.shared.connection.read_datagram()).poll(&mut context) {
                    Poll::Ready(datagram) => datagram.ok(),
                    Poll::Pending => None,
                };
            }
            let now = self.now();
            let mut machines = self.lock();
            self.flush(&mut machines, now);
            let more = machines.receiver.next_ack().is_some();
            drop(machines);
            if more {
                self.wake.notify_one();
            }
        }
    }

    fn take(&self, datagram: &Bytes, inbound: &Inbound) -> Result<(), Malformed> {
        match decode(datagram)? {
            Datagram::Ack(acked) => {
                let now = self.now();
                let mut machines = self.lock();
                let done = machines.sender.acknowledged(now, &acked)?;
                let passes: Vec<Pass> = done
                    .iter()
                    .filter_map(|id| machines.passes.remove(id))
                    .collect();
                drop(machines);
                drop(passes);
            }
            Datagram::Parity(parity) => inbound.parity(&parity)?,
            Datagram::Piece(piece) => {
                self.shared.steering.touch();
                check_kind(piece.shape.kind)?;
                let progress = self.lock().receiver.piece(piece)?;
                if let Some(len) = progress.began
                    && !inbound.hold(len + 1)
                {
                    // The violation is noted there.
                    return Ok(());
                }
                if let Some((kind, contents)) = progress.complete {
                    inbound.deliver_parcel(kind, contents).map_err(Malformed)?;
                }
            }
        }
        Ok(())
    }

    /// Takes what came on a stream marked with a parcel, all of it; the kind and the contents, if they
    /// are new.
    pub(in crate::link) fn take_stream(
        &self,
        stream: &Bytes,
        inbound: &Inbound,
    ) -> Result<Option<(u8, Bytes)>, Malformed> {
        let Some((header, _)) = stream.split_first_chunk::<STREAM_HEADER>() else {
            let what = "a stream with an urgent parcel that has not even an id";
            return Err(Malformed(what.to_owned()));
        };
        self.shared.steering.touch();
        let mut id = [0; 8];
        id.copy_from_slice(&header[1..9]);
        check_kind(header[9])?;
        let mut machines = self.lock();
        let streamed = machines.receiver.streamed(u64::from_le_bytes(id))?;
        drop(machines);
        // For the acknowledgement.
        self.wake.notify_one();
        if streamed.released > 0 {
            inbound.release(streamed.released + 1);
        }
        if !streamed.fresh {
            inbound.release(stream.len() as u64);
            return Ok(None);
        }
        // What is left is held as the contents with one byte of kind.
        inbound.release(STREAM_HEADER as u64 - 1);
        Ok(Some((header[9], stream.slice(STREAM_HEADER..))))
    }

    pub(in crate::link) fn stats(&self) -> UrgentStats {
        let machines = self.lock();
        let mut stats = machines.sender.stats();
        let received = machines.receiver.stats();
        stats.streams += machines.streams;
        stats.datagrams += received.datagrams;
        stats.datagram_bytes += received.datagram_bytes;
        stats.received = received.received;
        stats.repaired = received.repaired;
        stats.duplicates = received.duplicates;
        stats
    }
}

impl Machines {
    /// The next datagram that may go out now, acknowledgements first, mostly. Where others wait in QUIC's
    /// buffer, `busy`, a copy is made so long that it cannot share a packet with the one it repeats.
    fn pop(&mut self, now: Duration, largest: usize, busy: bool) -> Option<Bytes> {
        let due = self.sender.next_due().filter(|(at, _)| *at <= now);
        let copy = due.is_some_and(|(_, apart)| apart);
        // A copy that finds the buffer empty needs no length: what follows may share its packet.
        if (busy || !copy)
            && let Some(ack) = self.receiver.pop_ack(now)
        {
            return Some(ack);
        }
        if due.is_none() {
            let parity = self.parity.pop_front()?;
            self.parity_waiting -= parity.len();
            return Some(parity);
        }
        self.sender.pop(if copy && busy { largest } else { 0 })
    }
}

/// Parcels carry what the urgent lane carries on streams otherwise, and copies of control messages.
fn check_kind(kind: u8) -> Result<(), Malformed> {
    let lane = Lane::Urgent.to_wire();
    if kind == kind::MESSAGE + lane || kind == kind::BATCH + lane || kind == kind::CONTROL_COPY {
        return Ok(());
    }
    Err(Malformed(format!(
        "an urgent parcel of unknown kind {kind}"
    )))
}
