//! What the destination makes of each message: in which states it is legal and where it leads.

use std::time::Duration;

use hybridmig_transport::message::{
    Message, Offer, Refusal, RefusalCode, RegionId, SUPPORTED_VERSIONS, SessionId, Standing,
};

use super::{DestinationMachine, Handover, Link, State, refusal};
use crate::blocks::BlockSet;
use crate::session::io::{DestinationCommand, DestinationOutcome};
use crate::session::pieces;

/// Device state that is worth keeping in memory; QEMU's largest so far had 17 MiB.
const MAX_STATE: u64 = 1 << 30;

impl DestinationMachine {
    pub(super) fn message(&mut self, now: Duration, message: Message) {
        if self.link == Link::Down {
            return;
        }
        if let Message::Hello {
            versions,
            features,
            session,
            resume,
            ..
        } = message
        {
            self.hello(now, &versions, features, session, resume);
            return;
        }
        if self.link == Link::Greeting {
            // Whoever this is has not even said what it speaks.
            self.close_link("the first message must be a hello".into());
            return;
        }
        if !matches!(self.state, State::Declined) {
            self.heard = now;
        }
        match message {
            Message::Offer(offer) => self.offered(now, offer),
            Message::Behind { region, blocks } => self.behind_piece(now, region, blocks),
            Message::Handover {
                batches,
                postcopy_pass,
                state_len,
                state_hash,
                behind_pieces,
            } => {
                let handover = Handover {
                    batches,
                    postcopy_pass,
                    state_len,
                    state_hash,
                };
                self.handed_over(now, handover, behind_pieces);
            }
            Message::Released => self.source_released(now),
            Message::Cancel { reason } => self.source_cancelled(now, reason),
            Message::Refuse(refusal) => self.source_cancelled(now, refusal.to_string()),
            Message::Hello { .. }
            | Message::Welcome { .. }
            | Message::Ready { .. }
            | Message::Applied { .. }
            | Message::Accepted(_)
            | Message::Declined(_)
            | Message::Fetch { .. }
            | Message::AllPlaced(_)
            | Message::Status { .. }
            | Message::Missing { .. }
            | Message::Seeds { .. } => {
                self.violation(now, "it sent a message that only a destination sends");
            }
        }
    }

    fn hello(
        &mut self,
        now: Duration,
        versions: &[u16],
        features: u64,
        session: SessionId,
        resume: bool,
    ) {
        if self.link != Link::Greeting {
            self.violation(now, "a second hello");
            return;
        }
        let chosen = SUPPORTED_VERSIONS.iter().find(|v| versions.contains(v));
        let Some(version) = chosen else {
            let reason = format!(
                "no protocol version in common: the source speaks {versions:?}, the destination \
                 {SUPPORTED_VERSIONS:?}; update the older side"
            );
            self.turn_away(refusal(RefusalCode::Version, reason));
            return;
        };
        match self.session {
            None if resume => {
                let reason = format!("session {session} is not known here");
                self.turn_away(refusal(RefusalCode::UnknownSession, reason));
                return;
            }
            Some(ours) if ours == session && resume => {}
            Some(_) => {
                self.turn_away(self.busy());
                return;
            }
            None => {}
        }
        self.link = Link::Up;
        self.send(Message::Welcome {
            version: *version,
            features: features & self.config.features,
            software: self.config.software.clone(),
        });
        if resume {
            self.reconnects += 1;
            if self.state != State::Declined {
                self.heard = now;
            }
            self.status(now);
        } else {
            self.session = Some(session);
            self.enter(now, State::AwaitOffer);
        }
    }

    /// Refuses a link without letting it touch the session.
    fn turn_away(&mut self, refusal: Refusal) {
        let reason = refusal.to_string();
        self.link = Link::Up;
        self.send(Message::Refuse(refusal));
        self.close_link(reason);
    }

    fn offered(&mut self, now: Duration, offer: Offer) {
        if self.state != State::AwaitOffer {
            if self.may_decline() || self.accepted {
                self.violation(now, "a second offer");
            }
            return;
        }
        if let Err(what) = well_formed(&offer) {
            self.violation(now, &what);
            return;
        }
        self.enter(now, State::Checking);
        self.offer = Some(offer.clone());
        self.command(DestinationCommand::Check(offer));
    }

    pub(super) fn checked(&mut self, now: Duration, result: Result<Vec<String>, Refusal>) {
        let Some(offer) = self.offer.clone() else {
            return;
        };
        match result {
            Err(refusal) => {
                let outcome = DestinationOutcome::Refused(refusal.clone());
                self.decline(now, refusal, outcome, false);
            }
            Ok(notes) if offer.check_only => {
                self.send(Message::Ready { notes });
                self.finish(DestinationOutcome::Checked);
            }
            Ok(notes) => {
                self.notes = notes;
                self.prepared = true;
                self.enter(now, State::Preparing);
                self.command(DestinationCommand::Prepare(offer));
            }
        }
    }

    fn behind_piece(&mut self, now: Duration, region: RegionId, blocks: BlockSet) {
        match self.state {
            State::Receiving if self.handover.is_none() => {}
            State::Abandoning | State::Declining | State::Declined => return,
            _ => {
                self.violation(now, "blocks left behind, out of turn");
                return;
            }
        }
        let regions = self.offer.as_ref().map_or(&[][..], |o| &o.regions);
        if let Err(what) = pieces::check(regions, region, blocks.max()) {
            self.violation(now, &what);
            return;
        }
        if self.pieces == pieces::MAX_PIECES {
            self.violation(now, "too many pieces of blocks left behind");
            return;
        }
        self.pieces += 1;
        self.marks.first.get_or_insert(now);
        *self.behind.entry(region) |= blocks;
    }

    fn handed_over(&mut self, now: Duration, handover: Handover, behind_pieces: u32) {
        match self.state {
            State::Receiving if self.handover.is_none() => {}
            // It crossed our refusal. The source must hear that it is refused too.
            State::Abandoning | State::Declining => {
                self.handover = Some(handover);
                return;
            }
            State::Declined => return,
            _ => {
                self.violation(now, "a handover out of turn");
                return;
            }
        }
        self.handover = Some(handover);
        self.marks.first.get_or_insert(now);
        if handover.state_len > MAX_STATE {
            self.violation(
                now,
                &format!("a device state of {} bytes", handover.state_len),
            );
        } else if handover.postcopy_pass == 0 || behind_pieces != self.pieces {
            self.violation(now, "a handover that does not add up");
        } else {
            self.try_arm(now);
        }
    }

    fn source_released(&mut self, now: Duration) {
        match self.state {
            State::AwaitReleased => self.finish(DestinationOutcome::Moved),
            _ => self.violation(now, "a release of a guest that is not complete"),
        }
    }

    fn source_cancelled(&mut self, now: Duration, reason: String) {
        let reason = format!("cancelled by the source: {reason}");
        match self.state {
            State::AwaitOffer | State::Checking | State::Preparing | State::Receiving => {
                let source_knows = self.handover.is_none();
                let outcome = DestinationOutcome::Cancelled {
                    reason: reason.clone(),
                };
                let refusal = refusal(RefusalCode::Other, reason);
                self.decline(now, refusal, outcome, source_knows);
            }
            // It is loading already, and will say how that ends.
            State::Arming | State::Loading | State::Accepting | State::Resuming => {}
            State::Abandoning | State::Declining if self.handover.is_none() => {
                if let Some(decline) = &mut self.decline {
                    decline.source_knows = true;
                }
            }
            State::Abandoning | State::Declining => {}
            State::Declined => self.finish_declined(),
            // Sent before the source heard of the acceptance, on a resumed link.
            State::PostCopy | State::Disarming | State::Completing | State::AwaitReleased => {}
            State::Idle | State::Finished => {}
        }
    }

    /// Answers a resumed link.
    pub(super) fn status(&mut self, now: Duration) {
        let (standing, missing) = match self.state {
            State::Abandoning | State::Declining => {
                self.status_owed = true;
                return;
            }
            State::Declined => {
                let refusal = self.decline.as_ref().map_or_else(
                    || refusal(RefusalCode::Other, "the session has ended"),
                    |decline| decline.refusal.clone(),
                );
                (Standing::Refused(refusal), Vec::new())
            }
            State::Arming | State::Loading | State::Accepting | State::Resuming => {
                (Standing::Loading, pieces::split(&self.missing))
            }
            State::PostCopy | State::Disarming | State::Completing => {
                (Standing::Accepted, pieces::split(&self.missing))
            }
            State::AwaitReleased => (Standing::Complete, Vec::new()),
            _ => (Standing::Preparing, Vec::new()),
        };
        self.send(Message::Status {
            standing,
            missing_pieces: missing.len() as u32,
        });
        for (region, blocks) in missing {
            self.send(Message::Missing { region, blocks });
        }
        match self.state {
            State::PostCopy | State::Disarming | State::Completing => {
                // The first one may have been lost.
                self.send(Message::Accepted(self.timings));
            }
            State::AwaitReleased => {
                self.send(Message::Accepted(self.timings));
                self.tell_complete(now);
            }
            _ => {}
        }
        self.fetch_waiting();
    }
}

fn well_formed(offer: &Offer) -> Result<(), String> {
    if offer.regions.is_empty() || offer.regions.len() > usize::from(u16::MAX) {
        return Err(format!("an offer of {} regions", offer.regions.len()));
    }
    for (index, region) in offer.regions.iter().enumerate() {
        if usize::from(region.id.0) != index {
            return Err(format!("{} offered in place {index}", region.id));
        }
        let size = region.block_size;
        if !size.is_power_of_two() || !(512..=16 << 20).contains(&size) || region.blocks == 0 {
            return Err(format!(
                "{} of {} blocks of {size} bytes",
                region.id, region.blocks
            ));
        }
    }
    Ok(())
}
