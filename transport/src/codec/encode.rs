//! From contents to batches, on as many threads as there are. Chooses the form of every block; what
//! it refers to was acknowledged by the destination, which checks it again. Never sends a block
//! twice in one batch, never makes a batch larger than [`MAX_BATCH`].

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;
use zstd::bulk::Compressor;

use super::classify::{is_zero, looks_incompressible, xor_into};
use super::history::History;
use super::seeds::SeedNames;
use super::stats::CodecStats;
use super::varint;
use super::wire::{
    BATCH_FORMAT, BatchHeader, Codec, MAX_BATCH, MAX_BATCH_CONTENTS, MAX_STATE, MAX_STATE_PIECE,
    MIN_BLOCK_SIZE, NAME_LEN, checksum, put_runs, runs_of,
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

/// What is remembered of what was sent, for all threads that encode for one session.
///
/// Batches must be [recalled](Looked::recall) in the order of their ids; everything else about them
/// may happen in any order and on any thread.
pub struct EncoderMemory {
    features: u64,
    history: History,
}

impl EncoderMemory {
    /// Nothing was sent yet. The level of `config` is not its business.
    pub fn new(config: &EncoderConfig) -> Self {
        Self {
            features: config.features,
            history: History::new(config.index_entries, config.delta_cache_bytes),
        }
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
}

/// Makes batches of one session on one thread: [`Self::look`], then [`Looked::recall`] with the
/// memory that all threads share, then [`Sorted::write`]. What takes time is in the first and the last.
pub struct BatchMaker {
    zstd: Compressor<'static>,
    level: i32,
    looks: Vec<Look>,
    groups: Groups,
    frame: Vec<u8>,
}

/// What is seen of a block without any memory.
struct Look {
    /// Index among the blocks of the batch.
    index: usize,
    zero: bool,
    hash: u64,
    /// Its name, where the destination has the contents in a file of its own.
    seed: Option<[u8; NAME_LEN]>,
}

/// The blocks of the batch under way by form, kept between batches for their allocations. Numbers
/// are indices among the blocks of the batch.
#[derive(Default)]
struct Groups {
    zero: Vec<usize>,
    seeded: Vec<usize>,
    seeded_names: Vec<u8>,
    full: Vec<usize>,
    noise: Vec<usize>,
    plain: Vec<usize>,
    delta: Vec<usize>,
    delta_bases: Vec<u8>,
    delta_xor: Vec<u8>,
    named: Vec<(usize, RegionId, u32)>,
    named_origins: Vec<u8>,
    /// Contents that do not lie side by side.
    gathered: Vec<u8>,
    numbers: Vec<u32>,
}

impl Groups {
    fn clear(&mut self) {
        for blocks in [
            &mut self.zero,
            &mut self.seeded,
            &mut self.full,
            &mut self.noise,
            &mut self.plain,
            &mut self.delta,
        ] {
            blocks.clear();
        }
        self.named.clear();
        for bytes in [
            &mut self.seeded_names,
            &mut self.delta_bases,
            &mut self.delta_xor,
            &mut self.named_origins,
        ] {
            bytes.clear();
        }
    }
}

impl BatchMaker {
    /// A maker with this level of zstd, −7 to 19.
    pub fn new(level: i32) -> Result<Self, EncodeError> {
        Ok(Self {
            zstd: Compressor::new(level).map_err(zstd_error)?,
            level,
            looks: Vec::new(),
            groups: Groups::default(),
            frame: Vec::new(),
        })
    }

    /// Changes zstd's level for the batches to come.
    pub fn set_level(&mut self, level: i32) -> Result<(), EncodeError> {
        if self.level != level {
            self.zstd.set_compression_level(level).map_err(zstd_error)?;
            self.level = level;
        }
        Ok(())
    }

    /// Looks at `blocks` of a region, whose contents follow each other in `contents` in the same
    /// order. A block that is listed twice goes as its last contents. `remember` says whether the
    /// memory has a use for them.
    pub fn look<'a>(
        &'a mut self,
        region: RegionId,
        block_size: u32,
        blocks: &'a [u32],
        contents: &'a [u8],
        remember: bool,
    ) -> Result<Looked<'a>, EncodeError> {
        let size = block_size as usize;
        if !block_size.is_power_of_two() || block_size < MIN_BLOCK_SIZE {
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
        self.looks.clear();
        for index in in_order(blocks) {
            let data = &contents[index * size..][..size];
            let zero = is_zero(data);
            self.looks.push(Look {
                index,
                zero,
                hash: if zero || !remember { 0 } else { xxh3_64(data) },
                seed: None,
            });
        }
        Ok(Looked {
            maker: self,
            region,
            size,
            blocks,
            contents,
            remember,
        })
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
        let mut out = BatchWriter::new(header);
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
}

/// Blocks that were looked at.
pub struct Looked<'a> {
    maker: &'a mut BatchMaker,
    region: RegionId,
    size: usize,
    blocks: &'a [u32],
    contents: &'a [u8],
    remember: bool,
}

impl<'a> Looked<'a> {
    /// Names the blocks whose contents the destination has in files of its own. Those do not change
    /// with the guest, so that they may be named whatever else may be referred to.
    #[must_use]
    pub fn with_seeds(self, seeds: &SeedNames) -> Self {
        if seeds.serve(self.size) {
            for look in self.maker.looks.iter_mut().filter(|look| !look.zero) {
                let data = &self.contents[look.index * self.size..][..self.size];
                let name = *blake3::hash(data).as_bytes();
                let has = seeds.has(self.region, self.blocks[look.index], &name);
                look.seed = has.then_some(name);
            }
        }
        self
    }

    /// Decides what the blocks may refer to, and remembers them as sent with the batch. `refer`
    /// allows forms that need what the destination should have, and checks.
    pub fn recall(
        self,
        memory: &mut EncoderMemory,
        batch: u64,
        refer: Refer,
    ) -> Result<Sorted<'a>, EncodeError> {
        let EncoderMemory { features, history } = memory;
        let (region, size) = (self.region, self.size);
        if history
            .block_size(region)
            .is_some_and(|other| other != size)
        {
            let block_size = size as u32;
            return Err(EncodeError::BlockSize { region, block_size });
        }
        history.begin_batch(batch);
        if let Some(highest) = self.blocks.iter().max() {
            history.begin_region(region, size, *highest);
        }
        let remember = self.remember && *features & (Features::NAMED | Features::DELTA) != 0;
        let keep = *features & Features::DELTA != 0;
        let BatchMaker { looks, groups, .. } = &mut *self.maker;
        groups.clear();
        for look in looks.drain(..) {
            let Look {
                index, zero, hash, ..
            } = look;
            let block = self.blocks[index];
            let data = &self.contents[index * size..][..size];
            let in_full = history.take_in_full(region, block);
            if zero {
                groups.zero.push(index);
                history.sent_zero(region, block, batch);
                continue;
            }
            if let Some(name) = look.seed.filter(|_| !in_full) {
                groups.seeded.push(index);
                groups.seeded_names.extend_from_slice(&name);
                if remember {
                    history.sent(region, block, batch, data, hash, keep);
                }
                continue;
            }
            let refer = if in_full || !remember {
                Refer::Nothing
            } else {
                refer
            };
            let delta = refer != Refer::Nothing
                && keep
                && history
                    .base(region, block)
                    .is_some_and(|base| groups.try_delta(index, data, base));
            if !delta {
                let named = refer == Refer::Anything && *features & Features::NAMED != 0;
                match history.origin(region, hash).filter(|_| named) {
                    Some((from, block)) => groups.named.push((index, from, block)),
                    None => groups.full.push(index),
                }
            }
            if remember {
                history.sent(region, block, batch, data, hash, keep);
            }
        }
        Ok(Sorted {
            maker: self.maker,
            region,
            size,
            blocks: self.blocks,
            contents: self.contents,
        })
    }
}

/// Blocks whose form is decided, as far as it depends on what was sent before.
pub struct Sorted<'a> {
    maker: &'a mut BatchMaker,
    region: RegionId,
    size: usize,
    blocks: &'a [u32],
    contents: &'a [u8],
}

impl Sorted<'_> {
    /// Compresses and writes the batch.
    pub fn write(self, header: BatchHeader) -> Result<EncodedBatch, EncodeError> {
        let mut out = BatchWriter::new(header);
        let (size, region) = (self.size, self.region);
        let BatchMaker {
            zstd,
            groups: g,
            frame,
            ..
        } = &mut *self.maker;
        let data = |index: usize| &self.contents[index * size..][..size];
        let mut numbers = std::mem::take(&mut g.numbers);
        let mut place = |codec, indices: &mut dyn Iterator<Item = usize>| {
            numbers.clear();
            numbers.extend(indices.map(|index| self.blocks[index]));
            place(codec, region, &numbers)
        };
        // What refers to the destination's contents comes before what replaces them.
        if !g.named.is_empty() {
            for (index, from, block) in &g.named {
                // The index goes by a fast hash that a guest could forge; the name on the wire
                // cannot be forged, and the destination checks it against what it copies.
                varint::put(&mut g.named_origins, u64::from(from.0));
                varint::put(&mut g.named_origins, u64::from(*block));
                let name = blake3::hash(data(*index));
                g.named_origins.extend_from_slice(name.as_bytes());
            }
            let place = place(Codec::Named, &mut g.named.iter().map(|named| named.0));
            let sum = checksum(&place, &g.named_origins);
            let plain = g.named.len() * size;
            let payload = [&g.named_origins[..]];
            out.record(Codec::Named, g.named.len(), plain, &place, sum, &payload);
        }
        if !g.seeded.is_empty() {
            let place = place(Codec::Seeded, &mut g.seeded.iter().copied());
            let sum = checksum(&place, &g.seeded_names);
            let plain = g.seeded.len() * size;
            let payload = [&g.seeded_names[..]];
            out.record(Codec::Seeded, g.seeded.len(), plain, &place, sum, &payload);
        }
        if !g.delta.is_empty() {
            let place = place(Codec::XorZstd, &mut g.delta.iter().copied());
            let sum = checksum(&place, &g.delta_xor);
            let plain = g.delta_xor.len();
            compress(zstd, &g.delta_xor, frame)?;
            let payload = [&g.delta_bases[..], &frame[..]];
            out.record(Codec::XorZstd, g.delta.len(), plain, &place, sum, &payload);
        }
        if !g.zero.is_empty() {
            let place = place(Codec::Zero, &mut g.zero.iter().copied());
            let sum = checksum(&place, &[]);
            let plain = g.zero.len() * size;
            out.record(Codec::Zero, g.zero.len(), plain, &place, sum, &[]);
        }
        for &index in &g.full {
            if looks_incompressible(data(index)) {
                g.noise.push(index);
            } else {
                g.plain.push(index);
            }
        }
        if !g.plain.is_empty() {
            let contents = side_by_side(self.contents, size, &g.plain, &mut g.gathered);
            compress(zstd, contents, frame)?;
            // A gain below 1/32 is not worth the decoder's time.
            let gains = frame.len() + contents.len() / 32 < contents.len();
            let (codec, payload) = if gains {
                (Codec::Zstd, &frame[..])
            } else {
                (Codec::Raw, contents)
            };
            let place = place(codec, &mut g.plain.iter().copied());
            let sum = checksum(&place, contents);
            let plain = contents.len();
            out.record(codec, g.plain.len(), plain, &place, sum, &[payload]);
        }
        if !g.noise.is_empty() {
            let contents = side_by_side(self.contents, size, &g.noise, &mut g.gathered);
            let place = place(Codec::Raw, &mut g.noise.iter().copied());
            let sum = checksum(&place, contents);
            let plain = contents.len();
            out.record(Codec::Raw, g.noise.len(), plain, &place, sum, &[contents]);
        }
        g.numbers = numbers;
        Ok(out.finish())
    }
}

impl Groups {
    fn try_delta(&mut self, index: usize, data: &[u8], (base, base_hash): (&[u8], u64)) -> bool {
        let start = self.delta_xor.len();
        let differing = xor_into(&mut self.delta_xor, data, base);
        // Where more than a quarter differs, the difference is hardly smaller than the contents
        // and has lost what zstd could find in them.
        if differing > data.len() / 4 {
            self.delta_xor.truncate(start);
            return false;
        }
        self.delta.push(index);
        self.delta_bases.extend_from_slice(&base_hash.to_le_bytes());
        true
    }
}

/// The contents of these blocks one after the other: where they lie so, or gathered.
fn side_by_side<'a>(
    contents: &'a [u8],
    size: usize,
    indices: &[usize],
    gathered: &'a mut Vec<u8>,
) -> &'a [u8] {
    let first = indices[0];
    if indices
        .iter()
        .zip(first..)
        .all(|(index, next)| *index == next)
    {
        return &contents[first * size..][..indices.len() * size];
    }
    gathered.clear();
    for index in indices {
        gathered.extend_from_slice(&contents[index * size..][..size]);
    }
    gathered
}

/// Makes batches of blocks and remembers what it sent: [`BatchMaker`] and [`EncoderMemory`] on one
/// thread.
pub struct BlockEncoder {
    memory: EncoderMemory,
    seeds: SeedNames,
    maker: BatchMaker,
}

impl BlockEncoder {
    /// An encoder for one session.
    pub fn new(config: EncoderConfig) -> Result<Self, EncodeError> {
        Ok(Self {
            memory: EncoderMemory::new(&config),
            seeds: SeedNames::default(),
            maker: BatchMaker::new(config.level)?,
        })
    }

    /// Changes zstd's level for the batches to come.
    pub fn set_level(&mut self, level: i32) -> Result<(), EncodeError> {
        self.maker.set_level(level)
    }

    /// Encodes `blocks` of a region; see [`BatchMaker::look`] and [`Looked::recall`].
    pub fn encode_blocks(
        &mut self,
        header: BatchHeader,
        region: RegionId,
        block_size: u32,
        blocks: &[u32],
        contents: &[u8],
        refer: impl Into<Refer>,
    ) -> Result<EncodedBatch, EncodeError> {
        let remember = self.memory.features & (Features::NAMED | Features::DELTA) != 0;
        self.maker
            .look(region, block_size, blocks, contents, remember)?
            .with_seeds(&self.seeds)
            .recall(&mut self.memory, header.id, refer.into())?
            .write(header)
    }

    /// Encodes a piece of the device state.
    pub fn encode_state(
        &mut self,
        header: BatchHeader,
        offset: u64,
        data: &[u8],
    ) -> Result<EncodedBatch, EncodeError> {
        let encoded = self.maker.encode_state(header, offset, data)?;
        self.memory.history.begin_batch(header.id);
        Ok(encoded)
    }

    /// See [`EncoderMemory::acknowledge`].
    pub fn acknowledge(&mut self, batch: u64) {
        self.memory.acknowledge(batch);
    }

    /// What the destination has in files of its own.
    pub fn seeds(&self) -> &SeedNames {
        &self.seeds
    }

    /// See [`EncoderMemory::reject`].
    pub fn reject(&mut self, region: RegionId, block: u32) {
        self.seeds.refuse(region, block);
        self.memory.reject(region, block);
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

/// Longest varint, in bytes.
const MAX_VARINT: usize = 10;

/// Puts records after a header.
struct BatchWriter {
    bytes: Vec<u8>,
    stats: CodecStats,
}

impl BatchWriter {
    fn new(header: BatchHeader) -> Self {
        let mut bytes = Vec::with_capacity(64);
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
        let payload_len: usize = payload.iter().map(|part| part.len()).sum();
        // Most batches are one large record: it is copied once, into memory of its size.
        let most = place.len() + size_of::<u64>() + MAX_VARINT + payload_len;
        self.bytes.reserve_exact(most);
        self.bytes.extend_from_slice(place);
        self.bytes.extend_from_slice(&checksum.to_le_bytes());
        varint::put(&mut self.bytes, payload_len as u64);
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
        // or a name (8 + 40 bytes), plus zstd's bound and six records' headers.
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
