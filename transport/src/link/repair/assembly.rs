//! One stream as it arrives: its bytes in any order, and parity that stands in for those that are
//! missing. No clock, no connection.

use std::collections::BTreeMap;

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::wire::{PIECE, Parity, Shape};
use crate::link::urgent::wire::Malformed;

/// See the module's text.
#[derive(Debug, Default)]
pub struct Assembly {
    bytes: Vec<u8>,
    /// What has come of them: ascending, apart from each other.
    have: Vec<(usize, usize)>,
    shape: Option<Shape>,
    parity: BTreeMap<u16, Box<[u8]>>,
    taken: bool,
}

impl Assembly {
    /// Bytes that [`Self::put`] will add to those that are held.
    pub fn growth(&self, end: usize) -> usize {
        if self.taken {
            return 0;
        }
        end.saturating_sub(self.bytes.len())
    }

    /// Takes a piece of the stream. Where memory must grow, it grows to hold `expected` bytes at least.
    pub fn put(&mut self, offset: usize, piece: &[u8], expected: usize) {
        if self.taken || piece.is_empty() {
            return;
        }
        let end = offset + piece.len();
        self.note(offset, end);
        if end > self.bytes.len() {
            if end > self.bytes.capacity() {
                let told = self.shape.map_or(0, |shape| shape.len as usize);
                let room = expected.max(told).max(end);
                self.bytes.reserve_exact(room - self.bytes.len());
            }
            if offset == self.bytes.len() {
                self.bytes.extend_from_slice(piece);
                return;
            }
            self.bytes.resize(end, 0);
        }
        self.bytes[offset..end].copy_from_slice(piece);
    }

    fn note(&mut self, start: usize, end: usize) {
        let at = self.have.partition_point(|(_, before)| *before < start);
        let beyond = self.have.partition_point(|(after, _)| *after <= end);
        let (mut start, mut end) = (start, end);
        if at < beyond {
            start = start.min(self.have[at].0);
            end = end.max(self.have[beyond - 1].1);
        }
        self.have.splice(at..beyond, [(start, end)]);
    }

    /// Takes parity; the bytes by which what is held of it has grown.
    ///
    /// # Errors
    /// If it contradicts what came before.
    pub fn parity(&mut self, parity: &Parity) -> Result<usize, Malformed> {
        if self.taken {
            return Ok(0);
        }
        let shape = *self.shape.get_or_insert(parity.shape);
        if shape != parity.shape || self.bytes.len() > shape.len as usize {
            return Err(Malformed(format!(
                "parity of stream {} that contradicts it",
                parity.stream
            )));
        }
        let before = self.parity_held();
        for (index, piece) in parity.pieces() {
            self.parity.entry(index).or_insert_with(|| piece.into());
        }
        Ok(self.parity_held() - before)
    }

    /// Bytes of parity that are held.
    pub fn parity_held(&self) -> usize {
        self.parity.len() * PIECE
    }

    /// Whether there is parity that may be of use.
    pub fn has_parity(&self) -> bool {
        !self.taken && !self.parity.is_empty()
    }

    /// Bytes held of the stream itself.
    pub fn held(&self) -> usize {
        self.bytes.len()
    }

    /// Bytes that holding the whole stream takes beyond what is held; for one that can be restored.
    pub fn lacking(&self) -> usize {
        let len = self.shape.map_or(0, |shape| shape.len as usize);
        len.saturating_sub(self.bytes.len())
    }

    /// Whether parity makes up for all that is missing, and what is missing will not come by itself: what
    /// was sent after it is there, or nothing has come for a while (`quiet`), or nothing at all.
    pub fn restorable(&self, quiet: bool) -> bool {
        let Some(shape) = self.shape.filter(|_| !self.taken) else {
            return false;
        };
        let len = shape.len as usize;
        let last = self.have.last().map_or(0, |(_, end)| *end);
        let gone = quiet || last == len || last == 0;
        gone && self.missing(&shape) <= self.parity.len()
    }

    /// Whether all of the stream has come by itself.
    pub fn is_complete(&self) -> bool {
        self.shape
            .is_some_and(|shape| self.have == [(0, shape.len as usize)])
    }

    fn missing(&self, shape: &Shape) -> usize {
        let whole = |(start, end): &(usize, usize)| {
            let behind = if *end == shape.len as usize {
                shape.data()
            } else {
                end / PIECE
            };
            behind.saturating_sub(start.div_ceil(PIECE))
        };
        shape.data() - self.have.iter().map(whole).sum::<usize>()
    }

    /// The whole stream, whose last bytes have come.
    pub fn take(&mut self) -> Bytes {
        self.taken = true;
        self.parity.clear();
        std::mem::take(&mut self.bytes).into()
    }

    /// Whether the stream was taken already: nothing more of it is of interest.
    pub fn is_taken(&self) -> bool {
        self.taken
    }

    /// The whole stream, with the help of parity.
    ///
    /// # Errors
    /// If that is not what its checksum says: the peer made parity of something else.
    pub fn restore(&mut self) -> Result<Bytes, Malformed> {
        let Some(shape) = self.shape else {
            return Err(Malformed("parity of nothing".to_owned()));
        };
        let len = shape.len as usize;
        let data = shape.data();
        self.bytes.resize(data * PIECE, 0);
        let mut present = vec![false; data];
        for (start, end) in &self.have {
            let behind = if *end == len { data } else { end / PIECE };
            let first = start.div_ceil(PIECE).min(behind);
            present[first..behind].fill(true);
        }
        if present.contains(&false) {
            let pieces = self.bytes.chunks_exact(PIECE).enumerate();
            let original = pieces.filter(|(index, _)| present[*index]);
            let parity = self.parity.iter();
            let parity = parity.map(|(index, piece)| (usize::from(*index), piece));
            let restored =
                reed_solomon_simd::decode(data, usize::from(shape.parity), original, parity)
                    .map_err(|error| Malformed(format!("restoring a stream: {error}")))?;
            for (index, piece) in restored {
                self.bytes[index * PIECE..(index + 1) * PIECE].copy_from_slice(&piece);
            }
        }
        self.bytes.truncate(len);
        if xxh3_64(&self.bytes) != shape.checksum {
            return Err(Malformed(
                "parity of a stream that does not make its contents".to_owned(),
            ));
        }
        Ok(self.take())
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::parity_of;
    use super::*;
    use proptest::prelude::*;
    use rand::rngs::SmallRng;
    use rand::seq::SliceRandom as _;
    use rand::{Rng as _, SeedableRng as _};

    proptest! {
        #[test]
        fn a_stream_comes_out_whole_whatever_is_lost(
            len in 1..40_000_usize, packet in 300..1500_usize, parity in 1..40_usize, seed: u64,
        ) {
            let mut rng = SmallRng::seed_from_u64(seed);
            let contents: Vec<u8> = (0..len).map(|_| rng.random()).collect();
            let parity = parity.min(len.div_ceil(PIECE) + 16);
            let datagrams = parity_of(5, &[&contents[..1], &contents[1..]], parity, 1400).unwrap();
            let mut packets: Vec<(usize, &[u8])> = (0..).step_by(packet).zip(contents.chunks(packet)).collect();
            packets.shuffle(&mut rng);
            let mut assembly = Assembly::default();
            let mut datagrams = datagrams.iter();
            let mut restored = None;
            for (offset, bytes) in packets {
                if rng.random_bool(0.3) && let Some(parity) = datagrams.next() {
                    assembly.parity(parity).unwrap();
                }
                assembly.put(offset, bytes, 0);
                if assembly.restorable(true) {
                    restored = Some(assembly.restore().unwrap());
                    break;
                }
            }
            let whole = restored.unwrap_or_else(|| assembly.take());
            prop_assert_eq!(whole, contents);
        }
    }

    #[test]
    fn it_waits_for_what_is_on_its_way() {
        let contents: Vec<u8> = (0..4000_u32).map(|n| n as u8).collect();
        let parity = parity_of(5, &[&contents], 8, 2400).unwrap();
        let mut assembly = Assembly::default();
        assembly.put(0, &contents[..2400], 0);
        assert_eq!(assembly.parity(&parity[0]).unwrap(), 8 * PIECE);
        assert!(!assembly.restorable(false) && assembly.restorable(true));
        // The end is there: what is between was lost.
        assembly.put(3000, &contents[3000..], 0);
        assert!(assembly.restorable(false));
        assert_eq!(assembly.restore().unwrap(), contents);
        assert!(assembly.is_taken() && assembly.parity_held() == 0);
        // What comes later is nothing to it.
        assembly.put(2400, &contents[2400..3000], 0);
        assert_eq!(assembly.parity(&parity[0]).unwrap(), 0);
        assert_eq!((assembly.held(), assembly.growth(4000)), (0, 0));
    }

    #[test]
    fn parity_of_something_else_is_noticed() {
        let parity = parity_of(5, &[&[1; 1000]], 4, 2400).unwrap();
        let mut assembly = Assembly::default();
        assembly.put(0, &[2; 500], 0);
        assembly.parity(&parity[0]).unwrap();
        let other = parity_of(5, &[&[2; 1000]], 4, 2400).unwrap();
        assert!(assembly.parity(&other[0]).is_err());
        assert!(assembly.restorable(true));
        assert!(assembly.restore().is_err());
        let mut longer = Assembly::default();
        longer.put(0, &[1; 1001], 0);
        assert!(longer.parity(&parity[0]).is_err());
    }
}
