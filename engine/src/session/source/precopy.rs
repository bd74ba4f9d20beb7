//! The rounds: what is sent while the guest runs here, and the decision to freeze.

use std::time::Duration;

use super::{ChunkBody, ChunkKind, Lane, RoundReport, RoundStart, SourceMachine, State};
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::plan::{self, RoundFigures, Share, Shares, Verdict};
use crate::session::io::{Chunk, Refer, SourceOutcome};
use hybridmig_transport::message::{Mode, RegionInfo, RegionKind};

impl SourceMachine {
    /// Tracking is on: `populated` has content.
    pub(super) fn tracking(&mut self, now: Duration, populated: Blocks) {
        self.heard = now;
        self.figures.milestones.tracking = Some(now);
        self.figures.populated = populated.len();
        self.figures.populated_disk = self.shapes.on_disks(&populated);
        self.populated = populated;
        self.last_scan = now;
        self.round_began = RoundStart {
            at: now,
            ..RoundStart::default()
        };
        if self.config.mode == Mode::Postcopy {
            self.unsent = self.populated.clone();
            self.enter(State::Draining);
            return;
        }
        self.pending = self.populated.clone();
        if self.config.mode == Mode::Hybrid {
            let shares = self.shares();
            let mut first = self.shapes.of_kind(&self.pending, RegionKind::Memory);
            if let Some(share) = shares.memory {
                // Which pages are hot is not known yet, so the share is simply the lowest.
                first = self.heat.hottest(&first, share.pages());
            }
            first.union_with(&plan::disk_share(&shares, &self.pending, &self.heat));
            self.unsent = std::mem::replace(&mut self.pending, first);
            self.unsent.subtract(&self.pending);
        }
        self.round_began.rest = self.shapes.pages(&self.pending);
        self.enter(State::Round);
    }

    /// The operator's shares, which are of use in hybrid mode only.
    pub(super) fn shares(&self) -> Shares {
        if self.config.mode != Mode::Hybrid {
            return Shares::default();
        }
        let pages = |region: RegionId| {
            let blocks = self.populated.get(region).map_or(0, BlockSet::len);
            blocks * self.shapes.pages_per_block(region)
        };
        let memory = self.shapes.of_kind(&self.populated, RegionKind::Memory);
        let disk = |info: &RegionInfo| {
            let named = self.config.disk_fracs.get(&info.name).copied();
            let share = Share {
                fraction: named.or(self.config.disk_frac)?,
                populated: pages(info.id),
            };
            Some((info.id, share))
        };
        let disks = self.shapes.infos().iter();
        Shares {
            memory: self.config.mem_frac.map(|fraction| Share {
                fraction,
                populated: self.shapes.pages(&memory),
            }),
            disks: disks
                .filter(|info| info.kind == RegionKind::Disk)
                .filter_map(disk)
                .collect(),
        }
    }

    /// The guest has read or written these lately, as far as it can tell. What exists only counts.
    pub(super) fn accessed(&mut self, blocks: &Blocks) {
        self.heat.accessed(blocks);
        if matches!(self.state, State::Round | State::Scanning) {
            self.warm(blocks);
        }
    }

    /// What is used of a disk moves before the freeze, unless the operator has said how much of it does.
    fn warm(&mut self, used: &Blocks) {
        let shares = self.shares();
        for disk in self
            .shapes
            .disks()
            .filter(|disk| !shares.disks.contains_key(disk))
        {
            let Some((used, unsent)) = used.get(disk).zip(self.unsent.get(disk)) else {
                continue;
            };
            let found = used & unsent;
            *self.unsent.entry(disk) -= &found;
            *self.pending.entry(disk) |= found;
        }
    }

    pub(super) fn next_scan(&self) -> Duration {
        self.last_scan.saturating_add(self.config.min_round)
    }

    /// A scan has been answered; what it means depends on when it was asked for.
    pub(super) fn scanned(&mut self, now: Duration, dirty: Blocks) {
        if !matches!(
            self.state,
            State::Scanning | State::FinalScan | State::LastScan
        ) {
            return;
        }
        self.heard = now;
        let interval = now.saturating_sub(self.last_scan);
        self.last_scan = now;
        self.heat.scanned(&dirty);
        self.populated.union_with(&dirty);
        // Every version sent from here on supersedes those of before.
        self.pass += 1;
        match self.state {
            State::Scanning => self.round_done(now, dirty, interval),
            State::FinalScan => self.frozen_rest(now, dirty),
            _ => self.state_dirtied(now, dirty),
        }
    }

    fn round_done(&mut self, now: Duration, dirty: Blocks, interval: Duration) {
        let dirty_count = dirty.len();
        self.warm(&dirty);
        self.pending.union_with(&dirty);
        // What was never sent is not behind by having been written.
        self.pending.subtract(&self.unsent);
        let began = self.round_began;
        let pre = self.figures.precopy;
        self.figures.rounds.push(RoundReport {
            blocks: pre.blocks - began.blocks,
            bytes: pre.bytes - began.bytes,
            dirty_after: dirty_count,
            seconds: now.saturating_sub(began.at).as_secs_f64(),
        });
        let rest = self.shapes.pages(&self.pending) + self.shapes.pages(&self.resend);
        let seconds = interval.as_secs_f64().max(1e-3);
        self.figures.dirty_rate = dirty_count as f64 / seconds;
        let figures = RoundFigures {
            round: self.figures.rounds.len() as u32,
            rest,
            rest_before: began.rest,
            dirty_rate: self.shapes.pages(&dirty) as f64 / seconds,
            send_rate: self.estimator.pages_per_second(),
            rtt: self.estimator.rtt(),
        };
        self.round_began = RoundStart {
            at: now,
            rest,
            blocks: pre.blocks,
            bytes: pre.bytes,
        };
        match self.decider.after_round(figures) {
            Verdict::Round => self.enter(State::Round),
            Verdict::Freeze => self.enter(State::Draining),
            Verdict::NotConverged { reason } => {
                self.end_here(SourceOutcome::NotConverged { reason });
            }
        }
    }

    pub(super) fn bulk_chunk(&mut self) -> Option<Chunk> {
        if !self.bulk_has_room() {
            return None;
        }
        match self.state {
            State::Round => {
                let pages = self.config.chunk_pages;
                if let Some((region, blocks)) = self.shapes.pop(&mut self.resend, pages) {
                    for block in &blocks {
                        self.pending.remove(region, *block);
                    }
                    let body = ChunkBody::Blocks { region, blocks };
                    return Some(self.chunk(Lane::Bulk, ChunkKind::Resend, body, Refer::Nothing));
                }
                // Disks first: they change more slowly than memory.
                let (region, blocks) = self.shapes.pop_disks_first(&mut self.pending, pages)?;
                let body = ChunkBody::Blocks { region, blocks };
                Some(self.chunk(Lane::Bulk, ChunkKind::PreCopy, body, Refer::Anything))
            }
            State::Offered | State::Accepting | State::PostCopy => self.push_chunk(),
            _ => None,
        }
    }
}
