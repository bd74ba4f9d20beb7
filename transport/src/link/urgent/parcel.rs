//! Contents into pieces and back: Reed-Solomon over pieces of equal length, of which any k of k + m
//! do. Contents of one piece are copied instead, which is the same code for k = 1.

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::wire::{Malformed, Piece, Shape};

/// The pieces of a parcel: data first, then parity.
///
/// # Errors
/// Only if the shape is not one that [`Shape::of`] makes with at most [`super::wire::MAX_PIECES`].
pub fn split(id: u64, shape: Shape, contents: &[u8]) -> Result<Vec<Piece>, Malformed> {
    let (data, parity) = (usize::from(shape.data), usize::from(shape.parity));
    let len = shape.piece_len();
    let mut padded = contents.to_vec();
    padded.resize(len * data, 0);
    let padded = Bytes::from(padded);
    let mut bodies: Vec<Bytes> = (0..data)
        .map(|index| padded.slice(index * len..(index + 1) * len))
        .collect();
    if data == 1 {
        bodies.resize(1 + parity, padded);
    } else if parity > 0 {
        let recovery = reed_solomon_simd::encode(data, parity, &bodies)
            .map_err(|error| Malformed(format!("making parity: {error}")))?;
        bodies.extend(recovery.into_iter().map(Bytes::from));
    }
    let piece = |(index, bytes)| Piece {
        id,
        index: index as u8,
        shape,
        bytes,
    };
    Ok(bodies.into_iter().enumerate().map(piece).collect())
}

/// The contents, from `shape.data` different pieces with their indices.
///
/// # Errors
/// If what comes out is not what the checksum says: the peer made pieces that do not belong together.
pub fn join(shape: &Shape, pieces: &[(u8, Box<[u8]>)]) -> Result<Bytes, Malformed> {
    let (data, parity) = (usize::from(shape.data), usize::from(shape.parity));
    let (original, recovery): (Vec<_>, Vec<_>) = pieces
        .iter()
        .map(|(index, bytes)| (usize::from(*index), bytes))
        .partition(|(index, _)| *index < data || data == 1);
    let len = shape.piece_len();
    let mut contents = vec![0; len * data];
    let mut put = |index: usize, bytes: &[u8]| {
        let index = if data == 1 { 0 } else { index };
        contents[index * len..(index + 1) * len].copy_from_slice(bytes);
    };
    if !recovery.is_empty() {
        let original = original.iter().map(|(index, bytes)| (*index, *bytes));
        let recovery = recovery.iter().map(|(index, bytes)| (index - data, *bytes));
        let restored = reed_solomon_simd::decode(data, parity, original, recovery)
            .map_err(|error| Malformed(format!("restoring an urgent parcel: {error}")))?;
        for (index, bytes) in restored {
            put(index, &bytes);
        }
    }
    for (index, bytes) in original {
        put(index, bytes);
    }
    contents.truncate(usize::from(shape.len));
    if xxh3_64(&contents) != shape.checksum {
        return Err(Malformed(
            "pieces of an urgent parcel that do not make its contents".to_owned(),
        ));
    }
    Ok(contents.into())
}

/// Builds the tables of the code, which takes milliseconds the first time: not while a guest waits.
pub fn prepare() {
    let contents = [0; 2 * super::wire::MAX_PIECE];
    let mut shape = Shape::of(0, &contents);
    shape.parity = 1;
    let pieces = split(0, shape, &contents).unwrap_or_default();
    let second = pieces.into_iter().skip(1);
    let kept: Vec<_> = second
        .map(|piece| (piece.index, piece.bytes[..].into()))
        .collect();
    let restored = join(&shape, &kept);
    debug_assert!(restored.is_ok_and(|restored| restored == contents[..]));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_k_pieces_do(len in 1..=super::super::wire::MAX_PARCEL, parity in 0..=16_u8, seed: u64) {
            use rand::seq::SliceRandom as _;
            use rand::{Rng as _, SeedableRng as _};
            let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
            let mut contents = vec![0_u8; len];
            rng.fill(&mut contents[..]);
            let mut shape = Shape::of(17, &contents);
            shape.parity = parity;
            let mut pieces = split(1, shape, &contents).unwrap();
            prop_assert_eq!(pieces.len(), shape.pieces());
            pieces.shuffle(&mut rng);
            let kept: Vec<_> = pieces
                .iter()
                .take(usize::from(shape.data))
                .map(|piece| (piece.index, piece.bytes[..].into()))
                .collect();
            prop_assert_eq!(join(&shape, &kept).unwrap(), contents);
        }
    }

    #[test]
    fn pieces_of_different_parcels_are_noticed() {
        let shape = |byte| {
            let mut shape = Shape::of(17, &[byte; 3000]);
            shape.parity = 2;
            shape
        };
        let other = split(1, shape(1), &[1; 3000]).unwrap();
        let kept: Vec<_> = other
            .iter()
            .take(3)
            .map(|piece| (piece.index, piece.bytes[..].into()))
            .collect();
        assert!(join(&shape(2), &kept).is_err());
    }

    #[test]
    fn the_tables_can_be_built_ahead() {
        prepare();
    }
}
