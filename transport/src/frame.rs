//! Messages as bytes: length-prefixed postcard on the control lane, bare postcard on a stream of
//! their own. Bounded both ways; what a peer sends never panics and never allocates more than it
//! sent.

use crate::message::{BlockSet, Message};

/// Largest encoded message, in bytes. A set of blocks larger than [`MAX_SET`] must be split, so
/// that no legal message comes near.
pub const MAX_MESSAGE: usize = (1 << 20) + 4096;
/// Largest serialised set of blocks in one message, in bytes; see [`split_set`].
pub const MAX_SET: usize = 512 << 10;
/// Bytes of the length before each message on the control lane (little endian).
pub const PREFIX: usize = 4;

/// A message that cannot be encoded or decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Too long for the wire.
    #[error("message of {0} bytes, {MAX_MESSAGE} are allowed")]
    TooLarge(usize),
    /// Not a message of this protocol version.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// Bytes are left over after the message.
    #[error("malformed message: {0} bytes too many")]
    Trailing(usize),
}

/// Encodes a message without its length.
pub fn encode_message(message: &Message) -> Result<Vec<u8>, FrameError> {
    let bytes =
        postcard::to_stdvec(message).map_err(|error| FrameError::Malformed(error.to_string()))?;
    if bytes.len() > MAX_MESSAGE {
        return Err(FrameError::TooLarge(bytes.len()));
    }
    Ok(bytes)
}

/// Decodes a message without its length.
pub fn decode_message(bytes: &[u8]) -> Result<Message, FrameError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(FrameError::TooLarge(bytes.len()));
    }
    let (message, rest) = postcard::take_from_bytes(bytes)
        .map_err(|error| FrameError::Malformed(error.to_string()))?;
    if rest.is_empty() {
        Ok(message)
    } else {
        Err(FrameError::Trailing(rest.len()))
    }
}

/// Encodes a message with its length before it.
pub fn encode_frame(message: &Message) -> Result<Vec<u8>, FrameError> {
    let body = encode_message(message)?;
    let mut frame = Vec::with_capacity(PREFIX + body.len());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// Reads the length before a message.
pub fn decode_length(prefix: [u8; PREFIX]) -> Result<usize, FrameError> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len > MAX_MESSAGE {
        return Err(FrameError::TooLarge(len));
    }
    Ok(len)
}

/// Splits a set into pieces that fit a message each ([`MAX_SET`] bytes serialised). An empty set
/// gives no piece.
pub fn split_set(set: &BlockSet) -> Vec<BlockSet> {
    // Roaring keeps 65536 numbers in at most 8 KiB, plus 16 bytes of directory: this many such
    // containers fit for certain.
    const CONTAINERS: u32 = (MAX_SET / (8192 + 16) - 1) as u32;
    let mut pieces = Vec::new();
    let mut numbers = set.iter().peekable();
    while let Some(&first) = numbers.peek() {
        let start = first >> 16;
        let mut piece = BlockSet::new();
        let inside = |number: &u32| (number >> 16) - start < CONTAINERS;
        while numbers.peek().is_some_and(inside) {
            let batch = std::iter::from_fn(|| numbers.next_if(inside));
            // The numbers ascend, as `append` wants them.
            let appended = piece.append(batch);
            debug_assert!(appended.is_ok());
        }
        pieces.push(piece);
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pieces_of_a_set_fit_and_add_up() {
        let dense: BlockSet = (0..8_000_000).filter(|n| n % 3 == 0).collect();
        let sparse: BlockSet = (0..60_000).map(|n| n * 65_536 + n % 7).collect();
        for set in [dense, sparse, BlockSet::new(), (0..5).collect()] {
            let pieces = split_set(&set);
            assert!(
                pieces
                    .iter()
                    .all(|piece| piece.serialized_size() <= MAX_SET)
            );
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
            let sum = pieces
                .iter()
                .fold(BlockSet::new(), |sum, piece| sum | piece);
            assert_eq!(sum, set);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            if let Ok(message) = decode_message(&bytes) {
                // What was understood can be said again.
                prop_assert!(encode_message(&message).is_ok());
            }
        }
    }
}
