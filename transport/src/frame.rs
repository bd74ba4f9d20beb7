//! Messages as bytes: length-prefixed postcard on the control lane, bare postcard on a stream of
//! their own. Bounded both ways; what a peer sends never panics and never allocates more than it
//! sent.

use crate::codec::{MAX_BATCH_CONTENTS, MIN_BLOCK_SIZE};
use crate::message::{BlockSet, MAX_SEED_NAMES, Message, RegionInfo};

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
    /// One of its lists is longer than `docs/protocol.md` allows, or an offer that cannot be.
    #[error("illegal message: {0}")]
    Illegal(String),
    /// Bytes are left over after the message.
    #[error("malformed message: {0} bytes too many")]
    Trailing(usize),
}

/// Encodes a message without its length.
pub fn encode_message(message: &Message) -> Result<Vec<u8>, FrameError> {
    check(message)?;
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
    if !rest.is_empty() {
        return Err(FrameError::Trailing(rest.len()));
    }
    check(&message)?;
    Ok(message)
}

/// Bounds that the types do not have.
fn check(message: &Message) -> Result<(), FrameError> {
    let bounded = |what: &str, len: usize, most: usize| {
        if len > most {
            let text = format!("{len} {what}, {most} are allowed");
            return Err(FrameError::Illegal(text));
        }
        Ok(())
    };
    match message {
        Message::Hello { versions, .. } => bounded("versions", versions.len(), 16),
        Message::Applied { batches, rejected } => {
            bounded("ranges of batches", batches.len(), 1024)?;
            bounded("rejected blocks", rejected.len(), 4096)
        }
        Message::Fetch { blocks, .. } => bounded("blocks to fetch", blocks.len(), 1024),
        Message::Behind { blocks, .. } | Message::Missing { blocks, .. } => {
            bounded("bytes of blocks", blocks.serialized_size(), MAX_SET)
        }
        Message::AllPlaced(summary) => {
            bounded("blocked threads", summary.blocked_threads.len(), 64)?;
            bounded("samples of speed", summary.speed.len(), 4096)
        }
        Message::Offer(offer) => check_regions(&offer.regions),
        Message::Seeds { block_size, names } => {
            bounded("names of seeds", names.len(), MAX_SEED_NAMES)?;
            check_seeds(*block_size, names)
        }
        _ => Ok(()),
    }
}

/// Regions are numbered from 0, and their blocks are ones that the codec can carry.
fn check_regions(regions: &[RegionInfo]) -> Result<(), FrameError> {
    for (index, region) in regions.iter().enumerate() {
        if usize::from(region.id.0) != index {
            let text = format!("{} is offered in place {index}", region.id);
            return Err(FrameError::Illegal(text));
        }
        let size = region.block_size;
        if !carried(size) {
            let text = format!("{} has blocks of {size} bytes", region.id);
            return Err(FrameError::Illegal(text));
        }
    }
    Ok(())
}

/// Names ascend, and stand for contents that the codec can carry.
fn check_seeds(block_size: u32, names: &[u64]) -> Result<(), FrameError> {
    if !carried(block_size) {
        let text = format!("seeds of {block_size} bytes");
        return Err(FrameError::Illegal(text));
    }
    if names.is_empty() || !names.is_sorted_by(|before, after| before < after) {
        let text = "names of seeds that do not ascend, or none".to_owned();
        return Err(FrameError::Illegal(text));
    }
    Ok(())
}

/// Whether the codec carries blocks of this size.
fn carried(block_size: u32) -> bool {
    block_size.is_power_of_two()
        && block_size >= MIN_BLOCK_SIZE
        && block_size as usize <= MAX_BATCH_CONTENTS
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

    #[test]
    fn lists_beyond_their_bounds_are_refused_both_ways() {
        let fetch = |count: u32| Message::Fetch {
            region: crate::message::RegionId(0),
            blocks: (0..count).collect(),
        };
        assert!(encode_message(&fetch(1024)).is_ok());
        let error = encode_message(&fetch(1025)).unwrap_err();
        assert!(matches!(error, FrameError::Illegal(_)), "{error}");
        let wire = postcard::to_stdvec(&fetch(1025)).unwrap();
        assert_eq!(decode_message(&wire), Err(error));
    }

    #[test]
    fn an_offer_must_number_its_regions() {
        let offer = |id, block_size| {
            Message::Offer(crate::message::Offer {
                guest: crate::message::GuestDescription {
                    kind: "workload".to_owned(),
                    name: String::new(),
                    facts: std::collections::BTreeMap::new(),
                },
                regions: vec![RegionInfo {
                    id: crate::message::RegionId(id),
                    kind: crate::message::RegionKind::Memory,
                    name: "ram".to_owned(),
                    blocks: 1,
                    block_size,
                }],
                mode: crate::message::Mode::Hybrid,
                check_only: false,
            })
        };
        assert!(encode_message(&offer(0, 4096)).is_ok());
        for illegal in [
            offer(1, 4096),
            offer(0, 0),
            offer(0, 4095),
            offer(0, 1 << 31),
        ] {
            assert!(encode_message(&illegal).is_err());
            assert!(decode_message(&postcard::to_stdvec(&illegal).unwrap()).is_err());
        }
    }

    #[test]
    fn names_of_seeds_ascend_and_stand_for_blocks_that_can_be() {
        let seeds = |block_size, names: &[u64]| Message::Seeds {
            block_size,
            names: names.to_vec(),
        };
        let most: Vec<u64> = (0..MAX_SEED_NAMES as u64).map(|n| n << 40).collect();
        let wire = encode_message(&seeds(65_536, &most)).unwrap();
        assert!(wire.len() < 8 * MAX_SEED_NAMES + 16, "{}", wire.len());
        assert_eq!(decode_message(&wire), Ok(seeds(65_536, &most)));
        let too_many: Vec<u64> = (0..=MAX_SEED_NAMES as u64).collect();
        for illegal in [
            seeds(65_536, &[]),
            seeds(65_536, &[3, 3]),
            seeds(65_536, &[4, 3]),
            seeds(65_536, &too_many),
            seeds(0, &[3]),
            seeds(4095, &[3]),
            seeds(1 << 20, &[3]),
        ] {
            assert!(encode_message(&illegal).is_err());
            let wire = postcard::to_stdvec(&illegal).unwrap();
            assert!(matches!(decode_message(&wire), Err(FrameError::Illegal(_))));
        }
        // Half a name.
        let mut wire = encode_message(&seeds(512, &[7])).unwrap();
        let length = wire.len() - 9;
        assert_eq!(wire[length], 8);
        wire[length] = 7;
        wire.pop();
        assert!(matches!(
            decode_message(&wire),
            Err(FrameError::Malformed(_))
        ));
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
