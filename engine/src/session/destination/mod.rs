//! The destination's end of a session, as a state machine without I/O: inputs go in with the time,
//! commands are polled out.
//!
//! It must never run the guest before its acceptance is durable, nor say that it has declined while
//! there is any way left that the guest could run here.

mod config;
mod handover;
mod link;
mod messages;
mod postcopy;

use std::collections::VecDeque;
use std::time::Duration;

use hybridmig_transport::message::{
    Message, Offer, Refusal, RefusalCode, ResumeTimings, SessionId,
};
use serde::Serialize;

pub use config::DestinationConfig;

use super::io::{AppliedBatch, DestinationCommand, DestinationInput, DestinationOutcome, Phase};
use super::ranges::Ranges;
use crate::blocks::{Blocks, RegionId};

/// Where the session stands. Every state names what it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// `Hello`.
    Idle,
    /// `Offer`.
    AwaitOffer,
    /// `Checked`.
    Checking,
    /// `Prepared`.
    Preparing,
    /// Batches, and in the end all of the handover.
    Receiving,
    /// `Armed`.
    Arming,
    /// `Loaded`.
    Loading,
    /// `Accepted` to be durable.
    Accepting,
    /// `Resumed`.
    Resuming,
    /// The last missing block.
    PostCopy,
    /// `Disarmed`.
    Disarming,
    /// `Complete` to be durable.
    Completing,
    /// `Released`.
    AwaitReleased,
    /// `Abandoned`.
    Abandoning,
    /// `Declined` to be durable.
    Declining,
    /// The source to know of it.
    Declined,
    /// Nothing.
    Finished,
}

/// The link, as far as the machine knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    /// `Hello` is awaited.
    Greeting,
    Up,
}

/// Commands that have an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaited {
    Check,
    Prepare,
    Arm,
    LoadState,
    Journal,
    Resume,
    Disarm,
    Abandon,
}

/// [`Message::Handover`].
#[derive(Clone, Copy, Debug)]
struct Handover {
    batches: u64,
    postcopy_pass: u32,
    state_len: u64,
    state_hash: [u8; 32],
}

/// A session that will not be accepted.
#[derive(Clone, Debug)]
struct Decline {
    refusal: Refusal,
    outcome: DestinationOutcome,
    /// The source has ended it itself and waits for nothing.
    source_knows: bool,
}

/// When the steps of the handover began.
#[derive(Clone, Copy, Debug, Default)]
struct Marks {
    first: Option<Duration>,
    step: Duration,
}

/// Where a session stands, for a progress bar.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct DestinationProgress {
    /// The phase.
    pub phase: Phase,
    /// Batches applied.
    pub batches: u64,
    /// Blocks that stayed behind at the freeze.
    pub behind: u64,
    /// Of those: not here yet.
    pub missing: u64,
    /// Blocks asked for.
    pub faults: u64,
    /// Blocks that could not be decoded.
    pub rejected: u64,
    /// Blocks that were copied from seeds.
    pub seeded: u64,
    /// Their bytes.
    pub seeded_bytes: u64,
    /// Whether the link is up.
    pub linked: bool,
    /// Times the link came back.
    pub reconnects: u32,
    /// How long nothing has been heard of the source, not even by its transport.
    pub silent: Duration,
    /// When the session stops waiting for it.
    pub gives_up_in: Option<Duration>,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct DestinationMachine {
    config: DestinationConfig,
    state: State,
    link: Link,
    commands: VecDeque<DestinationCommand>,
    awaited: VecDeque<Awaited>,
    session: Option<SessionId>,
    offer: Option<Offer>,
    /// `Prepare` was asked for, so that there is something to abandon.
    prepared: bool,
    heard: Duration,

    // Batches.
    applied: Ranges,
    acks: Ranges,
    ack_count: u32,
    ack_rejected: Vec<(RegionId, u32)>,
    ack_due: Option<Duration>,
    /// Rejected, not repaired yet.
    outstanding: Blocks,

    // Handover.
    behind: Blocks,
    pieces: u32,
    handover: Option<Handover>,
    armed: bool,
    /// The acceptance is durable.
    accepted: bool,
    decline: Option<Decline>,
    /// A resumed link waits for `Status`.
    status_owed: bool,
    marks: Marks,
    timings: ResumeTimings,

    // Post-copy.
    missing: Blocks,
    /// Placed or removed while `Armed` was on its way.
    gone_early: Blocks,
    /// Faulted and not here.
    waiting: Blocks,
    /// Asked for on this link.
    requested: Blocks,
    told_complete: bool,

    batches: u64,
    faults: u64,
    rejected: u64,
    reconnects: u32,
    notes: Vec<String>,
    warnings: Vec<String>,
}

/// Ranges of batch ids in one acknowledgement.
const ACK_RANGES: usize = 1024;
/// Rejected blocks in one acknowledgement.
const ACK_REJECTED: usize = 4096;
/// Batches apply almost in order; a source whose ids are scattered wider than this is broken.
const MAX_FRAGMENTS: usize = 65_536;

impl DestinationMachine {
    /// Waits for a source.
    pub fn new(config: DestinationConfig) -> Self {
        Self {
            config,
            state: State::Idle,
            link: Link::Down,
            commands: VecDeque::new(),
            awaited: VecDeque::new(),
            session: None,
            offer: None,
            prepared: false,
            heard: Duration::ZERO,
            applied: Ranges::default(),
            acks: Ranges::default(),
            ack_count: 0,
            ack_rejected: Vec::new(),
            ack_due: None,
            outstanding: Blocks::new(),
            behind: Blocks::new(),
            pieces: 0,
            handover: None,
            armed: false,
            accepted: false,
            decline: None,
            status_owed: false,
            marks: Marks::default(),
            timings: ResumeTimings::default(),
            missing: Blocks::new(),
            gone_early: Blocks::new(),
            waiting: Blocks::new(),
            requested: Blocks::new(),
            told_complete: false,
            batches: 0,
            faults: 0,
            rejected: 0,
            reconnects: 0,
            notes: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Goes on with a session whose own process has ended after its acceptance was durable. The guest
    /// is this side's, its pager has been taken over, and these blocks are missing; the source is
    /// waited for. The guest is told to run, in case that it was not told before.
    pub fn take_over(
        config: DestinationConfig,
        session: SessionId,
        offer: Offer,
        missing: Blocks,
    ) -> Self {
        let mut machine = Self {
            state: State::PostCopy,
            session: Some(session),
            offer: Some(offer),
            prepared: true,
            armed: true,
            accepted: true,
            behind: missing.clone(),
            missing,
            ..Self::new(config)
        };
        machine.command(DestinationCommand::Resume);
        machine
    }

    /// Takes an input.
    pub fn handle(&mut self, now: Duration, input: DestinationInput) {
        if self.state == State::Finished {
            return;
        }
        match input {
            DestinationInput::Connected => self.connected(),
            DestinationInput::Disconnected { reason } => self.disconnected(now, &reason),
            DestinationInput::Message(message) => self.message(now, message),
            DestinationInput::Checked(result) => {
                if self.answered(Awaited::Check) && self.state == State::Checking {
                    self.checked(now, result);
                }
            }
            DestinationInput::Prepared => {
                if self.answered(Awaited::Prepare) && self.state == State::Preparing {
                    self.enter(now, State::Receiving);
                    let notes = std::mem::take(&mut self.notes);
                    self.send(Message::Ready { notes });
                }
            }
            DestinationInput::Applied(batch) => self.batch_applied(now, batch),
            DestinationInput::Armed { missing } => {
                if self.answered(Awaited::Arm) && self.state == State::Arming {
                    self.armed(now, missing);
                }
            }
            DestinationInput::Loaded => {
                if self.answered(Awaited::LoadState) && self.state == State::Loading {
                    self.loaded(now);
                }
            }
            DestinationInput::Journaled => {
                if self.answered(Awaited::Journal) {
                    self.journaled(now);
                }
            }
            DestinationInput::Resumed => {
                if self.answered(Awaited::Resume) {
                    match self.state {
                        State::Resuming => self.resumed(now),
                        // Taken over. Nothing may be missing any more.
                        State::PostCopy => self.settle(now, &Blocks::new()),
                        _ => {}
                    }
                }
            }
            DestinationInput::Disarmed => {
                if self.answered(Awaited::Disarm) && self.state == State::Disarming {
                    self.disarmed(now);
                }
            }
            DestinationInput::Abandoned => {
                if self.answered(Awaited::Abandon) && self.state == State::Abandoning {
                    self.abandoned(now);
                }
            }
            DestinationInput::Fault { region, block } => self.fault(region, block),
            DestinationInput::Removed(blocks) => self.removed(now, &blocks),
            DestinationInput::Failed { error } => self.failed(now, error),
            DestinationInput::PlacementFailed { error } => self.placement_failed(now, error),
            DestinationInput::Violation { what } => self.violation(now, &what),
            DestinationInput::Cancel { reason } => self.cancel(now, reason),
            DestinationInput::Timeout => self.timeout(now),
        }
        if self.ack_due.is_some_and(|due| now >= due) {
            self.acknowledge();
        }
    }

    /// The next command, until there is none.
    pub fn poll_command(&mut self) -> Option<DestinationCommand> {
        self.commands.pop_front()
    }

    /// When [`DestinationInput::Timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Duration> {
        if self.state == State::Finished {
            return None;
        }
        [self.ack_due, self.deadline()].into_iter().flatten().min()
    }

    /// For a connection that comes while another one is up: `None` if its hello is that of our own
    /// source, whose old link has died unnoticed (give the machine `Disconnected`, `Connected` and
    /// the hello); otherwise what to answer before closing it, without telling the machine.
    pub fn refuse_other(&self, hello: &Message) -> Option<Refusal> {
        match (hello, self.session) {
            (
                Message::Hello {
                    session,
                    resume: true,
                    ..
                },
                Some(ours),
            ) if *session == ours => None,
            _ => Some(self.busy()),
        }
    }

    /// The session, once a source has named it.
    pub fn session(&self) -> Option<SessionId> {
        self.session
    }

    /// The phase of the session.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Idle | State::AwaitOffer | State::Checking | State::Preparing => {
                Phase::Negotiation
            }
            State::Receiving if self.pieces == 0 && self.handover.is_none() => Phase::PreCopy,
            State::Receiving
            | State::Arming
            | State::Loading
            | State::Accepting
            | State::Resuming => Phase::FreezeCopy,
            State::PostCopy => Phase::PostCopy,
            State::Disarming
            | State::Completing
            | State::AwaitReleased
            | State::Abandoning
            | State::Declining
            | State::Declined
            | State::Finished => Phase::Done,
        }
    }

    /// Where the session stands. How long the transport has been silent, and what came of seeds, is for
    /// the driver to add.
    pub fn progress(&self, now: Duration) -> DestinationProgress {
        DestinationProgress {
            phase: self.phase(),
            batches: self.batches,
            behind: self.behind.len(),
            missing: self.missing.len(),
            faults: self.faults,
            rejected: self.rejected,
            seeded: 0,
            seeded_bytes: 0,
            linked: self.link != Link::Down,
            reconnects: self.reconnects,
            silent: Duration::ZERO,
            gives_up_in: self.deadline().map(|until| until.saturating_sub(now)),
        }
    }

    /// Durations of the handover on this side; zero until it is done.
    pub fn timings(&self) -> ResumeTimings {
        self.timings
    }

    /// What went wrong without ending the session.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn enter(&mut self, now: Duration, state: State) {
        // The wait that begins is counted from here.
        self.heard = now;
        self.state = state;
    }

    fn command(&mut self, command: DestinationCommand) {
        let awaited = match &command {
            DestinationCommand::Check(_) => Some(Awaited::Check),
            DestinationCommand::Prepare(_) => Some(Awaited::Prepare),
            DestinationCommand::Arm { .. } => Some(Awaited::Arm),
            DestinationCommand::LoadState { .. } => Some(Awaited::LoadState),
            DestinationCommand::Journal(_) => Some(Awaited::Journal),
            DestinationCommand::Resume => Some(Awaited::Resume),
            DestinationCommand::Disarm => Some(Awaited::Disarm),
            DestinationCommand::Abandon => Some(Awaited::Abandon),
            DestinationCommand::Send(_)
            | DestinationCommand::Fetch { .. }
            | DestinationCommand::CloseLink { .. }
            | DestinationCommand::Finish(_) => None,
        };
        self.awaited.extend(awaited);
        self.commands.push_back(command);
    }

    fn send(&mut self, message: Message) {
        if self.link == Link::Up {
            self.command(DestinationCommand::Send(message));
        }
    }

    fn finish(&mut self, outcome: DestinationOutcome) {
        self.state = State::Finished;
        self.command(DestinationCommand::Finish(outcome));
    }

    /// Whether the answer is the one that is due; another one is the driver's mistake and is not
    /// acted on.
    fn answered(&mut self, answer: Awaited) -> bool {
        let due = self.awaited.front() == Some(&answer);
        debug_assert!(due, "answer {answer:?} while {:?} are due", self.awaited);
        if due {
            self.awaited.pop_front();
        }
        due
    }

    fn busy(&self) -> Refusal {
        let session = self
            .session
            .map_or_else(String::new, |session| format!(" {session}"));
        Refusal {
            code: RefusalCode::Busy,
            reasons: vec![format!(
                "the destination is busy with session{session}: wait for its end, or start another \
                 receiver"
            )],
        }
    }

    /// Whether the acceptance has not been asked to be made durable.
    fn may_decline(&self) -> bool {
        matches!(
            self.state,
            State::AwaitOffer
                | State::Checking
                | State::Preparing
                | State::Receiving
                | State::Arming
                | State::Loading
        )
    }

    fn batch_applied(&mut self, now: Duration, batch: AppliedBatch) {
        self.heard = now;
        if self.applied.insert(batch.batch) {
            self.batches += 1;
        }
        if self.applied.fragments() > MAX_FRAGMENTS {
            self.violation(now, "its batch ids are scattered");
            return;
        }
        for (region, block) in &batch.repaired {
            self.outstanding.remove(*region, *block);
        }
        for (region, block) in &batch.rejected {
            self.outstanding.insert(*region, *block);
            self.rejected += 1;
        }
        if self.link == Link::Up && !self.status_owed {
            self.acks.insert(batch.batch);
            self.ack_count += 1;
            self.ack_rejected.extend(&batch.rejected);
            let at_once = !batch.rejected.is_empty()
                || self.ack_count >= self.config.ack_batches
                || (self.handover.is_some() && !self.accepted);
            let due = if at_once {
                now
            } else {
                now.saturating_add(self.config.ack_interval)
            };
            self.ack_due = Some(self.ack_due.map_or(due, |earlier| earlier.min(due)));
        }
        self.settle(now, &batch.placed);
        self.try_arm(now);
    }

    fn acknowledge(&mut self) {
        self.ack_due = None;
        self.ack_count = 0;
        while !self.acks.is_empty() || !self.ack_rejected.is_empty() {
            let batches = self.acks.take(ACK_RANGES);
            let more = self.ack_rejected.len().min(ACK_REJECTED);
            let rejected = self.ack_rejected.drain(..more).collect();
            self.send(Message::Applied { batches, rejected });
        }
    }
}

fn refusal(code: RefusalCode, reason: impl Into<String>) -> Refusal {
    Refusal {
        code,
        reasons: vec![reason.into()],
    }
}
