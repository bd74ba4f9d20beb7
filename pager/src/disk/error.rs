//! Errors of the disk pager.

use std::io;
use std::path::{Path, PathBuf};

use crate::PagerError;

/// Result of an operation on a disk.
pub type Result<T> = std::result::Result<T, DiskError>;

/// Why the disk pager could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// A file operation or system call failed.
    #[error("{action} failed")]
    Io {
        /// What was being done, and on what.
        action: String,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },

    /// The options contradict each other or a limit.
    #[error("unusable disk options: {reason}")]
    BadOptions {
        /// What is wrong.
        reason: String,
    },

    /// There is something in the place of the image or its map already.
    #[error("{path} exists and is not empty: move it away, or allow it to be overwritten")]
    Exists {
        /// The file.
        path: PathBuf,
    },

    /// Another process serves this image.
    #[error("{path} is in use by another disk pager: end that one first")]
    InUse {
        /// The file.
        path: PathBuf,
    },

    /// The image's file system keeps no holes.
    #[error("the file system of {path} cannot punch holes: use ext4, xfs, btrfs or tmpfs")]
    NoHoles {
        /// The image.
        path: PathBuf,
    },

    /// A map file is not one, or does not belong to its image.
    #[error("{path} is not a usable disk map: {reason}")]
    BadMap {
        /// The map file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },

    /// The former process ended before the disk was armed.
    #[error("{path} was never armed, the image may hold stale blocks: migrate again")]
    NeverArmed {
        /// The map file.
        path: PathBuf,
    },

    /// The operation does not fit the disk's state.
    #[error("{operation} is for a disk that {needed}, not for {image}")]
    WrongState {
        /// What was asked.
        operation: &'static str,
        /// The state that it needs.
        needed: &'static str,
        /// The image.
        image: PathBuf,
    },

    /// Blocks that the disk does not have.
    #[error("blocks {first}+{count} lie outside disk region {region} of {blocks} blocks")]
    OutOfRange {
        /// Region that was addressed.
        region: u16,
        /// First block.
        first: u32,
        /// Number of blocks.
        count: u64,
        /// Length of the disk in blocks.
        blocks: u32,
    },

    /// A buffer is empty or not a whole number of blocks.
    #[error("a buffer of {len} bytes is not a whole number of blocks of {block_size} bytes")]
    NotWholeBlocks {
        /// Its length.
        len: usize,
        /// Bytes of a block.
        block_size: u32,
    },

    /// The block has not arrived.
    #[error("block {block} of disk region {region} is missing")]
    Missing {
        /// The region.
        region: u16,
        /// The block.
        block: u32,
    },

    /// The disk is not complete.
    #[error("{count} blocks of {image} are still missing: it cannot be finished yet")]
    StillMissing {
        /// How many.
        count: u64,
        /// The image.
        image: PathBuf,
    },

    /// A server listens on the socket, or it is something else.
    #[error("cannot serve on {path}: {reason}")]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// What is there.
        reason: &'static str,
    },
}

impl DiskError {
    /// For `map_err`: what was done on which file.
    pub(super) fn io<E: Into<io::Error>>(
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(E) -> Self {
        let action = format!("{action} {}", path.display());
        move |source| Self::Io {
            action,
            source: source.into(),
        }
    }
}

impl From<PagerError> for DiskError {
    fn from(error: PagerError) -> Self {
        match error {
            PagerError::Os { action, source } => Self::Io { action, source },
            other => Self::Io {
                action: "paging".into(),
                source: io::Error::other(other),
            },
        }
    }
}
