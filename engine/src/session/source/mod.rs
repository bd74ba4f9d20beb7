//! The source's end of a session, as a state machine without I/O: inputs go in with the time,
//! commands and chunks are polled out.
//!
//! It must never let the guest run here once ownership may have left: from the moment the handover
//! has been sent the guest is thawed for one reason only, the destination's word that it has
//! declined and always will.

mod config;
mod flights;
mod handover;
mod link;
mod messages;
mod on_the_way;
mod planning;
mod postcopy;
mod precopy;
mod progress;
mod readahead;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use hybridmig_transport::message::{
    GuestDescription, Message, Offer, PROTOCOL_VERSION, RegionInfo, SUPPORTED_VERSIONS,
};

pub use config::SourceConfig;
pub use planning::{GuestUse, PlanReport, Revision};
pub use progress::{PhaseCount, RoundReport, SourceFigures, SourceMilestones, SourceProgress};
use readahead::Readahead;

use super::io::{
    Chunk, ChunkBody, Lane, Phase, SourceCommand, SourceInput, SourceOutcome, SourceRecord,
};
use super::rate::Estimator;
use crate::blocks::{Blocks, RegionId};
use crate::plan::{Decider, Heat, PushOrder};
use crate::regions::Regions;

/// Where the session stands. Every state names what it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The first link.
    Idle,
    /// `Welcome`.
    AwaitWelcome,
    /// `Ready`.
    AwaitReady,
    /// `Tracking`.
    StartTracking,
    /// The round's last chunk to be handed out.
    Round,
    /// `Dirty` of a running guest.
    Scanning,
    /// What is in flight to drain, before the freeze.
    Draining,
    /// `Frozen`.
    Freezing,
    /// `Dirty` of the frozen guest.
    FinalScan,
    /// `StateSaved`; the freeze set goes out meanwhile.
    Saving,
    /// `Dirty` after the state was saved.
    LastScan,
    /// The last chunk of the handover to be handed out.
    FreezeCopy,
    /// `HandoverOffered` to be durable.
    Offering,
    /// The destination's answer. From here on the guest is not ours to thaw.
    Offered,
    /// `Accepted` to be durable.
    Accepting,
    /// `AllPlaced`.
    PostCopy,
    /// `Released` (record) to be durable.
    Completing,
    /// `Released` (guest).
    Releasing,
    /// `Declined` to be durable, before the thaw.
    Declining,
    /// `Thawed`.
    Thawing,
    /// Nothing.
    Finished,
}

/// The link, as far as the machine knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    Up,
    /// Up again after the handover: `Welcome` is awaited.
    Greeting,
    /// `Status` is awaited.
    AwaitStatus,
    /// Pieces of what is missing are awaited.
    AwaitMissing {
        left: u32,
    },
}

/// Commands that have an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaited {
    StartTracking,
    Scan,
    Freeze,
    SaveState,
    Journal,
    Thaw,
    Release,
}

/// A chunk that was handed out.
#[derive(Debug)]
struct Flight {
    /// Bytes on the wire; an estimate until `Sent`.
    bytes: u64,
    sent: bool,
    applied: bool,
    kind: ChunkKind,
    /// Pages of contents, and whether they are a disk's.
    pages: u64,
    disk: bool,
    /// Blocks that must come again if the link is lost: of chunks after the freeze only.
    contents: Option<(RegionId, Vec<u32>)>,
    /// The first and the last of these.
    span: (u32, u32),
    /// When it arrives if nothing of it is lost.
    arrival: Duration,
}

/// Why a chunk went out, for the figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChunkKind {
    PreCopy,
    Freeze,
    State,
    Push,
    Prefetch,
    Urgent,
    Resend,
}

/// Most chunks in flight, whatever their size: chunks of zeroes have almost none.
const MAX_FLIGHTS: usize = 4096;
/// Length of a piece of the device state.
const STATE_PIECE: u64 = 64 * 1024;
/// Blocks that the guest waits for and that are left to come by themselves, at once.
const MAX_COMING: usize = 1024;
/// Neighbourhoods of faults that wait to be prefetched.
const MAX_PREFETCH: usize = 64;

/// See the module's documentation.
#[derive(Debug)]
pub struct SourceMachine {
    config: SourceConfig,
    guest: GuestDescription,
    shapes: Regions,
    state: State,
    link: Link,
    commands: VecDeque<SourceCommand>,
    awaited: VecDeque<Awaited>,
    /// Tracking was started or the guest frozen: it needs a thaw to be as before.
    touched: bool,
    /// How the session ends once the guest is thawed.
    ending: Option<SourceOutcome>,
    /// Set while `HandoverOffered` is being made durable: it is not to be sent after all.
    withdrawn: Option<SourceOutcome>,
    /// When the other side was last heard of.
    heard: Duration,

    // Blocks.
    heat: Heat,
    decider: Decider,
    estimator: Estimator,
    /// Blocks that have content.
    populated: Blocks,
    /// To be sent in this round.
    pending: Blocks,
    /// Of these, those that the guest has written since the round began: they go last.
    hot: Blocks,
    /// Their turn has come: `pending` are such too.
    only_hot: bool,
    /// Written after they were handed out in this round: to be sent in the next one.
    again: Blocks,
    /// Rejected by the destination: to be sent again in full.
    resend: Blocks,
    /// Populated blocks that the plan does not move before the freeze.
    unsent: Blocks,
    /// Freeze set, to be handed out.
    freeze_pending: Blocks,
    /// Everything that stayed behind at the freeze.
    behind: Blocks,
    /// What never stays behind: the guest's own word, when it had stopped.
    needed: Blocks,
    /// Of `behind`: not handed out yet.
    remaining: Blocks,
    /// Pass of chunks handed out now.
    pass: u32,
    next_batch: u64,
    flights: BTreeMap<u64, Flight>,
    in_flight_bytes: u64,
    last_scan: Duration,
    /// A scan within a round has been asked for.
    scanning: bool,
    /// When the last scan was asked for, and what scans take.
    scan_began: Duration,
    scan_takes: Duration,
    round_began: RoundStart,

    // Handover.
    postcopy_pass: u32,
    state_len: u64,
    state_hash: [u8; 32],
    state_next: u64,
    behind_pieces: u32,

    // Post-copy.
    order: PushOrder,
    urgent: VecDeque<(RegionId, u32)>,
    /// The same of disks, which wait behind memory.
    urgent_disks: VecDeque<(RegionId, u32)>,
    urgent_set: Blocks,
    /// Blocks that the guest waits for and that are on their way: when they must be there.
    coming: VecDeque<(Duration, RegionId, u32)>,
    prefetch: VecDeque<(RegionId, u32, u32)>,
    readahead: Readahead,
    missing: Blocks,
    resumed_standing: Option<hybridmig_transport::message::Standing>,
    planning: planning::Planning,

    figures: SourceFigures,
    notes: Vec<String>,
    warnings: Vec<String>,
}

/// Figures at the start of a round.
#[derive(Clone, Copy, Debug, Default)]
struct RoundStart {
    at: Duration,
    rest: u64,
    blocks: u64,
    bytes: u64,
}

impl SourceMachine {
    /// A session that waits for its first link.
    pub fn new(config: SourceConfig, guest: GuestDescription, regions: Vec<RegionInfo>) -> Self {
        let mut heat = Heat::new(&regions);
        for (region, runs) in &config.known_heat {
            heat.known(*region, runs);
        }
        Self {
            heat,
            decider: Decider::new(config.limits()),
            config,
            guest,
            shapes: Regions::new(regions),
            state: State::Idle,
            link: Link::Down,
            commands: VecDeque::new(),
            awaited: VecDeque::new(),
            touched: false,
            ending: None,
            withdrawn: None,
            heard: Duration::ZERO,
            estimator: Estimator::new(),
            populated: Blocks::new(),
            pending: Blocks::new(),
            hot: Blocks::new(),
            only_hot: false,
            again: Blocks::new(),
            resend: Blocks::new(),
            unsent: Blocks::new(),
            freeze_pending: Blocks::new(),
            behind: Blocks::new(),
            needed: Blocks::new(),
            remaining: Blocks::new(),
            pass: 1,
            next_batch: 0,
            flights: BTreeMap::new(),
            in_flight_bytes: 0,
            last_scan: Duration::ZERO,
            scanning: false,
            scan_began: Duration::ZERO,
            scan_takes: Duration::ZERO,
            round_began: RoundStart::default(),
            postcopy_pass: 0,
            state_len: 0,
            state_hash: [0; 32],
            state_next: 0,
            behind_pieces: 0,
            order: PushOrder::default(),
            urgent: VecDeque::new(),
            urgent_disks: VecDeque::new(),
            urgent_set: Blocks::new(),
            coming: VecDeque::new(),
            prefetch: VecDeque::new(),
            readahead: Readahead::default(),
            missing: Blocks::new(),
            resumed_standing: None,
            planning: planning::Planning::default(),
            figures: SourceFigures::default(),
            notes: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Takes an input.
    pub fn handle(&mut self, now: Duration, input: SourceInput) {
        if self.state == State::Finished {
            return;
        }
        match input {
            SourceInput::Connected => self.connected(now),
            SourceInput::Disconnected { reason } => self.disconnected(now, &reason),
            SourceInput::Message(message) => self.message(now, message),
            SourceInput::Accessed(blocks) => self.accessed(now, &blocks),
            SourceInput::Sampled(samples) => self.sampled(&samples),
            SourceInput::Contents {
                disk,
                bytes_per_page,
            } => self.estimator.assume(disk, bytes_per_page),
            SourceInput::Tracking(populated) => {
                if self.answered(Awaited::StartTracking) && self.state == State::StartTracking {
                    self.tracking(now, populated);
                }
            }
            SourceInput::Dirty(dirty) => {
                if self.answered(Awaited::Scan) {
                    self.scanned(now, dirty);
                }
            }
            SourceInput::Frozen { needed } => {
                if self.answered(Awaited::Freeze) && self.state == State::Freezing {
                    self.needed = needed;
                    self.figures.milestones.frozen = Some(now);
                    self.enter(State::FinalScan);
                    self.scan(now);
                }
            }
            SourceInput::StateSaved { len, hash } => {
                if self.answered(Awaited::SaveState) && self.state == State::Saving {
                    self.state_saved(now, len, hash);
                }
            }
            SourceInput::Journaled => {
                if self.answered(Awaited::Journal) {
                    self.journaled(now);
                }
            }
            SourceInput::Thawed => {
                if self.answered(Awaited::Thaw) && self.state == State::Thawing {
                    self.finish_ending();
                }
            }
            SourceInput::Released => {
                if self.answered(Awaited::Release) && self.state == State::Releasing {
                    self.released();
                }
            }
            SourceInput::Failed { error } => self.failed(now, error),
            SourceInput::Unreadable { error } => self.unreadable(error),
            SourceInput::Sent { batch, bytes } => self.sent(batch, bytes),
            SourceInput::Link(figures) => self.estimator.link(figures),
            SourceInput::Cancel { reason } => self.cancel(reason),
            SourceInput::Timeout => {
                self.timeout(now);
                self.overdue(now);
            }
        }
        self.advance(now);
    }

    /// The next command, until there is none.
    pub fn poll_command(&mut self) -> Option<SourceCommand> {
        self.commands.pop_front()
    }

    /// The next piece of work for a lane that has room. To be asked again after every input.
    pub fn poll_chunk(&mut self, now: Duration, lane: Lane) -> Option<Chunk> {
        if self.link != Link::Up {
            return None;
        }
        if self.state == State::PostCopy {
            self.look_again(now);
        }
        let chunk = match lane {
            Lane::Control => None,
            Lane::Urgent => self.urgent_chunk(),
            Lane::Freeze => self.freeze_chunk(),
            Lane::Bulk => self.bulk_chunk(),
        };
        if let Some(chunk) = &chunk {
            self.handed_out(now, chunk.batch);
            self.advance(now);
        }
        chunk
    }

    /// When [`SourceInput::Timeout`] is due.
    pub fn poll_timeout(&self) -> Option<Duration> {
        if matches!(self.state, State::Idle | State::Finished) {
            return None;
        }
        let patience = self
            .waits_for_peer()
            .then(|| self.heard.saturating_add(self.config.patience));
        let round = (self.state == State::Round && self.round_is_out()).then(|| self.next_scan());
        let overdue = (self.state == State::PostCopy && self.link == Link::Up)
            .then(|| self.coming.iter().map(|(deadline, ..)| *deadline).min())
            .flatten();
        patience.into_iter().chain(round).chain(overdue).min()
    }

    /// Whether the driver should dial the destination (again).
    pub fn wants_link(&self) -> bool {
        self.link == Link::Down
            && matches!(
                self.state,
                State::Idle | State::Offered | State::Accepting | State::PostCopy
            )
    }

    /// The phase of the session.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Idle | State::AwaitWelcome | State::AwaitReady => Phase::Negotiation,
            State::StartTracking
            | State::Round
            | State::Scanning
            | State::Draining
            | State::Freezing => Phase::PreCopy,
            State::FinalScan
            | State::Saving
            | State::LastScan
            | State::FreezeCopy
            | State::Offering
            | State::Offered => Phase::FreezeCopy,
            State::Accepting | State::PostCopy => Phase::PostCopy,
            State::Completing
            | State::Releasing
            | State::Declining
            | State::Thawing
            | State::Finished => Phase::Done,
        }
    }

    /// Figures for the report.
    pub fn figures(&self) -> &SourceFigures {
        &self.figures
    }

    /// What the destination checked, from its `Ready`.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What went wrong without ending the session.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn enter(&mut self, state: State) {
        self.state = state;
    }

    fn command(&mut self, command: SourceCommand) {
        let awaited = match &command {
            SourceCommand::StartTracking => Some(Awaited::StartTracking),
            SourceCommand::Scan => Some(Awaited::Scan),
            SourceCommand::Freeze => Some(Awaited::Freeze),
            SourceCommand::SaveState => Some(Awaited::SaveState),
            SourceCommand::Journal(_) => Some(Awaited::Journal),
            SourceCommand::Thaw => Some(Awaited::Thaw),
            SourceCommand::Release => Some(Awaited::Release),
            SourceCommand::Send(_) | SourceCommand::CloseLink { .. } | SourceCommand::Finish(_) => {
                None
            }
        };
        self.awaited.extend(awaited);
        self.commands.push_back(command);
    }

    fn send(&mut self, message: Message) {
        if self.link != Link::Down {
            self.command(SourceCommand::Send(message));
        }
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

    /// Whether the next step is the other side's.
    fn waits_for_peer(&self) -> bool {
        matches!(
            self.state,
            State::AwaitWelcome
                | State::AwaitReady
                | State::Round
                | State::Draining
                | State::FreezeCopy
                | State::Offered
                | State::PostCopy
        )
    }

    /// Ends the session with the guest here. Only before ownership was sent, or once the
    /// destination has declined.
    fn end_here(&mut self, outcome: SourceOutcome) {
        let why = match &outcome {
            SourceOutcome::Cancelled { reason }
            | SourceOutcome::NotConverged { reason }
            | SourceOutcome::Failed { reason } => reason.clone(),
            SourceOutcome::Refused(refusal) => refusal.to_string(),
            _ => "the session has ended".into(),
        };
        self.send(Message::Cancel { reason: why });
        self.ending = Some(outcome);
        if self.touched {
            self.enter(State::Thawing);
            self.command(SourceCommand::Thaw);
        } else {
            self.finish_ending();
        }
    }

    fn finish_ending(&mut self) {
        if let Some(outcome) = self.ending.take() {
            self.finish(outcome);
        }
    }

    fn finish(&mut self, outcome: SourceOutcome) {
        self.enter(State::Finished);
        self.command(SourceCommand::Finish(outcome));
    }

    /// Whether ownership has certainly not left, without anything having been promised.
    fn before_offer(&self) -> bool {
        matches!(
            self.state,
            State::Idle
                | State::AwaitWelcome
                | State::AwaitReady
                | State::StartTracking
                | State::Round
                | State::Scanning
                | State::Draining
                | State::Freezing
                | State::FinalScan
                | State::Saving
                | State::LastScan
                | State::FreezeCopy
        )
    }

    /// Takes the steps that need no input, only that something has run empty.
    fn advance(&mut self, now: Duration) {
        match self.state {
            State::Round if self.round_is_out() && now >= self.next_scan() => {
                self.enter(State::Scanning);
                self.scan(now);
            }
            State::Round if self.scan_is_due(now) => {
                self.scanning = true;
                self.scan(now);
            }
            State::Draining if self.in_flight_bytes <= self.drained() => {
                self.enter(State::Freezing);
                self.figures.milestones.freeze = Some(now);
                self.command(SourceCommand::Freeze);
            }
            State::FreezeCopy
                if self.freeze_pending.is_empty() && self.state_next >= self.state_len =>
            {
                self.enter(State::Offering);
                self.command(SourceCommand::Journal(SourceRecord::HandoverOffered {
                    session: self.config.session,
                }));
            }
            _ => {}
        }
    }

    fn offer(&self) -> Offer {
        Offer {
            guest: self.guest.clone(),
            regions: self.shapes.infos().to_vec(),
            mode: self.config.mode,
            check_only: self.config.check_only,
        }
    }

    fn welcome(&mut self, version: u16) -> bool {
        let known = SUPPORTED_VERSIONS.contains(&version);
        if !known {
            self.violation(&format!(
                "it chose protocol version {version}, which was not offered (best here: \
                 {PROTOCOL_VERSION})"
            ));
        }
        known
    }
}
