//! Parity of a stream as datagrams; `docs/protocol.md` has the same layout in words. What a peer sends
//! is checked here for form and bounds.

use bytes::{BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::xxh3_64;

use crate::link::inbound::MAX_STREAM;
use crate::link::urgent::wire::Malformed;

/// Length of a piece in bytes. A packet that is lost takes the pieces at both of its ends with it, so
/// that short ones cost less; still shorter ones would make the code slow.
pub const PIECE: usize = 256;
/// Bytes before the pieces.
pub const HEADER: usize = 26;
/// Parity pieces of a stream beyond the number of its data pieces, at most: short streams are repeated.
pub const MAX_EXTRA: usize = 16;
/// First byte of the datagram.
pub(in crate::link) const PARITY: u8 = 3;

/// What all parity of a stream has in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Length of the stream in bytes, the kind byte among them.
    pub len: u32,
    /// Number of parity pieces, m.
    pub parity: u16,
    /// XXH3-64 of the stream.
    pub checksum: u64,
}

impl Shape {
    /// Number of data pieces, k.
    pub fn data(&self) -> usize {
        data_pieces(self.len as usize)
    }

    /// Bytes of the stream in a data piece; the last one is padded with zeros.
    pub fn range(&self, piece: usize) -> std::ops::Range<usize> {
        piece * PIECE..((piece + 1) * PIECE).min(self.len as usize)
    }
}

/// Number of data pieces of a stream of this length.
pub fn data_pieces(len: usize) -> usize {
    len.div_ceil(PIECE)
}

/// Some parity of a stream: one datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parity {
    /// Number of the stream among the unidirectional ones that this side has opened.
    pub stream: u64,
    /// What it is parity of.
    pub shape: Shape,
    /// Index of the first piece in here, counted from the first parity piece.
    pub first: u16,
    /// The pieces, one after the other.
    pub pieces: Bytes,
}

impl Parity {
    /// The pieces with their indices.
    pub fn pieces(&self) -> impl Iterator<Item = (u16, &[u8])> {
        (self.first..).zip(self.pieces.chunks_exact(PIECE))
    }

    /// The datagram, with zeros up to `at_least` bytes.
    pub fn encode(&self, at_least: usize) -> Bytes {
        let mut out = BytesMut::with_capacity((HEADER + self.pieces.len()).max(at_least));
        out.put_u8(PARITY);
        out.put_u64_le(self.stream);
        out.put_u32_le(self.shape.len);
        out.put_u16_le(self.shape.parity);
        out.put_u16_le(self.first);
        out.put_u8((self.pieces.len() / PIECE) as u8);
        out.put_u64_le(self.shape.checksum);
        debug_assert_eq!(out.len(), HEADER);
        out.put_slice(&self.pieces);
        if out.len() < at_least {
            out.put_bytes(0, at_least - out.len());
        }
        out.freeze()
    }
}

/// Reads a datagram that begins with [`PARITY`].
pub(in crate::link) fn decode(datagram: &Bytes) -> Result<Parity, Malformed> {
    let short = || Malformed(format!("a datagram of parity of {} bytes", datagram.len()));
    let header = datagram.first_chunk::<HEADER>().ok_or_else(short)?;
    let le = |range: std::ops::Range<usize>| {
        let bytes = header[range].iter().rev();
        bytes.fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
    };
    let shape = Shape {
        len: le(9..13) as u32,
        parity: le(13..15) as u16,
        checksum: le(18..26),
    };
    let (first, count) = (le(15..17) as u16, usize::from(header[17]));
    let (len, parity) = (u64::from(shape.len), usize::from(shape.parity));
    if len == 0 || len > MAX_STREAM || parity == 0 || parity > shape.data() + MAX_EXTRA {
        return Err(Malformed(format!(
            "{parity} pieces of parity for a stream of {len} bytes"
        )));
    }
    if count == 0 || usize::from(first) + count > parity {
        return Err(Malformed(format!(
            "{count} pieces of parity from {first} on, of {parity}"
        )));
    }
    let end = HEADER + count * PIECE;
    if datagram.len() < end {
        return Err(short());
    }
    Ok(Parity {
        stream: le(1..9),
        shape,
        first,
        pieces: datagram.slice(HEADER..end),
    })
}

/// `parity` pieces for a stream, in datagrams of at most `largest` bytes. None of these has more pieces
/// than the stream itself, so that what repeats a short stream is not lost at once.
///
/// # Errors
/// If the stream is empty or too long, or more parity is asked for than [`decode`] takes.
pub fn parity_of(
    stream: u64,
    contents: &[&[u8]],
    parity: usize,
    largest: usize,
) -> Result<Vec<Parity>, Malformed> {
    let mut whole = contents.concat();
    let shape = Shape {
        len: whole.len() as u32,
        parity: parity as u16,
        checksum: xxh3_64(&whole),
    };
    let data = shape.data();
    whole.resize(data * PIECE, 0);
    let pieces = reed_solomon_simd::encode(data, parity, whole.chunks_exact(PIECE))
        .map_err(|error| Malformed(format!("making parity: {error}")))?;
    let fit = (largest.saturating_sub(HEADER) / PIECE).min(data);
    let together = fit.clamp(1, usize::from(u8::MAX));
    let datagrams = pieces.chunks(together).zip((0..).step_by(together));
    Ok(datagrams
        .map(|(pieces, first)| Parity {
            stream,
            shape,
            first,
            pieces: pieces.concat().into(),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(
            len in 1..600_000_usize, parity in 1..40_usize, stream: u64, largest in 300..1500_usize,
        ) {
            prop_assume!(parity <= data_pieces(len) + MAX_EXTRA);
            let contents = vec![7; len];
            let datagrams = parity_of(stream, &[&contents], parity, largest).unwrap();
            let pieces: usize = datagrams.iter().map(|parity| parity.pieces().count()).sum();
            prop_assert_eq!(pieces, parity);
            for parity in datagrams {
                let datagram = parity.encode(100);
                prop_assert!(datagram.len() <= largest);
                prop_assert_eq!(decode(&datagram).unwrap(), parity);
            }
        }

        #[test]
        fn garbage_is_refused_or_read(mut bytes: Vec<u8>) {
            bytes.insert(0, PARITY);
            if let Ok(parity) = decode(&bytes.into()) {
                prop_assert!(u64::from(parity.shape.len) <= MAX_STREAM);
                prop_assert!(parity.pieces().all(|(index, _)| index < parity.shape.parity));
            }
        }
    }

    #[test]
    fn bounds_are_checked() {
        let parity = parity_of(1, &[&[1; 1000]], 2, 1400).unwrap().remove(0);
        let changed = |change: &dyn Fn(&mut Parity)| {
            let mut parity = parity.clone();
            change(&mut parity);
            decode(&parity.encode(0))
        };
        assert!(changed(&|_| {}).is_ok());
        assert!(changed(&|parity| parity.shape.len = 0).is_err());
        assert!(changed(&|parity| parity.shape.len = u32::MAX).is_err());
        assert!(changed(&|parity| parity.shape.parity = 21).is_err());
        assert!(changed(&|parity| parity.first = 1).is_err());
        assert!(changed(&|parity| parity.pieces = Bytes::new()).is_err());
        let datagram = parity.encode(0);
        assert!(decode(&datagram.slice(..datagram.len() - 1)).is_err());
    }
}
