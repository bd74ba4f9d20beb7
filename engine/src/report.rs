//! The report of one run, written by `--json`. `docs/report.md` documents every field; the version
//! goes up when a field changes its meaning or goes away. Fields may be added within a version.

use std::time::Duration;

use hybridmig_transport::message::{
    DestinationSummary, GuestDescription, Mode, RegionInfo, ResumeTimings, SessionId,
};
use hybridmig_transport::{RepairStats, UrgentStats};
use serde::{Deserialize, Serialize};

use crate::agility::Agility;
use crate::driver::level::LevelsUsed;
pub use crate::journal::Side;
use crate::predict::Prediction;
use crate::session::io::LinkFigures;
use crate::session::source::PlanReport;

/// Version of the report's format.
pub const REPORT_VERSION: u32 = 1;

/// All that one side knows of a run when it has ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// [`REPORT_VERSION`].
    pub report_version: u32,
    /// Who wrote it.
    pub side: Side,
    /// `hybridmig X.Y.Z`.
    pub software: String,
    /// The other side's software, where it said.
    pub peer_software: Option<String>,
    /// Version of the protocol that was spoken.
    pub protocol_version: Option<u16>,
    /// The session, 16 hexadecimal digits.
    pub session: String,
    /// Seconds since 1970 when the session began, by this host's clock.
    pub started_unix: f64,
    /// How it ended: the outcome's name, and what it says.
    pub outcome: serde_json::Value,
    /// The guest.
    pub guest: Option<GuestDescription>,
    /// Its regions.
    pub regions: Vec<RegionInfo>,
    /// How it was moved.
    pub mode: Option<Mode>,
    /// Times in seconds.
    pub times: Times,
    /// Downtime by its parts, in seconds.
    pub downtime: Option<Downtime>,
    /// What was sent (source) or applied (destination), by phase.
    pub traffic: Vec<PhaseTraffic>,
    /// Memory and storage apart (source only).
    #[serde(default)]
    pub kinds: Option<Kinds>,
    /// Seeds, where there were any (destination only).
    #[serde(default)]
    pub seeds: Option<SeedsUsed>,
    /// Levels of compression on the bulk lane (source only).
    #[serde(default)]
    pub compression: Option<LevelsUsed>,
    /// What was predicted (source only), in the units of the outcome.
    #[serde(default)]
    pub prediction: Option<Predictions>,
    /// What was planned, and how (source only).
    #[serde(default)]
    pub plan: Option<PlanReport>,
    /// Pre-copy rounds (source only).
    pub rounds: Vec<Round>,
    /// Demand paging, as the destination saw it.
    pub faults: Option<Faults>,
    /// What the guest has done with its disks while they were served here (destination only).
    #[serde(default)]
    pub disk_io: Vec<DiskIo>,
    /// Lost work, PRA, T95.
    pub agility: Option<Agility>,
    /// Guest speed, v/v0, by seconds since the freeze (negative: before).
    pub speed: Vec<(f64, f64)>,
    /// Where `speed` comes from: `guest` (it counts its own work) or `blocked-time` (share of the
    /// vCPUs that did not wait for blocks).
    pub speed_source: Option<String>,
    /// The link at the end.
    pub link: Option<Link>,
    /// The guest's own verification of its contents, where it was asked for.
    pub verified: Option<Verified>,
    /// What an operator should know besides.
    pub notes: Vec<String>,
}

impl Report {
    /// A report with nothing in it yet.
    pub fn new(side: Side, session: SessionId, started_unix: f64) -> Self {
        Self {
            report_version: REPORT_VERSION,
            side,
            software: crate::SOFTWARE.to_owned(),
            peer_software: None,
            protocol_version: None,
            session: session.to_string(),
            started_unix,
            outcome: serde_json::Value::Null,
            guest: None,
            regions: Vec::new(),
            mode: None,
            times: Times::default(),
            downtime: None,
            traffic: Vec::new(),
            kinds: None,
            seeds: None,
            compression: None,
            prediction: None,
            plan: None,
            rounds: Vec::new(),
            faults: None,
            disk_io: Vec::new(),
            agility: None,
            speed: Vec::new(),
            speed_source: None,
            link: None,
            verified: None,
            notes: Vec::new(),
        }
    }
}

/// Times of a run, in seconds; absent where the run did not get that far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Times {
    /// Session begun → last block in place and released.
    pub total: f64,
    /// Session begun → guest runs at the destination ("remote up time").
    pub remote_up: Option<f64>,
    /// Length of the pre-copy phase.
    pub pre_copy: Option<f64>,
    /// Guest runs at the destination → last block in place.
    pub post_copy: Option<f64>,
}

/// Downtime by its parts, in seconds. Where the two hosts' clocks would have to be compared, half
/// the smallest round-trip time stands for the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    /// Guest stopped → guest runs, as far as the two sides can tell.
    pub total: f64,
    /// Stopping the guest.
    pub stop: f64,
    /// Final scan for dirty blocks.
    pub scan: f64,
    /// Saving the device state.
    pub save_state: f64,
    /// First frozen byte handed to the transport → all in place at the destination, the journal
    /// at the source included.
    pub transit: f64,
    /// Discarding stale blocks and arming the pager.
    pub discard: f64,
    /// Loading the device state, with the faults it causes.
    pub load: f64,
    /// The destination's journal.
    pub journal: f64,
    /// Starting the guest.
    pub resume: f64,
}

impl Downtime {
    /// Fills in the destination's parts.
    #[must_use]
    pub fn with_resume(mut self, timings: &ResumeTimings) -> Self {
        let seconds = |us: u64| Duration::from_micros(us).as_secs_f64();
        self.discard = seconds(timings.discard_us);
        self.load = seconds(timings.load_us);
        self.journal = seconds(timings.journal_us);
        self.resume = seconds(timings.resume_us);
        self
    }
}

/// Predictions, to be held against what came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Predictions {
    /// When the first scan had shown what the guest writes.
    pub at_start: Option<Prediction>,
    /// From what was known at the freeze.
    pub at_freeze: Option<Prediction>,
}

impl From<&PlanReport> for Predictions {
    fn from(plan: &PlanReport) -> Self {
        Self {
            at_start: plan.at_start.as_ref().map(|plan| plan.prediction),
            at_freeze: plan.at_freeze.as_ref().map(|plan| plan.prediction),
        }
    }
}

/// Memory and storage apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kinds {
    /// Of memory.
    pub memory: Kind,
    /// Of all disks.
    pub storage: Kind,
}

/// What moved of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kind {
    /// Blocks that had content when tracking began.
    pub content_blocks: u64,
    /// Blocks chosen to move in the freeze.
    pub freeze_set_blocks: u64,
    /// Blocks that stayed behind at the freeze.
    pub behind_blocks: u64,
    /// Blocks that the destination asked for.
    pub faults: u64,
    /// Bytes sent in batches while the guest ran at the source.
    pub pre_copy_bytes: u64,
    /// While it stood still.
    pub freeze_copy_bytes: u64,
    /// Since then.
    pub post_copy_bytes: u64,
}

impl Kind {
    /// Bytes sent in all phases.
    pub fn bytes(&self) -> u64 {
        self.pre_copy_bytes + self.freeze_copy_bytes + self.post_copy_bytes
    }
}

/// What moved in one phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PhaseTraffic {
    /// `pre-copy`, `freeze-copy` or `post-copy`.
    pub phase: String,
    /// By kind of record.
    pub codecs: Vec<CodecTraffic>,
}

/// What moved in one kind of record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodecTraffic {
    /// `zero`, `named`, `seeded`, `delta`, `zstd`, `raw` or `state`.
    pub codec: String,
    /// Blocks (for `state`: pieces).
    pub blocks: u64,
    /// Bytes of the blocks themselves.
    pub plain_bytes: u64,
    /// Bytes that they took in batches.
    pub wire_bytes: u64,
}

/// What came of seeds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedsUsed {
    /// The files.
    pub files: Vec<String>,
    /// Contents in them, each counted once, without zeroes.
    pub contents: u64,
    /// Length of a content.
    pub block_size: u32,
    /// Blocks copied from them.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks that were named and not there any more, and so sent in full.
    pub missed: u64,
    /// Files that were written to since they were read.
    pub changed: Vec<String>,
}

/// One round of pre-copy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Blocks handed out in it.
    pub blocks: u64,
    /// Bytes that they took on the wire.
    pub bytes: u64,
    /// Blocks written after they had been handed out.
    pub dirty_after: u64,
    /// Its length in seconds.
    pub seconds: f64,
}

/// Demand paging.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Faults {
    /// Faults that crossed the network.
    pub network: u64,
    /// Faults answered at the destination.
    pub local: u64,
    /// Of `network`: blocks that were on their way already, so that the source did not send them again
    /// (source only).
    #[serde(default)]
    pub on_the_way: u64,
    /// Latency of the network faults: (upper bound in ms, upper bound in units of the smallest RTT, count).
    pub latency: Vec<(f64, f64, u64)>,
    /// Median and 99th percentile in ms.
    pub p50_ms: f64,
    /// See `p50_ms`.
    pub p99_ms: f64,
    /// Sum over threads of the time they waited, in seconds.
    pub blocked: f64,
    /// The same by thread.
    pub blocked_threads: Vec<(String, f64)>,
}

impl Faults {
    /// From the destination's summary; `min_rtt` scales the histogram.
    pub fn from_summary(summary: &DestinationSummary, min_rtt: Duration) -> Self {
        let rtt_ms = min_rtt.as_secs_f64() * 1e3;
        let counted: u64 = summary
            .fault_latency_us
            .iter()
            .map(|(_, count)| count)
            .sum();
        let quantile = |share: f64| {
            let wanted = (counted as f64 * share).ceil().max(1.0) as u64;
            let mut seen = 0;
            for (bound, count) in &summary.fault_latency_us {
                seen += count;
                if seen >= wanted {
                    return *bound as f64 / 1e3;
                }
            }
            0.0
        };
        Self {
            network: summary.faults,
            local: summary.local_faults,
            on_the_way: 0,
            latency: summary
                .fault_latency_us
                .iter()
                .map(|(bound, count)| {
                    let ms = *bound as f64 / 1e3;
                    (ms, if rtt_ms > 0.0 { ms / rtt_ms } else { 0.0 }, *count)
                })
                .collect(),
            p50_ms: quantile(0.5),
            p99_ms: quantile(0.99),
            blocked: Duration::from_micros(summary.blocked_us).as_secs_f64(),
            blocked_threads: summary
                .blocked_threads
                .iter()
                .map(|(name, us)| (name.clone(), Duration::from_micros(*us).as_secs_f64()))
                .collect(),
        }
    }
}

/// What a guest has done with one of its disks while blocks of it were still arriving.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskIo {
    /// The disk's region.
    pub region: u16,
    /// Reads answered, and their latencies: median and 99th percentile, in ms.
    pub reads: u64,
    /// See `reads`.
    pub read_p50_ms: f64,
    /// See `reads`.
    pub read_p99_ms: f64,
    /// Writes answered, and the same of them.
    pub writes: u64,
    /// See `writes`.
    pub write_p50_ms: f64,
    /// See `writes`.
    pub write_p99_ms: f64,
    /// Requests that had to wait for a block from the source, and for how long in all, in seconds.
    pub waited: u64,
    /// See `waited`.
    pub waited_seconds: f64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// The link, as the transport of this side measured it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// Smallest round-trip time, in ms.
    pub min_rtt_ms: f64,
    /// Smoothed round-trip time at the end, in ms.
    pub rtt_ms: f64,
    /// Estimated rate in bytes/s.
    pub bandwidth: f64,
    /// Share of packets lost.
    pub loss: f64,
    /// Packets that are lost together, on average; 0 while nobody knows.
    #[serde(default)]
    pub loss_burst: f64,
    /// Time that packets lately waited at the bottleneck, in ms.
    #[serde(default)]
    pub queue_ms: f64,
    /// Whether others seemed to use the bottleneck as well.
    #[serde(default)]
    pub shared: bool,
    /// Bytes of all UDP payload sent by this side.
    pub sent_bytes: u64,
    /// Bytes of all UDP payload received by this side.
    pub received_bytes: u64,
    /// Times that the link was lost and came back.
    pub reconnects: u32,
    /// What the urgent lane's datagrams have done, on the last connection.
    #[serde(default)]
    pub urgent: UrgentStats,
    /// What parity has done for the streams of the freeze.
    #[serde(default)]
    pub repair: RepairStats,
    /// Longest time, in seconds, in which nothing was heard of the other side.
    #[serde(default)]
    pub longest_silence: f64,
}

impl From<LinkFigures> for Link {
    fn from(figures: LinkFigures) -> Self {
        Self {
            min_rtt_ms: figures.min_rtt.as_secs_f64() * 1e3,
            rtt_ms: figures.rtt.as_secs_f64() * 1e3,
            bandwidth: figures.bandwidth,
            loss: figures.loss,
            loss_burst: figures.loss_burst,
            queue_ms: figures.queue.as_secs_f64() * 1e3,
            shared: figures.shared,
            sent_bytes: 0,
            received_bytes: 0,
            reconnects: 0,
            urgent: UrgentStats::default(),
            repair: RepairStats::default(),
            longest_silence: 0.0,
        }
    }
}

/// The guest's own verification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Whether every block was right.
    pub ok: bool,
    /// Blocks verified.
    pub blocks: u64,
    /// What was wrong.
    pub error: Option<String>,
}

impl From<Result<u64, String>> for Verified {
    fn from(result: Result<u64, String>) -> Self {
        match result {
            Ok(blocks) => Self {
                ok: true,
                blocks,
                error: None,
            },
            Err(error) => Self {
                ok: false,
                blocks: 0,
                error: Some(error),
            },
        }
    }
}
