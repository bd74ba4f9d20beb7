//! From bytes to batches: everything that can be checked without the guest. Trusts nothing; what it
//! allocates is bounded by the length of the input and [`MAX_BATCH_CONTENTS`].

use std::collections::BTreeMap;

use roaring::RoaringBitmap;
use zstd::bulk::Decompressor;

use super::stats::CodecStats;
use super::varint::Reader;
use super::wire::{
    BATCH_FORMAT, BatchHeader, Codec, Limits, MAX_BATCH, MAX_BATCH_CONTENTS, MAX_STATE,
    MAX_STATE_PIECE, NAME_LEN, Run, WireError, checksum, place_name, read_runs,
};
use crate::lane::Lane;
use crate::message::{RegionId, RegionInfo};

/// A batch whose form, bounds and checksums have been verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub(super) header: BatchHeader,
    pub(super) records: Vec<Record>,
    pub(super) stats: CodecStats,
}

impl Batch {
    /// Id, pass and lane.
    pub fn header(&self) -> BatchHeader {
        self.header
    }

    /// What it is made of.
    pub fn stats(&self) -> &CodecStats {
        &self.stats
    }

    /// Number of blocks, over all regions.
    pub fn blocks(&self) -> u64 {
        let blocks = |record: &Record| match record {
            Record::Blocks { runs, .. } => runs.iter().map(|run| u64::from(run.1)).sum(),
            Record::State { .. } => 0,
        };
        self.records.iter().map(blocks).sum()
    }

    /// Every run of blocks that the batch has something for, in the order of its records: region,
    /// first block, count.
    pub fn runs(&self) -> impl Iterator<Item = (RegionId, u32, u32)> + '_ {
        self.records.iter().flat_map(|record| {
            let (region, runs) = match record {
                Record::Blocks { region, runs, .. } => (*region, &runs[..]),
                Record::State { .. } => (RegionId(0), &[][..]),
            };
            runs.iter()
                .map(move |&(first, count)| (region, first, count))
        })
    }
}

/// One record, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Record {
    Blocks {
        region: RegionId,
        block_size: usize,
        runs: Vec<Run>,
        form: Form,
    },
    State {
        offset: u64,
        data: Vec<u8>,
    },
}

/// What a record has for its blocks, in the order of its runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Zero,
    Contents(Vec<u8>),
    Delta { bases: Vec<u64>, xor: Vec<u8> },
    Named(Vec<Origin>),
    Seeded(Vec<[u8; NAME_LEN]>),
}

/// Where a named block's content is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) region: RegionId,
    pub(super) block: u32,
    pub(super) name: [u8; NAME_LEN],
}

/// Decodes and verifies a batch.
pub fn decode_batch(bytes: &[u8], limits: &Limits<'_>) -> Result<Batch, WireError> {
    if bytes.len() > MAX_BATCH {
        return Err(WireError::TooLarge(bytes.len()));
    }
    let mut reader = Reader::new(bytes);
    let format = reader.byte()?;
    if format != BATCH_FORMAT {
        return Err(WireError::Format(format));
    }
    let id = reader.varint()?;
    let pass = reader.varint_u32()?;
    let lane = reader.byte()?;
    let header = BatchHeader {
        id,
        pass,
        lane: Lane::of_batch(lane).ok_or(WireError::Lane(lane))?,
    };
    let mut decoder = Decoder {
        reader,
        limits,
        budget: MAX_BATCH_CONTENTS,
        seen: BTreeMap::new(),
        stats: CodecStats::default(),
    };
    let mut records = Vec::new();
    while !decoder.reader.is_empty() {
        records.push(decoder.record()?);
    }
    Ok(Batch {
        header,
        records,
        stats: decoder.stats,
    })
}

struct Decoder<'a> {
    reader: Reader<'a>,
    limits: &'a Limits<'a>,
    /// Bytes that may still be decoded.
    budget: usize,
    seen: BTreeMap<RegionId, RoaringBitmap>,
    stats: CodecStats,
}

impl<'a> Decoder<'a> {
    fn record(&mut self) -> Result<Record, WireError> {
        let start = self.reader.remaining();
        let codec = Codec::from_wire(self.reader.byte()?)?;
        let (record, blocks, plain) = if codec == Codec::State {
            let (record, len) = self.state(start)?;
            (record, 1, len)
        } else {
            self.blocks(codec, start)?
        };
        let count = self.stats.of_mut(codec);
        count.blocks += blocks;
        count.plain_bytes += plain;
        count.wire_bytes += (start.len() - self.reader.remaining().len()) as u64;
        Ok(record)
    }

    fn state(&mut self, start: &'a [u8]) -> Result<(Record, u64), WireError> {
        let offset = self.reader.varint()?;
        let len = self.reader.varint()?;
        if len > MAX_STATE_PIECE as u64 || offset.saturating_add(len) > MAX_STATE {
            return Err(WireError::Contents);
        }
        let name = || format!("device state at {offset}");
        let len = len as usize;
        let place = self.since(start);
        let (sum, payload) = self.payload()?;
        self.spend(len)?;
        let data = inflate(payload, len, name)?;
        if checksum(place, &data) != sum {
            return Err(WireError::Checksum { place: name() });
        }
        Ok((Record::State { offset, data }, len as u64))
    }

    fn blocks(&mut self, codec: Codec, start: &'a [u8]) -> Result<(Record, u64, u64), WireError> {
        let limits = self.limits;
        let info = limits.region(self.reader.varint()?)?;
        let (runs, blocks) = read_runs(&mut self.reader, info)?;
        self.note_seen(info.id, &runs)?;
        let place = self.since(start);
        let (sum, payload) = self.payload()?;
        let name = || place_name(info.id, &runs);
        let wrong_length = || WireError::Length { place: name() };
        let block_size = info.block_size as usize;
        let plain = blocks * u64::from(info.block_size);
        let verify = |decoded: &[u8]| {
            (checksum(place, decoded) == sum)
                .then_some(())
                .ok_or_else(|| WireError::Checksum { place: name() })
        };
        let form = match codec {
            Codec::Zero => {
                if !payload.is_empty() {
                    return Err(wrong_length());
                }
                verify(&[])?;
                Form::Zero
            }
            Codec::Raw => {
                if payload.len() as u64 != plain {
                    return Err(wrong_length());
                }
                self.spend(payload.len())?;
                verify(payload)?;
                Form::Contents(payload.to_vec())
            }
            Codec::Zstd => {
                let len = self.spend_u64(plain)?;
                let contents = inflate(payload, len, name)?;
                verify(&contents)?;
                Form::Contents(contents)
            }
            Codec::XorZstd => {
                let len = self.spend_u64(plain)?;
                let count = len / block_size;
                if payload.len() < count * 8 {
                    return Err(wrong_length());
                }
                let (bases, frame) = payload.split_at(count * 8);
                let xor = inflate(frame, len, name)?;
                verify(&xor)?;
                let mut reader = Reader::new(bases);
                let bases = (0..count)
                    .map(|_| reader.u64_le())
                    .collect::<Result<_, _>>()?;
                Form::Delta { bases, xor }
            }
            Codec::Named => {
                verify(payload)?;
                Form::Named(read_origins(payload, blocks, info, limits)?)
            }
            Codec::Seeded => {
                // Names cost the sender little and this side the reading of their contents.
                self.spend_u64(plain)?;
                if payload.len() as u64 != blocks * NAME_LEN as u64 {
                    return Err(wrong_length());
                }
                verify(payload)?;
                let (names, _) = payload.as_chunks();
                Form::Seeded(names.to_vec())
            }
            Codec::State => unreachable!("told apart by the caller"),
        };
        let record = Record::Blocks {
            region: info.id,
            block_size,
            runs,
            form,
        };
        Ok((record, blocks, plain))
    }

    /// The bytes read since `start`.
    fn since(&self, start: &'a [u8]) -> &'a [u8] {
        &start[..start.len() - self.reader.remaining().len()]
    }

    fn payload(&mut self) -> Result<(u64, &'a [u8]), WireError> {
        let sum = self.reader.u64_le()?;
        let len = usize::try_from(self.reader.varint()?).map_err(|_| WireError::Truncated)?;
        Ok((sum, self.reader.take(len)?))
    }

    fn spend(&mut self, bytes: usize) -> Result<(), WireError> {
        self.budget = self.budget.checked_sub(bytes).ok_or(WireError::Contents)?;
        Ok(())
    }

    fn spend_u64(&mut self, bytes: u64) -> Result<usize, WireError> {
        let bytes = usize::try_from(bytes).map_err(|_| WireError::Contents)?;
        self.spend(bytes)?;
        Ok(bytes)
    }

    fn note_seen(&mut self, region: RegionId, runs: &[Run]) -> Result<(), WireError> {
        let seen = self.seen.entry(region).or_default();
        for &(first, count) in runs {
            // The region's bound has been checked, so that the end fits 32 bits.
            if seen.insert_range(first..first + count) != u64::from(count) {
                return Err(WireError::Twice(region));
            }
        }
        Ok(())
    }
}

fn read_origins(
    payload: &[u8],
    blocks: u64,
    info: &RegionInfo,
    limits: &Limits<'_>,
) -> Result<Vec<Origin>, WireError> {
    // A name takes 34 bytes at least.
    if blocks > (payload.len() / (NAME_LEN + 2)) as u64 {
        return Err(WireError::Truncated);
    }
    let mut reader = Reader::new(payload);
    let mut origins = Vec::with_capacity(blocks as usize);
    for _ in 0..blocks {
        let id = reader.varint()?;
        let from = limits.region(id)?;
        if from.block_size != info.block_size {
            return Err(WireError::Region(id));
        }
        let block = reader.varint_u32()?;
        if block >= from.blocks {
            return Err(WireError::Bounds {
                region: from.id,
                first: u64::from(block),
                count: 1,
                blocks: from.blocks,
            });
        }
        let mut name = [0; NAME_LEN];
        name.copy_from_slice(reader.take(NAME_LEN)?);
        origins.push(Origin {
            region: from.id,
            block,
            name,
        });
    }
    if !reader.is_empty() {
        return Err(WireError::Length {
            place: info.id.to_string(),
        });
    }
    Ok(origins)
}

/// Decompresses one zstd frame into exactly `len` bytes.
fn inflate(frame: &[u8], len: usize, name: impl Fn() -> String) -> Result<Vec<u8>, WireError> {
    thread_local! {
        static ZSTD: std::cell::RefCell<Option<Decompressor<'static>>> =
            const { std::cell::RefCell::new(None) };
    }
    let bad = || WireError::Zstd { place: name() };
    let mut out = Vec::with_capacity(len);
    let written = ZSTD.with_borrow_mut(|slot| {
        let zstd = match slot {
            Some(zstd) => zstd,
            None => slot.insert(Decompressor::new().map_err(|_| bad())?),
        };
        zstd.decompress_to_buffer(frame, &mut out)
            .map_err(|_| bad())
    })?;
    if written != len {
        return Err(WireError::Length { place: name() });
    }
    Ok(out)
}
