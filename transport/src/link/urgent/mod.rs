//! The urgent lane: short contents as **parcels**, k data and m parity pieces of equal length, each in
//! a QUIC datagram of its own, any k of which give the contents back. So one lost packet, or a few,
//! cost no round trip. A parcel that is not acknowledged in time is sent once more, then its contents
//! go on a stream; whatever arrives twice is dropped by its id.
//!
//! [`wire`], [`plan`], [`observe`], [`parcel`], [`sender`] and [`receiver`] know no clock and no
//! connection: time goes in as a duration since the link began. `driver` carries between them and
//! QUIC. Nothing here may hold memory that the peer decides about without a bound.

pub(super) mod driver;
pub mod observe;
pub mod parcel;
pub mod plan;
pub mod receiver;
pub mod sender;
pub mod wire;

use serde::{Deserialize, Serialize};

/// What the urgent lane's datagrams have done, both directions of this side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UrgentStats {
    /// Contents sent as parcels.
    pub parcels: u64,
    /// Their bytes.
    pub contents_bytes: u64,
    /// Datagrams sent, acknowledgements among them.
    pub datagrams: u64,
    /// Bytes of those.
    pub datagram_bytes: u64,
    /// The part of `datagram_bytes` that is copies, parity, padding, and everything of retries.
    pub redundant_bytes: u64,
    /// Parcels sent a second time.
    pub retries: u64,
    /// Second times that were not needed: the acknowledgement was on its way.
    pub needless_retries: u64,
    /// Parcels whose contents went on a stream in the end.
    pub stream_fallbacks: u64,
    /// Contents that went on a stream at once: too long, or no datagrams here.
    pub streams: u64,
    /// Parcels received.
    pub received: u64,
    /// Of `received`: those that needed parity or a later copy.
    pub repaired: u64,
    /// Pieces, or streams, that had come before and were dropped.
    pub duplicates: u64,
}
