//! The sending end of parcels, without I/O: which datagram goes out when, what is acknowledged, what
//! is tried again, and what goes on a stream in the end. Tries are bounded: two, then the stream.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;

use super::UrgentStats;
use super::observe::{Network, Observer};
use super::parcel::split;
use super::plan::redundancy;
use super::wire::{Acked, HEADER, MAX_PARCEL, MAX_PIECE, Malformed, Piece, Shape, WINDOW};

/// Tries before the stream.
const TRIES: u8 = 2;
/// An acknowledgement is late after this many smoothed round trips …
const LATE: f64 = 1.5;
/// … and this, for the wake-ups on both sides.
const LATE_MARGIN: Duration = Duration::from_millis(5);
/// Time between two looks at a backlog on this side.
const BACKLOG_WAIT: Duration = Duration::from_millis(2);
/// Growth of the patience after a try that was not needed, its bound, and its return.
const CALM: f64 = 1.5;
const MAX_CALM: f64 = 4.0;
const CALM_DECAY: f64 = 0.95;
/// Acknowledged parcels whose last pieces may still be told.
const RECENT: usize = 64;
/// Pieces that have not come when one sent this much later has are lost.
const REORDERING: Duration = Duration::from_millis(5);

/// Contents that are to go on a stream, marked with their parcel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// The parcel.
    pub id: u64,
    /// Kind of the contents.
    pub kind: u8,
    /// The contents.
    pub contents: Bytes,
}

/// What waits for QUIC on this side, of all that was given to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backlog {
    /// Nothing: what was sent is on the network.
    None,
    /// Something, which may or may not be what is late.
    Some,
    /// As much as may.
    Full,
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct Sender {
    next_id: u64,
    outstanding: BTreeMap<u64, Outstanding>,
    /// Pieces to send: by time, then in order.
    due: BTreeMap<(Duration, u64), (u64, u8)>,
    queued: u64,
    recent: VecDeque<Recent>,
    observer: Observer,
    /// Smoothed time from sending to acknowledgement and its mean deviation, in seconds.
    timing: Option<(f64, f64)>,
    /// Factor on the time that is waited.
    calm: f64,
    srtt: Duration,
    min_rtt: Duration,
    pub(super) stats: UrgentStats,
}

#[derive(Debug)]
struct Outstanding {
    shape: Shape,
    contents: Bytes,
    pieces: Vec<Piece>,
    gap: Duration,
    began: Duration,
    /// When the last try began.
    tried: Duration,
    tries: u8,
    /// When the acknowledgement is late; none for what is on a stream.
    deadline: Option<Duration>,
    /// How long that was put off because this side had a backlog.
    put_off: Duration,
}

/// An acknowledged parcel.
#[derive(Debug)]
struct Recent {
    id: u64,
    shape: Shape,
    began: Duration,
    ended: Duration,
    seen: u32,
}

impl Sender {
    /// Takes contents to send as a parcel; its id. Nothing if they must go on a stream: too long, or
    /// too many are unacknowledged.
    pub fn send(
        &mut self,
        now: Duration,
        kind: u8,
        contents: Bytes,
        network: &Network,
    ) -> Option<u64> {
        self.network(now, network);
        let oldest = self.outstanding.keys().next().copied();
        let crowded = oldest.is_some_and(|oldest| self.next_id - oldest >= WINDOW);
        if contents.is_empty() || contents.len() > MAX_PARCEL || crowded {
            self.stats.streams += 1;
            return None;
        }
        let mut shape = Shape::of(kind, &contents);
        let data = usize::from(shape.data);
        let plan = redundancy(data, contents.len(), &self.observer.path());
        shape.parity = plan.parity as u8;
        let id = self.next_id;
        let pieces = split(id, shape, &contents).ok()?;
        self.next_id += 1;
        self.stats.parcels += 1;
        self.stats.contents_bytes += contents.len() as u64;
        self.outstanding.insert(
            id,
            Outstanding {
                shape,
                contents,
                pieces,
                gap: plan.gap,
                began: now,
                tried: now,
                tries: 0,
                deadline: None,
                put_off: Duration::ZERO,
            },
        );
        self.attempt(now, id);
        Some(id)
    }

    /// QUIC's figures as they are now.
    pub fn network(&mut self, now: Duration, network: &Network) {
        self.srtt = network.srtt;
        self.min_rtt = network.min_rtt;
        self.observer.network(now, network);
    }

    /// When the next datagram may go out, and whether it is a short one that must not share a packet
    /// with the one that it repeats.
    pub fn next_due(&mut self) -> Option<(Duration, bool)> {
        loop {
            let (&(at, number), &(id, index)) = self.due.first_key_value()?;
            // What has been acknowledged meanwhile, or is on a stream, is not sent any more.
            let wanted = self.outstanding.get(&id);
            if let Some(parcel) = wanted.filter(|parcel| parcel.deadline.is_some()) {
                return Some((at, index > 0 && parcel.shape.data == 1));
            }
            self.due.remove(&(at, number));
        }
    }

    /// The next datagram, at least `at_least` bytes long; [`Self::next_due`] tells when.
    pub fn pop(&mut self, at_least: usize) -> Option<Bytes> {
        self.next_due()?;
        let (_, (id, index)) = self.due.pop_first()?;
        let parcel = self.outstanding.get(&id)?;
        let datagram = parcel.pieces.get(usize::from(index))?.encode(at_least);
        let len = datagram.len() as u64;
        self.stats.datagrams += 1;
        self.stats.datagram_bytes += len;
        let needed = if parcel.tries == 1 && index < parcel.shape.data {
            (HEADER + parcel.shape.piece_len()) as u64
        } else {
            0
        };
        self.stats.redundant_bytes += len.saturating_sub(needed);
        Some(datagram)
    }

    /// Takes an acknowledgement; the parcels that are done with.
    ///
    /// # Errors
    /// If it names a parcel that was never sent.
    pub fn acknowledged(&mut self, now: Duration, acked: &[Acked]) -> Result<Vec<u64>, Malformed> {
        let mut done = Vec::new();
        for Acked { id, seen } in acked {
            if *id >= self.next_id {
                return Err(Malformed(format!(
                    "an acknowledgement of urgent parcel {id}, never sent"
                )));
            }
            if let Some(parcel) = self.outstanding.remove(id) {
                self.learn_timing(now, &parcel);
                // What came of several tries says nothing about one.
                if parcel.tries == 1 && parcel.deadline.is_some() {
                    if self.recent.len() == RECENT {
                        self.recent.pop_front();
                    }
                    self.recent.push_back(Recent {
                        id: *id,
                        shape: parcel.shape,
                        began: parcel.began,
                        ended: parcel.began + parcel.gaps(),
                        seen: *seen,
                    });
                }
                done.push(*id);
            } else if let Some(recent) = self.recent.iter_mut().find(|recent| recent.id == *id) {
                recent.seen |= seen;
            }
        }
        self.settle(acked);
        Ok(done)
    }

    /// Tries again what is late; what must go on a stream instead. Nothing is late that may still wait
    /// on this side: a congestion control that yields must not make a storm of repeats.
    pub fn timeout(&mut self, now: Duration, backlog: Backlog) -> Vec<Fallback> {
        let srtt = self.srtt;
        let mut late = Vec::new();
        for (id, parcel) in &mut self.outstanding {
            let Some(deadline) = parcel.deadline.filter(|at| *at <= now) else {
                continue;
            };
            let wait = match backlog {
                Backlog::None => Duration::ZERO,
                // Others' pieces may be what waits: for a round trip only.
                Backlog::Some if parcel.put_off >= srtt => Duration::ZERO,
                Backlog::Some => BACKLOG_WAIT,
                Backlog::Full => (srtt / 4).max(LATE_MARGIN),
            };
            if wait.is_zero() {
                late.push((*id, parcel.tries));
            } else {
                parcel.put_off += wait + now.saturating_sub(deadline);
                parcel.deadline = Some(now + wait);
            }
        }
        let mut fallbacks = Vec::new();
        for (id, tries) in late {
            if tries < TRIES {
                self.stats.retries += 1;
                self.attempt(now, id);
            } else {
                fallbacks.extend(self.fall_back(id));
            }
        }
        fallbacks
    }

    /// Datagrams do not pass any more: everything that is not acknowledged goes on streams.
    pub fn give_up(&mut self) -> Vec<Fallback> {
        let ids: Vec<u64> = self.outstanding.keys().copied().collect();
        ids.into_iter()
            .filter_map(|id| self.fall_back(id))
            .collect()
    }

    /// When [`Self::timeout`] is due.
    pub fn next_timeout(&self) -> Option<Duration> {
        self.outstanding
            .values()
            .filter_map(|parcel| parcel.deadline)
            .min()
    }

    /// The peer has all of a [`Fallback`]'s stream; true if it was not acknowledged before.
    pub fn streamed(&mut self, id: u64) -> bool {
        self.outstanding.remove(&id).is_some()
    }

    /// What the lane takes the path for.
    pub fn path(&self) -> super::plan::Path {
        self.observer.path()
    }

    /// What was sent, and what came of it.
    pub fn stats(&self) -> UrgentStats {
        self.stats
    }

    fn attempt(&mut self, now: Duration, id: u64) {
        let wait = self.wait();
        let Some(parcel) = self.outstanding.get_mut(&id) else {
            return;
        };
        parcel.tries += 1;
        parcel.tried = now;
        parcel.put_off = Duration::ZERO;
        for piece in &parcel.pieces {
            let at = now + parcel.offset(piece.index);
            self.due.insert((at, self.queued), (id, piece.index));
            self.queued += 1;
        }
        parcel.deadline = Some(now + parcel.gaps() + wait);
    }

    fn fall_back(&mut self, id: u64) -> Option<Fallback> {
        let parcel = self.outstanding.get_mut(&id)?;
        parcel.deadline.take()?;
        parcel.pieces = Vec::new();
        self.stats.stream_fallbacks += 1;
        Some(Fallback {
            id,
            kind: parcel.shape.kind,
            contents: std::mem::take(&mut parcel.contents),
        })
    }

    /// Time from the last piece to the moment at which its acknowledgement is late.
    fn wait(&self) -> Duration {
        let own = self
            .timing
            .map_or(0.0, |(mean, spread)| mean + 4.0 * spread);
        let late = (LATE * self.srtt.as_secs_f64()).max(own);
        Duration::from_secs_f64((late * self.calm.max(1.0)).min(60.0)) + LATE_MARGIN
    }

    fn learn_timing(&mut self, now: Duration, parcel: &Outstanding) {
        if parcel.tries == 1 {
            let sample = now.saturating_sub(parcel.began).as_secs_f64();
            self.timing = Some(match self.timing {
                None => (sample, sample / 4.0),
                Some((mean, spread)) => {
                    let error = (sample - mean).abs();
                    (
                        mean + (sample - mean) / 8.0,
                        spread + (error - spread) / 4.0,
                    )
                }
            });
            self.calm = (self.calm * CALM_DECAY).max(1.0);
        } else if now.saturating_sub(parcel.tried) < self.min_rtt * 9 / 10 {
            // Sooner than the last try can have been answered: the round trip has grown.
            self.stats.needless_retries += 1;
            self.calm = (self.calm.max(1.0) * CALM).min(MAX_CALM);
        }
    }

    /// Learns from parcels all of whose pieces have come or never will.
    fn settle(&mut self, acked: &[Acked]) {
        let told = |recent: &&Recent| acked.iter().any(|acked| acked.id == recent.id);
        let latest = self
            .recent
            .iter()
            .filter(told)
            .map(|recent| recent.began)
            .max();
        let observer = &mut self.observer;
        self.recent.retain(|recent| {
            let over = latest.is_some_and(|latest| latest >= recent.ended + REORDERING);
            let whole = (0..recent.shape.pieces()).all(|index| recent.seen & (1 << index) != 0);
            if over || whole {
                observer.parcel(&recent.shape, recent.seen);
            }
            !over && !whole
        });
    }
}

impl Outstanding {
    /// Time from the begin of a try to this piece of it.
    fn offset(&self, index: u8) -> Duration {
        if self.shape.data == 1 {
            self.gap * u32::from(index)
        } else if index >= self.shape.data {
            self.gap
        } else {
            Duration::ZERO
        }
    }

    /// Time from the first piece to the last.
    fn gaps(&self) -> Duration {
        self.offset((self.shape.pieces() - 1) as u8)
    }
}

const _: () = assert!(HEADER + MAX_PIECE < 1162);

#[cfg(test)]
mod tests {
    use super::*;

    const NETWORK: Network = Network {
        srtt: Duration::from_millis(100),
        min_rtt: Duration::from_millis(100),
        sent_packets: 0,
        lost_packets: 0,
        burst: None,
    };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn drain(sender: &mut Sender, until: Duration) -> Vec<Bytes> {
        let mut sent = Vec::new();
        while sender.next_due().is_some_and(|(at, _)| at <= until) {
            sent.extend(sender.pop(0));
        }
        sent
    }

    fn page() -> Bytes {
        Bytes::from(vec![3; 4126])
    }

    #[test]
    fn data_goes_at_once_and_parity_a_little_later() {
        let mut sender = Sender::default();
        assert_eq!(sender.send(ms(0), 17, page(), &NETWORK), Some(0));
        assert_eq!(drain(&mut sender, ms(0)).len(), 4);
        let (at, apart) = sender.next_due().unwrap();
        assert!(!apart && at > ms(0) && at <= ms(5), "{at:?}");
        let parity = drain(&mut sender, ms(5)).len();
        assert!((1..=4).contains(&parity));
        assert_eq!(sender.next_due(), None);
    }

    #[test]
    fn two_tries_then_the_stream_and_no_more() {
        let mut sender = Sender::default();
        sender.send(ms(0), 17, page(), &NETWORK);
        drain(&mut sender, ms(10));
        let mut fallbacks = Vec::new();
        let mut tries = 1;
        while let Some(at) = sender.next_timeout() {
            fallbacks.extend(sender.timeout(at, Backlog::None));
            tries += usize::from(!drain(&mut sender, at + ms(10)).is_empty());
            assert!(tries <= 2);
        }
        assert_eq!(tries, 2);
        assert_eq!(fallbacks.len(), 1);
        assert_eq!(fallbacks[0].contents, page());
        assert!(sender.streamed(0));
        assert!(!sender.streamed(0));
    }

    #[test]
    fn an_acknowledgement_ends_it_and_its_pieces() {
        let mut sender = Sender::default();
        sender.send(ms(0), 17, page(), &NETWORK);
        let acked = [Acked { id: 0, seen: 15 }];
        assert_eq!(sender.acknowledged(ms(100), &acked), Ok(vec![0]));
        assert_eq!(sender.acknowledged(ms(100), &acked), Ok(vec![]));
        assert_eq!(sender.next_due(), None);
        assert_eq!(sender.next_timeout(), None);
        assert!(
            sender
                .acknowledged(ms(100), &[Acked { id: 1, seen: 1 }])
                .is_err()
        );
    }

    #[test]
    fn what_waits_here_is_not_late() {
        let mut sender = Sender::default();
        sender.send(ms(0), 17, page(), &NETWORK);
        for _ in 0..20 {
            let at = sender.next_timeout().unwrap();
            assert_eq!(sender.timeout(at, Backlog::Full), []);
        }
        assert_eq!(sender.stats().retries, 0);
        // Where others keep this side busy, it is late in the end.
        let from = sender.next_timeout().unwrap();
        while sender.stats().retries == 0 {
            let at = sender.next_timeout().unwrap();
            assert!(at < from + ms(120));
            sender.timeout(at, Backlog::Some);
        }
    }

    #[test]
    fn a_needless_try_makes_patient() {
        let mut sender = Sender::default();
        let mut waits = Vec::new();
        for turn in 0..3_u64 {
            let now = ms(10_000 * turn);
            let id = sender.send(now, 17, page(), &NETWORK).unwrap();
            let late = sender.next_timeout().unwrap();
            waits.push(late.saturating_sub(now));
            sender.timeout(late, Backlog::None);
            let acked = [Acked { id, seen: 15 }];
            sender.acknowledged(late + ms(20), &acked).unwrap();
        }
        assert!(waits[0] < waits[1] && waits[1] < waits[2], "{waits:?}");
        assert_eq!(sender.stats().needless_retries, 3);
    }

    #[test]
    fn what_is_too_long_or_too_much_goes_by_stream() {
        let mut sender = Sender::default();
        let long = Bytes::from(vec![0; MAX_PARCEL + 1]);
        assert_eq!(sender.send(ms(0), 17, long, &NETWORK), None);
        for id in 0..WINDOW {
            let one = Bytes::from_static(b"x");
            assert_eq!(sender.send(ms(0), 9, one, &NETWORK), Some(id));
        }
        assert_eq!(
            sender.send(ms(0), 9, Bytes::from_static(b"x"), &NETWORK),
            None
        );
        assert_eq!(sender.give_up().len() as u64, WINDOW);
        assert_eq!(sender.next_due(), None);
    }
}
