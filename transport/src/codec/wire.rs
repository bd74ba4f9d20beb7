//! The layout of a batch: header, records, bounds and what can be wrong with them. Shared by the
//! encoder and the decoder; it must never know where contents come from or go to.
//!
//! ```text
//! batch  := format(1 byte) id(varint) pass(varint) lane(1 byte) record*
//! record := codec(1 byte) place checksum(8 bytes, little endian) length(varint) payload
//! place  := region(varint) runs            for blocks
//!         | offset(varint) length(varint)  for a piece of the device state
//! runs   := count(varint) (gap(varint) blocks(varint))*
//! ```
//! `gap` counts the blocks between the end of the run before (or block 0) and this run's first
//! block. `checksum` is XXH3-64 of the decoded payload, seeded with the XXH3-64 of the record's
//! bytes up to the end of `place`: a record cannot be put where it does not belong.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::varint::{self, Reader};
use crate::lane::Lane;
use crate::message::{RegionId, RegionInfo};

/// First byte of every batch.
pub const BATCH_FORMAT: u8 = 1;
/// Largest batch on the wire, in bytes. The encoder never exceeds it, the receiver refuses more.
pub const MAX_BATCH: usize = 512 << 10;
/// Largest total of block contents in one batch, in bytes before compression. Zero blocks count for
/// the encoder, which is given them in full.
pub const MAX_BATCH_CONTENTS: usize = 384 << 10;
/// Largest piece of device state in one batch, in bytes before compression.
pub const MAX_STATE_PIECE: usize = 256 << 10;
/// Largest device state, in bytes.
pub const MAX_STATE: u64 = 1 << 32;
/// Smallest block that the codec works on, in bytes.
pub const MIN_BLOCK_SIZE: u32 = 512;
/// Bytes of BLAKE3 by which a block is named.
pub(super) const NAME_LEN: usize = 32;

/// How the payload of a record stands for its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Codec {
    /// All zero; no payload.
    Zero = 0,
    /// The contents as they are.
    Raw = 1,
    /// The contents of all blocks of the record as one zstd frame.
    Zstd = 2,
    /// XXH3-64 of the base of each block, then one zstd frame of contents XOR base.
    XorZstd = 3,
    /// For each block where the same content is: region, block, BLAKE3.
    Named = 4,
    /// A piece of the device state as one zstd frame.
    State = 5,
    /// For each block the BLAKE3 of its contents, which the destination has in a file of its own.
    Seeded = 6,
}

impl Codec {
    pub(super) fn from_wire(byte: u8) -> Result<Self, WireError> {
        Ok(match byte {
            0 => Self::Zero,
            1 => Self::Raw,
            2 => Self::Zstd,
            3 => Self::XorZstd,
            4 => Self::Named,
            5 => Self::State,
            6 => Self::Seeded,
            other => return Err(WireError::Codec(other)),
        })
    }
}

/// What every batch says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Unique in the session, ascending from 0.
    pub id: u64,
    /// Pass that its blocks belong to; a later pass of a block supersedes an earlier one.
    pub pass: u32,
    /// The lane it was sent on.
    pub lane: Lane,
}

/// What the receiver checks a batch against.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// The regions that were offered, `regions[i].id == RegionId(i)`.
    pub regions: &'a [RegionInfo],
}

impl Limits<'_> {
    pub(super) fn region(&self, id: u64) -> Result<&RegionInfo, WireError> {
        usize::try_from(id)
            .ok()
            .and_then(|index| self.regions.get(index))
            .ok_or(WireError::Region(id))
    }
}

/// What is wrong with a batch. The link's owner adds which peer sent it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The first byte is not a known format.
    #[error("batch of unknown format {0}; the peer speaks another version")]
    Format(u8),
    /// It ends in the middle.
    #[error("batch ends in the middle of a record")]
    Truncated,
    /// A number that is too large, or not in its shortest form.
    #[error("batch with a malformed number")]
    Varint,
    /// Larger than [`MAX_BATCH`].
    #[error("batch of {0} bytes, {MAX_BATCH} are allowed")]
    TooLarge(usize),
    /// Not the number of a lane that carries batches.
    #[error("batch for unknown lane {0}")]
    Lane(u8),
    /// Not the number of a codec.
    #[error("record with unknown codec {0}")]
    Codec(u8),
    /// A region that was not offered, or one with another block size than its origin's.
    #[error("record for region {0}, which was not offered or has blocks of another size")]
    Region(u64),
    /// A run that is empty, or passes the region's end.
    #[error("record for {region}, blocks {first}+{count}: the region has {blocks}")]
    Bounds {
        /// The region.
        region: RegionId,
        /// First block of the run.
        first: u64,
        /// Length of the run.
        count: u64,
        /// Length of the region.
        blocks: u32,
    },
    /// The same block twice in one batch.
    #[error("{0}: a block comes twice in one batch")]
    Twice(RegionId),
    /// More contents than [`MAX_BATCH_CONTENTS`], or more state than [`MAX_STATE_PIECE`].
    #[error("batch that decodes to more than is allowed")]
    Contents,
    /// The payload has not the length that its blocks need.
    #[error("{place}: the payload has the wrong length")]
    Length {
        /// Region and blocks, or the piece of state.
        place: String,
    },
    /// zstd could not decode it.
    #[error("{place}: the payload is not a valid zstd frame")]
    Zstd {
        /// Region and blocks, or the piece of state.
        place: String,
    },
    /// Decoded contents and checksum do not belong together.
    #[error("{place}: checksum mismatch; the contents were damaged on the way or by the sender")]
    Checksum {
        /// Region and blocks, or the piece of state.
        place: String,
    },
}

/// A run of blocks: first, count.
pub(super) type Run = (u32, u32);

/// Turns ascending blocks into runs.
pub(super) fn runs_of(blocks: &[u32]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for &block in blocks {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == block => *count += 1,
            _ => runs.push((block, 1)),
        }
    }
    runs
}

pub(super) fn put_runs(out: &mut Vec<u8>, runs: &[Run]) {
    varint::put(out, runs.len() as u64);
    let mut end = 0;
    for &(first, count) in runs {
        varint::put(out, u64::from(first - end));
        varint::put(out, u64::from(count));
        end = first + count;
    }
}

/// Reads runs and checks them against the region. Returns them with the number of their blocks.
pub(super) fn read_runs(
    reader: &mut Reader<'_>,
    region: &RegionInfo,
) -> Result<(Vec<Run>, u64), WireError> {
    let count = reader.varint()?;
    // Two bytes a run at least: a count beyond that is a lie, and must not size an allocation.
    if count > (reader.remaining().len() / 2) as u64 {
        return Err(WireError::Truncated);
    }
    let mut runs = Vec::with_capacity(count as usize);
    let mut end = 0_u64;
    let mut total = 0_u64;
    for _ in 0..count {
        let first = end.saturating_add(reader.varint()?);
        let blocks = reader.varint()?;
        end = first.saturating_add(blocks);
        if blocks == 0 || end > u64::from(region.blocks) {
            return Err(WireError::Bounds {
                region: region.id,
                first,
                count: blocks,
                blocks: region.blocks,
            });
        }
        total += blocks;
        runs.push((first as u32, blocks as u32));
    }
    if runs.is_empty() {
        return Err(WireError::Length {
            place: region.id.to_string(),
        });
    }
    Ok((runs, total))
}

/// The checksum of a record: see the layout above.
pub(super) fn checksum(place: &[u8], decoded: &[u8]) -> u64 {
    xxh3_64_with_seed(decoded, xxh3_64(place))
}

/// Where a record belongs, for messages; long lists of runs are cut.
pub(super) fn place_name(region: RegionId, runs: &[Run]) -> String {
    use std::fmt::Write as _;
    let mut text = format!("{region}, blocks");
    for (i, (first, count)) in runs.iter().enumerate() {
        if i == 8 {
            text.push_str(" …");
            break;
        }
        let _infallible = match count {
            1 => write!(text, " {first}"),
            _ => write!(text, " {first}-{}", first + count - 1),
        };
    }
    text
}

impl Lane {
    /// The lane's number on the wire.
    pub(crate) fn to_wire(self) -> u8 {
        match self {
            Self::Control => 0,
            Self::Urgent => 1,
            Self::Freeze => 2,
            Self::Bulk => 3,
        }
    }

    /// The lane of a batch by its number; the control lane carries none.
    pub(crate) fn of_batch(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Urgent),
            2 => Some(Self::Freeze),
            3 => Some(Self::Bulk),
            _ => None,
        }
    }
}
