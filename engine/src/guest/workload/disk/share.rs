//! What one disk thread owns: a contiguous share of the disk's blocks, and the generations of its
//! sectors in guest memory. The digest over the generations travels with the thread's state, as that
//! of memory does.

use std::fmt;
use std::io::{ErrorKind, Result};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::io::Act;
use super::pattern::{DiskPattern, DiskPatternState, Kind, Operation};
use super::{BLOCK, BLOCK_SECTORS, Disk, DiskIo, DiskSpec, SECTOR};
use crate::guest::workload::memory::SharedMemory;
use crate::guest::workload::pages::{Contents, PAGE, Page, WrongPage};
use crate::guest::workload::partition::Damage;
use crate::guest::workload::pattern::mix;
use crate::guest::workload::profile::Profile;
use crate::guest::workload::stats::{StatsPage, Timed};

/// Generations in one page of guest memory: 32 bits each.
const ENTRIES: u32 = (PAGE / 4) as u32;
/// Blocks that are written at the start, or not, together: 1 MiB.
const EXTENT_BLOCKS: u32 = 16;
/// Makes the contents of the disk other ones than those of memory with the same seed.
const DISK_SEED: u64 = 0x6469_736b_2073_6563;

/// Pages of guest memory that hold the generations of so many sectors.
pub fn table_pages(sectors: u32) -> u32 {
    sectors.div_ceil(ENTRIES)
}

/// The contents of one guest's disk.
#[derive(Clone, Copy, Debug)]
pub struct DiskContents {
    contents: Contents,
    seed: u64,
    used: u32,
}

impl DiskContents {
    /// The contents of a guest with this profile and seed.
    pub fn new(profile: Profile, seed: u64) -> Self {
        let spec = DiskSpec::of(profile);
        let seed = mix(seed ^ DISK_SEED);
        Self {
            contents: Contents::new(profile, spec.contents, seed),
            seed,
            used: spec.used,
        }
    }

    /// The contents of its sectors.
    pub fn sectors(&self) -> &Contents {
        &self.contents
    }

    /// Whether a block is written when the guest is started.
    pub fn is_used(&self, block: u32) -> bool {
        let extent = u64::from(block / EXTENT_BLOCKS);
        mix(self.seed.rotate_left(29) ^ extent) % 100 < u64::from(self.used)
    }
}

/// A contiguous run of blocks that one thread owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    first: u32,
    blocks: u32,
    /// Where in guest memory, in bytes, the generations of the whole disk begin.
    table: usize,
}

/// What a disk thread knows beside guest memory and disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskWorkerState {
    /// The pattern.
    pub pattern: DiskPatternState,
    /// Sectors read or written.
    pub sectors: u64,
    /// Operations that wrote.
    pub writes: u64,
    digest: u64,
}

/// A sector that is not as it should be.
struct WrongSector(WrongPage);

impl fmt::Display for WrongSector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_string().replace("page", "disk sector"))
    }
}

impl Share {
    /// The share of thread `worker` of `workers` (at most the blocks of the disk), in a guest with
    /// this memory.
    pub fn of(worker: u32, workers: u32, disk: &Disk, memory: &SharedMemory) -> Self {
        let sectors = disk.sectors();
        let blocks = sectors / BLOCK_SECTORS;
        let bound = |number: u32| {
            (u64::from(blocks) * u64::from(number) / u64::from(workers)) as u32 // ≤ blocks
        };
        let (first, end) = (bound(worker), bound(worker + 1));
        assert!(end > first, "a thread needs a block of the disk");
        Self {
            first,
            blocks: end - first,
            table: (memory.pages() - table_pages(sectors)) as usize * PAGE,
        }
    }

    /// The pattern over this share.
    pub fn pattern(&self, profile: Profile) -> DiskPattern {
        DiskPattern::new(DiskSpec::of(profile), self.blocks)
    }

    /// Writes what the share holds when the guest is started; it must be all holes, and the memory
    /// zero. Returns the state to begin with.
    pub fn fill(
        &self,
        memory: &SharedMemory,
        disk: &Disk,
        contents: &DiskContents,
        pattern: DiskPatternState,
    ) -> Result<DiskWorkerState> {
        let mut digest = 0_u64;
        let mut data = vec![0; BLOCK];
        for block in self.first..self.first + self.blocks {
            let generation = u32::from(contents.is_used(block));
            for (sector, data) in sectors_of(block).zip(data.chunks_exact_mut(SECTOR)) {
                digest = digest.wrapping_add(contents.contents.digest_term(sector, generation));
                if generation != 0 {
                    contents.contents.produce(sector, generation, page(data));
                    self.entry(memory, sector).store(generation, Relaxed);
                }
            }
            if generation != 0 {
                let offset = u64::from(block) * BLOCK as u64;
                // Without a mark: it was not the guest that used it.
                disk.file.write_all_at(&data, offset)?;
            }
        }
        Ok(DiskWorkerState {
            pattern,
            sectors: 0,
            writes: 0,
            digest,
        })
    }

    /// Compares every byte of every sector with what it should be, and all generations with the
    /// digest of the state. Waits for what is missing.
    pub fn verify(
        &self,
        memory: &SharedMemory,
        disk: &Arc<Disk>,
        contents: &DiskContents,
        state: &DiskWorkerState,
    ) -> Damage {
        let mut io = DiskIo::new(Arc::clone(disk));
        let mut damage = Damage::default();
        let mut digest = 0_u64;
        let mut data = vec![0; BLOCK];
        for block in self.first..self.first + self.blocks {
            let offset = u64::from(block) * BLOCK as u64;
            if let Err(error) = io.perform(Act::Read(offset, &mut data), || false) {
                damage.add(format!("block {block} of the disk cannot be read: {error}"));
                continue;
            }
            for (sector, data) in sectors_of(block).zip(data.chunks_exact_mut(SECTOR)) {
                let generation = self.entry(memory, sector).load(Relaxed);
                let right = contents.contents.compare(sector, generation, page(data));
                if let Err(wrong) = right {
                    damage.add(WrongSector(wrong));
                }
                digest = digest.wrapping_add(contents.contents.digest_term(sector, generation));
            }
        }
        if digest != state.digest {
            let (first, last) = (self.first, self.first + self.blocks - 1);
            let expected = state.digest;
            damage.add(format!(
                "the generations of the disk's blocks {first} to {last} are not those that were \
                 written: digest {digest:016x} instead of {expected:016x}, so a table page is stale"
            ));
        }
        damage
    }

    fn entry<'a>(&self, memory: &'a SharedMemory, sector: u32) -> &'a AtomicU32 {
        memory.word32(self.table + sector as usize * 4)
    }
}

/// What a disk thread works with. It makes one operation after the other.
pub struct DiskHand<'a> {
    pub share: &'a Share,
    pub pattern: &'a DiskPattern,
    pub memory: &'a SharedMemory,
    pub contents: &'a DiskContents,
    pub stats: &'a StatsPage,
    pub io: DiskIo,
    pub buffer: Vec<u8>,
    /// Writes until the next flush.
    pub unflushed: u32,
}

/// What an operation has found.
pub enum Trouble {
    /// A sector is not as it should be.
    Wrong(String),
    /// The storage refused.
    Failed(String),
}

impl DiskHand<'_> {
    /// Makes the next operation. Trouble is told, as often as there is some. `give_up` says whether
    /// to stop waiting for a server that has gone.
    pub fn operate(
        &mut self,
        state: &mut DiskWorkerState,
        flush_every: u32,
        give_up: &dyn Fn() -> bool,
        mut trouble: impl FnMut(Trouble),
    ) {
        let Operation { first, count, kind } = self.pattern.next(&mut state.pattern);
        let first = self.share.first * BLOCK_SECTORS + first;
        let offset = u64::from(first) * SECTOR as u64;
        let len = count as usize * SECTOR;
        state.sectors = state.sectors.wrapping_add(u64::from(count));
        if kind != Kind::Replace {
            let started = Instant::now();
            let read = Act::Read(offset, &mut self.buffer[..len]);
            if let Err(error) = self.io.perform(read, give_up) {
                return failed("read", first, &error, trouble);
            }
            self.stats.time(Timed::Read, started.elapsed());
            let mut right = true;
            let sectors = self.buffer[..len].chunks_exact_mut(SECTOR);
            for (sector, data) in (first..).zip(sectors) {
                let generation = self.share.entry(self.memory, sector).load(Relaxed);
                if let Err(wrong) = self.contents.contents.check(sector, generation, page(data)) {
                    right = false;
                    trouble(Trouble::Wrong(WrongSector(wrong).to_string()));
                }
            }
            // What is wrong is never written: it stays to be seen.
            if kind == Kind::Read || !right {
                return;
            }
        }
        let sectors = self.buffer[..len].chunks_exact_mut(SECTOR);
        for (sector, data) in (first..).zip(sectors) {
            let generation = self.share.entry(self.memory, sector).load(Relaxed);
            let contents = &self.contents.contents;
            contents.produce(sector, next(generation), page(data));
        }
        let started = Instant::now();
        let write = Act::Write(offset, &self.buffer[..len]);
        if let Err(error) = self.io.perform(write, give_up) {
            return failed("written", first, &error, trouble);
        }
        self.stats.time(Timed::Write, started.elapsed());
        for sector in first..first + count {
            let entry = self.share.entry(self.memory, sector);
            let generation = entry.load(Relaxed);
            entry.store(next(generation), Relaxed);
            let term = |generation| self.contents.contents.digest_term(sector, generation);
            let change = term(next(generation)).wrapping_sub(term(generation));
            state.digest = state.digest.wrapping_add(change);
        }
        state.writes = state.writes.wrapping_add(1);
        self.unflushed += 1;
        if flush_every > 0 && self.unflushed >= flush_every {
            self.unflushed = 0;
            let started = Instant::now();
            if let Err(error) = self.io.perform(Act::Flush, give_up) {
                return failed("flushed", first, &error, trouble);
            }
            self.stats.time(Timed::Flush, started.elapsed());
        }
    }
}

fn failed(what: &str, sector: u32, error: &std::io::Error, mut trouble: impl FnMut(Trouble)) {
    // The process ends, and with it the operation: no error of the disk.
    if error.kind() != ErrorKind::Interrupted {
        trouble(Trouble::Failed(format!(
            "disk sector {sector} could not be {what}: {error}"
        )));
    }
}

/// 0 means "never written", so the counter skips it when it wraps.
fn next(generation: u32) -> u32 {
    generation.checked_add(1).unwrap_or(1)
}

fn sectors_of(block: u32) -> std::ops::Range<u32> {
    block * BLOCK_SECTORS..(block + 1) * BLOCK_SECTORS
}

fn page(data: &mut [u8]) -> &mut Page {
    data.try_into().expect("a sector is as long as a page")
}
