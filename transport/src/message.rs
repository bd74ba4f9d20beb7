//! The messages of a session, as they travel on the control lane and (only [`Message::Fetch`])
//! on the urgent lane. `docs/protocol.md` tells the order in which they are legal; this file is
//! only their shape. It must never know what a message leads to: that is the engine's business.

use std::collections::BTreeMap;
use std::fmt;

use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

/// A set of block numbers within one region. 32 bits of block number address 16 TiB of memory in
/// pages of 4 KiB, or 256 TiB of disk in clusters of 64 KiB.
pub type BlockSet = RoaringBitmap;

/// The protocol version that this build speaks best.
pub const PROTOCOL_VERSION: u16 = 1;
/// Every protocol version that this build can speak, best first.
pub const SUPPORTED_VERSIONS: &[u16] = &[PROTOCOL_VERSION];

/// Names one region of a guest within a session. Dense, from 0, in the order of the offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RegionId(pub u16);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {}", self.0)
    }
}

/// What a region holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionKind {
    /// Guest memory; a block is a page of 4 KiB.
    Memory,
    /// A disk; a block is a cluster of 64 KiB unless the offer says otherwise.
    Disk,
}

/// One block-addressed piece of a guest's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionInfo {
    /// The region's name in this session.
    pub id: RegionId,
    /// Memory or disk.
    pub kind: RegionKind,
    /// What the guest calls it, for example `ram` or a disk's node name.
    pub name: String,
    /// Length in blocks.
    pub blocks: u32,
    /// Length of a block in bytes; a power of two, 4096 for memory.
    pub block_size: u32,
}

impl RegionInfo {
    /// The region's length in bytes.
    pub fn bytes(&self) -> u64 {
        u64::from(self.blocks) * u64::from(self.block_size)
    }
}

/// Random name of one migration, the same on both sides and in both journals.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SessionId(pub [u8; 8]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl std::str::FromStr for SessionId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || format!("'{text}' is not a session id: 16 hexadecimal digits are expected");
        if text.len() != 16 || !text.is_ascii() {
            return Err(bad());
        }
        let mut id = [0; 8];
        for (i, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).map_err(|_| bad())?;
        }
        Ok(Self(id))
    }
}

/// What the guest is, as far as the other side must match it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDescription {
    /// `workload`, `qemu` or `xen`.
    pub kind: String,
    /// What the operator calls the guest; for messages only.
    pub name: String,
    /// Facts that must be equal on both sides, by name (`machine`, `cpu`, `ram` …).
    pub facts: BTreeMap<String, String>,
}

/// How the three phases are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Pre-copy, then freeze-copy, then post-copy of what stayed behind.
    Hybrid,
    /// Everything moves before the guest resumes.
    Precopy,
    /// The guest resumes first, its blocks follow.
    Postcopy,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hybrid => "hybrid",
            Self::Precopy => "precopy",
            Self::Postcopy => "postcopy",
        })
    }
}

/// What the source wants to move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The guest.
    pub guest: GuestDescription,
    /// Its regions, `regions[i].id == RegionId(i)`.
    pub regions: Vec<RegionInfo>,
    /// How it is to be moved.
    pub mode: Mode,
    /// Only run the checks (`hybridmig check --to`): nothing is prepared, and the destination goes
    /// on waiting for a sender.
    pub check_only: bool,
}

/// Why a side will not go on. The code is for programs, the reasons are for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// What kind of refusal this is.
    pub code: RefusalCode,
    /// One sentence for each thing that is wrong: what failed, on what, what to do about it.
    pub reasons: Vec<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reasons.join("; "))
    }
}

/// The kinds of [`Refusal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalCode {
    /// No common protocol version.
    Version,
    /// The destination is busy with another session.
    Busy,
    /// The guest does not fit the destination (memory, machine type, CPU model …).
    Guest,
    /// The session is not known here.
    UnknownSession,
    /// The destination could not load the guest's state or place its blocks.
    Load,
    /// The peer broke the protocol.
    Protocol,
    /// Anything else; see the reasons.
    Other,
    /// The operator of the refusing side, or a lost link, has ended the session.
    Cancelled,
}

/// What the destination knows of a session when the link is back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Standing {
    /// It has not accepted the guest and from now on never will: its journal holds the refusal.
    Refused(Refusal),
    /// Something that belongs to the handover has not arrived. It has not accepted, and declines if
    /// it is told to cancel.
    Preparing,
    /// All of the handover has arrived and it is loading the state, which may fetch blocks. It will
    /// accept or decline by itself; a cancel comes too late.
    Loading,
    /// It has accepted: the guest is the destination's.
    Accepted,
    /// It has accepted and every block is in place.
    Complete,
}

/// Durations at the destination between the arrival of the handover and the running guest, in
/// microseconds. The source cannot see them, and clocks of two hosts cannot be compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeTimings {
    /// First freeze-lane byte seen → last block and the state in place.
    pub receive_us: u64,
    /// Discarding what is not current and arming the pager.
    pub discard_us: u64,
    /// Loading the device state.
    pub load_us: u64,
    /// Writing the acceptance to the journal.
    pub journal_us: u64,
    /// Resuming the guest.
    pub resume_us: u64,
}

/// What the destination saw, for the source's report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DestinationSummary {
    /// Demand faults that had to cross the network.
    pub faults: u64,
    /// Faults answered locally (block known to be zero, or already here).
    pub local_faults: u64,
    /// Fault latency histogram: (upper bound in µs, count), ascending.
    pub fault_latency_us: Vec<(u64, u64)>,
    /// Sum over the guest's threads of the time they waited for blocks, in µs.
    pub blocked_us: u64,
    /// Per thread (name or id, µs blocked), the most blocked first; at most 64.
    pub blocked_threads: Vec<(String, u64)>,
    /// Speed of the guest relative to before the freeze: (µs since resume, v/v0), at most 4096
    /// samples; empty where the guest cannot tell.
    pub speed: Vec<(u64, f32)>,
    /// How the blocks of `speed` were found: `guest` or `blocked-time`.
    pub speed_source: String,
    /// Resume → last block in place, in µs.
    pub postcopy_us: u64,
    /// Outcome of the guest's own verification of its contents, where it has one.
    pub verified: Option<Result<u64, String>>,
}

/// One message of a session.
///
/// The order of the variants is part of the wire format: append only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// Source → destination, first: what the source can speak.
    Hello {
        /// Versions, best first; at most 16.
        versions: Vec<u16>,
        /// Bits of [`Features`].
        features: u64,
        /// `hybridmig 0.1.0`, for messages and reports.
        software: String,
        /// The session to start or to resume.
        session: SessionId,
        /// Whether this connection continues a session after a lost link.
        resume: bool,
    },
    /// Destination → source: what is spoken from now on.
    Welcome {
        /// The chosen version.
        version: u16,
        /// The features that both have.
        features: u64,
        /// The destination's software.
        software: String,
    },
    /// Either side, before the handover: no, and why. Nothing has happened to the guest.
    Refuse(Refusal),
    /// Source → destination: what is to be moved.
    Offer(Offer),
    /// Destination → source: prepared; batches may come.
    Ready {
        /// Facts that were checked and held, for the report of `check`.
        notes: Vec<String>,
    },
    /// Destination → source: these batches have been applied.
    Applied {
        /// Half-open ranges of batch ids, ascending; at most 1024.
        batches: Vec<(u64, u64)>,
        /// Blocks that must be sent again in full, because what a record named or differed from
        /// was not what the destination has; at most 4096.
        rejected: Vec<(RegionId, u32)>,
    },
    /// Source → destination, once frozen: blocks that stay behind. A large set comes in pieces.
    Behind {
        /// The region.
        region: RegionId,
        /// A piece of the set.
        #[serde(with = "block_set")]
        blocks: BlockSet,
    },
    /// Source → destination: ownership. The source has journalled it and will not run the guest
    /// again unless the destination refuses.
    Handover {
        /// Every batch with an id below this one is part of the handover.
        batches: u64,
        /// From this pass on a block in the set of those left behind counts as arrived.
        postcopy_pass: u32,
        /// Length of the device state in bytes.
        state_len: u64,
        /// BLAKE3 of the device state.
        state_hash: [u8; 32],
        /// Number of [`Message::Behind`] pieces that came before.
        behind_pieces: u32,
    },
    /// Destination → source: journalled, loaded, running. The guest is the destination's.
    Accepted(ResumeTimings),
    /// Destination → source: it cannot; its journal holds the refusal. The source thaws.
    Declined(Refusal),
    /// Destination → source, post-copy: blocks that the guest waits for. Travels on the urgent
    /// lane, or on control.
    Fetch {
        /// The region.
        region: RegionId,
        /// The blocks, in the order of need; at most 1024.
        blocks: Vec<u32>,
    },
    /// Destination → source: every block is in place; the source may release the guest.
    AllPlaced(DestinationSummary),
    /// Source → destination: released; nothing more will come.
    Released,
    /// Either side before the handover: stop, the guest stays at the source. From a source it is
    /// also the answer to a refusal (so that the destination need not wait for it to come back), and
    /// after a resumed connection the request to decline if that is still possible.
    Cancel {
        /// Why.
        reason: String,
    },
    /// Destination → source, after the welcome of a resumed connection.
    Status {
        /// Where the destination stands.
        standing: Standing,
        /// Number of [`Message::Missing`] pieces that follow.
        missing_pieces: u32,
    },
    /// Destination → source: a piece of the set of blocks that it does not have.
    Missing {
        /// The region.
        region: RegionId,
        /// A piece of the set.
        #[serde(with = "block_set")]
        blocks: BlockSet,
    },
    /// Destination → source, on the bulk lane: a piece of the set of contents that it has in files
    /// of its own (seeds), whatever region they belong to.
    Seeds {
        /// Length of each content in bytes.
        block_size: u32,
        /// The first eight bytes of each one's BLAKE3, as little-endian numbers, ascending; 1 to
        /// [`MAX_SEED_NAMES`]. Pieces do not overlap.
        #[serde(with = "names")]
        names: Vec<u64>,
    },
}

/// Most names in one [`Message::Seeds`]: 32 KiB, so that a piece is soon out of the way of others.
pub const MAX_SEED_NAMES: usize = 4096;

/// Bits that the two sides offer in [`Message::Hello`] and choose in [`Message::Welcome`].
pub struct Features;

impl Features {
    /// Blocks named by the hash of content that was sent before.
    pub const NAMED: u64 = 1 << 0;
    /// Blocks as XOR difference to the version sent before.
    pub const DELTA: u64 = 1 << 1;
    /// Blocks named by the hash of content that the destination has in files of its own, which it
    /// tells of by [`Message::Seeds`].
    pub const SEEDS: u64 = 1 << 2;
    /// All that this build has.
    pub const ALL: u64 = Self::NAMED | Self::DELTA | Self::SEEDS;
}

/// Block sets travel in the portable roaring format.
mod block_set {
    use super::BlockSet;
    use serde::{Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(set: &BlockSet, out: S) -> Result<S::Ok, S::Error> {
        let mut bytes = Vec::with_capacity(set.serialized_size());
        set.serialize_into(&mut bytes)
            .map_err(serde::ser::Error::custom)?;
        out.serialize_bytes(&bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<BlockSet, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = BlockSet;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a set of blocks in the portable roaring format")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<BlockSet, E> {
                BlockSet::deserialize_from(bytes).map_err(E::custom)
            }
        }
        input.deserialize_bytes(Visitor)
    }
}

/// Names travel as bytes, eight each, little endian: random numbers as varints would take ten.
mod names {
    use serde::{Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(names: &[u64], out: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = names.iter().flat_map(|name| name.to_le_bytes()).collect();
        out.serialize_bytes(&bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<u64>, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Vec<u64>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("names of eight bytes each")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Vec<u64>, E> {
                let (names, rest) = bytes.as_chunks::<8>();
                if !rest.is_empty() {
                    return Err(E::invalid_length(bytes.len(), &self));
                }
                Ok(names.iter().map(|name| u64::from_le_bytes(*name)).collect())
            }
        }
        input.deserialize_bytes(Visitor)
    }
}
