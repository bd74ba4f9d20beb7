//! The datagrams of the urgent lane as bytes; `docs/protocol.md` has the same layout in words. What a
//! peer sends is checked here for form and bounds, and never makes this panic or allocate.

use bytes::{BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::xxh3_64;

use crate::link::repair::wire as repair;

/// Longest contents of a parcel, in bytes.
pub const MAX_PARCEL: usize = 16 << 10;
/// Longest piece, in bytes. Fits a packet of QUIC's least MTU (1200 bytes of UDP payload), so that a
/// parcel keeps its shape when a path turns out to be narrow, and two of them never share a packet.
pub const MAX_PIECE: usize = 1100;
/// Most data pieces of a parcel.
pub const MAX_DATA: usize = 16;
/// Most pieces of a parcel, parity and all.
pub const MAX_PIECES: usize = 32;
/// Bytes before a piece.
pub const HEADER: usize = 24;
/// Most parcels that one acknowledgement names.
pub const MAX_ACKED: usize = 16;
/// Parcels from the oldest that is not acknowledged to the newest, at most.
pub const WINDOW: u64 = 1024;

const _: () = assert!(MAX_PARCEL.div_ceil(MAX_PIECE) <= MAX_DATA && MAX_PIECES <= 32);

const PIECE: u8 = 1;
const ACK: u8 = 2;

/// What all pieces of a parcel have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Kind of the contents, as the first byte of a stream would say it.
    pub kind: u8,
    /// Length of the contents in bytes, from 1 to [`MAX_PARCEL`].
    pub len: u16,
    /// Number of data pieces, k.
    pub data: u8,
    /// Number of parity pieces, m; for k = 1, of copies beside the first.
    pub parity: u8,
    /// XXH3-64 of the contents.
    pub checksum: u64,
}

impl Shape {
    /// The shape of these contents (1 to [`MAX_PARCEL`] bytes), without parity.
    pub fn of(kind: u8, contents: &[u8]) -> Self {
        Self {
            kind,
            len: contents.len() as u16,
            data: data_pieces(contents.len()) as u8,
            parity: 0,
            checksum: xxh3_64(contents),
        }
    }

    /// Length of each piece: even, as the code needs it.
    pub fn piece_len(&self) -> usize {
        let even = usize::from(self.len).div_ceil(usize::from(self.data).max(1));
        even.next_multiple_of(2)
    }

    /// Number of all pieces.
    pub fn pieces(&self) -> usize {
        usize::from(self.data) + usize::from(self.parity)
    }

    fn check(&self) -> Result<(), Malformed> {
        let len = usize::from(self.len);
        if len == 0 || len > MAX_PARCEL {
            return Err(Malformed(format!(
                "an urgent parcel of {len} bytes; 1 to {MAX_PARCEL} are allowed"
            )));
        }
        if usize::from(self.data) != data_pieces(len) || self.pieces() > MAX_PIECES {
            return Err(Malformed(format!(
                "an urgent parcel of {len} bytes in {} + {} pieces",
                self.data, self.parity
            )));
        }
        Ok(())
    }
}

/// Number of data pieces for contents of this length.
pub fn data_pieces(len: usize) -> usize {
    len.div_ceil(MAX_PIECE).max(1)
}

/// One piece of a parcel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The parcel; ascending from 0 in each direction.
    pub id: u64,
    /// Which piece: data from 0, then parity.
    pub index: u8,
    /// What it is a piece of.
    pub shape: Shape,
    /// The piece itself.
    pub bytes: Bytes,
}

/// A parcel that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acked {
    /// The parcel.
    pub id: u64,
    /// Which of its pieces have come by now, a bit each.
    pub seen: u32,
}

/// One datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Datagram {
    /// A piece of a parcel.
    Piece(Piece),
    /// The parcels that arrived last, the newest first; 1 to [`MAX_ACKED`].
    Ack(Vec<Acked>),
    /// Parity of a stream.
    Parity(repair::Parity),
}

/// A datagram that the protocol does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

impl Piece {
    /// The datagram, with zeros up to `at_least` bytes.
    pub fn encode(&self, at_least: usize) -> Bytes {
        let mut out = BytesMut::with_capacity((HEADER + self.bytes.len()).max(at_least));
        out.put_u8(PIECE);
        out.put_u64_le(self.id);
        out.put_u8(self.shape.kind);
        out.put_u16_le(self.shape.len);
        out.put_u8(self.shape.data);
        out.put_u8(self.shape.parity);
        out.put_u8(self.index);
        out.put_u8(0);
        out.put_u64_le(self.shape.checksum);
        debug_assert_eq!(out.len(), HEADER);
        out.put_slice(&self.bytes);
        if out.len() < at_least {
            out.put_bytes(0, at_least - out.len());
        }
        out.freeze()
    }
}

/// The datagram that names these parcels; the ids are at most 65535 apart.
pub fn encode_ack(acked: &[Acked]) -> Bytes {
    let newest = acked.iter().map(|acked| acked.id).max().unwrap_or(0);
    let mut out = BytesMut::with_capacity(10 + 6 * acked.len());
    out.put_u8(ACK);
    out.put_u8(acked.len() as u8);
    out.put_u64_le(newest);
    for acked in acked {
        out.put_u16_le((newest - acked.id) as u16);
        out.put_u32_le(acked.seen);
    }
    out.freeze()
}

/// Reads a datagram.
pub fn decode(datagram: &Bytes) -> Result<Datagram, Malformed> {
    match datagram.first() {
        Some(&PIECE) => decode_piece(datagram).map(Datagram::Piece),
        Some(&ACK) => decode_ack(datagram).map(Datagram::Ack),
        Some(&repair::PARITY) => repair::decode(datagram).map(Datagram::Parity),
        Some(kind) => Err(Malformed(format!("a datagram of unknown kind {kind}"))),
        None => Err(Malformed("an empty datagram".to_owned())),
    }
}

fn decode_piece(datagram: &Bytes) -> Result<Piece, Malformed> {
    let short = || Malformed(format!("an urgent piece of {} bytes", datagram.len()));
    let header = datagram.first_chunk::<HEADER>().ok_or_else(short)?;
    let shape = Shape {
        kind: header[9],
        len: u16::from_le_bytes([header[10], header[11]]),
        data: header[12],
        parity: header[13],
        checksum: le_u64(&header[16..]),
    };
    shape.check()?;
    let index = header[14];
    if usize::from(index) >= shape.pieces() || header[15] != 0 {
        return Err(Malformed(format!(
            "piece {index} (flags {}) of an urgent parcel of {} + {} pieces",
            header[15], shape.data, shape.parity
        )));
    }
    let end = HEADER + shape.piece_len();
    if datagram.len() < end {
        return Err(short());
    }
    Ok(Piece {
        id: le_u64(&header[1..9]),
        index,
        shape,
        bytes: datagram.slice(HEADER..end),
    })
}

fn decode_ack(datagram: &Bytes) -> Result<Vec<Acked>, Malformed> {
    let malformed = || {
        let len = datagram.len();
        Malformed(format!("an acknowledgement of {len} bytes that is none"))
    };
    let (head, rest) = datagram.split_first_chunk::<10>().ok_or_else(malformed)?;
    let count = usize::from(head[1]);
    if count == 0 || count > MAX_ACKED || rest.len() != 6 * count {
        return Err(malformed());
    }
    let newest = le_u64(&head[2..]);
    rest.chunks_exact(6)
        .map(|entry| {
            let back = u16::from_le_bytes([entry[0], entry[1]]);
            let id = newest.checked_sub(u64::from(back)).ok_or_else(malformed)?;
            let seen = u32::from_le_bytes([entry[2], entry[3], entry[4], entry[5]]);
            Ok(Acked { id, seen })
        })
        .collect()
}

fn le_u64(bytes: &[u8]) -> u64 {
    let fold = |value: u64, byte: &u8| (value << 8) | u64::from(*byte);
    bytes.iter().rev().fold(0, fold)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn piece(len: usize) -> Piece {
        let contents = vec![7; len];
        let mut shape = Shape::of(17, &contents);
        shape.parity = 2;
        Piece {
            id: 300,
            index: 1,
            shape,
            bytes: Bytes::from(vec![7; shape.piece_len()]),
        }
    }

    #[test]
    fn a_piece_survives_padding() {
        for (len, at_least) in [(1, 0), (4126, 0), (50, 700), (MAX_PARCEL, 0)] {
            let piece = piece(len);
            let datagram = piece.encode(at_least);
            assert!(datagram.len() >= at_least);
            assert!(datagram.len() <= HEADER + MAX_PIECE);
            assert_eq!(decode(&datagram), Ok(Datagram::Piece(piece)));
        }
    }

    #[test]
    fn illegal_pieces_are_named() {
        let good = piece(4126).encode(0);
        let with = |at: usize, byte: u8| {
            let mut bytes = good.to_vec();
            bytes[at] = byte;
            decode(&bytes.into()).unwrap_err().0
        };
        assert!(with(0, 9).contains("unknown kind 9"));
        assert!(with(12, 5).contains("5 + 2 pieces"));
        assert!(with(13, 29).contains("4 + 29 pieces"));
        assert!(with(14, 6).contains("piece 6"));
        assert!(with(15, 1).contains("flags 1"));
        assert!(with(11, 0xff).contains("an urgent parcel of 65310 bytes"));
        let cut = good.slice(..good.len() - 1);
        assert!(decode(&cut).is_err());
        assert!(decode(&Bytes::new()).is_err());
    }

    #[test]
    fn illegal_acknowledgements_are_refused() {
        let acked = [Acked { id: 5, seen: 7 }, Acked { id: 3, seen: 1 }];
        let good = encode_ack(&acked);
        assert_eq!(decode(&good), Ok(Datagram::Ack(acked.to_vec())));
        let mut none = good.to_vec();
        none[1] = 0;
        let mut negative = good.to_vec();
        negative[10] = 6;
        for bytes in [none, negative, good[..good.len() - 1].to_vec()] {
            assert!(decode(&bytes.into()).is_err());
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            first in 0..4_u8,
            rest in proptest::collection::vec(any::<u8>(), 0..1500),
        ) {
            let mut bytes = vec![first];
            bytes.extend(rest);
            if let Ok(Datagram::Piece(piece)) = decode(&bytes.into()) {
                // What was understood can be said again.
                prop_assert_eq!(decode(&piece.encode(0)), Ok(Datagram::Piece(piece)));
            }
        }
    }
}
