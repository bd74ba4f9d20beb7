//! Seeds: files of the destination that hold contents which the guest may have too, such as an old
//! copy of its disk, the image that it was made from, what an earlier migration left. They are read
//! once, before the destination listens; from then on a block with such contents is named by the
//! source and copied here.
//!
//! A seed is never written, and never trusted: what is copied from it is checked by its whole hash,
//! so that a file that has changed since costs a block sent again, and never gives a wrong byte.

mod read;

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use hybridmig_transport::codec::{MAX_SEED_PIECES, seed_name};
use hybridmig_transport::message::{MAX_SEED_NAMES, Message, RegionInfo};

/// Length of the blocks that seeds are read in, in bytes: that of a disk region's blocks.
pub const SEED_BLOCK: u32 = 64 << 10;

/// Most blocks of all seeds together: 1 TiB of [`SEED_BLOCK`]s, for which 256 MiB of memory are
/// needed here and 128 MiB at the source.
pub const MAX_SEED_BLOCKS: usize = MAX_SEED_PIECES * MAX_SEED_NAMES;

/// A file that cannot serve as a seed.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// It cannot be opened.
    #[error("the seed {} cannot be opened: name a file that can be read, or leave it out", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A directory, a pipe, a terminal.
    #[error("the seed {} is neither a file nor a block device: name a disk image", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// A part of it cannot be read.
    #[error(
        "the seed {} cannot be read at byte {offset}: leave it out, or copy what can be read of it",
        path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Blocks are counted in 32 bits.
    #[error("the seeds are longer than 2^32 blocks of {0} bytes together: leave one out")]
    TooLong(u32),
    /// No thread could be started.
    #[error("no thread to read the seeds with could be started")]
    Thread(#[source] std::io::Error),
}

/// How far the reading of seeds is, in bytes; holes count as read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeedProgress {
    /// Read so far.
    pub read: u64,
    /// Length of all files.
    pub total: u64,
}

/// One file, as it was when it was read.
#[derive(Debug)]
struct Seed {
    path: PathBuf,
    file: File,
    identity: Identity,
    /// Length in bytes.
    len: u64,
    /// When it was last written, in seconds and nanoseconds.
    written: (i64, i64),
    /// Number of its first block, over all files.
    first: u32,
}

/// What makes two names those of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Identity {
    File { device: u64, inode: u64 },
    Device(u64),
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self::Device(metadata.rdev())
        } else {
            Self::File {
                device: metadata.dev(),
                inode: metadata.ino(),
            }
        }
    }
}

/// Where a content is.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// [`seed_name`] of its BLAKE3.
    name: u64,
    /// Number of the block, over all files.
    at: u32,
}

/// The contents of some files, by name.
#[derive(Debug)]
pub struct Seeds {
    block_size: u32,
    files: Vec<Seed>,
    /// By ascending name; no name comes twice.
    entries: Vec<Entry>,
    cut_off: bool,
}

impl Seeds {
    /// Reads these files, in blocks of `block_size` bytes (a power of two; [`SEED_BLOCK`] for disks),
    /// on as many threads as there are cores. Holes are skipped, blocks of zeroes left out. What
    /// comes after [`MAX_SEED_BLOCKS`] blocks is not used ([`Self::cut_off`]). `progress` is called
    /// often, from all of the threads.
    pub fn read(
        paths: &[PathBuf],
        block_size: u32,
        progress: &(dyn Fn(SeedProgress) + Sync),
    ) -> Result<Self, SeedError> {
        read::read(paths, block_size, MAX_SEED_BLOCKS, progress)
    }

    /// Length of a block in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Number of contents, each counted once.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no content but zeroes.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether there were more than [`MAX_SEED_BLOCKS`] blocks.
    pub fn cut_off(&self) -> bool {
        self.cut_off
    }

    /// Whether there is something for any of these regions.
    pub fn serve(&self, regions: &[RegionInfo]) -> bool {
        let fits = |region: &RegionInfo| region.block_size == self.block_size;
        !self.is_empty() && regions.iter().any(fits)
    }

    /// The files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|seed| seed.path.as_path())
    }

    /// What the source is told: all names, in pieces.
    pub fn pieces(&self) -> impl Iterator<Item = Message> + '_ {
        self.entries
            .chunks(MAX_SEED_NAMES)
            .map(|entries| Message::Seeds {
                block_size: self.block_size,
                names: entries.iter().map(|entry| entry.name).collect(),
            })
    }

    /// Copies the content of this BLAKE3 into `buf`; false where none of its name and length is
    /// known, or it cannot be read any more. That the file still has it is for the caller to check.
    pub fn copy(&self, name: &[u8; 32], buf: &mut [u8]) -> bool {
        if buf.len() != self.block_size as usize {
            return false;
        }
        let name = seed_name(name);
        let Ok(index) = self.entries.binary_search_by_key(&name, |entry| entry.name) else {
            return false;
        };
        let at = self.entries[index].at;
        let seed = &self.files[self.files.partition_point(|seed| seed.first <= at) - 1];
        let offset = u64::from(at - seed.first) * u64::from(self.block_size);
        // The last block of a file may be a part of one.
        let len = seed.len.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (contents, rest) = buf.split_at_mut(len);
        rest.fill(0);
        match seed.file.read_exact_at(contents, offset) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!("the seed {} at {offset}: {error}", seed.path.display());
                false
            }
        }
    }

    /// Why this file, which is going to be written, must not be: it is one of the seeds, whose
    /// contents would go while they are needed.
    pub fn conflict(&self, written: &Path) -> Option<String> {
        // A file that is not there yet is none of the seeds.
        let identity = Identity::of(&std::fs::metadata(written).ok()?);
        let seed = self.files.iter().find(|seed| seed.identity == identity)?;
        Some(format!(
            "the seed {} is the file that the guest is written to ({}): move it aside (mv {0} \
             {0}.old), name the moved file with --seed, and let the guest be written to a new one",
            seed.path.display(),
            written.display(),
        ))
    }

    /// The files that were written to since they were read.
    pub fn changed(&self) -> Vec<&Path> {
        let changed = |seed: &&Seed| {
            seed.file.metadata().map_or(true, |metadata| {
                (metadata.mtime(), metadata.mtime_nsec()) != seed.written
            })
        };
        self.files
            .iter()
            .filter(changed)
            .map(|seed| seed.path.as_path())
            .collect()
    }
}

#[cfg(test)]
mod tests;
