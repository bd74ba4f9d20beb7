//! The receiving end of parcels, without I/O: gathers pieces, gives out contents once, remembers what
//! has come. What it holds is bounded: at most [`WINDOW`] parcels at once, each of them of the length
//! that the caller has accounted for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;

use super::UrgentStats;
use super::parcel::join;
use super::wire::{Acked, MAX_ACKED, Malformed, Piece, Shape, WINDOW, encode_ack};

/// Time after which an acknowledgement is repeated, should none have followed it: the loss of one must
/// not look like the loss of a parcel.
const REPEAT: Duration = Duration::from_millis(3);

/// See the module's text.
#[derive(Debug, Default)]
pub struct Receiver {
    /// Every parcel below has arrived.
    floor: u64,
    /// Those above it that have.
    arrived: BTreeSet<u64>,
    partial: BTreeMap<u64, Partial>,
    /// Those that arrived last, the newest at the back.
    recent: VecDeque<Acked>,
    /// When an acknowledgement is to go out: at once for something new, later once more.
    ack_at: Option<Duration>,
    /// Whether the next acknowledgement is the second of the same.
    repeat: bool,
    pub(super) stats: UrgentStats,
}

#[derive(Debug)]
struct Partial {
    shape: Shape,
    pieces: Vec<(u8, Box<[u8]>)>,
    seen: u32,
}

/// What a piece led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The first piece of its parcel has come: bytes of contents to be accounted for.
    pub began: Option<u64>,
    /// Its parcel is complete: kind and contents.
    pub complete: Option<(u8, Bytes)>,
}

/// What a parcel on a stream led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Streamed {
    /// Whether its contents are new.
    pub fresh: bool,
    /// Bytes accounted for pieces that are not needed any more.
    pub released: u64,
}

impl Receiver {
    /// Takes a piece.
    ///
    /// # Errors
    /// If it cannot be one of what the peer may send: the link is to be ended.
    pub fn piece(&mut self, piece: Piece) -> Result<Progress, Malformed> {
        let Piece {
            id,
            index,
            shape,
            bytes,
        } = piece;
        let bit = 1_u32 << index;
        if self.has(id)? {
            self.late(id, bit);
            return Ok(Progress::default());
        }
        let mut progress = Progress::default();
        let partial = self.partial.entry(id).or_insert_with(|| {
            progress.began = Some(u64::from(shape.len));
            Partial {
                shape,
                pieces: Vec::new(),
                seen: 0,
            }
        });
        if partial.shape != shape {
            return Err(Malformed(format!(
                "pieces of urgent parcel {id} that contradict each other"
            )));
        }
        if partial.seen & bit != 0 {
            self.stats.duplicates += 1;
            return Ok(progress);
        }
        partial.seen |= bit;
        // A copy: the piece would hold on to the packet that it came in.
        partial.pieces.push((index, bytes[..].into()));
        if partial.pieces.len() < usize::from(shape.data) {
            return Ok(progress);
        }
        let contents = join(&shape, &partial.pieces)?;
        let seen = partial.seen;
        self.stats.received += 1;
        self.stats.repaired += u64::from(seen != (1 << shape.data) - 1);
        self.done(id, seen);
        progress.complete = Some((shape.kind, contents));
        Ok(progress)
    }

    /// Takes a parcel whose contents came on a stream.
    ///
    /// # Errors
    /// As [`Self::piece`].
    pub fn streamed(&mut self, id: u64) -> Result<Streamed, Malformed> {
        if self.has(id)? {
            self.stats.duplicates += 1;
            self.acknowledge();
            return Ok(Streamed {
                fresh: false,
                released: 0,
            });
        }
        let released = self
            .partial
            .get(&id)
            .map_or(0, |partial| u64::from(partial.shape.len));
        self.stats.received += 1;
        self.done(id, 0);
        Ok(Streamed {
            fresh: true,
            released,
        })
    }

    /// The acknowledgement that is due.
    pub fn pop_ack(&mut self, now: Duration) -> Option<Bytes> {
        self.ack_at.take_if(|at| *at <= now)?;
        if !std::mem::replace(&mut self.repeat, true) {
            self.ack_at = Some(now + REPEAT);
        }
        let newest = self.recent.iter().map(|acked| acked.id).max()?;
        // Old ones that were repeated may be far from the newest, but never that far.
        let near = |acked: &&Acked| u16::try_from(newest - acked.id).is_ok();
        let acked: Vec<Acked> = self.recent.iter().rev().filter(near).copied().collect();
        let datagram = encode_ack(&acked);
        self.stats.datagrams += 1;
        self.stats.datagram_bytes += datagram.len() as u64;
        Some(datagram)
    }

    /// When the next acknowledgement is due.
    pub fn next_ack(&self) -> Option<Duration> {
        self.ack_at
    }

    /// What was received.
    pub fn stats(&self) -> UrgentStats {
        self.stats
    }

    /// Whether a parcel has arrived.
    fn has(&self, id: u64) -> Result<bool, Malformed> {
        // The sender never has more than a window unacknowledged, and the oldest of it is at or
        // below the floor.
        if id >= self.floor.saturating_add(WINDOW) {
            return Err(Malformed(format!(
                "urgent parcel {id} while {} has not come",
                self.floor
            )));
        }
        Ok(id < self.floor || self.arrived.contains(&id))
    }

    fn done(&mut self, id: u64, seen: u32) {
        self.partial.remove(&id);
        self.arrived.insert(id);
        while self.arrived.remove(&self.floor) {
            self.floor += 1;
        }
        self.remember(Acked { id, seen });
        self.acknowledge();
    }

    /// A piece of a parcel that has arrived already.
    fn late(&mut self, id: u64, bit: u32) {
        let known = self.recent.iter_mut().find(|recent| recent.id == id);
        match known {
            // What was not needed after all.
            Some(recent) if recent.seen & bit == 0 => recent.seen |= bit,
            // Tried again: the sender has not heard.
            Some(_) => {
                self.stats.duplicates += 1;
                self.acknowledge();
            }
            None => {
                self.stats.duplicates += 1;
                self.remember(Acked { id, seen: bit });
                self.acknowledge();
            }
        }
    }

    fn acknowledge(&mut self) {
        self.ack_at = Some(Duration::ZERO);
        self.repeat = false;
    }

    fn remember(&mut self, acked: Acked) {
        if self.recent.len() == MAX_ACKED {
            self.recent.pop_front();
        }
        self.recent.push_back(acked);
    }
}

#[cfg(test)]
mod tests {
    use super::super::parcel::split;
    use super::super::wire::{Datagram, decode};
    use super::*;
    use proptest::prelude::*;

    fn pieces(id: u64, len: usize, parity: u8) -> Vec<Piece> {
        let contents = vec![id as u8; len];
        let mut shape = Shape::of(17, &contents);
        shape.parity = parity;
        split(id, shape, &contents).unwrap()
    }

    fn acked(receiver: &mut Receiver) -> Vec<Acked> {
        match decode(&receiver.pop_ack(Duration::ZERO).unwrap()) {
            Ok(Datagram::Ack(acked)) => acked,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn contents_come_once_and_late_pieces_are_told() {
        let mut receiver = Receiver::default();
        let mut complete = 0;
        for (count, piece) in pieces(0, 4126, 2).into_iter().enumerate() {
            if count == 1 {
                continue;
            }
            let progress = receiver.piece(piece).unwrap();
            assert_eq!(progress.began, (count == 0).then_some(4126));
            complete += usize::from(progress.complete.is_some());
        }
        assert_eq!(complete, 1);
        assert_eq!(
            acked(&mut receiver),
            [Acked {
                id: 0,
                seen: 0b11_1101
            }]
        );
        assert_eq!(receiver.pop_ack(Duration::ZERO), None);
        // Once more, in case that one is lost; not for ever.
        assert!(receiver.pop_ack(REPEAT).is_some());
        assert_eq!(receiver.next_ack(), None);
        assert_eq!(receiver.stats().repaired, 1);
        assert_eq!(receiver.stats().duplicates, 0);
        // Tried again: acknowledged again.
        let again = pieces(0, 4126, 2).remove(0);
        assert_eq!(receiver.piece(again), Ok(Progress::default()));
        assert_eq!(acked(&mut receiver).len(), 1);
        assert_eq!(receiver.stats().duplicates, 1);
    }

    #[test]
    fn one_that_was_forgotten_is_acknowledged_again() {
        let mut receiver = Receiver::default();
        for id in 0..100 {
            receiver.piece(pieces(id, 10, 0).remove(0)).unwrap();
        }
        assert_eq!(acked(&mut receiver).len(), MAX_ACKED);
        receiver.piece(pieces(3, 10, 0).remove(0)).unwrap();
        assert!(acked(&mut receiver).iter().any(|acked| acked.id == 3));
    }

    #[test]
    fn a_stream_and_its_pieces_are_one() {
        let mut receiver = Receiver::default();
        let mut parts = pieces(0, 4126, 2);
        receiver.piece(parts.remove(0)).unwrap();
        let first = receiver.streamed(0).unwrap();
        assert_eq!((first.fresh, first.released), (true, 4126));
        for part in parts {
            assert_eq!(receiver.piece(part).unwrap(), Progress::default());
        }
        assert!(!receiver.streamed(0).unwrap().fresh);
    }

    #[test]
    fn what_no_sender_does_is_named() {
        let mut receiver = Receiver::default();
        let far = pieces(WINDOW, 10, 0).remove(0);
        assert!(receiver.piece(far).is_err());
        assert!(receiver.streamed(u64::MAX).is_err());
        receiver.piece(pieces(5, 4126, 2).remove(0)).unwrap();
        let other = pieces(5, 4000, 2).remove(1);
        let error = receiver.piece(other).unwrap_err();
        assert!(error.0.contains("contradict"), "{error}");
        let mut forged = pieces(6, 10, 0).remove(0);
        forged.bytes = vec![1; 10].into();
        let error = receiver.piece(forged).unwrap_err();
        assert!(error.0.contains("do not make"), "{error}");
    }

    proptest! {
        #[test]
        fn any_order_gives_everything_once(
            count in 1..40_u64,
            order in proptest::collection::vec((any::<proptest::sample::Index>(), any::<bool>()), 0..400),
        ) {
            let all: Vec<Piece> = (0..count).flat_map(|id| pieces(id, 2000, 1)).collect();
            let mut receiver = Receiver::default();
            let mut seen = BTreeSet::new();
            let rest = all.iter().map(|piece| (piece, false));
            let drawn = order.iter().map(|(index, by_stream)| (index.get(&all), *by_stream));
            for (piece, by_stream) in drawn.chain(rest) {
                let fresh = if by_stream {
                    receiver.streamed(piece.id).unwrap().fresh
                } else {
                    receiver.piece(piece.clone()).unwrap().complete.is_some()
                };
                prop_assert!(!fresh || seen.insert(piece.id));
            }
            prop_assert_eq!(seen.len() as u64, count);
            prop_assert_eq!(receiver.floor, count);
            prop_assert!(receiver.partial.is_empty() && receiver.arrived.is_empty());
        }
    }
}
