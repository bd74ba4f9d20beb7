//! What goes into the session machines and what comes out of them. Time is a [`Duration`] since
//! the session began, given with every input, so that a virtual clock can drive them.
//!
//! Rules for whoever drives a machine:
//!
//! - Commands that have an answer (guest commands and `Journal`) are executed one at a time, in the
//!   order in which the machine gave them, and each is answered exactly once, by its own answer or
//!   by `Failed`, in that order. The one exception is [`DestinationCommand::Abandon`], which see.
//! - After every input and after every call of `poll_chunk` the commands are polled until there is
//!   none. Only faults may be given several at a time: they go in one message then.
//! - Messages sent before `Finish` or `CloseLink` are delivered, or their connection is lost, before
//!   the link is closed: they may be what tells the peer who owns the guest.
//! - A link that a `CloseLink` named is gone for the machine at once; a `Disconnected` for it may
//!   still be given and changes nothing.

use std::time::Duration;

use hybridmig_transport::message::{Message, Offer, Refusal, RefusalCode, SessionId};
use serde::{Deserialize, Serialize};

pub use hybridmig_transport::codec::Refer;
pub use hybridmig_transport::lane::Lane;

use crate::blocks::{Blocks, RegionId};
use crate::profile::AccessSample;

/// The phases of a session, as both sides name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Versions, checks, preparation.
    Negotiation,
    /// The guest runs at the source, blocks move.
    PreCopy,
    /// The guest runs nowhere.
    FreezeCopy,
    /// The guest runs at the destination, blocks follow.
    PostCopy,
    /// Nothing more to move.
    Done,
}

/// A piece of work for the source's data plane: read, encode and send as one batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Id of the batch, unique in the session, ascending from 0.
    pub batch: u64,
    /// Pass that the blocks belong to; a later pass of a block supersedes an earlier one.
    pub pass: u32,
    /// Lane it goes out on.
    pub lane: Lane,
    /// What to send.
    pub body: ChunkBody,
    /// What of the destination's contents the encoder may refer to (difference, hash). A rejected
    /// record costs a round trip, which during the freeze is downtime.
    pub refer: Refer,
    /// The handover waits for it, or is likely to: what is lost of it on the way should cost no round
    /// trip.
    pub awaited: bool,
}

/// The contents of a [`Chunk`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChunkBody {
    /// Blocks of one region, in the order to send them.
    Blocks {
        /// The region.
        region: RegionId,
        /// The blocks.
        blocks: Vec<u32>,
    },
    /// A piece of the device state.
    State {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u32,
    },
}

/// Inputs of the source's machine.
#[derive(Clone, Debug)]
pub enum SourceInput {
    /// An authorised link to the destination is up, for the first time or again.
    Connected,
    /// The link is gone.
    Disconnected {
        /// What the transport said.
        reason: String,
    },
    /// A message from the destination.
    Message(Message),
    /// Blocks that the guest has accessed lately, as far as it can tell. Given before the answer to
    /// `StartTracking` or `Scan`; answers no command.
    Accessed(Blocks),
    /// Which of samples of blocks the guest has accessed. Given before the answer to `Scan`; answers no command.
    Sampled(Vec<AccessSample>),
    /// What a sample of the contents took in batches: bytes per page, of memory or of disks. Answers no command.
    Contents {
        /// Of disks.
        disk: bool,
        /// Bytes on the wire per page of 4 KiB.
        bytes_per_page: f64,
    },
    /// Answer to [`SourceCommand::StartTracking`]: the blocks that have content.
    Tracking(Blocks),
    /// Answer to [`SourceCommand::Scan`].
    Dirty(Blocks),
    /// Answer to [`SourceCommand::Freeze`].
    Frozen {
        /// Blocks that have to be at the destination before the guest resumes there, whatever the plan.
        needed: Blocks,
    },
    /// Answer to [`SourceCommand::SaveState`].
    StateSaved {
        /// Length in bytes.
        len: u64,
        /// BLAKE3.
        hash: [u8; 32],
    },
    /// Answer to [`SourceCommand::Journal`]: the record is durable.
    Journaled,
    /// Answer to [`SourceCommand::Thaw`].
    Thawed,
    /// Answer to [`SourceCommand::Release`].
    Released,
    /// A command failed (`what` names it); for `Journal`, nothing was made durable.
    Failed {
        /// What failed and why.
        error: String,
    },
    /// A chunk could not be read or encoded. Answers no command.
    Unreadable {
        /// What failed and why.
        error: String,
    },
    /// A chunk has been encoded and given to the transport.
    Sent {
        /// Its batch.
        batch: u64,
        /// Its size on the wire in bytes, without QUIC's overhead.
        bytes: u64,
    },
    /// What the transport measures, a few times a second.
    Link(LinkFigures),
    /// The operator wants it to end with the guest at the source.
    Cancel {
        /// Why.
        reason: String,
    },
    /// The time of [`super::source::SourceMachine::poll_timeout`] has come.
    Timeout,
}

/// What the transport knows of the link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LinkFigures {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Smallest round-trip time seen.
    pub min_rtt: Duration,
    /// Estimated bottleneck rate in bytes/s, 0 while unknown.
    pub bandwidth: f64,
    /// Share of packets lost, 0 to 1.
    pub loss: f64,
    /// Packets that are lost together, on average; 1 where losses are independent, 0 while nobody knows.
    pub loss_burst: f64,
    /// Time that packets lately waited at the bottleneck.
    pub queue: Duration,
    /// Whether others seem to use the bottleneck as well.
    pub shared: bool,
}

/// Records of the source's journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "record")]
pub enum SourceRecord {
    /// From here on the source may not run the guest by itself: ownership is being sent.
    HandoverOffered {
        /// The session.
        session: SessionId,
    },
    /// The destination has refused (or was told to never accept); the guest is the source's.
    Declined {
        /// Why.
        reason: String,
    },
    /// The destination has accepted; the guest is the destination's.
    Accepted,
    /// Every block is at the destination; the guest here was released.
    Released,
}

/// What the source's machine wants done. Guest commands are executed one at a time, in order.
#[derive(Clone, Debug)]
pub enum SourceCommand {
    /// Send on the control lane.
    Send(Message),
    /// Start dirty tracking.
    StartTracking,
    /// Take the dirty blocks.
    Scan,
    /// Stop the guest.
    Freeze,
    /// Save its device state.
    SaveState,
    /// Make a record durable (fsync), then answer.
    Journal(SourceRecord),
    /// Let the guest run again.
    Thaw,
    /// The guest has left for good.
    Release,
    /// Drop this link; the peer is told why. Ask `wants_link` whether to dial again.
    CloseLink {
        /// Why.
        reason: String,
    },
    /// The session has ended. Always the last command.
    Finish(SourceOutcome),
}

/// How a session ended for the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum SourceOutcome {
    /// The guest runs at the destination, every block is there.
    Moved,
    /// Only checks were wanted, and all held.
    Checked {
        /// The destination's notes.
        notes: Vec<String>,
    },
    /// One side refused before the handover; the guest runs at the source.
    Refused(Refusal),
    /// Cancelled, or the link was lost before the handover; the guest runs at the source.
    Cancelled {
        /// Why.
        reason: String,
    },
    /// Pre-copy could not reach the downtime that was asked for; the guest runs at the source.
    NotConverged {
        /// Rounds done, the rest in blocks, the downtime it would have cost.
        reason: String,
    },
    /// Ownership was sent and no answer came within the patience. The guest is frozen here and
    /// may run at the destination: `hybridmig resolve` tells what is known.
    InDoubt {
        /// What is known.
        reason: String,
    },
    /// The destination owns the guest but did not get every block within the patience; the blocks
    /// are kept here, frozen.
    Incomplete {
        /// What is known.
        reason: String,
    },
    /// The guest is at the source but something failed that needs a person (a thaw that failed).
    Failed {
        /// What.
        reason: String,
    },
}

impl SourceOutcome {
    /// The end of a session that the destination has refused: not every refusal is an objection.
    pub(crate) fn of_refusal(refusal: Refusal) -> Self {
        if refusal.code == RefusalCode::Cancelled {
            Self::Cancelled {
                reason: refusal.to_string(),
            }
        } else {
            Self::Refused(refusal)
        }
    }
}

/// Inputs of the destination's machine.
#[derive(Clone, Debug)]
pub enum DestinationInput {
    /// An authorised link from the source is up, for the first time or again.
    Connected,
    /// The link is gone.
    Disconnected {
        /// What the transport said.
        reason: String,
    },
    /// A message from the source.
    Message(Message),
    /// Answer to [`DestinationCommand::Check`].
    Checked(Result<Vec<String>, Refusal>),
    /// Answer to [`DestinationCommand::Prepare`].
    Prepared,
    /// A batch has been applied to the guest.
    Applied(AppliedBatch),
    /// Answer to [`DestinationCommand::Arm`]: what is really missing (blocks pushed early are not).
    Armed {
        /// The blocks to wait for.
        missing: Blocks,
    },
    /// Answer to [`DestinationCommand::LoadState`].
    Loaded,
    /// Answer to [`DestinationCommand::Journal`].
    Journaled,
    /// Answer to [`DestinationCommand::Resume`].
    Resumed,
    /// Answer to [`DestinationCommand::Disarm`].
    Disarmed,
    /// Answer to [`DestinationCommand::Abandon`].
    Abandoned,
    /// The guest waits for a block that is missing.
    Fault {
        /// The region.
        region: RegionId,
        /// The block.
        block: u32,
    },
    /// The guest gave blocks back; they need not come any more.
    Removed(Blocks),
    /// A command failed; for `Journal`, nothing was made durable.
    Failed {
        /// What failed and why.
        error: String,
    },
    /// A block could not be put in place, or the pager cannot go on. Answers no command.
    PlacementFailed {
        /// What failed and why.
        error: String,
    },
    /// The data plane found that the source broke the protocol (a batch that cannot be decoded, a
    /// block beyond its region).
    Violation {
        /// What it did.
        what: String,
    },
    /// The operator wants it to end.
    Cancel {
        /// Why.
        reason: String,
    },
    /// The time of `poll_timeout` has come.
    Timeout,
}

/// What applying a batch did. Batches are reported in the order in which the
/// [ledger](super::ledger::Ledger) saw them, or a repaired block could be reported before its
/// rejection.
#[derive(Clone, Debug, Default)]
pub struct AppliedBatch {
    /// Its id.
    pub batch: u64,
    /// Blocks that are now in place and were missing (post-copy only).
    pub placed: Blocks,
    /// Blocks that must be sent again in full.
    pub rejected: Vec<(RegionId, u32)>,
    /// Blocks rejected in an earlier batch that are now current.
    pub repaired: Vec<(RegionId, u32)>,
}

/// Records of the destination's journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "record")]
pub enum DestinationRecord {
    /// The guest is the destination's from here on.
    Accepted {
        /// The session.
        session: SessionId,
    },
    /// The guest will never run here in this session.
    Declined {
        /// The session.
        session: SessionId,
        /// Why.
        reason: String,
    },
    /// Every block is in place.
    Complete,
}

/// What the destination's machine wants done. Guest commands are executed one at a time, in order.
#[derive(Clone, Debug)]
pub enum DestinationCommand {
    /// Send on the control lane.
    Send(Message),
    /// Send [`Message::Fetch`] on the urgent lane.
    Fetch {
        /// The region.
        region: RegionId,
        /// The blocks.
        blocks: Vec<u32>,
    },
    /// Run the checks against the offer.
    Check(Offer),
    /// Make ready for blocks.
    Prepare(Offer),
    /// Under the data plane's lock: work out what is missing (`behind` less what has come with
    /// `postcopy_pass` or later), discard it, arm the pager. From then on batches are placed, not
    /// written.
    Arm {
        /// The blocks that stayed behind.
        behind: Blocks,
        /// See [`Message::Handover`].
        postcopy_pass: u32,
    },
    /// Check length and hash of the device state and load it.
    LoadState {
        /// Length in bytes.
        len: u64,
        /// BLAKE3.
        hash: [u8; 32],
    },
    /// Make a record durable (fsync), then answer.
    Journal(DestinationRecord),
    /// Run the guest.
    Resume,
    /// Every block is here: let go of the guest. The driver adds its summary to the message that
    /// follows ([`Message::AllPlaced`] is sent with an empty summary, which the driver fills in).
    Disarm,
    /// The guest will never run here. Executed at once, even beside a guest command that is still
    /// at work (a `LoadState` that waits for a block which will never come) and thereby ends it. The
    /// answer of that other command comes before [`DestinationInput::Abandoned`].
    Abandon,
    /// Drop this link; the peer is told why.
    CloseLink {
        /// Why.
        reason: String,
    },
    /// The session has ended. Always the last command.
    Finish(DestinationOutcome),
}

/// How a session ended for the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome")]
pub enum DestinationOutcome {
    /// The guest runs here, every block is here.
    Moved,
    /// Only checks were wanted. The driver goes on listening.
    Checked,
    /// One side refused before the handover.
    Refused(Refusal),
    /// Cancelled, or the link was lost before the handover; the guest is the source's.
    Cancelled {
        /// Why.
        reason: String,
    },
    /// The guest is ours and runs (or waits for blocks) but the source did not come back within
    /// the patience.
    Incomplete {
        /// What is known.
        reason: String,
    },
    /// Acceptance was made durable, the guest could not be started here, and that it never will be
    /// could not be made durable. The source stays frozen: `hybridmig resolve` is needed.
    Failed {
        /// What failed.
        reason: String,
    },
}
