//! What can end a session from outside: the link, the operator, time, a source that breaks the
//! protocol. Before the acceptance is asked to be durable each leads to declining, after it none does.

use std::time::Duration;

use hybridmig_transport::message::RefusalCode;

use super::{DestinationMachine, Link, State, refusal};
use crate::blocks::Blocks;
use crate::session::io::{DestinationCommand, DestinationOutcome};
use crate::session::ranges::Ranges;

impl DestinationMachine {
    pub(super) fn connected(&mut self) {
        if self.link != Link::Down {
            self.link_lost();
        }
        self.link = Link::Greeting;
    }

    pub(super) fn link_lost(&mut self) {
        self.link = Link::Down;
        self.status_owed = false;
        self.acks = Ranges::default();
        self.ack_count = 0;
        self.ack_rejected.clear();
        self.ack_due = None;
        self.requested = Blocks::new();
    }

    pub(super) fn disconnected(&mut self, now: Duration, reason: &str) {
        let was_up = self.link == Link::Up;
        self.link_lost();
        if !was_up {
            return;
        }
        let reason = format!("the link was lost before the handover: {reason}");
        match self.state {
            State::AwaitOffer | State::Checking | State::Preparing => {
                self.decline_lost(now, reason);
            }
            State::Receiving if self.handover.is_none() => self.decline_lost(now, reason),
            _ => {}
        }
    }

    pub(super) fn decline_lost(&mut self, now: Duration, reason: String) {
        let outcome = DestinationOutcome::Cancelled {
            reason: reason.clone(),
        };
        self.decline(now, refusal(RefusalCode::Cancelled, reason), outcome, false);
    }

    pub(super) fn close_link(&mut self, reason: String) {
        if self.link != Link::Down {
            self.command(DestinationCommand::CloseLink {
                reason: reason.clone(),
            });
            self.warnings.push(reason);
            self.link_lost();
        }
    }

    /// The source sent what it may not. While nothing is accepted the guest is safest where it is;
    /// after that only the link is given up.
    pub(super) fn violation(&mut self, now: Duration, what: &str) {
        let reason = format!("the source broke the protocol: {what}");
        if self.may_decline() {
            let refusal = refusal(RefusalCode::Protocol, reason);
            let outcome = DestinationOutcome::Refused(refusal.clone());
            self.decline(now, refusal, outcome, false);
        } else {
            self.close_link(reason);
        }
    }

    /// Memory is full, or the pager is broken. What is not accepted yet is declined; after that the
    /// blocks are kept at the source, and another pager can take over.
    pub(super) fn placement_failed(&mut self, now: Duration, error: String) {
        if self.may_decline() {
            let refusal = refusal(RefusalCode::Load, error);
            let outcome = DestinationOutcome::Refused(refusal.clone());
            self.decline(now, refusal, outcome, false);
            return;
        }
        match self.state {
            State::PostCopy => self.incomplete(error),
            // The rest of what is being given up.
            State::Abandoning | State::Declining | State::Declined => {}
            _ => self.warnings.push(error),
        }
    }

    pub(super) fn cancel(&mut self, now: Duration, reason: String) {
        if self.state == State::Idle {
            self.finish(DestinationOutcome::Cancelled { reason });
        } else if self.may_decline() {
            let outcome = DestinationOutcome::Cancelled {
                reason: reason.clone(),
            };
            let refusal = refusal(
                RefusalCode::Cancelled,
                format!("cancelled at the destination: {reason}"),
            );
            self.decline(now, refusal, outcome, false);
        } else if self.state == State::Declined {
            self.finish_declined();
        } else if self.state == State::AwaitReleased {
            self.finish(DestinationOutcome::Moved);
        } else if self.state == State::PostCopy && self.link == Link::Down {
            self.incomplete(format!("cancelled while the link was lost: {reason}"));
        } else {
            self.warnings.push(format!(
                "too late to cancel ({reason}): the guest is this side's"
            ));
        }
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        let wait = match self.state {
            State::AwaitOffer
            | State::Receiving
            | State::Arming
            | State::Loading
            | State::PostCopy => self.config.patience,
            State::AwaitReleased if self.told_complete && self.link == Link::Down => {
                self.config.linger
            }
            State::AwaitReleased => self.config.patience,
            State::Declined => self.config.linger,
            _ => return None,
        };
        Some(self.heard.saturating_add(wait))
    }

    pub(super) fn timeout(&mut self, now: Duration) {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return;
        }
        let reason = format!(
            "nothing was heard of the source for {} s",
            self.config.patience.as_secs()
        );
        match self.state {
            State::PostCopy => self.incomplete(reason),
            State::AwaitReleased => {
                self.warnings
                    .push("the source did not say that it has released the guest".into());
                self.finish(DestinationOutcome::Moved);
            }
            State::Declined => self.finish_declined(),
            _ => self.decline_lost(now, reason),
        }
    }

    pub(super) fn incomplete(&mut self, reason: String) {
        let reason = format!(
            "{reason}; {} blocks are still at the source",
            self.missing.len()
        );
        self.finish(DestinationOutcome::Incomplete { reason });
    }
}
