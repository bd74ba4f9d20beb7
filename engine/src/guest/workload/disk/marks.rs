//! Which blocks of the disk were written and used, in memory that the source of a migration maps.
//!
//! A block is marked as written *after* the write has returned, and the source takes the marks
//! *before* it reads the blocks. So a write is never missed: if the source finds the mark, the write
//! has returned, and the read that follows sees it; if it does not, the mark is there the next time.
//! What it read in the middle of a write is told of again. (Marking before the write would miss one:
//! the mark is taken and the block read, and only then comes the write.) On a frozen guest no
//! operation is under way, and all marks are made.
//!
//! The page: 64-bit word 0 `hmdisk1\0`, word 1 number of blocks; from byte 4096 on one bit per block,
//! written; from the next whole page on 32 bits per block, the second of `CLOCK_MONOTONIC` when it
//! was last read or written, 0 for never.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::blocks::BlockSet;
use crate::guest::workload::memory::SharedMemory;
use crate::guest::workload::pages::PAGE;

const MAGIC: u64 = u64::from_le_bytes(*b"hmdisk1\0");

/// The marks, mapped.
pub struct DiskMarks {
    memory: SharedMemory,
    blocks: u32,
}

impl DiskMarks {
    /// New marks, none set.
    pub fn create(blocks: u32) -> io::Result<Self> {
        let memory = SharedMemory::create(c"hybridmig-guest-disk", size(blocks))?;
        memory.word64(8).store(u64::from(blocks), Relaxed);
        memory.word64(0).store(MAGIC, Release);
        Ok(Self { memory, blocks })
    }

    /// The marks of another process, for a disk of so many blocks.
    pub fn attach(fd: OwnedFd, blocks: u32) -> io::Result<Self> {
        let memory = SharedMemory::attach(fd)?;
        let fits = memory.len() == size(blocks)
            && memory.word64(0).load(Acquire) == MAGIC
            && memory.word64(8).load(Relaxed) == u64::from(blocks);
        if !fits {
            return Err(io::Error::other("not the marks of a disk of this size"));
        }
        Ok(Self { memory, blocks })
    }

    /// A write to these blocks has returned.
    pub fn written(&self, blocks: Range<u32>) {
        for block in blocks.clone() {
            let bit = 1_u64 << (block % 64);
            // Release: whoever takes the mark sees what was written before.
            self.memory.word64(bits_at(block)).fetch_or(bit, Release);
        }
        self.used(blocks);
    }

    /// These blocks were read or written.
    pub fn used(&self, blocks: Range<u32>) {
        let now = now();
        for block in blocks {
            self.stamp(block).store(now, Relaxed);
        }
    }

    /// The blocks that were marked as written since the last call; the marks are gone then.
    pub fn take_written(&self) -> BlockSet {
        let mut taken = BlockSet::new();
        for first in (0..self.blocks).step_by(64) {
            let word = self.memory.word64(bits_at(first));
            // Most are clear, and looking does not take the line from the guest's processor.
            if word.load(Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, AcqRel);
            while bits != 0 {
                let block = first + bits.trailing_zeros();
                if block < self.blocks {
                    taken.insert(block);
                }
                bits &= bits - 1;
            }
        }
        taken
    }

    /// The blocks that were read or written in the last so many seconds.
    pub fn lately_used(&self, within: Duration) -> BlockSet {
        let oldest = now().saturating_sub(within.as_secs() as u32).max(1);
        (0..self.blocks)
            .filter(|block| self.stamp(*block).load(Relaxed) >= oldest)
            .collect()
    }

    fn stamp(&self, block: u32) -> &std::sync::atomic::AtomicU32 {
        let at = stamps_at(self.blocks) + block as usize * 4;
        self.memory.word32(at)
    }
}

impl AsFd for DiskMarks {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

/// Seconds since the host has started, never 0; the same in every process.
fn now() -> u32 {
    clock_gettime(ClockId::Monotonic).tv_sec as u32 + 1
}

fn bits_at(block: u32) -> usize {
    PAGE + block as usize / 64 * 8
}

fn stamps_at(blocks: u32) -> usize {
    PAGE + (blocks as usize).div_ceil(64 * PAGE / 8) * PAGE
}

fn size(blocks: u32) -> usize {
    (stamps_at(blocks) + blocks as usize * 4).next_multiple_of(PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_cross_the_descriptor_and_are_taken_once() {
        let marks = DiskMarks::create(70_000).unwrap();
        let fd = || marks.as_fd().try_clone_to_owned().unwrap();
        let other = DiskMarks::attach(fd(), 70_000).unwrap();
        assert!(DiskMarks::attach(fd(), 70_001).is_err());
        assert!(other.take_written().is_empty());
        marks.written(0..1);
        marks.written(62..66);
        marks.written(69_999..70_000);
        marks.used(5..7);
        let expected: BlockSet = [0, 62, 63, 64, 65, 69_999].into_iter().collect();
        assert_eq!(other.take_written(), expected);
        assert!(other.take_written().is_empty());
        let used = other.lately_used(Duration::from_secs(60));
        let mut all = expected;
        all.extend([5, 6]);
        assert_eq!(used, all);
    }
}
