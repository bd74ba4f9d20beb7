//! Reading and writing the file behind a region of guest memory. It must never make a page
//! present that nobody wrote: at the destination a present page is a page that does not fault.
//!
//! All access goes through `pread` and `pwrite`, not through a mapping of our own:
//! - reading a hole of a tmpfs file through a mapping *fills* the hole; `pread` leaves it;
//! - writing to a full tmpfs through a mapping is a SIGBUS; `pwrite` is an `ENOSPC`;
//! - the guest writes while we read: a torn copy is fine (the block is dirty again), but a Rust
//!   reference to such memory would not be.
//!
//! The page cache is the guest's memory, so both see each other's bytes at once.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use roaring::RoaringBitmap;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::{PAGE_SIZE, PagerError, Ranges, Result};

const PAGE: u64 = PAGE_SIZE as u64;
/// `f_type` of hugetlbfs, from `linux/magic.h`.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// The file behind one region: a memfd or a tmpfs file, from `offset`, `blocks` pages long.
#[derive(Debug)]
pub struct RegionMemory {
    file: File,
    region: u16,
    offset: u64,
    blocks: u32,
}

impl RegionMemory {
    /// The memory of region `region` in `file`, from byte `offset`, `len` bytes long. Both must be
    /// multiples of the page size, and the file at least that long.
    pub fn open(file: impl Into<File>, region: u16, offset: u64, len: u64) -> Result<Self> {
        let file = file.into();
        let unsuitable = |reason: String| PagerError::UnsuitableMemory { reason };
        if !offset.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || len == 0 {
            return Err(unsuitable(format!(
                "offset {offset} and length {len} are not whole pages of {PAGE_SIZE} bytes"
            )));
        }
        let blocks = u32::try_from(len / PAGE)
            .map_err(|_| unsuitable(format!("{len} bytes are more than the 16 TiB of a region")))?;
        let size = file
            .metadata()
            .map_err(|error| PagerError::os("fstat of the RAM file", error))?
            .size();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(unsuitable(format!(
                "it has {size} bytes, the region needs {len} from {offset}"
            )));
        }
        let fs = rustix::fs::fstatfs(&file)
            .map_err(|error| PagerError::os("fstatfs of the RAM file", error))?;
        if fs.f_type as i64 == HUGETLBFS_MAGIC {
            return Err(unsuitable(
                "it is on hugetlbfs; use a memfd or a tmpfs file".into(),
            ));
        }
        Ok(Self {
            file,
            region,
            offset,
            blocks,
        })
    }

    /// Length in blocks.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        u64::from(self.blocks) * PAGE
    }

    /// A region is never empty; the method is here because [`Self::len`] is.
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// The region's index.
    pub fn region(&self) -> u16 {
        self.region
    }

    /// Where the region begins in its file, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Device and inode of the file: how a mapping of it is recognised in another process.
    pub fn identity(&self) -> Result<(u64, u64)> {
        let meta = self
            .file
            .metadata()
            .map_err(|error| PagerError::os("fstat of the RAM file", error))?;
        Ok((meta.dev(), meta.ino()))
    }

    /// Copies blocks from `first` on into `buf`, a whole number of pages. A hole reads as zeroes
    /// and stays a hole. Torn if the guest writes at the same time.
    pub fn read(&self, first: u32, buf: &mut [u8]) -> Result<()> {
        let at = self.locate(first, buf.len())?;
        self.file.read_exact_at(buf, at).map_err(|error| {
            PagerError::os(
                format!("reading block {first} of region {}", self.region),
                error,
            )
        })
    }

    /// Writes whole blocks from `first` on. A full file system is [`PagerError::OutOfMemory`].
    pub fn write(&self, first: u32, data: &[u8]) -> Result<()> {
        let at = self.locate(first, data.len())?;
        let mut done = 0;
        while done < data.len() {
            match rustix::io::pwrite(&self.file, &data[done..], at + done as u64) {
                Ok(0) | Err(Errno::NOSPC | Errno::NOMEM | Errno::DQUOT) => {
                    return Err(PagerError::OutOfMemory {
                        region: self.region,
                        block: first + (done / PAGE_SIZE) as u32,
                    });
                }
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(PagerError::os(
                        format!("writing block {first} of region {}", self.region),
                        error,
                    ));
                }
            }
        }
        Ok(())
    }

    /// Makes blocks zero by making them holes.
    pub fn zero(&self, first: u32, count: u32) -> Result<()> {
        self.check(first, u64::from(count))?;
        if count == 0 {
            return Ok(());
        }
        self.punch_range(first, u64::from(count))
    }

    /// The blocks that are present. A page that was allocated but never written counts as absent
    /// only as long as the kernel says so (`SEEK_DATA`).
    pub fn populated(&self) -> Result<RoaringBitmap> {
        let end = self.offset + self.len();
        let mut set = RoaringBitmap::new();
        let mut at = self.offset;
        let seek = |position| rustix::fs::seek(&self.file, position);
        while at < end {
            let data = match seek(SeekFrom::Data(at)) {
                Ok(data) if data < end => data,
                // No data up to the end of the file.
                Ok(_) | Err(Errno::NXIO) => break,
                Err(error) => return Err(PagerError::os("SEEK_DATA on the RAM file", error)),
            };
            let hole = seek(SeekFrom::Hole(data))
                .map_err(|error| PagerError::os("SEEK_HOLE on the RAM file", error))?
                .min(end);
            let first = (data - self.offset) / PAGE;
            let last = (hole - self.offset).div_ceil(PAGE);
            // Inclusive, because the last block of a 16 TiB region is u32::MAX.
            if last > first {
                set.insert_range(first as u32..=(last - 1) as u32);
            }
            at = hole;
        }
        Ok(set)
    }

    /// Makes every block of `blocks` a hole.
    pub fn punch(&self, blocks: &RoaringBitmap) -> Result<()> {
        if let Some(last) = blocks.max() {
            self.check(last, 1)?;
        }
        Ranges::exact(blocks).try_for_each(|(first, count)| self.punch_range(first, count))
    }

    /// Takes away what must not be read by the guest: every present block that is in `missing` or
    /// is not in `written`. Then checks that it is gone: a page that stays present never faults,
    /// and the guest would run on stale bytes.
    pub fn discard(&self, missing: &RoaringBitmap, written: &RoaringBitmap) -> Result<()> {
        let current = written - missing;
        let stale = self.populated()? - &current;
        self.punch(&stale)?;
        let left = self.populated()? - current;
        if left.is_empty() {
            Ok(())
        } else {
            Err(PagerError::NotDiscarded {
                region: self.region,
                count: left.len(),
            })
        }
    }

    fn punch_range(&self, first: u32, count: u64) -> Result<()> {
        let at = self.offset + u64::from(first) * PAGE;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(&self.file, flags, at, count * PAGE) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => {
                    return Err(PagerError::os(
                        format!("punching blocks {first}+{count} of region {}", self.region),
                        error,
                    ));
                }
            }
        }
    }

    /// Byte position of `first` if `len` bytes from there are whole pages within the region.
    fn locate(&self, first: u32, len: usize) -> Result<u64> {
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) {
            return Err(PagerError::NotWholePages { len });
        }
        self.check(first, (len / PAGE_SIZE) as u64)?;
        Ok(self.offset + u64::from(first) * PAGE)
    }

    pub(crate) fn check(&self, first: u32, count: u64) -> Result<()> {
        if u64::from(first) + count > u64::from(self.blocks) {
            return Err(PagerError::OutOfRange {
                region: self.region,
                first,
                count,
                blocks: self.blocks,
            });
        }
        Ok(())
    }
}

impl AsFd for RegionMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn memfd(pages: u64) -> File {
        let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(pages * PAGE).unwrap();
        file
    }

    #[test]
    fn reading_a_hole_leaves_it_a_hole() {
        let memory = RegionMemory::open(memfd(16), 0, 0, 16 * PAGE).unwrap();
        memory.write(3, &[7; 2 * PAGE_SIZE]).unwrap();
        let mut buf = vec![1; 16 * PAGE_SIZE];
        memory.read(0, &mut buf).unwrap();
        assert!(buf[..3 * PAGE_SIZE].iter().all(|byte| *byte == 0));
        assert!(
            buf[3 * PAGE_SIZE..5 * PAGE_SIZE]
                .iter()
                .all(|byte| *byte == 7)
        );
        assert_eq!(memory.populated().unwrap(), (3..5).collect());
    }

    #[test]
    fn zeroing_and_punching_make_holes() {
        let memory = RegionMemory::open(memfd(32), 0, 8 * PAGE, 16 * PAGE).unwrap();
        memory.write(0, &vec![9; 16 * PAGE_SIZE]).unwrap();
        memory.zero(2, 3).unwrap();
        memory.zero(15, 1).unwrap();
        memory.punch(&[0, 8, 9].into_iter().collect()).unwrap();
        let expected: RoaringBitmap = [1, 5, 6, 7, 10, 11, 12, 13, 14].into_iter().collect();
        assert_eq!(memory.populated().unwrap(), expected);
        // Nothing outside the region was touched.
        let mut outside = [1; PAGE_SIZE];
        memory.file().read_exact_at(&mut outside, 7 * PAGE).unwrap();
        assert_eq!(outside, [0; PAGE_SIZE]);
    }

    #[test]
    fn discarding_keeps_only_what_is_written_and_not_missing() {
        let memory = RegionMemory::open(memfd(8), 0, 0, 8 * PAGE).unwrap();
        memory.write(0, &vec![1; 6 * PAGE_SIZE]).unwrap();
        memory
            .discard(&[1, 2, 7].into_iter().collect(), &(1..5).collect())
            .unwrap();
        assert_eq!(memory.populated().unwrap(), (3..5).collect());
    }

    #[test]
    fn ranges_outside_the_region_are_refused() {
        let memory = RegionMemory::open(memfd(4), 0, 0, 4 * PAGE).unwrap();
        assert!(matches!(
            memory.write(3, &[0; 2 * PAGE_SIZE]),
            Err(PagerError::OutOfRange { .. })
        ));
        assert!(matches!(
            memory.read(0, &mut [0; 100]),
            Err(PagerError::NotWholePages { len: 100 })
        ));
        assert!(memory.zero(4, 1).is_err());
        assert!(memory.punch(&[4].into_iter().collect()).is_err());
        assert!(RegionMemory::open(memfd(4), 0, PAGE, 4 * PAGE).is_err());
        assert!(RegionMemory::open(memfd(4), 0, 0, 100).is_err());
    }
}
