//! What is known of a guest: how often its blocks are written and accessed, what they hold, how that is
//! spread. It is the input of the predictor ([`crate::predict`]).
//!
//! Blocks are not looked at one by one there, but by **level**: the level of a block is the history of its
//! last eight scans, one bit each, the newest on top (see [`crate::plan::Heat`]). How often the blocks of a
//! level are written is not assumed from the bits, but counted: of the blocks that had this history at a
//! scan, so many were written by the next ([`rates`]).

pub mod collect;
pub mod contents;
pub mod file;
pub mod map;
pub mod rates;
pub mod spread;
pub mod windows;

use serde::{Deserialize, Serialize};

use hybridmig_transport::message::RegionKind;

use crate::blocks::{BlockSet, RegionId};

/// Version of the profile's JSON.
pub const PROFILE_VERSION: u32 = 1;

/// Which of a sample of blocks the guest has accessed (read or written) in an interval.
#[derive(Clone, Debug)]
pub struct AccessSample {
    /// Their region.
    pub region: RegionId,
    /// The blocks that were watched.
    pub watched: BlockSet,
    /// Those of them that were accessed.
    pub accessed: BlockSet,
    /// Length of the interval in seconds.
    pub seconds: f64,
}

/// Blocks that behave alike.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HotnessClass {
    /// Their level: the history of scans.
    pub level: u8,
    /// How many, in pages of 4 KiB.
    pub pages: f64,
    /// Writes of one page per second, each interval's first one counted (a Poisson rate: in `t` seconds
    /// a page is written with probability `1 − exp(−writes·t)`).
    pub writes: f64,
    /// Accesses of one page per second, reads and writes, in the same sense.
    pub accesses: f64,
}

/// What the blocks of a region hold, as shares of its content, 0 to 1, found in a sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Contents {
    /// Blocks looked at.
    pub sampled: u64,
    /// All zero.
    pub zero: f64,
    /// The same as another one of the sample.
    pub duplicate: f64,
    /// Bytes on the wire per page of 4 KiB that is neither.
    pub bytes_per_page: f64,
}

impl Contents {
    /// Bytes on the wire per page of content; `None` where nobody has looked.
    pub fn mean_bytes(&self) -> Option<f64> {
        let small = self.zero + self.duplicate;
        let rest = (1.0 - small).max(0.0) * self.bytes_per_page;
        (self.sampled > 0).then_some(small * NAMED_BYTES + rest)
    }
}

/// Bytes of a page that is all zero, or that is named.
const NAMED_BYTES: f64 = 20.0;

/// A number of distinct pages over a time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Distinct {
    /// Length of the interval in seconds.
    pub seconds: f64,
    /// Distinct pages written in it.
    pub written: f64,
    /// Distinct pages accessed in it, where that is known.
    pub accessed: Option<f64>,
}

/// Blocks of one level: the first, how many, the level.
pub type HeatRun = (u32, u32, u8);

/// How a guest uses one region.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RegionProfile {
    /// Its name.
    pub name: String,
    /// Memory or disk.
    pub kind: RegionKind,
    /// Bytes per block.
    pub block_size: u32,
    /// Blocks, with content or without.
    pub blocks: u32,
    /// Pages of 4 KiB with content.
    pub content_pages: u64,
    /// What they hold.
    pub contents: Contents,
    /// The blocks with content by hotness, the hottest first.
    pub classes: Vec<HotnessClass>,
    /// Distinct pages by interval, ascending: the re-dirty curve and the working set.
    pub distinct: Vec<Distinct>,
    /// How what is used lies.
    pub spread: spread::Spread,
    /// Level of runs of blocks: first block, number, level; ascending, gaps have level 0.
    pub heat: Vec<HeatRun>,
}

/// How a guest uses its memory and its disks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// [`PROFILE_VERSION`].
    pub profile_version: u32,
    /// The guest, as it describes itself.
    pub guest: String,
    /// Kind of guest: `qemu`, `workload`, …
    pub guest_kind: String,
    /// Seconds since 1970 when it was taken.
    pub taken_unix: f64,
    /// How long the guest was watched, in seconds.
    pub seconds: f64,
    /// Threads that run guest code (vCPUs, workers).
    pub parallelism: u32,
    /// Work per second, where the guest counts it.
    pub work_per_second: Option<f64>,
    /// Share of its speed that watching cost, where that could be measured.
    pub watching_cost: Option<f64>,
    /// Whether reads are in the access rates (sampled), or these were assumed from the writes.
    pub reads_seen: bool,
    /// Its regions, in the order of their ids.
    pub regions: Vec<RegionProfile>,
    /// What an operator should know besides.
    pub notes: Vec<String>,
}
