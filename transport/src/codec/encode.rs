//! From contents to batches. Chooses the form of every block; what it refers to was acknowledged by
//! the destination, which checks it again. Never sends a block twice in one batch, never makes a
//! batch larger than [`MAX_BATCH`].

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;
use zstd::bulk::Compressor;

use super::classify::{is_zero, looks_incompressible, xor_into};
use super::history::History;
use super::stats::CodecStats;
use super::varint;
use super::wire::{
    BATCH_FORMAT, BatchHeader, Codec, MAX_BATCH, MAX_BATCH_CONTENTS, MAX_STATE, MAX_STATE_PIECE,
    MIN_BLOCK_SIZE, checksum, put_runs, runs_of,
};
use crate::message::{Features, RegionId};

/// How a [`BlockEncoder`] works.
#[derive(Clone, Copy, Debug)]
pub struct EncoderConfig {
    /// zstd's level, −7 to 19.
    pub level: i32,
    /// Bits of [`Features`] that both sides have.
    pub features: u64,
    /// Bytes of contents kept as bases for differences.
    pub delta_cache_bytes: usize,
    /// Number of blocks and of contents that are remembered; 40 bytes each, rounded up to a power
    /// of two.
    pub index_entries: usize,
}

impl Default for EncoderConfig {
    fn default() -> Self {
        Self {
            level: 1,
            features: Features::ALL,
            delta_cache_bytes: 256 << 20,
            index_entries: 1 << 20,
        }
    }
}

/// What a record may refer to that the destination should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refer {
    /// Nothing: every block goes in full.
    Nothing,
    /// The version of the same block that was sent last and acknowledged. Nothing that was sent
    /// since can have replaced it, so such a record is not rejected.
    Itself,
    /// That, and equal contents of any block that was sent and acknowledged. A newer version of
    /// that other block may overtake the record, which is then rejected.
    Anything,
}

/// All or nothing.
impl From<bool> for Refer {
    fn from(may_refer: bool) -> Self {
        if may_refer {
            Self::Anything
        } else {
            Self::Nothing
        }
    }
}

/// A batch, ready for a lane.
#[derive(Clone, Debug)]
pub struct EncodedBatch {
    /// What goes on the wire.
    pub bytes: Bytes,
    /// What it is made of.
    pub stats: CodecStats,
}

/// A batch that cannot be made; always the caller's mistake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The contents are not as long as the blocks.
    #[error("{blocks} blocks of {block_size} bytes were given with {contents} bytes of contents")]
    Length {
        /// Number of blocks.
        blocks: usize,
        /// Their size.
        block_size: u32,
        /// Length of the contents.
        contents: usize,
    },
    /// Not a power of two, smaller than [`MIN_BLOCK_SIZE`], or not what it was before.
    #[error("{region}: blocks of {block_size} bytes cannot be encoded")]
    BlockSize {
        /// The region.
        region: RegionId,
        /// The size.
        block_size: u32,
    },
    /// More than [`MAX_BATCH_CONTENTS`] or [`MAX_STATE_PIECE`].
    #[error("{0} bytes do not fit one batch: give at most {1}")]
    TooLarge(usize, usize),
    /// The piece lies beyond [`MAX_STATE`].
    #[error("a device state of more than {MAX_STATE} bytes cannot be sent")]
    State,
    /// zstd failed, which it has no reason to.
    #[error("zstd: {0}")]
    Zstd(String),
}

/// Makes batches of blocks and remembers what it sent.
pub struct BlockEncoder {
    features: u64,
    history: History,
    zstd: Compressor<'static>,
    groups: Groups,
    frame: Vec<u8>,
}

/// The blocks of the batch under way by form, kept between batches for their allocations.
#[derive(Default)]
struct Groups {
    zero: Vec<u32>,
    raw: Vec<u32>,
    raw_contents: Vec<u8>,
    plain: Vec<u32>,
    plain_contents: Vec<u8>,
    delta: Vec<u32>,
    delta_bases: Vec<u8>,
    delta_xor: Vec<u8>,
    named: Vec<u32>,
    named_origins: Vec<u8>,
}

impl Groups {
    fn clear(&mut self) {
        for blocks in [
            &mut self.zero,
            &mut self.raw,
            &mut self.plain,
            &mut self.delta,
            &mut self.named,
        ] {
            blocks.clear();
        }
        for bytes in [
            &mut self.raw_contents,
            &mut self.plain_contents,
            &mut self.delta_bases,
            &mut self.delta_xor,
            &mut self.named_origins,
        ] {
            bytes.clear();
        }
    }
}

impl BlockEncoder {
    /// An encoder for one session.
    pub fn new(config: EncoderConfig) -> Result<Self, EncodeError> {
        Ok(Self {
            features: config.features,
            history: History::new(config.index_entries, config.delta_cache_bytes),
            zstd: Compressor::new(config.level).map_err(zstd_error)?,
            groups: Groups::default(),
            frame: Vec::new(),
        })
    }

    /// Changes zstd's level for the batches to come.
    pub fn set_level(&mut self, level: i32) -> Result<(), EncodeError> {
        self.zstd.set_compression_level(level).map_err(zstd_error)
    }

    /// Encodes `blocks` of a region, whose contents follow each other in `contents` in the same
    /// order. A block that is listed twice goes as its last contents. `refer` allows forms that need
    /// what the destination should have, and checks.
    pub fn encode_blocks(
        &mut self,
        header: BatchHeader,
        region: RegionId,
        block_size: u32,
        blocks: &[u32],
        contents: &[u8],
        refer: impl Into<Refer>,
    ) -> Result<EncodedBatch, EncodeError> {
        let refer = refer.into();
        let size = block_size as usize;
        if !block_size.is_power_of_two()
            || block_size < MIN_BLOCK_SIZE
            || self.history.block_size(region).is_some_and(|s| s != size)
        {
            return Err(EncodeError::BlockSize { region, block_size });
        }
        if Some(contents.len()) != blocks.len().checked_mul(size) {
            return Err(EncodeError::Length {
                blocks: blocks.len(),
                block_size,
                contents: contents.len(),
            });
        }
        if contents.len() > MAX_BATCH_CONTENTS {
            return Err(EncodeError::TooLarge(contents.len(), MAX_BATCH_CONTENTS));
        }
        self.history.begin_batch(header.id);
        if let Some(highest) = blocks.iter().max() {
            self.history.begin_region(region, size, *highest);
        }
        self.groups.clear();
        for index in in_order(blocks) {
            let data = &contents[index * size..][..size];
            self.sort_block(header.id, region, blocks[index], data, refer);
        }
        self.write_groups(header, region, contents.len())
    }

    /// Encodes a piece of the device state.
    pub fn encode_state(
        &mut self,
        header: BatchHeader,
        offset: u64,
        data: &[u8],
    ) -> Result<EncodedBatch, EncodeError> {
        if data.len() > MAX_STATE_PIECE {
            return Err(EncodeError::TooLarge(data.len(), MAX_STATE_PIECE));
        }
        if offset.saturating_add(data.len() as u64) > MAX_STATE {
            return Err(EncodeError::State);
        }
        self.history.begin_batch(header.id);
        let mut out = BatchWriter::new(header, data.len());
        let mut place = vec![Codec::State as u8];
        varint::put(&mut place, offset);
        varint::put(&mut place, data.len() as u64);
        compress(&mut self.zstd, data, &mut self.frame)?;
        out.record(
            Codec::State,
            1,
            data.len(),
            &place,
            checksum(&place, data),
            &[&self.frame],
        );
        Ok(out.finish())
    }

    /// The destination has applied the batch: what it held may be referred to from now on, as far
    /// as nothing newer of the same block was sent. Blocks that were rejected are told with
    /// [`Self::reject`].
    pub fn acknowledge(&mut self, batch: u64) {
        self.history.acknowledge(batch);
    }

    /// The destination could not use what was sent of the block: it is forgotten, and its next
    /// version goes in full whatever `refer` says.
    pub fn reject(&mut self, region: RegionId, block: u32) {
        self.history.reject(region, block);
    }

    /// Decides the form of one block and puts it into its group.
    fn sort_block(&mut self, batch: u64, region: RegionId, block: u32, data: &[u8], refer: Refer) {
        let in_full = self.history.take_in_full(region, block);
        let refer = if in_full { Refer::Nothing } else { refer };
        let groups = &mut self.groups;
        if is_zero(data) {
            groups.zero.push(block);
            self.history.sent_zero(region, block, batch);
            return;
        }
        let remember = self.features & (Features::NAMED | Features::DELTA) != 0;
        let hash = if remember { xxh3_64(data) } else { 0 };
        if !self.try_delta(region, block, data, refer)
            && !self.try_named(region, block, data, hash, refer)
        {
            let groups = &mut self.groups;
            if looks_incompressible(data) {
                groups.raw.push(block);
                groups.raw_contents.extend_from_slice(data);
            } else {
                groups.plain.push(block);
                groups.plain_contents.extend_from_slice(data);
            }
        }
        if remember {
            let keep = self.features & Features::DELTA != 0;
            self.history.sent(region, block, batch, data, hash, keep);
        }
    }

    fn try_delta(&mut self, region: RegionId, block: u32, data: &[u8], refer: Refer) -> bool {
        if refer == Refer::Nothing || self.features & Features::DELTA == 0 {
            return false;
        }
        let Some((base, base_hash)) = self.history.base(region, block) else {
            return false;
        };
        let groups = &mut self.groups;
        let start = groups.delta_xor.len();
        let differing = xor_into(&mut groups.delta_xor, data, base);
        // Where more than a quarter differs, the difference is hardly smaller than the contents
        // and has lost what zstd could find in them.
        if differing > data.len() / 4 {
            groups.delta_xor.truncate(start);
            return false;
        }
        groups.delta.push(block);
        groups
            .delta_bases
            .extend_from_slice(&base_hash.to_le_bytes());
        true
    }

    fn try_named(
        &mut self,
        region: RegionId,
        block: u32,
        data: &[u8],
        hash: u64,
        refer: Refer,
    ) -> bool {
        if refer != Refer::Anything || self.features & Features::NAMED == 0 {
            return false;
        }
        let Some((from, from_block)) = self.history.origin(region, hash) else {
            return false;
        };
        // The index goes by a fast hash that a guest could forge; the name on the wire cannot be
        // forged, and the destination checks it against what it copies.
        let groups = &mut self.groups;
        groups.named.push(block);
        varint::put(&mut groups.named_origins, u64::from(from.0));
        varint::put(&mut groups.named_origins, u64::from(from_block));
        groups
            .named_origins
            .extend_from_slice(blake3::hash(data).as_bytes());
        true
    }

    fn write_groups(
        &mut self,
        header: BatchHeader,
        region: RegionId,
        plain: usize,
    ) -> Result<EncodedBatch, EncodeError> {
        let mut out = BatchWriter::new(header, plain);
        let g = &self.groups;
        let size = self.history.block_size(region).unwrap_or(0);
        // What refers to the destination's contents comes before what replaces them.
        if !g.named.is_empty() {
            let place = place(Codec::Named, region, &g.named);
            let sum = checksum(&place, &g.named_origins);
            let plain = g.named.len() * size;
            let payload = [&g.named_origins[..]];
            out.record(Codec::Named, g.named.len(), plain, &place, sum, &payload);
        }
        if !g.delta.is_empty() {
            let place = place(Codec::XorZstd, region, &g.delta);
            let sum = checksum(&place, &g.delta_xor);
            let plain = g.delta_xor.len();
            compress(&mut self.zstd, &g.delta_xor, &mut self.frame)?;
            let payload = [&g.delta_bases[..], &self.frame[..]];
            out.record(Codec::XorZstd, g.delta.len(), plain, &place, sum, &payload);
        }
        if !g.zero.is_empty() {
            let place = place(Codec::Zero, region, &g.zero);
            let sum = checksum(&place, &[]);
            let plain = g.zero.len() * size;
            out.record(Codec::Zero, g.zero.len(), plain, &place, sum, &[]);
        }
        if !g.plain.is_empty() {
            compress(&mut self.zstd, &g.plain_contents, &mut self.frame)?;
            let contents = &g.plain_contents;
            // A gain below 1/32 is not worth the decoder's time.
            let gains = self.frame.len() + contents.len() / 32 < contents.len();
            let (codec, payload) = if gains {
                (Codec::Zstd, &self.frame)
            } else {
                (Codec::Raw, contents)
            };
            let place = place(codec, region, &g.plain);
            let sum = checksum(&place, contents);
            out.record(
                codec,
                g.plain.len(),
                contents.len(),
                &place,
                sum,
                &[payload],
            );
        }
        if !g.raw.is_empty() {
            let place = place(Codec::Raw, region, &g.raw);
            let sum = checksum(&place, &g.raw_contents);
            let plain = g.raw_contents.len();
            let payload = [&g.raw_contents[..]];
            out.record(Codec::Raw, g.raw.len(), plain, &place, sum, &payload);
        }
        Ok(out.finish())
    }
}

/// Indices into `blocks` by ascending block, the last one of equal blocks only.
fn in_order(blocks: &[u32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..blocks.len()).collect();
    order.sort_by_key(|&index| (blocks[index], std::cmp::Reverse(index)));
    order.dedup_by_key(|index| blocks[*index]);
    order
}

fn place(codec: Codec, region: RegionId, blocks: &[u32]) -> Vec<u8> {
    let mut place = vec![codec as u8];
    varint::put(&mut place, u64::from(region.0));
    put_runs(&mut place, &runs_of(blocks));
    place
}

fn compress(
    zstd: &mut Compressor<'static>,
    data: &[u8],
    frame: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    frame.clear();
    frame.reserve(zstd::zstd_safe::compress_bound(data.len()));
    zstd.compress_to_buffer(data, frame).map_err(zstd_error)?;
    Ok(())
}

fn zstd_error(error: std::io::Error) -> EncodeError {
    EncodeError::Zstd(error.to_string())
}

/// Puts records after a header.
struct BatchWriter {
    bytes: Vec<u8>,
    stats: CodecStats,
}

impl BatchWriter {
    fn new(header: BatchHeader, plain: usize) -> Self {
        let mut bytes = Vec::with_capacity(plain / 2 + 64);
        bytes.push(BATCH_FORMAT);
        varint::put(&mut bytes, header.id);
        varint::put(&mut bytes, u64::from(header.pass));
        bytes.push(header.lane.to_wire());
        Self {
            bytes,
            stats: CodecStats::default(),
        }
    }

    fn record(
        &mut self,
        codec: Codec,
        blocks: usize,
        plain: usize,
        place: &[u8],
        checksum: u64,
        payload: &[&[u8]],
    ) {
        let before = self.bytes.len();
        self.bytes.extend_from_slice(place);
        self.bytes.extend_from_slice(&checksum.to_le_bytes());
        varint::put(
            &mut self.bytes,
            payload.iter().map(|part| part.len() as u64).sum(),
        );
        for part in payload {
            self.bytes.extend_from_slice(part);
        }
        let count = self.stats.of_mut(codec);
        count.blocks += blocks as u64;
        count.plain_bytes += plain as u64;
        count.wire_bytes += (self.bytes.len() - before) as u64;
    }

    fn finish(self) -> EncodedBatch {
        // Worst case: all contents raw, plus for every block of 512 bytes a run (6 bytes), a base
        // or a name (8 + 40 bytes), plus zstd's bound and five records' headers.
        debug_assert!(self.bytes.len() <= MAX_BATCH, "{} bytes", self.bytes.len());
        EncodedBatch {
            bytes: self.bytes.into(),
            stats: self.stats,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_equal_blocks_counts() {
        assert_eq!(in_order(&[5, 3, 5, 1, 3]), [3, 4, 2]);
        assert!(in_order(&[]).is_empty());
    }
}
