//! Taking the guest over, or declining it.

use std::time::Duration;

use hybridmig_transport::message::{Message, Refusal, RefusalCode};

use super::{Awaited, Decline, DestinationMachine, Link, State, refusal};
use crate::blocks::Blocks;
use crate::session::io::{DestinationCommand, DestinationOutcome, DestinationRecord};

impl DestinationMachine {
    /// Goes on as soon as everything that the handover named is in place.
    pub(super) fn try_arm(&mut self, now: Duration) {
        let (State::Receiving, Some(handover)) = (self.state, self.handover) else {
            return;
        };
        let rejected = self
            .outstanding
            .iter_blocks()
            .any(|(region, block)| !self.behind.contains(region, block));
        if rejected || !self.applied.covers_below(handover.batches) {
            return;
        }
        self.timings.receive_us = micros(self.marks.first.unwrap_or(now), now);
        self.marks.step = now;
        self.missing = self.behind.clone();
        self.enter(now, State::Arming);
        self.command(DestinationCommand::Arm {
            behind: self.behind.clone(),
            postcopy_pass: handover.postcopy_pass,
        });
    }

    pub(super) fn armed(&mut self, now: Duration, mut missing: Blocks) {
        self.armed = true;
        missing.subtract(&std::mem::take(&mut self.gone_early));
        self.missing = missing;
        self.waiting = self.waiting.intersection(&self.missing);
        self.timings.discard_us = self.step(now);
        let Some(handover) = self.handover else {
            return;
        };
        self.enter(now, State::Loading);
        self.command(DestinationCommand::LoadState {
            len: handover.state_len,
            hash: handover.state_hash,
        });
    }

    pub(super) fn loaded(&mut self, now: Duration) {
        self.timings.load_us = self.step(now);
        let Some(session) = self.session else {
            return;
        };
        // Durable before the guest runs.
        self.enter(now, State::Accepting);
        self.command(DestinationCommand::Journal(DestinationRecord::Accepted {
            session,
        }));
    }

    pub(super) fn resumed(&mut self, now: Duration) {
        self.timings.resume_us = self.step(now);
        self.enter(now, State::PostCopy);
        self.send(Message::Accepted(self.timings));
        self.settle(now, &Blocks::new());
    }

    fn step(&mut self, now: Duration) -> u64 {
        let us = micros(self.marks.step, now);
        self.marks.step = now;
        us
    }

    pub(super) fn journaled(&mut self, now: Duration) {
        match self.state {
            State::Accepting => {
                self.accepted = true;
                self.timings.journal_us = self.step(now);
                self.enter(now, State::Resuming);
                self.command(DestinationCommand::Resume);
            }
            State::Completing => self.completed(now),
            State::Declining => self.declined(now),
            _ => {}
        }
    }

    pub(super) fn failed(&mut self, now: Duration, error: String) {
        let Some(command) = self.awaited.pop_front() else {
            self.warnings.push(error);
            return;
        };
        match (command, self.state) {
            (Awaited::Check, State::Checking)
            | (Awaited::Prepare, State::Preparing)
            | (Awaited::Arm, State::Arming)
            | (Awaited::LoadState, State::Loading)
            | (Awaited::Journal, State::Accepting)
            | (Awaited::Resume, State::Resuming) => {
                let code = match command {
                    Awaited::Arm | Awaited::LoadState | Awaited::Resume => RefusalCode::Load,
                    _ => RefusalCode::Other,
                };
                let refusal = refusal(code, error);
                let outcome = DestinationOutcome::Refused(refusal.clone());
                self.decline(now, refusal, outcome, false);
            }
            (Awaited::Disarm, State::Disarming) => {
                self.warnings.push(format!(
                    "every block is here, but the pager could not let go of the guest: {error}"
                ));
                self.disarmed(now);
            }
            (Awaited::Journal, State::Completing) => {
                self.warnings.push(format!(
                    "the completion could not be recorded in the journal: {error}"
                ));
                self.completed(now);
            }
            (Awaited::Abandon, State::Abandoning) if self.accepted => self.stuck(&format!(
                "the guest could not be started, and what is left of it could not be ended: {error}"
            )),
            (Awaited::Abandon, State::Abandoning) => {
                // It never ran here, and no acceptance is recorded: that holds all the same.
                self.warnings
                    .push(format!("what was prepared could not be ended: {error}"));
                self.abandoned(now);
            }
            // The pager failed first, as it does when the load has ended the guest's process: what the load
            // itself has to say tells why.
            (Awaited::LoadState, State::Abandoning) => self.decline_also(error),
            (Awaited::Journal, State::Declining) if self.accepted => self.stuck(&format!(
                "the guest could not be started, and that could not be recorded: {error}"
            )),
            (Awaited::Journal, State::Declining) => {
                // Without a record of acceptance nobody will ever run the guest here.
                self.warnings.push(format!(
                    "the refusal could not be recorded in the journal: {error}"
                ));
                self.declined(now);
            }
            _ => self.warnings.push(error),
        }
    }

    /// Acceptance is durable and cannot be taken back durably, so it is not taken back at all.
    fn stuck(&mut self, what: &str) {
        let why = self
            .decline
            .take()
            .map_or_else(String::new, |decline| format!(" ({})", decline.refusal));
        self.finish(DestinationOutcome::Failed {
            reason: format!("{what}{why}; the source keeps the guest frozen"),
        });
    }

    /// The guest will not run here. The source is told when that is beyond doubt: what was made
    /// ready is gone and the refusal is durable.
    pub(super) fn decline(
        &mut self,
        now: Duration,
        refusal: Refusal,
        outcome: DestinationOutcome,
        source_knows: bool,
    ) {
        if !self.prepared {
            if !source_knows {
                self.send(Message::Refuse(refusal));
            }
            self.finish(outcome);
            return;
        }
        self.decline = Some(Decline {
            refusal,
            outcome,
            source_knows,
        });
        self.enter(now, State::Abandoning);
        self.command(DestinationCommand::Abandon);
    }

    /// One more reason for what is being given up.
    fn decline_also(&mut self, reason: String) {
        let Some(decline) = &mut self.decline else {
            return;
        };
        if let DestinationOutcome::Refused(told) = &mut decline.outcome {
            told.reasons.push(reason.clone());
        }
        decline.refusal.reasons.push(reason);
    }

    pub(super) fn abandoned(&mut self, now: Duration) {
        let (Some(session), Some(decline)) = (self.session, &self.decline) else {
            return;
        };
        let record = DestinationRecord::Declined {
            session,
            reason: decline.refusal.to_string(),
        };
        self.enter(now, State::Declining);
        self.command(DestinationCommand::Journal(record));
    }

    fn declined(&mut self, now: Duration) {
        let Some(decline) = self.decline.clone() else {
            return;
        };
        if decline.source_knows {
            self.finish(decline.outcome);
            return;
        }
        self.enter(now, State::Declined);
        if std::mem::take(&mut self.status_owed) {
            self.status(now);
        } else if self.link == Link::Up {
            self.send(if self.handover.is_some() {
                Message::Declined(decline.refusal)
            } else {
                Message::Refuse(decline.refusal)
            });
        }
    }

    pub(super) fn finish_declined(&mut self) {
        if let Some(decline) = self.decline.take() {
            self.finish(decline.outcome);
        }
    }
}

fn micros(from: Duration, to: Duration) -> u64 {
    to.saturating_sub(from)
        .as_micros()
        .try_into()
        .unwrap_or(u64::MAX)
}
