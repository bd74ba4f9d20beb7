//! The freeze, the passing of ownership, and the answer.

use std::time::Duration;

use hybridmig_transport::message::{Message, Mode, Standing};

use super::{ChunkBody, ChunkKind, Lane, Link, RegionId, STATE_PIECE, SourceMachine, State};
use crate::blocks::Blocks;
use crate::plan::{self, FreezeSplit, PushOrder, Rest};
use crate::session::io::{Chunk, Refer, SourceCommand, SourceOutcome, SourceRecord};
use crate::session::pieces;

impl SourceMachine {
    /// The guest stands still and this is all it has written since the last round.
    pub(super) fn frozen_rest(&mut self, now: Duration, dirty: Blocks) {
        self.figures.milestones.scanned = Some(now);
        let unsent = std::mem::take(&mut self.unsent);
        let mut stale = std::mem::take(&mut self.pending);
        stale.union_with(&dirty);
        stale.union_with(&std::mem::take(&mut self.hot));
        stale.union_with(&std::mem::take(&mut self.again));
        stale.union_with(&std::mem::take(&mut self.resend));
        // What was never sent is not stale by having been written.
        stale.subtract(&unsent);
        let rest = Rest { stale, unsent };
        let FreezeSplit {
            mut freeze,
            mut behind,
        } = if self.planned() {
            let (memory, disks) = self.divide(&rest);
            plan::split_as_planned(rest, &self.heat, memory, disks)
        } else {
            let split = plan::split_at_freeze(
                &self.config.limits(),
                &self.shares(),
                rest,
                &self.heat,
                &self.pace(),
            );
            self.divided(&split.freeze, &split.behind);
            split
        };
        let needed = behind.intersection(&self.needed);
        behind.subtract(&needed);
        freeze.union_with(&needed);
        self.figures.freeze_set = freeze.len();
        self.figures.freeze_set_disk = self.shapes.on_disks(&freeze);
        self.freeze_pending = freeze;
        self.leave_behind(&behind);
        self.enter(State::Saving);
        self.command(SourceCommand::SaveState);
    }

    fn leave_behind(&mut self, blocks: &Blocks) {
        for (region, blocks) in pieces::split(blocks) {
            self.behind_pieces += 1;
            self.send(Message::Behind { region, blocks });
        }
        self.behind.union_with(blocks);
        self.figures.behind = self.behind.len();
        self.figures.behind_disk = self.shapes.on_disks(&self.behind);
    }

    pub(super) fn state_saved(&mut self, now: Duration, len: u64, hash: [u8; 32]) {
        self.heard = now;
        self.figures.milestones.state_saved = Some(now);
        self.figures.state_bytes = len;
        self.state_len = len;
        self.state_hash = hash;
        self.enter(State::LastScan);
        self.scan(now);
    }

    /// What saving the state has dirtied (nothing, as far as was seen). Those blocks move in the
    /// freeze unless they stay behind anyway; what was never sent at all stays behind.
    pub(super) fn state_dirtied(&mut self, now: Duration, mut dirty: Blocks) {
        self.figures.milestones.last_scan = Some(now);
        dirty.subtract(&self.behind);
        if self.config.mode == Mode::Postcopy {
            let needed = dirty.intersection(&self.needed);
            dirty.subtract(&needed);
            self.freeze_pending.union_with(&needed);
            self.leave_behind(&dirty);
        } else {
            self.freeze_pending.union_with(&dirty);
        }
        self.postcopy_pass = self.pass;
        self.enter(State::FreezeCopy);
    }

    /// Freeze lane: what was rejected, the freeze set, the state, and after that the
    /// neighbourhoods of faults.
    pub(super) fn freeze_chunk(&mut self) -> Option<Chunk> {
        let frozen = matches!(
            self.state,
            State::Saving
                | State::LastScan
                | State::FreezeCopy
                | State::Offering
                | State::Offered
                | State::Accepting
                | State::PostCopy
        );
        if !frozen || self.flights.len() >= 4 * super::MAX_FLIGHTS {
            return None;
        }
        let pages = self.config.chunk_pages;
        if let Some((region, blocks)) = self.shapes.pop(&mut self.resend, pages) {
            let body = ChunkBody::Blocks { region, blocks };
            return Some(self.chunk(Lane::Freeze, ChunkKind::Resend, body, Refer::Nothing));
        }
        if let Some((region, blocks)) = self.shapes.pop(&mut self.freeze_pending, pages) {
            let body = ChunkBody::Blocks { region, blocks };
            return Some(self.chunk(Lane::Freeze, ChunkKind::Freeze, body, Refer::Itself));
        }
        if self.state_next < self.state_len {
            let offset = self.state_next;
            let len = STATE_PIECE.min(self.state_len - offset) as u32;
            self.state_next += u64::from(len);
            let body = ChunkBody::State { offset, len };
            return Some(self.chunk(Lane::Freeze, ChunkKind::State, body, Refer::Nothing));
        }
        self.prefetch_chunk()
    }

    pub(super) fn journaled(&mut self, now: Duration) {
        self.heard = now;
        match self.state {
            State::Offering => match self.withdrawn.take() {
                // The handover was never sent, so nobody else can have accepted it.
                Some(outcome) => self.decline(outcome),
                None => self.hand_over(now),
            },
            State::Accepting => self.begin_postcopy(now),
            State::Completing => self.release(),
            State::Declining => self.thaw(),
            _ => {}
        }
    }

    pub(super) fn journal_failed(&mut self, now: Duration, error: String) {
        match self.state {
            State::Offering => {
                let outcome = self.withdrawn.take().unwrap_or(SourceOutcome::Cancelled {
                    reason: format!("the handover could not be recorded: {error}"),
                });
                self.end_here(outcome);
            }
            // What follows is the destination's word, of which it has its own record.
            State::Accepting => {
                self.not_recorded("the acceptance", &error);
                self.begin_postcopy(now);
            }
            State::Completing => {
                self.not_recorded("the completion", &error);
                self.release();
            }
            State::Declining => {
                self.not_recorded("the refusal", &error);
                self.thaw();
            }
            _ => self.warnings.push(error),
        }
    }

    fn not_recorded(&mut self, what: &str, error: &str) {
        self.warnings.push(format!(
            "{what} could not be recorded in the journal: {error}"
        ));
    }

    fn thaw(&mut self) {
        if let Some(outcome) = self.ending.take() {
            self.end_here(outcome);
        }
    }

    fn hand_over(&mut self, now: Duration) {
        self.figures.milestones.handover = Some(now);
        self.enter(State::Offered);
        self.remaining = self.behind.clone();
        self.order = PushOrder::new(&self.remaining, &self.heat);
        self.send(Message::Handover {
            batches: self.next_batch,
            postcopy_pass: self.postcopy_pass,
            state_len: self.state_len,
            state_hash: self.state_hash,
            behind_pieces: self.behind_pieces,
        });
    }

    /// The link is back, and this is where the destination stands.
    pub(super) fn resumed(&mut self, now: Duration) {
        let Some(standing) = self.resumed_standing.take() else {
            return;
        };
        self.link = Link::Up;
        let missing = std::mem::take(&mut self.missing);
        match (standing, self.state) {
            (Standing::Refused(refusal), State::Offered) => {
                self.decline(SourceOutcome::of_refusal(refusal));
            }
            (Standing::Preparing, State::Offered) => {
                // What was on its way is lost. It could be sent again, but the guest has stood
                // still for long already: it is to decline, and the guest goes on here.
                self.send(Message::Cancel {
                    reason: "the link was lost during the handover".into(),
                });
            }
            (Standing::Loading, State::Offered) => self.remains(missing),
            (Standing::Accepted, State::Offered) => {
                self.remains(missing);
                self.figures.milestones.accepted.get_or_insert(now);
                self.enter(State::Accepting);
                self.command(SourceCommand::Journal(SourceRecord::Accepted));
            }
            (Standing::Accepted, State::Accepting | State::PostCopy) => self.remains(missing),
            (Standing::Complete, State::Offered) => {
                self.figures.milestones.accepted.get_or_insert(now);
                self.figures.milestones.complete.get_or_insert(now);
                self.enter(State::Accepting);
                self.command(SourceCommand::Journal(SourceRecord::Accepted));
            }
            (Standing::Complete, State::Accepting) => {
                self.figures.milestones.complete.get_or_insert(now);
            }
            (Standing::Complete, State::PostCopy) => self.complete(now),
            (Standing::Refused(refusal), _) => self.violation(&format!(
                "it refuses a guest that it has accepted: {refusal}"
            )),
            (Standing::Preparing | Standing::Loading, _) => {
                self.violation("it still prepares a guest that it has accepted");
            }
            (Standing::Accepted | Standing::Complete, _) => {}
        }
    }

    /// The destination lacks exactly these.
    fn remains(&mut self, missing: Blocks) {
        self.remaining = missing;
        self.order = PushOrder::new(&self.remaining, &self.heat);
    }

    /// The destination's requests must be for blocks that exist, and only when ownership has been
    /// sent: before it nothing can be missing there.
    pub(super) fn fetch(&mut self, now: Duration, region: RegionId, blocks: &[u32]) {
        match self.state {
            State::Offered | State::Accepting | State::PostCopy => {}
            State::Completing | State::Releasing | State::Declining | State::Thawing => return,
            _ => {
                self.violation("a fetch before the handover");
                return;
            }
        }
        if blocks.len() > 1024 {
            self.violation(&format!("a fetch of {} blocks at once", blocks.len()));
            return;
        }
        if let Err(what) = pieces::check(self.shapes.infos(), region, blocks.iter().copied().max())
        {
            self.violation(&what);
            return;
        }
        for block in blocks {
            self.requested(now, region, *block);
        }
    }
}
