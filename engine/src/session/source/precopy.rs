//! The rounds: what is sent while the guest runs here, and the decision to freeze.

use std::time::Duration;

use super::{ChunkBody, ChunkKind, Lane, RoundReport, RoundStart, SourceMachine, State};
use crate::blocks::Blocks;
use crate::plan::{RoundFigures, Share, Verdict};
use crate::session::io::{Chunk, Refer, SourceOutcome};
use hybridmig_transport::message::Mode;

impl SourceMachine {
    /// Tracking is on: `populated` has content.
    pub(super) fn tracking(&mut self, now: Duration, populated: Blocks) {
        self.heard = now;
        self.figures.milestones.tracking = Some(now);
        self.figures.populated = populated.len();
        self.populated = populated;
        self.last_scan = now;
        self.round_began = RoundStart {
            at: now,
            rest: self.populated.len(),
            ..RoundStart::default()
        };
        if self.config.mode == Mode::Postcopy {
            self.unsent = self.populated.clone();
            self.enter(State::Draining);
            return;
        }
        self.pending = self.populated.clone();
        if let Some(share) = self.share() {
            // Which blocks are hot is not known yet, so the share is simply the lowest blocks.
            let mut first = Blocks::new();
            let mut wanted = share.blocks();
            for (region, block) in self.pending.iter_blocks() {
                if wanted == 0 {
                    break;
                }
                wanted -= 1;
                first.insert(region, block);
            }
            self.unsent = std::mem::replace(&mut self.pending, first);
            self.unsent.subtract(&self.pending);
        }
        self.enter(State::Round);
    }

    pub(super) fn share(&self) -> Option<Share> {
        let fraction = self.config.mem_frac?;
        (self.config.mode == Mode::Hybrid).then(|| Share {
            fraction,
            populated: self.populated.len(),
        })
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
        let rest = self.pending.len() + self.resend.len();
        let figures = RoundFigures {
            round: self.figures.rounds.len() as u32,
            rest,
            rest_before: began.rest,
            dirty_rate: dirty_count as f64 / interval.as_secs_f64().max(1e-3),
            send_rate: self.estimator.blocks_per_second(),
            rtt: self.estimator.rtt(),
        };
        self.figures.dirty_rate = figures.dirty_rate;
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
                let limit = self.config.chunk_blocks.max(1);
                if let Some((region, blocks)) = self.resend.pop_front(limit) {
                    for block in &blocks {
                        self.pending.remove(region, *block);
                    }
                    let body = ChunkBody::Blocks { region, blocks };
                    return Some(self.chunk(Lane::Bulk, ChunkKind::Resend, body, Refer::Nothing));
                }
                let (region, blocks) = self.pending.pop_front(limit)?;
                let body = ChunkBody::Blocks { region, blocks };
                Some(self.chunk(Lane::Bulk, ChunkKind::PreCopy, body, Refer::Anything))
            }
            State::Offered | State::Accepting | State::PostCopy => self.push_chunk(),
            _ => None,
        }
    }
}
