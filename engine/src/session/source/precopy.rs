//! The rounds: what is sent while the guest runs here, and the decision to freeze.

use std::time::Duration;

use super::config::{FIRST_SCANS, SCAN_SHARE};
use super::{ChunkBody, ChunkKind, Lane, RoundReport, RoundStart, SourceMachine, State};
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::plan::{self, Midway, Pace, RoundFigures, Share, Shares, Verdict};
use crate::session::io::{Chunk, Refer, SourceCommand, SourceOutcome};
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
    pub(super) fn accessed(&mut self, now: Duration, blocks: &Blocks) {
        self.heat
            .accessed(blocks, &self.populated, now.as_secs_f64());
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

    pub(super) fn scan(&mut self, now: Duration) {
        self.scan_began = now;
        self.command(SourceCommand::Scan);
    }

    /// Blocks that are to be handed out in this round.
    pub(super) fn left_of_round(&self) -> u64 {
        self.pending.len() + self.hot.len()
    }

    /// How long that takes, in seconds.
    fn left_seconds(&self) -> f64 {
        let (memory, disks) = self.pages_of([&self.pending, &self.hot]);
        self.estimator.seconds(memory, disks)
    }

    /// Whether the round's blocks are out, and so far on their way that a freeze would not wait for
    /// them.
    pub(super) fn round_is_out(&self) -> bool {
        self.left_of_round() == 0
            && self.resend.is_empty()
            && !self.scanning
            && self.in_flight_bytes <= self.drained()
    }

    /// Whether the round is long enough for a scan within it: now, and until its end.
    pub(super) fn scan_is_due(&self, now: Duration) -> bool {
        let usual = self.config.scan_interval;
        let made = self.heat.rates(RegionKind::Memory).scans() as usize;
        let wanted = FIRST_SCANS
            .get(made)
            .map_or(usual, |share| usual.mul_f64(*share));
        let interval = wanted.max(self.scan_takes.saturating_mul(SCAN_SHARE));
        !self.scanning
            && now >= self.last_scan.saturating_add(interval)
            && self.left_seconds() > interval.as_secs_f64() / 2.0
    }

    /// Whether what is handed out now may still be on its way when the round ends.
    pub(super) fn round_ends_soon(&self) -> bool {
        let left = self.left_seconds() * self.estimator.bandwidth();
        left <= 2.0 * self.drained() as f64
    }

    pub(super) fn pace(&self) -> Pace {
        Pace {
            send_rate: self.estimator.pages_per_second(),
            rtt: self.estimator.rtt(),
            parity: self.estimator.parity(),
            scan: self.scan_takes,
        }
    }

    /// A scan has been answered; what it means depends on when it was asked for.
    pub(super) fn scanned(&mut self, now: Duration, dirty: Blocks) {
        let within = std::mem::take(&mut self.scanning);
        let wanted = match self.state {
            State::Round => within,
            State::Scanning | State::FinalScan | State::LastScan => true,
            _ => false,
        };
        if !wanted {
            return;
        }
        self.heard = now;
        let interval = now.saturating_sub(self.last_scan);
        self.last_scan = now;
        let took = now.saturating_sub(self.scan_began);
        self.scan_takes = if self.scan_takes.is_zero() {
            took
        } else {
            (self.scan_takes + took) / 2
        };
        self.populated.union_with(&dirty);
        let seconds = interval.as_secs_f64();
        self.heat.scanned(&dirty, &self.populated, seconds);
        // Every version sent from here on supersedes those of before.
        self.pass += 1;
        match self.state {
            State::Round => self.written_meanwhile(now, dirty, interval),
            State::Scanning => self.round_done(now, dirty, interval),
            State::FinalScan => self.frozen_rest(now, dirty),
            _ => self.state_dirtied(now, dirty),
        }
    }

    /// What has been handed out in this round must go again in the next one. What has not goes last, as it
    /// is then: the guest may well write it once more before.
    fn written_meanwhile(&mut self, now: Duration, mut dirty: Blocks, interval: Duration) {
        let seconds = interval.as_secs_f64().max(1e-3);
        self.figures.dirty_rate = dirty.len() as f64 / seconds;
        self.warm(&dirty);
        let mut calm = self.pending.clone();
        calm.subtract(&dirty);
        let mut written = std::mem::replace(&mut self.pending, calm);
        written.subtract(&self.pending);
        self.hot.union_with(&written);
        dirty.subtract(&self.hot);
        dirty.subtract(&self.unsent);
        dirty.subtract(&self.again);
        self.again.union_with(&dirty);
        let calm = self.shapes.pages(&self.pending);
        let midway = Midway {
            send_rate: self.estimator.pages_per_second(),
            undone_rate: self.shapes.pages(&dirty) as f64 / seconds,
            calm: if self.only_hot { 0 } else { calm },
        };
        // A share that the operator named is sent whatever comes of it.
        let may_freeze = self.config.mode == Mode::Hybrid && !self.config.has_share();
        let freeze = if self.planned() {
            self.look_midway(now)
        } else {
            self.first_look(now);
            may_freeze && !midway.pays()
        };
        if freeze {
            let rest = self.left_of_round() + self.again.len() + self.resend.len();
            self.report_round(now, rest);
            self.enter(State::Draining);
        }
    }

    fn report_round(&mut self, now: Duration, dirty_after: u64) {
        let began = self.round_began;
        let pre = self.figures.precopy;
        self.figures.rounds.push(RoundReport {
            blocks: pre.blocks - began.blocks,
            bytes: pre.bytes - began.bytes,
            dirty_after,
            seconds: now.saturating_sub(began.at).as_secs_f64(),
        });
    }

    fn round_done(&mut self, now: Duration, dirty: Blocks, interval: Duration) {
        let dirty_count = dirty.len();
        self.only_hot = false;
        self.warm(&dirty);
        self.pending.union_with(&dirty);
        self.pending.union_with(&std::mem::take(&mut self.again));
        // What was never sent is not behind by having been written.
        self.pending.subtract(&self.unsent);
        let began = self.round_began;
        let pre = self.figures.precopy;
        self.report_round(now, self.pending.len());
        let rest = self.shapes.pages(&self.pending) + self.shapes.pages(&self.resend);
        let seconds = interval.as_secs_f64().max(1e-3);
        self.figures.dirty_rate = dirty_count as f64 / seconds;
        let figures = RoundFigures {
            round: self.figures.rounds.len() as u32,
            rest,
            rest_before: began.rest,
            dirty_rate: self.shapes.pages(&dirty) as f64 / seconds,
            pace: self.pace(),
        };
        self.round_began = RoundStart {
            at: now,
            rest,
            blocks: pre.blocks,
            bytes: pre.bytes,
        };
        let verdict = self.decider.after_round(figures);
        let verdict = if self.planned() {
            if self.look_after_round(now) {
                Verdict::Freeze
            } else {
                Verdict::Round
            }
        } else {
            self.first_look(now);
            verdict
        };
        match verdict {
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
                        self.hot.remove(region, *block);
                    }
                    let body = ChunkBody::Blocks { region, blocks };
                    return Some(self.chunk(Lane::Bulk, ChunkKind::Resend, body, Refer::Nothing));
                }
                if self.pending.is_empty() {
                    self.only_hot = true;
                    self.pending = std::mem::take(&mut self.hot);
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
