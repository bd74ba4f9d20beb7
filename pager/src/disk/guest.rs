//! What the guest does to its disk. Nothing here waits: what needs missing blocks says so, and
//! [`DiskImage::wait_for`] tells when they are here.
//!
//! Why so little is locked: after arming, a granule that is here stays here, and nothing but the
//! guest changes it. So reads, and writes to what is here, need no lock. The block's lock orders the
//! rest: placing, the guest's first write to a granule, and the start of a wait.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::geometry::GRANULE;
use super::image::{DiskImage, next_data, punch};
use super::pending::{LOCKED_TOGETHER, Resume, Waiting, go_on};
use crate::FaultAnswer;

/// Zeroes that are written at once where the file system cannot make them.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// A part of a granule that is missing: to be written when the granule is here.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Edge {
    pub(crate) offset: u64,
    pub(crate) data: Vec<u8>,
}

/// How to make zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zero {
    /// The guest does not need the contents any more; parts of granules may keep theirs.
    Trim,
    /// Zeroes; their room may be given back.
    Hole,
    /// Zeroes that keep their room.
    Allocated,
    /// The same, but only if that is quicker than writing them.
    AllocatedFast,
}

/// What a range of the disk is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) bytes: u64,
    /// Zero without data. What is missing is not: nobody knows what it holds.
    pub(crate) hole: bool,
}

impl DiskImage {
    /// Whether all of these bytes are here.
    pub(crate) fn is_here(&self, bytes: &Range<u64>) -> bool {
        !self.map.any_missing(&self.geometry.touched(bytes))
    }

    /// Reads bytes that are here.
    pub(crate) fn guest_read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// Reads bytes that are here if that takes no wait for the medium. False if it would.
    pub(crate) fn guest_read_cached(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool> {
        let len = buf.len();
        let mut buffers = [io::IoSliceMut::new(buf)];
        match rustix::io::preadv2(&self.file, &mut buffers, offset, ReadWriteFlags::NOWAIT) {
            Ok(count) => Ok(count == len),
            Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether these bytes, which are here, are one hole.
    pub(crate) fn is_hole(&self, bytes: &Range<u64>) -> io::Result<bool> {
        let data = next_data(&self.file, bytes.start)?;
        Ok(data.is_none_or(|data| data >= bytes.end))
    }

    /// Writes. What cannot be written before a granule is here goes to `edges`: at most two.
    pub(crate) fn guest_write(
        &self,
        offset: u64,
        data: &[u8],
        edges: &mut Vec<Edge>,
    ) -> io::Result<()> {
        let bytes = offset..offset + data.len() as u64;
        if self.is_here(&bytes) {
            return self.file.write_all_at(data, offset);
        }
        let part = |range: &Range<u64>| {
            &data[(range.start - offset) as usize..(range.end - offset) as usize]
        };
        self.make_here(
            &bytes,
            |range| self.file.write_all_at(part(range), range.start),
            |range| {
                edges.push(Edge {
                    offset: range.start,
                    data: part(range).to_vec(),
                });
            },
        )
    }

    /// Makes zeroes. What cannot be made before a granule is here goes to `edges`: at most two.
    pub(crate) fn guest_zero(
        &self,
        bytes: &Range<u64>,
        how: Zero,
        edges: &mut Vec<Edge>,
    ) -> io::Result<()> {
        if self.is_here(bytes) {
            return self.zero(bytes, how);
        }
        self.make_here(
            bytes,
            |range| self.zero(range, how),
            |range| {
                if how != Zero::Trim {
                    edges.push(Edge {
                        offset: range.start,
                        data: vec![0; (range.end - range.start) as usize],
                    });
                }
            },
        )
    }

    /// Writes a part of a granule that is here now.
    pub(crate) fn guest_merge(&self, edge: &Edge) -> io::Result<()> {
        debug_assert!(self.is_here(&(edge.offset..edge.offset + edge.data.len() as u64)));
        self.file.write_all_at(&edge.data, edge.offset)
    }

    /// Asks for what is missing of `bytes`, and lets `then` go on when all of it is here, which may
    /// be before this returns.
    pub(crate) fn wait_for(&self, bytes: &[Range<u64>], then: Arc<dyn Resume>) {
        let waiting = Waiting::new(then, Arc::clone(&self.stats));
        let mut ask = Vec::new();
        for bytes in bytes {
            let granules = self.geometry.touched(bytes);
            let mut rest = granules.clone();
            while let Some(run) = self.map.next_missing(&rest) {
                let block = self.geometry.block_of(run.start);
                let mut locked = self.shards.lock(block, 1);
                let needs = self.map.missing_of(block, &granules);
                if needs != 0 && locked.wait(block, needs, &waiting) {
                    ask.push(block);
                }
                drop(locked);
                rest.start = self.geometry.granules_of(block, 1).end;
            }
        }
        for block in ask {
            self.ask(block);
        }
        waiting.one_less();
    }

    /// Forgets waits that are [abandoned](Resume::abandoned).
    pub(crate) fn sweep(&self) {
        self.shards.sweep();
    }

    fn ask(&self, block: u32) {
        self.stats.faults.fetch_add(1, Ordering::Relaxed);
        let Some(faults) = self.faults.get() else {
            // Without them nothing is missing.
            return;
        };
        if faults.fault(self.region(), block) == FaultAnswer::Zero
            && let Err(error) = self.place_zero(block, 1)
        {
            // Who waits goes on waiting: a wrong answer would be worse.
            tracing::error!(block, %error, "a block that is zero could not be placed");
        }
    }

    /// Extents from `bytes.start` on, at most `limit`; the last may be cut short.
    pub(crate) fn extents(&self, bytes: &Range<u64>, limit: usize) -> io::Result<Vec<Extent>> {
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = bytes.start;
        while at < bytes.end {
            let (end, hole) = self.extent(&(at..bytes.end))?;
            let bytes = end - at;
            let full = extents.len() == limit;
            match extents.last_mut() {
                Some(last) if last.hole == hole => last.bytes += bytes,
                _ if full => break,
                _ => extents.push(Extent { bytes, hole }),
            }
            at = end;
        }
        Ok(extents)
    }

    /// Where what begins at the start of `bytes` ends, and whether it is a hole.
    fn extent(&self, bytes: &Range<u64>) -> io::Result<(u64, bool)> {
        let granules = self.geometry.touched(bytes);
        let mut end = bytes.end;
        // First this, then the file: a granule that arrives in between counts as data.
        if self.map.missing() != 0
            && let Some(missing) = self.map.next_missing(&granules)
        {
            let missing = self.geometry.bytes_of(&missing);
            if missing.start <= bytes.start {
                return Ok((missing.end.min(end), false));
            }
            end = end.min(missing.start);
        }
        let data = next_data(&self.file, bytes.start)?.unwrap_or(self.geometry.bytes);
        if data > bytes.start {
            return Ok((data.min(end), true));
        }
        let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(bytes.start))?;
        Ok((hole.clamp(bytes.start + 1, end), false))
    }

    /// Puts contents into all of `bytes`: whole granules are here then, and parts of missing ones
    /// are `deferred`.
    fn make_here(
        &self,
        bytes: &Range<u64>,
        mut put: impl FnMut(&Range<u64>) -> io::Result<()>,
        mut deferred: impl FnMut(&Range<u64>),
    ) -> io::Result<()> {
        let covered = self.geometry.covered(bytes);
        let inner = self.geometry.bytes_of(&covered);
        let head = bytes.start..inner.start.min(bytes.end);
        let tail = inner.end.max(head.end)..bytes.end;
        for edge in [head, tail] {
            if edge.is_empty() {
                continue;
            }
            if self.is_here(&edge) {
                put(&edge)?;
            } else {
                deferred(&edge);
            }
        }
        let mut rest = covered;
        while !rest.is_empty() {
            let first = self.geometry.block_of(rest.start);
            let last = self.geometry.block_of(rest.end - 1);
            let count = LOCKED_TOGETHER.min(last - first + 1);
            let end = self.geometry.granules_of(first, count).end.min(rest.end);
            let granules = rest.start..end;
            self.make_granules_here(first, count, &granules, &mut put)?;
            rest.start = end;
        }
        Ok(())
    }

    fn make_granules_here(
        &self,
        first: u32,
        count: u32,
        granules: &Range<u64>,
        put: &mut impl FnMut(&Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let bytes = self.geometry.bytes_of(granules);
        if !self.map.any_missing(granules) {
            return put(&bytes);
        }
        let mut locked = self.shards.lock(first, count);
        put(&bytes)?;
        let incomplete: Vec<u32> = (first..first + count)
            .filter(|&block| self.map.missing_of(block, &(0..u64::MAX)) != 0)
            .collect();
        self.map.clear(granules);
        let ready = locked.arrived(&self.map);
        let complete: Vec<u32> = incomplete
            .into_iter()
            .filter(|&block| self.map.missing_of(block, &(0..u64::MAX)) == 0)
            .collect();
        drop(locked);
        go_on(&ready);
        self.removed(&complete);
        Ok(())
    }

    /// The guest has made these blocks complete by itself.
    fn removed(&self, blocks: &[u32]) {
        let Some(faults) = self.faults.get() else {
            return;
        };
        self.stats
            .removed
            .fetch_add(blocks.len() as u64, Ordering::Relaxed);
        for run in blocks.chunk_by(|a, b| a + 1 == *b) {
            faults.removed(self.region(), run[0], run.len() as u32);
        }
    }

    fn zero(&self, bytes: &Range<u64>, how: Zero) -> io::Result<()> {
        let len = bytes.end - bytes.start;
        if matches!(how, Zero::Trim | Zero::Hole) {
            return Ok(punch(&self.file, bytes.start, len)?);
        }
        let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, mode, bytes.start, len) {
            Err(Errno::OPNOTSUPP) if how == Zero::Allocated => {}
            other => return Ok(other?),
        }
        let mut at = bytes.start;
        while at < bytes.end {
            let len = (bytes.end - at).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..len as usize], at)?;
            at += len;
        }
        Ok(())
    }
}

/// Bytes of the granules that an edge lies in, for [`DiskImage::wait_for`].
impl Edge {
    pub(crate) fn bytes(&self) -> Range<u64> {
        debug_assert!(self.data.len() < GRANULE as usize);
        self.offset..self.offset + self.data.len() as u64
    }
}
