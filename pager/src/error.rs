//! The one error type of this crate: each variant says what failed, on what, and what to do.

use std::io;
use std::path::PathBuf;

/// Result of a pager operation.
pub type Result<T> = std::result::Result<T, PagerError>;

/// Why the pager could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagerError {
    /// A system call or a file operation failed in a way that has no variant of its own.
    #[error("{action} failed")]
    Os {
        /// What was being done, and on what.
        action: String,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },

    /// The guest's process has ended.
    #[error("process {pid} of the guest has ended")]
    GuestGone {
        /// Its process id.
        pid: u32,
    },

    /// The memory's file system or the host has no room left.
    #[error(
        "no memory left for region {region} at block {block}: enlarge the tmpfs or the memory limit of the guest"
    )]
    OutOfMemory {
        /// Region that was written.
        region: u16,
        /// First block that found no room.
        block: u32,
    },

    /// A block number or range lies outside its region.
    #[error("blocks {first}+{count} lie outside region {region} of {blocks} blocks")]
    OutOfRange {
        /// Region that was addressed.
        region: u16,
        /// First block.
        first: u32,
        /// Number of blocks.
        count: u64,
        /// Length of the region in blocks.
        blocks: u32,
    },

    /// The region index is not one of this pager's.
    #[error("there is no region {region}")]
    NoSuchRegion {
        /// The index.
        region: u16,
    },

    /// A buffer is not a multiple of the page size, or empty.
    #[error("a buffer of {len} bytes is not a whole number of pages")]
    NotWholePages {
        /// Length of the buffer.
        len: usize,
    },

    /// The RAM file cannot be paged from outside.
    #[error("the RAM file cannot be paged: {reason}")]
    UnsuitableMemory {
        /// What is wrong with it and what to use instead.
        reason: String,
    },

    /// The guest's process does not map the RAM file, or not all of it, or not shared.
    #[error("process {pid} does not map {what}")]
    NotMapped {
        /// Process id.
        pid: u32,
        /// File and range.
        what: String,
    },

    /// The guest's process maps its memory elsewhere than when tracking began.
    #[error(
        "process {pid} changed how it maps region {region} while it was tracked: \
         writes may have been missed, migrate again"
    )]
    MappingsChanged {
        /// Process id.
        pid: u32,
        /// The region.
        region: u16,
    },

    /// The kernel lacks something that this side needs.
    #[error("Linux {release} is too old here: {missing} needs Linux {needed} or later")]
    KernelTooOld {
        /// Running release.
        release: String,
        /// What it lacks.
        missing: &'static str,
        /// First release that has it.
        needed: &'static str,
    },

    /// The userfaultfd lacks features that this use needs.
    #[error("the userfaultfd lacks {missing}; {hint}")]
    MissingFeatures {
        /// Names of the features.
        missing: String,
        /// What to do.
        hint: &'static str,
    },

    /// No userfaultfd may be created in or for a process.
    #[error("{who} may not create a userfaultfd that sees kernel faults: {hint}")]
    NotPermitted {
        /// Who was refused.
        who: String,
        /// What to do.
        hint: &'static str,
    },

    /// A thread of the guest could not be borrowed for a system call.
    #[error("cannot attach to process {pid}: {reason}")]
    Attach {
        /// Process id.
        pid: u32,
        /// What happened.
        reason: String,
    },

    /// The guest's process has no userfaultfd that a pager has armed.
    #[error(
        "process {pid} holds no userfaultfd that a pager has armed; if it was paged before and blocks were missing, \
         they are lost and it must not run on"
    )]
    NoTrap {
        /// Process id.
        pid: u32,
    },

    /// Pages that must be absent are still present after a hole was punched.
    #[error(
        "{count} pages of region {region} are still present after they were discarded \
         (huge pages in the RAM file?): mount the tmpfs with huge=never"
    )]
    NotDiscarded {
        /// The region.
        region: u16,
        /// How many.
        count: u64,
    },

    /// The guest must not be let go while blocks are missing: it would read zeroes.
    #[error("{count} blocks are still missing: the guest cannot be let go yet")]
    StillMissing {
        /// How many.
        count: u64,
    },

    /// The guest's memory layout kept changing for too long.
    #[error(
        "placing block {block} of region {region} was held up for {seconds} s \
         by a layout change that the guest does not finish"
    )]
    HeldUp {
        /// The region.
        region: u16,
        /// The block.
        block: u32,
        /// How long was tried.
        seconds: u64,
    },

    /// A map of missing blocks is not one, or is not of this guest.
    #[error("{path} is not a usable map of missing blocks: {reason}")]
    BadMissingMap {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },

    /// A pager ended before the guest's stale memory was discarded.
    #[error(
        "the guest was never armed for demand paging, its memory may hold stale blocks: end it and migrate again"
    )]
    NeverArmed,

    /// What came over the handover socket is not a handover.
    #[error("handover refused: {0}")]
    BadHandover(String),
}

impl PagerError {
    /// An [`PagerError::Os`] from whatever the system call wrapper returned.
    pub(crate) fn os(action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Os {
            action: action.into(),
            source: source.into(),
        }
    }
}
