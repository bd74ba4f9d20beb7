//! The disk of a guest that leaves, as the source of its migration sees it: its file, and the marks of
//! what the guest has written to it and used.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::{BLOCK, DiskMarks};
use crate::blocks::BlockSet;
use crate::guest::workload::control::DiskHandover;
use crate::guest::{GuestError, GuestResult};

/// What was used within this time counts as used lately.
const LATELY: Duration = Duration::from_secs(60);

/// See the module's text.
pub struct DiskLeft {
    file: File,
    marks: DiskMarks,
    path: PathBuf,
    blocks: u32,
}

impl DiskLeft {
    /// From what the guest has handed over. Changes nothing.
    pub fn new(handover: DiskHandover) -> GuestResult<Self> {
        let DiskHandover {
            file,
            marks,
            path,
            bytes,
        } = handover;
        let blocks = u32::try_from(bytes / BLOCK as u64)
            .ok()
            .filter(|_| bytes.is_multiple_of(BLOCK as u64))
            .ok_or_else(|| GuestError::new(format!("a disk of {bytes} bytes cannot be moved")))?;
        let marks = DiskMarks::attach(marks, blocks).map_err(|error| {
            GuestError::caused("the marks of the guest's disk cannot be mapped", error)
        })?;
        Ok(Self {
            file: file.into(),
            marks,
            path,
            blocks,
        })
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Forgets what was written so far and returns the blocks that are no holes. All others are zero
    /// until they are written.
    pub fn start(&self) -> GuestResult<BlockSet> {
        // First this: what is written while the file is looked at is told of by the next round.
        self.marks.take_written();
        self.content().map_err(|error| {
            let path = self.path.display();
            GuestError::caused(format!("cannot tell what the disk {path} holds"), error)
        })
    }

    /// Blocks written since the last call; final once the guest is frozen.
    pub fn take_dirty(&self) -> BlockSet {
        self.marks.take_written()
    }

    /// Blocks that were read or written lately.
    pub fn accessed(&self) -> BlockSet {
        self.marks.lately_used(LATELY)
    }

    /// Copies one block; torn if the guest writes it meanwhile, and then it is told of again.
    pub fn read(&self, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        if block >= self.blocks || buf.len() != BLOCK {
            return Err(GuestError::new(format!(
                "the guest's disk has no block {block} of {} bytes",
                buf.len()
            )));
        }
        let offset = u64::from(block) * BLOCK as u64;
        self.file.read_exact_at(buf, offset).map_err(|error| {
            let path = self.path.display();
            GuestError::caused(format!("cannot read block {block} of {path}"), error)
        })
    }

    fn content(&self) -> io::Result<BlockSet> {
        let mut content = BlockSet::new();
        let end = u64::from(self.blocks) * BLOCK as u64;
        let mut at = 0;
        while at < end {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(Errno::NXIO) => break,
                Err(error) => return Err(error.into()),
            };
            let hole = seek(&self.file, SeekFrom::Hole(data))?.min(end);
            let block = BLOCK as u64;
            content.insert_range((data / block) as u32..hole.div_ceil(block) as u32);
            at = hole.max(at + 1);
        }
        Ok(content)
    }
}
