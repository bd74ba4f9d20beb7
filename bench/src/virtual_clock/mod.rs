//! Whole migrations of the embedded guest under a virtual clock: both real session machines, the guest's true access
//! patterns, a model of the link and of what the steps cost. So fine sweeps over fixed fractions take seconds. What
//! it says is held against real runs: docs/bench/plan/virtual.md.
//!
//! Contents are versions, not bytes: a page that is read at the destination must have the version that it had at the
//! source, so a migration that loses a write fails here, too.

mod codec;
mod guest;
mod link;
mod sweep;
#[cfg(test)]
mod tests;
mod world;

use std::time::Duration;

use hybridmig_engine::guest::workload::Profile;
use hybridmig_engine::report::Predictions;
use hybridmig_engine::session::source::PlanReport;
use hybridmig_transport::message::Mode;
use serde::{Deserialize, Serialize};

pub use sweep::{compare, sweep, table};
pub use world::World;

/// One migration to be simulated.
#[derive(Clone, Debug)]
pub struct Setting {
    /// What the guest does.
    pub profile: Profile,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// Its disk in MiB.
    pub disk_mib: u64,
    /// Workers.
    pub threads: u32,
    /// Multiplies the profile's rates.
    pub rate_factor: f64,
    /// Seed of the guest.
    pub seed: u64,
    /// The link.
    pub link: hybridmig_netem::LinkSpec,
    /// How the phases are used.
    pub mode: Mode,
    /// The operator's share of memory.
    pub mem_frac: Option<f64>,
    /// The same of the disk.
    pub disk_frac: Option<f64>,
    /// The simple rule instead of the planner.
    pub observe: bool,
}

/// What the steps take, in seconds: medians of real runs of the embedded guest on an idle machine.
#[derive(Clone, Copy, Debug)]
pub struct Steps {
    /// Stopping the guest.
    pub stop: f64,
    /// A scan, and what each page of memory takes of it.
    pub scan: f64,
    /// See `scan`.
    pub scan_page: f64,
    /// Saving the state.
    pub save: f64,
    /// A journal record.
    pub journal: f64,
    /// Discarding stale blocks and arming, and what each page takes that is there.
    pub arm: f64,
    /// See `arm`.
    pub arm_page: f64,
    /// Loading the state.
    pub load: f64,
    /// Running the guest.
    pub resume: f64,
    /// Preparing the destination.
    pub prepare: f64,
}

impl Default for Steps {
    fn default() -> Self {
        Self {
            stop: 0.000_2,
            scan: 0.001,
            scan_page: 1.8e-7,
            save: 0.000_3,
            journal: 0.001,
            arm: 0.001_5,
            arm_page: 3e-7,
            load: 0.000_5,
            resume: 0.000_3,
            prepare: 0.05,
        }
    }
}

/// What a simulated migration came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Came {
    /// Session begun → released, seconds.
    pub total: f64,
    /// Guest stopped → guest runs, seconds.
    pub downtime: f64,
    /// Session begun → guest runs at the destination.
    pub remote_up: f64,
    /// L in seconds.
    pub lost_work: f64,
    /// T₉₅ in seconds from the freeze on.
    pub t95: Option<f64>,
    /// Bytes in batches.
    pub bytes: u64,
    /// Bytes of packets, with what had to be sent again and parity.
    pub sent: u64,
    /// Faults over the network.
    pub faults: u64,
    /// Rounds.
    pub rounds: usize,
    /// Blocks in the freeze set.
    pub freeze_set: u64,
    /// Blocks that stayed behind.
    pub behind: u64,
    /// Distinct pages of memory accessed in the ten seconds before the freeze (or since the beginning).
    pub working_set: u64,
    /// What was predicted.
    pub prediction: Predictions,
    /// What was planned.
    pub plan: PlanReport,
}

/// Seconds.
fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value.max(0.0))
}
