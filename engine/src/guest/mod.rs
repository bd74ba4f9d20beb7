//! The seam to what is migrated. A guest is whatever implements [`SourceGuest`] on one host and
//! [`DestinationGuest`] on the other; the rest of the engine knows regions and blocks only.
//!
//! The methods block (they are ioctls and short dialogues with a VMM); the drivers call them from
//! threads of their own. They take `&self`: reading and placing blocks goes on beside the others.

mod folder;
pub mod paged_disks;
pub mod paging;
pub mod qemu;
pub mod workload;
pub mod xen;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hybridmig_transport::message::{GuestDescription, Offer, Refusal, RegionInfo};

use crate::blocks::{Blocks, RegionId};
use crate::profile::AccessSample;
use crate::report::DiskIo;
use crate::session::source::GuestUse;

/// What went wrong with a guest: what failed, on what, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct GuestError {
    what: String,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl GuestError {
    /// An error without a cause of its own.
    pub fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            source: None,
        }
    }

    /// An error caused by another.
    pub fn caused(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            what: what.into(),
            source: Some(source.into()),
        }
    }

    /// The whole chain in one line, for a peer or a log.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

/// Result of a guest operation.
pub type GuestResult<T> = Result<T, GuestError>;

/// Operations of a guest on one of its disks, since it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskCounts {
    /// The disk.
    pub region: RegionId,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes read and bytes written, where these are counted.
    pub bytes: Option<(u64, u64)>,
}

/// The guest on the host that it leaves.
pub trait SourceGuest: Send + Sync {
    /// What it is.
    fn describe(&self) -> &GuestDescription;

    /// Its regions, in the order of their ids.
    fn regions(&self) -> &[RegionInfo];

    /// Starts dirty tracking and returns the blocks that have content. Every other block reads as
    /// zero, until a scan reports it.
    fn start_tracking(&self) -> GuestResult<Blocks>;

    /// Blocks written (or punched) since the last call, tracking re-armed on them. May report a
    /// block that was not written, never misses one: a write that is still under way by DMA is
    /// reported again by a later call. On a frozen guest the result is final.
    fn take_dirty(&self) -> GuestResult<Blocks>;

    /// Blocks with content that the guest has accessed lately, read or written, as far as it can be
    /// told cheaply: those of disks that are to move first. Asked after [`Self::start_tracking`]
    /// and after [`Self::take_dirty`]; may be empty, and may be wrong.
    fn accessed(&self) -> Blocks {
        Blocks::new()
    }

    /// Which blocks of a sample the guest has read or written since the last call, where that can be had
    /// cheaply; begins the next sample. Asked after [`Self::take_dirty`] while the guest runs.
    fn access_samples(&self) -> Vec<AccessSample> {
        Vec::new()
    }

    /// Why [`Self::access_samples`] tells nothing, where it is known.
    fn access_samples_off(&self) -> Option<String> {
        Some("this kind of guest cannot tell what it reads".into())
    }

    /// What the guest has done with its disks since it was started, where that is counted.
    fn disk_counts(&self) -> GuestResult<Vec<DiskCounts>> {
        Ok(Vec::new())
    }

    /// How the guest waits for what it lacks, as far as it can be told.
    fn guest_use(&self) -> GuestUse {
        GuestUse::default()
    }

    /// Copies one block into `buf`, whose length is the region's block size. While the guest runs
    /// the copy may be torn; the block is then reported by a later [`Self::take_dirty`].
    fn read(&self, region: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()>;

    /// Stops the guest, with its I/O drained.
    fn freeze(&self) -> GuestResult<()>;

    /// Blocks of the frozen guest that have to be at the other host before it resumes there, because what would wait
    /// for them cannot. Asked after [`Self::freeze`].
    fn before_resume(&self) -> Blocks {
        Blocks::new()
    }

    /// The device state of the frozen guest.
    fn save_state(&self) -> GuestResult<Vec<u8>>;

    /// Lets the guest run again. Also ends dirty tracking. Legal after `start_tracking`, `freeze`
    /// and `save_state`, in every order of failures.
    fn thaw(&self) -> GuestResult<()>;

    /// The guest has left: ends what is left of it here. Never called before the destination has
    /// every block.
    fn release(&self) -> GuestResult<()>;

    /// Monotonic count of the work that the guest has done, where it can tell.
    fn work_done(&self) -> Option<u64> {
        None
    }
}

/// What a fault thread does with a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAnswer {
    /// The block has been asked for; who faulted waits.
    Requested,
    /// The block is known to be zero (or already here): resolve it at once.
    Zero,
}

/// Told of faults by the guest's pager, on its own threads. Must not block.
pub trait FaultSink: Send + Sync {
    /// The guest waits for a block.
    fn fault(&self, region: RegionId, block: u32) -> FaultAnswer;

    /// The guest gave these blocks back (`MADV_REMOVE`, balloon): they are zero from now on.
    fn removed(&self, region: RegionId, first: u32, count: u32);

    /// The pager cannot go on; the guest's threads wait until another pager takes over.
    fn failed(&self, error: GuestError);
}

/// How long the guest's threads waited for blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockedTime {
    /// Sum over the threads.
    pub total: Duration,
    /// Per thread: name or id, time; the most blocked first.
    pub threads: Vec<(String, Duration)>,
    /// Number of threads that run guest code (vCPUs, workers), to turn blocked time into lost
    /// speed.
    pub parallelism: u32,
}

/// The guest on the host that it comes to.
///
/// Order of calls: `check`, `prepare`, any number of `write`/`write_zero`/`read`, `arm`,
/// `load_state`, `resume`, any number of `place`/`place_zero`, `disarm`. `place` is legal from
/// `arm` on (loading the state faults too). `abandon` ends it anywhere before `resume`.
pub trait DestinationGuest: Send + Sync {
    /// Whether this guest could come here; changes nothing. Returns notes on what was checked.
    fn check(&self, offer: &Offer) -> Result<Vec<String>, Refusal>;

    /// Makes everything ready that blocks can be written into.
    fn prepare(&self, offer: &Offer) -> GuestResult<()>;

    /// Files and devices that blocks are written to, such as disk images, as far as they are known
    /// (all of them once prepared). None of them may be a seed.
    fn written_files(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Writes whole blocks before the pager is armed. `data` is a multiple of the block size.
    fn write(&self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()>;

    /// Makes blocks zero before the pager is armed.
    fn write_zero(&self, region: RegionId, first: u32, count: u32) -> GuestResult<()>;

    /// Copies one block, as written so far, into `buf`.
    fn read(&self, region: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()>;

    /// Discards every populated block in `missing` and every populated block that is not in
    /// `written` (device models populate memory too), then traps access to all that is not
    /// present and starts to tell `faults`. `written` holds every block that `write` has put in
    /// place.
    fn arm(
        &self,
        missing: &Blocks,
        written: &Blocks,
        faults: Arc<dyn FaultSink>,
    ) -> GuestResult<()>;

    /// Loads the device state. The guest does not run yet, but may fault.
    fn load_state(&self, state: &[u8]) -> GuestResult<()>;

    /// Runs the guest. It may fault before this returns.
    fn resume(&self) -> GuestResult<()>;

    /// Places whole blocks of an armed guest and wakes who waits for them. A block that is already
    /// present keeps its contents.
    fn place(&self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()>;

    /// Like `place`, with zeroes.
    fn place_zero(&self, region: RegionId, first: u32, count: u32) -> GuestResult<()>;

    /// Every block is here: stops trapping and lets go of the guest.
    fn disarm(&self) -> GuestResult<BlockedTime>;

    /// The guest will never run here: ends what was started for it.
    fn abandon(&self) -> GuestResult<()>;

    /// Monotonic count of the work that the guest has done, where it can tell.
    fn work_done(&self) -> Option<u64> {
        None
    }

    /// How long the guest's threads have waited so far.
    fn blocked_time(&self) -> BlockedTime {
        BlockedTime::default()
    }

    /// What the guest has done with its disks since they are served here.
    fn disk_io(&self) -> Vec<DiskIo> {
        Vec::new()
    }

    /// Asks the guest to verify all of its contents, where it can: number of blocks verified, or
    /// what is wrong.
    fn verify(&self) -> Option<Result<u64, String>> {
        None
    }
}
