//! What can end a session from outside: the link, the operator, time, a command that failed, a
//! destination that breaks the protocol. Each is harmless before ownership is offered, and none may
//! thaw the guest after that.

use std::time::Duration;

use hybridmig_transport::message::{Message, Refusal, RefusalCode, SUPPORTED_VERSIONS};

use super::{Awaited, Link, SourceMachine, State};
use crate::blocks::Blocks;
use crate::plan::PushOrder;
use crate::session::io::{SourceCommand, SourceOutcome};

impl SourceMachine {
    /// The destination sent what it may not.
    pub(super) fn violation(&mut self, what: &str) {
        let reason = format!("the destination broke the protocol: {what}");
        if self.before_offer() {
            let refusal = Refusal {
                code: RefusalCode::Protocol,
                reasons: vec![reason],
            };
            self.send(Message::Refuse(refusal.clone()));
            self.end_here(SourceOutcome::Refused(refusal));
        } else {
            self.drop_link(reason);
        }
    }

    pub(super) fn drop_link(&mut self, reason: String) {
        if self.link != Link::Down {
            self.command(SourceCommand::CloseLink {
                reason: reason.clone(),
            });
            if self.state == State::Offering {
                self.withdrawn.get_or_insert(SourceOutcome::Cancelled {
                    reason: reason.clone(),
                });
            }
            self.warnings.push(reason);
            self.link_lost();
        }
    }

    pub(super) fn connected(&mut self, now: Duration) {
        match self.state {
            State::Idle => {
                self.heard = now;
                self.figures.milestones.connected = Some(now);
                self.link = Link::Up;
                self.enter(State::AwaitWelcome);
                self.hello(false);
                // One version is offered, so that the form of the offer need not wait for the
                // choice.
                const { assert!(SUPPORTED_VERSIONS.len() == 1) };
                self.send(Message::Offer(self.offer()));
            }
            State::Offered | State::Accepting | State::PostCopy => {
                if self.link != Link::Down {
                    self.link_lost();
                }
                self.link = Link::Greeting;
                self.figures.reconnects += 1;
                self.hello(true);
            }
            _ => {}
        }
    }

    pub(super) fn hello(&mut self, resume: bool) {
        self.send(Message::Hello {
            versions: SUPPORTED_VERSIONS.to_vec(),
            features: self.config.features,
            software: self.config.software.clone(),
            session: self.config.session,
            resume,
        });
    }

    pub(super) fn disconnected(&mut self, _now: Duration, reason: &str) {
        if self.link == Link::Down && self.state != State::Idle {
            return;
        }
        self.link_lost();
        let cancelled = SourceOutcome::Cancelled {
            reason: format!("the link was lost before the handover: {reason}"),
        };
        if self.before_offer() {
            self.end_here(cancelled);
        } else if self.state == State::Offering {
            self.withdrawn.get_or_insert(cancelled);
        }
    }

    /// Forgets what was in flight; after the freeze it stays to be sent.
    pub(super) fn link_lost(&mut self) {
        self.link = Link::Down;
        self.estimator.interrupted();
        self.in_flight_bytes = 0;
        self.resumed_standing = None;
        for (_, flight) in std::mem::take(&mut self.flights) {
            if let (false, Some((region, blocks))) = (flight.applied, flight.contents) {
                for block in blocks {
                    if self.behind.contains(region, block) {
                        self.remaining.insert(region, block);
                    }
                }
            }
        }
        self.urgent.clear();
        self.urgent_disks.clear();
        self.urgent_set = Blocks::new();
        self.prefetch.clear();
        if !self.before_offer() {
            for (region, block) in std::mem::take(&mut self.resend).iter_blocks() {
                if self.behind.contains(region, block) {
                    self.remaining.insert(region, block);
                }
            }
            self.order = PushOrder::new(&self.remaining, &self.heat);
        }
    }

    /// Ends the session with the guest here, if ownership has not been sent: at once, or as soon as
    /// the record that is being written allows it. False if it has been sent.
    pub(super) fn withdraw(&mut self, outcome: SourceOutcome) -> bool {
        if self.before_offer() {
            self.end_here(outcome);
        } else if self.state == State::Offering {
            self.withdrawn.get_or_insert(outcome);
        } else {
            return false;
        }
        true
    }

    /// A chunk that was handed out cannot go out. After the handover the destination waits for it,
    /// and keeps what it has.
    pub(super) fn unreadable(&mut self, error: String) {
        let reason = error.clone();
        if !self.withdraw(SourceOutcome::Cancelled { reason }) {
            self.warnings.push(error);
        }
    }

    pub(super) fn cancel(&mut self, reason: String) {
        let outcome = SourceOutcome::Cancelled {
            reason: reason.clone(),
        };
        if self.withdraw(outcome) {
            return;
        }
        match self.state {
            State::Offered | State::Accepting | State::PostCopy if self.link == Link::Down => {
                self.give_up(format!("cancelled while the link was lost: {reason}"));
            }
            _ => self.warnings.push(format!(
                "too late to cancel ({reason}): ownership of the guest has been sent"
            )),
        }
    }

    /// Ends without the other side's word; the guest stays frozen.
    pub(super) fn give_up(&mut self, reason: String) {
        let outcome = if self.state == State::Offered {
            SourceOutcome::InDoubt { reason }
        } else {
            SourceOutcome::Incomplete { reason }
        };
        self.finish(outcome);
    }

    pub(super) fn timeout(&mut self, now: Duration) {
        if !self.waits_for_peer() || now < self.heard.saturating_add(self.config.patience) {
            return;
        }
        let reason = format!(
            "nothing was heard of the destination for {} s",
            self.config.patience.as_secs()
        );
        if self.before_offer() {
            self.end_here(SourceOutcome::Cancelled { reason });
        } else {
            self.give_up(reason);
        }
    }

    pub(super) fn failed(&mut self, now: Duration, error: String) {
        let Some(command) = self.awaited.pop_front() else {
            self.warnings.push(error);
            return;
        };
        match (command, self.state) {
            (Awaited::Journal, _) => self.journal_failed(now, error),
            (Awaited::Thaw, State::Thawing) => {
                let before = match self.ending.take() {
                    Some(SourceOutcome::Cancelled { reason }) => format!(" (after: {reason})"),
                    _ => String::new(),
                };
                self.finish(SourceOutcome::Failed {
                    reason: format!("the guest could not be thawed: {error}{before}"),
                });
            }
            (Awaited::Release, State::Releasing) => {
                self.warnings.push(format!(
                    "the guest has moved, but what is left of it here could not be ended: {error}"
                ));
                self.released();
            }
            _ if self.before_offer() => {
                self.end_here(SourceOutcome::Cancelled { reason: error });
            }
            _ => self.warnings.push(error),
        }
    }
}
