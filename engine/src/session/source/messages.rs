//! What the source makes of each message: in which states it is legal and where it leads. A message
//! that is not legal breaks the protocol; nothing a peer sends can make the guest run twice.

use std::time::Duration;

use hybridmig_transport::message::{Message, Refusal, RefusalCode, Standing};

use super::{Link, SourceMachine, State};
use crate::blocks::{BlockSet, RegionId};
use crate::session::io::{SourceCommand, SourceOutcome, SourceRecord};
use crate::session::pieces;

impl SourceMachine {
    pub(super) fn message(&mut self, now: Duration, message: Message) {
        if self.link == Link::Down {
            return;
        }
        self.heard = now;
        match message {
            Message::Welcome { version, .. } => self.welcomed(version),
            Message::Refuse(refusal) => self.refused(refusal),
            Message::Ready { notes } => self.ready(notes),
            Message::Applied { batches, rejected } => self.applied(now, &batches, &rejected),
            Message::Accepted(timings) => {
                self.figures.resume_timings = Some(timings);
                self.accepted(now);
            }
            Message::Declined(refusal) => self.declined(refusal),
            Message::Fetch { region, blocks } => self.fetch(now, region, &blocks),
            Message::AllPlaced(summary) => {
                self.figures.destination = Some(summary);
                self.all_placed(now);
            }
            Message::Cancel { reason } => self.peer_cancelled(reason),
            Message::Status {
                standing,
                missing_pieces,
            } => self.status(now, standing, missing_pieces),
            Message::Missing { region, blocks } => self.missing_piece(now, region, blocks),
            // The data plane takes those that come where they belong.
            Message::Seeds { .. } => self.violation("names of seeds on the control lane"),
            other @ (Message::Hello { .. }
            | Message::Offer(_)
            | Message::Behind { .. }
            | Message::Handover { .. }
            | Message::Released) => {
                self.violation(&format!("{} is not its to send", name(&other)));
            }
        }
    }

    fn welcomed(&mut self, version: u16) {
        match (self.state, self.link) {
            (State::AwaitWelcome, Link::Up) => {
                if self.welcome(version) {
                    self.enter(State::AwaitReady);
                }
            }
            (_, Link::Greeting) => {
                if self.welcome(version) {
                    self.link = Link::AwaitStatus;
                }
            }
            _ => self.violation("a welcome that no hello asked for"),
        }
    }

    fn ready(&mut self, notes: Vec<String>) {
        if self.state != State::AwaitReady {
            self.violation("a second 'ready'");
            return;
        }
        self.notes.clone_from(&notes);
        if self.config.check_only {
            self.finish(SourceOutcome::Checked { notes });
            return;
        }
        self.touched = true;
        self.enter(State::StartTracking);
        self.command(SourceCommand::StartTracking);
    }

    /// A refusal is the destination's word that it has not accepted and never will, if it is given
    /// on the link that carried the offer. On a resumed link it may come from a destination that
    /// knows nothing of the session, and then proves nothing.
    fn refused(&mut self, refusal: Refusal) {
        if self.withdraw(SourceOutcome::of_refusal(refusal.clone())) {
            return;
        }
        match (self.state, self.link) {
            (State::Offered, Link::Up) if self.figures.reconnects == 0 => self.declined(refusal),
            (State::Offered | State::Accepting | State::PostCopy, _)
                if refusal.code == RefusalCode::UnknownSession =>
            {
                self.give_up(format!(
                    "the destination does not know the session any more: {refusal}"
                ));
            }
            (State::Offered | State::Accepting | State::PostCopy, _) => {
                self.drop_link(format!("the destination refuses to resume: {refusal}"));
            }
            _ => {}
        }
    }

    fn peer_cancelled(&mut self, reason: String) {
        let reason = format!("cancelled by the destination: {reason}");
        let outcome = SourceOutcome::Cancelled { reason };
        if self.withdraw(outcome.clone()) {
            return;
        }
        match self.state {
            // Sent before the handover had reached it, and durable before it was sent.
            State::Offered if self.link == Link::Up && self.figures.reconnects == 0 => {
                self.decline(outcome);
            }
            State::Offered | State::Accepting | State::PostCopy => {
                self.violation("a cancel after the handover");
            }
            _ => {}
        }
    }

    fn declined(&mut self, refusal: Refusal) {
        let outcome = SourceOutcome::of_refusal(refusal);
        // Not expected before the handover, but it says nothing that is unsafe then.
        if self.withdraw(outcome.clone()) {
            return;
        }
        match self.state {
            State::Offered => self.decline(outcome),
            State::Accepting | State::PostCopy => {
                self.violation("it declines a guest that it has accepted");
            }
            _ => {}
        }
    }

    /// The destination's word is there: record it, then thaw.
    pub(super) fn decline(&mut self, outcome: SourceOutcome) {
        let reason = match &outcome {
            SourceOutcome::Refused(refusal) => refusal.to_string(),
            SourceOutcome::Cancelled { reason } => reason.clone(),
            _ => "declined".into(),
        };
        self.ending = Some(outcome);
        self.enter(State::Declining);
        self.command(SourceCommand::Journal(SourceRecord::Declined { reason }));
    }

    fn accepted(&mut self, now: Duration) {
        match self.state {
            State::Offered => {
                self.figures.milestones.accepted.get_or_insert(now);
                self.enter(State::Accepting);
                self.command(SourceCommand::Journal(SourceRecord::Accepted));
            }
            // Said again after a lost link.
            State::Accepting | State::PostCopy => {}
            State::Completing | State::Releasing => {}
            _ => self.violation("it accepts a guest that was not offered"),
        }
    }

    fn all_placed(&mut self, now: Duration) {
        match self.state {
            State::PostCopy => self.complete(now),
            // The acceptance is still being recorded.
            State::Accepting => self.figures.milestones.complete = Some(now),
            State::Completing | State::Releasing => {}
            _ => self.violation("it has every block of a guest that it has not accepted"),
        }
    }

    fn status(&mut self, now: Duration, standing: Standing, missing_pieces: u32) {
        if self.link != Link::AwaitStatus {
            self.violation("a status that no resumed link asked for");
            return;
        }
        if missing_pieces > pieces::MAX_PIECES {
            self.violation(&format!("{missing_pieces} pieces of missing blocks"));
            return;
        }
        self.missing = crate::blocks::Blocks::new();
        self.resumed_standing = Some(standing);
        self.link = Link::AwaitMissing {
            left: missing_pieces,
        };
        if missing_pieces == 0 {
            self.resumed(now);
        }
    }

    fn missing_piece(&mut self, now: Duration, region: RegionId, blocks: BlockSet) {
        let Link::AwaitMissing { left } = self.link else {
            self.violation("missing blocks that no status announced");
            return;
        };
        if let Err(what) = pieces::check(self.shapes.infos(), region, blocks.max()) {
            self.violation(&what);
            return;
        }
        *self.missing.entry(region) |= blocks;
        self.link = Link::AwaitMissing { left: left - 1 };
        if left == 1 {
            self.resumed(now);
        }
    }
}

/// The message's name, for complaints.
fn name(message: &Message) -> &'static str {
    match message {
        Message::Hello { .. } => "a hello",
        Message::Welcome { .. } => "a welcome",
        Message::Refuse(_) => "a refusal",
        Message::Offer(_) => "an offer",
        Message::Ready { .. } => "'ready'",
        Message::Applied { .. } => "an acknowledgement of batches",
        Message::Behind { .. } => "a set of blocks left behind",
        Message::Handover { .. } => "a handover",
        Message::Accepted(_) => "an acceptance",
        Message::Declined(_) => "'declined'",
        Message::Fetch { .. } => "a fetch",
        Message::AllPlaced(_) => "'all placed'",
        Message::Released => "'released'",
        Message::Cancel { .. } => "a cancel",
        Message::Status { .. } => "a status",
        Message::Missing { .. } => "a set of missing blocks",
        Message::Seeds { .. } => "names of seeds",
    }
}
