//! What the source's machine tells of itself: progress while it works, figures for the report.

use std::time::Duration;

use hybridmig_transport::message::{DestinationSummary, RegionKind, ResumeTimings};
use serde::Serialize;

use super::{ChunkKind, SourceMachine, State};
use crate::blocks::Blocks;
use crate::report::{Kind, Kinds};
use crate::session::io::{LinkFigures, Phase};

/// Chunks handed out for one purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PhaseCount {
    /// Blocks.
    pub blocks: u64,
    /// Pages of 4 KiB that these blocks are long.
    pub pages: u64,
    /// Bytes on the wire, without QUIC's overhead.
    pub bytes: u64,
    /// Chunks.
    pub chunks: u64,
    /// Of the blocks: those of disks.
    pub disk_blocks: u64,
    /// Of the bytes: those of disks.
    pub disk_bytes: u64,
}

/// One pre-copy round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RoundReport {
    /// Blocks handed out in it.
    pub blocks: u64,
    /// Bytes sent during it.
    pub bytes: u64,
    /// Blocks that were found dirty after they had been handed out.
    pub dirty_after: u64,
    /// How long it took.
    pub seconds: f64,
}

/// When what happened, in time since the session began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SourceMilestones {
    /// The first link was up.
    pub connected: Option<Duration>,
    /// Dirty tracking was on.
    pub tracking: Option<Duration>,
    /// The guest was told to stop: downtime begins.
    pub freeze: Option<Duration>,
    /// The guest stood still.
    pub frozen: Option<Duration>,
    /// The final scan was done.
    pub scanned: Option<Duration>,
    /// The device state was saved.
    pub state_saved: Option<Duration>,
    /// The scan after it was done.
    pub last_scan: Option<Duration>,
    /// Ownership was recorded and sent.
    pub handover: Option<Duration>,
    /// The destination's acceptance arrived; the guest has been running there for about half a
    /// round trip.
    pub accepted: Option<Duration>,
    /// The destination's word that it has every block arrived.
    pub complete: Option<Duration>,
}

/// Figures for the report.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SourceFigures {
    /// When what happened.
    pub milestones: SourceMilestones,
    /// The rounds, the first pass included.
    pub rounds: Vec<RoundReport>,
    /// Blocks that had content when tracking began.
    pub populated: u64,
    /// Of these: those of disks.
    pub populated_disk: u64,
    /// Blocks chosen to move in the freeze.
    pub freeze_set: u64,
    /// Of these: those of disks.
    pub freeze_set_disk: u64,
    /// Blocks that stayed behind.
    pub behind: u64,
    /// Of these: those of disks.
    pub behind_disk: u64,
    /// Length of the device state in bytes.
    pub state_bytes: u64,
    /// Sent while the guest ran here.
    pub precopy: PhaseCount,
    /// The freeze set.
    pub freeze: PhaseCount,
    /// The device state (no blocks).
    pub state: PhaseCount,
    /// Pushed after the handover.
    pub push: PhaseCount,
    /// Sent around faults.
    pub prefetch: PhaseCount,
    /// Sent because the guest waited for it.
    pub urgent: PhaseCount,
    /// Sent again because the destination could not decode it.
    pub resent: PhaseCount,
    /// Bytes given to links that were lost before they were acknowledged.
    pub lost_bytes: u64,
    /// Blocks that the destination rejected.
    pub rejected: u64,
    /// Blocks that the destination asked for.
    pub faults: u64,
    /// Of these: blocks of disks.
    pub faults_disk: u64,
    /// Of these: blocks that were on their way already, and sooner there than an answer.
    pub faults_on_the_way: u64,
    /// Times the link came back.
    pub reconnects: u32,
    /// Distinct blocks dirtied per second, in the last round.
    pub dirty_rate: f64,
    /// Durations at the destination.
    pub resume_timings: Option<ResumeTimings>,
    /// What the destination saw.
    pub destination: Option<DestinationSummary>,
}

impl SourceFigures {
    pub(super) fn count(&mut self, kind: ChunkKind) -> &mut PhaseCount {
        match kind {
            ChunkKind::PreCopy => &mut self.precopy,
            ChunkKind::Freeze => &mut self.freeze,
            ChunkKind::State => &mut self.state,
            ChunkKind::Push => &mut self.push,
            ChunkKind::Prefetch => &mut self.prefetch,
            ChunkKind::Urgent => &mut self.urgent,
            ChunkKind::Resend => &mut self.resent,
        }
    }

    fn sum(&self, of: impl Fn(&PhaseCount) -> u64) -> u64 {
        [
            &self.precopy,
            &self.freeze,
            &self.state,
            &self.push,
            &self.prefetch,
            &self.urgent,
            &self.resent,
        ]
        .into_iter()
        .map(of)
        .sum()
    }

    /// Memory and storage apart, for the report.
    pub fn kinds(&self) -> Kinds {
        let post = [&self.push, &self.prefetch, &self.urgent];
        let of = |all: u64, disk: u64| (all - disk, disk);
        let bytes = |counts: &[&PhaseCount]| {
            let all = counts.iter().map(|count| count.bytes).sum();
            of(all, counts.iter().map(|count| count.disk_bytes).sum())
        };
        let content = of(self.populated, self.populated_disk);
        let frozen = of(self.freeze_set, self.freeze_set_disk);
        let behind = of(self.behind, self.behind_disk);
        let faults = of(self.faults, self.faults_disk);
        let pre = bytes(&[&self.precopy, &self.resent]);
        let freeze = bytes(&[&self.freeze]);
        let post = bytes(&post);
        let memory = Kind {
            content_blocks: content.0,
            freeze_set_blocks: frozen.0,
            behind_blocks: behind.0,
            faults: faults.0,
            pre_copy_bytes: pre.0,
            freeze_copy_bytes: freeze.0,
            post_copy_bytes: post.0,
        };
        let storage = Kind {
            content_blocks: content.1,
            freeze_set_blocks: frozen.1,
            behind_blocks: behind.1,
            faults: faults.1,
            pre_copy_bytes: pre.1,
            freeze_copy_bytes: freeze.1,
            post_copy_bytes: post.1,
        };
        Kinds { memory, storage }
    }

    /// Blocks handed out, for whatever purpose.
    pub fn blocks(&self) -> u64 {
        self.sum(|count| count.blocks)
    }

    /// Bytes on the wire, without QUIC's overhead.
    pub fn bytes(&self) -> u64 {
        self.sum(|count| count.bytes) + self.lost_bytes
    }
}

/// Where a session stands, for a progress bar.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SourceProgress {
    /// The phase.
    pub phase: Phase,
    /// Pre-copy rounds begun.
    pub round: u32,
    /// Pages of 4 KiB sent, for whatever purpose.
    pub pages_sent: u64,
    /// Pages of 4 KiB that this phase has still to send.
    pub pages_remaining: u64,
    /// Of these: those of disks.
    pub disk_pages_remaining: u64,
    /// Bytes sent.
    pub bytes_sent: u64,
    /// Bytes sent and not yet acknowledged as applied.
    pub in_flight: u64,
    /// Bytes per second that arrive.
    pub rate: f64,
    /// Until this phase has nothing left to send, at that rate.
    pub eta: Option<Duration>,
    /// Blocks that the destination asked for.
    pub faults: u64,
    /// How long the guest has been stopped, or was: until the destination's word arrived.
    pub downtime: Option<Duration>,
    /// Whether the link is up.
    pub linked: bool,
    /// Times the link came back.
    pub reconnects: u32,
    /// What the transport says of the link.
    pub link: LinkFigures,
    /// How long nothing has been heard of the destination, not even by its transport.
    pub silent: Duration,
    /// When the session stops waiting for it.
    pub gives_up_in: Option<Duration>,
}

impl SourceMachine {
    /// Where the session stands. How long the transport has been silent is for the driver to add.
    pub fn progress(&self, now: Duration) -> SourceProgress {
        let (memory, disks) = match self.state {
            State::Offered | State::Accepting | State::PostCopy => {
                self.pages_of([&self.remaining, &self.urgent_set, &self.resend])
            }
            _ => self.pages_of([&self.pending, &self.hot, &self.freeze_pending, &self.resend]),
        };
        let remaining = memory + disks;
        let eta = self.estimator.seconds(memory, disks);
        let milestones = &self.figures.milestones;
        SourceProgress {
            phase: self.phase(),
            round: match self.state {
                State::Round | State::Scanning => self.figures.rounds.len() as u32 + 1,
                _ => self.figures.rounds.len() as u32,
            },
            pages_sent: self.figures.sum(|count| count.pages),
            pages_remaining: remaining,
            disk_pages_remaining: disks,
            bytes_sent: self.figures.bytes(),
            in_flight: self.in_flight_bytes,
            rate: self.estimator.bandwidth(),
            eta: (remaining > 0)
                .then(|| Duration::try_from_secs_f64(eta).ok())
                .flatten(),
            faults: self.figures.faults,
            downtime: milestones
                .freeze
                .map(|freeze| milestones.accepted.unwrap_or(now).saturating_sub(freeze)),
            linked: self.link != super::Link::Down,
            reconnects: self.figures.reconnects,
            link: self.link_figures(),
            silent: Duration::ZERO,
            gives_up_in: self.waits_for_peer().then(|| {
                let until = self.heard.saturating_add(self.config.patience);
                until.saturating_sub(now)
            }),
        }
    }

    /// Pages of memory and of disks in these sets.
    pub(super) fn pages_of<const N: usize>(&self, sets: [&Blocks; N]) -> (u64, u64) {
        let of = |kind| {
            let pages = |set: &&Blocks| self.shapes.pages_of_kind(set, kind);
            sets.iter().map(pages).sum()
        };
        (of(RegionKind::Memory), of(RegionKind::Disk))
    }

    /// What the transport said of the link last.
    pub fn link_figures(&self) -> LinkFigures {
        self.estimator.link_figures()
    }
}
