//! What the operator and the driver set for a source.

use std::collections::BTreeMap;
use std::time::Duration;

use hybridmig_transport::message::{Features, Mode, SessionId};

use super::planning::GuestUse;
use crate::blocks::RegionId;
use crate::plan::Limits;
use crate::predict::Costs;
use crate::profile::HeatRun;

/// What the operator and the driver set.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Name of the session.
    pub session: SessionId,
    /// How the phases are used.
    pub mode: Mode,
    /// Share of the memory that has content to move before the guest resumes (hybrid mode), 0 to 1.
    pub mem_frac: Option<f64>,
    /// The same of the disks.
    pub disk_frac: Option<f64>,
    /// The same of single disks, by name.
    pub disk_fracs: BTreeMap<String, f64>,
    /// Downtime never to exceed knowingly.
    pub max_downtime: Option<Duration>,
    /// The longest migration, as far as it can be planned.
    pub max_total: Option<Duration>,
    /// Predict only, and decide by the simple rule.
    pub observe: bool,
    /// What the steps of a handover cost, as far as it is known.
    pub costs: Costs,
    /// How the guest waits for what it lacks.
    pub guest: GuestUse,
    /// Heat that is known from an earlier look at the guest: runs of blocks and their levels.
    pub known_heat: Vec<(RegionId, Vec<HeatRun>)>,
    /// Downtime to aim at by the simple rule.
    pub target_downtime: Duration,
    /// Pre-copy rounds at most, the first pass included.
    pub max_rounds: u32,
    /// How long to wait for the other side before the session ends without it.
    pub patience: Duration,
    /// Pages of 4 KiB per chunk; a larger block goes by itself.
    pub chunk_pages: usize,
    /// Blocks of memory fetched around a fault, beside the one asked for; 0 turns the reading ahead on
    /// disks off, too.
    pub prefetch: u32,
    /// Least bound on the bytes in flight on the bulk lane.
    pub min_in_flight: u64,
    /// Greatest bound on the bytes in flight on the bulk lane.
    pub max_in_flight: u64,
    /// Shortest time between two scans: scanning costs the guest speed.
    pub min_round: Duration,
    /// Time between two scans in a round that takes longer: what the guest writes before it was sent
    /// need not be sent twice. At most [`SCAN_SHARE`] of the time goes to scans.
    pub scan_interval: Duration,
    /// Only run the checks of both sides.
    pub check_only: bool,
    /// Bits of [`Features`] to offer.
    pub features: u64,
    /// What the destination is told of this software.
    pub software: String,
}

/// The first scans come sooner, after these shares of the usual time: a guest that writes most of its memory within a
/// second shows only in less than that how fast it does, and whether it walks.
pub const FIRST_SCANS: [f64; 2] = [0.1, 0.4];
/// One in so many parts of a round may go to scans.
pub const SCAN_SHARE: u32 = 20;

impl SourceConfig {
    /// The defaults for a session of this name.
    pub fn new(session: SessionId, mode: Mode) -> Self {
        Self {
            session,
            mode,
            mem_frac: None,
            disk_frac: None,
            disk_fracs: BTreeMap::new(),
            max_downtime: None,
            max_total: None,
            observe: false,
            costs: Costs::assumed("qemu"),
            guest: GuestUse::default(),
            known_heat: Vec::new(),
            target_downtime: Duration::from_millis(150),
            max_rounds: 30,
            patience: Duration::from_secs(600),
            chunk_pages: 64,
            prefetch: 24,
            min_in_flight: 2 << 20,
            max_in_flight: 256 << 20,
            min_round: Duration::from_millis(100),
            scan_interval: Duration::from_secs(1),
            check_only: false,
            features: Features::ALL,
            software: concat!("hybridmig ", env!("CARGO_PKG_VERSION")).into(),
        }
    }

    /// Whether the operator has said how much is to move before the guest resumes.
    pub(super) fn has_share(&self) -> bool {
        self.mem_frac.is_some() || self.disk_frac.is_some() || !self.disk_fracs.is_empty()
    }

    pub(super) fn limits(&self) -> Limits {
        Limits {
            mode: self.mode,
            target: self.target_downtime,
            max_downtime: self.max_downtime,
            max_rounds: self.max_rounds.max(1),
        }
    }
}
