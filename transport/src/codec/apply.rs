//! From a verified batch into the guest. What a record refers to is read from the target and
//! checked before anything is made of it; a block that fails is rejected, not guessed.

use xxhash_rust::xxh3::xxh3_64;

use super::decode::{Batch, Form, Origin, Record};
use super::stats::CodecStats;
use super::wire::{NAME_LEN, Run};
use crate::message::RegionId;

/// What batches are applied to.
pub trait BatchTarget {
    /// Why the target failed.
    type Error;

    /// Whether this block of this pass is wanted: false when a later pass is already in place, or
    /// when the guest has the block.
    fn admit(&mut self, region: RegionId, block: u32, pass: u32) -> bool;

    /// Copies one block as it is now into `buf`. Only called for records that refer to contents.
    fn read(&mut self, region: RegionId, block: u32, buf: &mut [u8]) -> Result<(), Self::Error>;

    /// Writes whole blocks from `first` on.
    fn write(&mut self, region: RegionId, first: u32, data: &[u8]) -> Result<(), Self::Error>;

    /// Makes blocks zero.
    fn zero(&mut self, region: RegionId, first: u32, count: u32) -> Result<(), Self::Error>;

    /// Copies the content of this BLAKE3 (`_name`) into `_buf` from a file that the source was told
    /// of; false where there is none of this length. What is copied is checked by the caller.
    fn seed(&mut self, _name: &[u8; 32], _buf: &mut [u8]) -> bool {
        false
    }

    /// Takes a piece of the device state.
    fn state(&mut self, offset: u64, data: &[u8]) -> Result<(), Self::Error>;

    /// The block was admitted but what its record refers to is not what is here: it must be sent
    /// again in full.
    fn reject(&mut self, region: RegionId, block: u32);
}

/// What applying a batch did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ApplyStats {
    /// What the batch was made of.
    pub codecs: CodecStats,
    /// Blocks written, zeroed ones among them.
    pub written: u64,
    /// Blocks that were not admitted.
    pub skipped: u64,
    /// Blocks that were rejected.
    pub rejected: u64,
    /// Of those written: copied from files of this side.
    pub seeded: u64,
    /// Of those rejected: no such content was in these files.
    pub unseeded: u64,
    /// Bytes of device state.
    pub state_bytes: u64,
}

/// The target failed while a batch was applied; a part of the batch may be in place.
#[derive(Debug, thiserror::Error)]
#[error("applying batch {batch}")]
pub struct ApplyError<E> {
    /// The batch.
    pub batch: u64,
    /// What the target said.
    #[source]
    pub source: E,
}

impl Batch {
    /// Applies every record. Blocks that the target does not admit are skipped.
    pub fn apply<T: BatchTarget>(
        &self,
        target: &mut T,
    ) -> Result<ApplyStats, ApplyError<T::Error>> {
        let mut work = Work {
            target,
            pass: self.header.pass,
            stats: ApplyStats {
                codecs: self.stats,
                ..ApplyStats::default()
            },
            block: Vec::new(),
        };
        for record in &self.records {
            work.record(record).map_err(|source| ApplyError {
                batch: self.header.id,
                source,
            })?;
        }
        Ok(work.stats)
    }
}

struct Work<'a, T> {
    target: &'a mut T,
    pass: u32,
    stats: ApplyStats,
    /// Room for one block.
    block: Vec<u8>,
}

impl<T: BatchTarget> Work<'_, T> {
    fn record(&mut self, record: &Record) -> Result<(), T::Error> {
        match record {
            Record::State { offset, data } => {
                self.target.state(*offset, data)?;
                self.stats.state_bytes += data.len() as u64;
                Ok(())
            }
            Record::Blocks {
                region,
                block_size,
                runs,
                form,
            } => match form {
                Form::Zero => self.zero(*region, runs),
                Form::Contents(contents) => self.contents(*region, *block_size, runs, contents),
                Form::Delta { bases, xor } => self.delta(*region, *block_size, runs, bases, xor),
                Form::Named(origins) => self.named(*region, *block_size, runs, origins),
                Form::Seeded(names) => self.seeded(*region, *block_size, runs, names),
            },
        }
    }

    fn zero(&mut self, region: RegionId, runs: &[Run]) -> Result<(), T::Error> {
        // A run of zeroes can be as long as the region; pieces bound the list of admitted parts.
        const PIECE: u32 = 1 << 16;
        for &(first, count) in runs {
            for start in (0..count).step_by(PIECE as usize) {
                let piece = (first + start, PIECE.min(count - start));
                for (first, count) in self.admitted(region, piece) {
                    self.target.zero(region, first, count)?;
                    self.stats.written += u64::from(count);
                }
            }
        }
        Ok(())
    }

    fn contents(
        &mut self,
        region: RegionId,
        block_size: usize,
        runs: &[Run],
        mut contents: &[u8],
    ) -> Result<(), T::Error> {
        for &run in runs {
            let (data, rest) = contents.split_at(run.1 as usize * block_size);
            contents = rest;
            for (first, count) in self.admitted(region, run) {
                let start = (first - run.0) as usize * block_size;
                let data = &data[start..][..count as usize * block_size];
                self.target.write(region, first, data)?;
                self.stats.written += u64::from(count);
            }
        }
        Ok(())
    }

    fn delta(
        &mut self,
        region: RegionId,
        block_size: usize,
        runs: &[Run],
        bases: &[u64],
        xor: &[u8],
    ) -> Result<(), T::Error> {
        let differences = bases.iter().zip(xor.chunks_exact(block_size));
        for (block, (base, difference)) in blocks_of(runs).zip(differences) {
            if !self.admit(region, block) {
                continue;
            }
            self.read(region, block, block_size)?;
            if xxh3_64(&self.block) != *base {
                self.reject(region, block);
                continue;
            }
            for (byte, change) in self.block.iter_mut().zip(difference) {
                *byte ^= change;
            }
            self.target.write(region, block, &self.block)?;
            self.stats.written += 1;
        }
        Ok(())
    }

    fn named(
        &mut self,
        region: RegionId,
        block_size: usize,
        runs: &[Run],
        origins: &[Origin],
    ) -> Result<(), T::Error> {
        for (block, origin) in blocks_of(runs).zip(origins) {
            if !self.admit(region, block) {
                continue;
            }
            self.read(origin.region, origin.block, block_size)?;
            if blake3::hash(&self.block).as_bytes() != &origin.name {
                self.reject(region, block);
                continue;
            }
            self.target.write(region, block, &self.block)?;
            self.stats.written += 1;
        }
        Ok(())
    }

    fn seeded(
        &mut self,
        region: RegionId,
        block_size: usize,
        runs: &[Run],
        names: &[[u8; NAME_LEN]],
    ) -> Result<(), T::Error> {
        self.block.resize(block_size, 0);
        for (block, name) in blocks_of(runs).zip(names) {
            if !self.admit(region, block) {
                continue;
            }
            let found = self.target.seed(name, &mut self.block);
            if !found || blake3::hash(&self.block).as_bytes() != name {
                self.reject(region, block);
                self.stats.unseeded += 1;
                continue;
            }
            self.target.write(region, block, &self.block)?;
            self.stats.written += 1;
            self.stats.seeded += 1;
        }
        Ok(())
    }

    fn read(&mut self, region: RegionId, block: u32, block_size: usize) -> Result<(), T::Error> {
        self.block.resize(block_size, 0);
        self.target.read(region, block, &mut self.block)
    }

    fn admit(&mut self, region: RegionId, block: u32) -> bool {
        let admitted = self.target.admit(region, block, self.pass);
        if !admitted {
            self.stats.skipped += 1;
        }
        admitted
    }

    fn reject(&mut self, region: RegionId, block: u32) {
        self.target.reject(region, block);
        self.stats.rejected += 1;
    }

    /// The parts of a run that the target admits.
    fn admitted(&mut self, region: RegionId, (first, count): Run) -> Vec<Run> {
        let mut parts: Vec<Run> = Vec::new();
        for block in first..first + count {
            if !self.admit(region, block) {
                continue;
            }
            match parts.last_mut() {
                Some((start, len)) if *start + *len == block => *len += 1,
                _ => parts.push((block, 1)),
            }
        }
        parts
    }
}

fn blocks_of(runs: &[Run]) -> impl Iterator<Item = u32> + '_ {
    runs.iter().flat_map(|&(first, count)| first..first + count)
}
