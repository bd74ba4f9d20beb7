//! What can go wrong with endpoints and links: who ended it, and why.

use std::net::SocketAddr;
use std::time::Duration;

use crate::identity::Fingerprint;

/// Codes that a link is closed with. Numbers above 15 are free for the application.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CloseCode(pub u32);

impl CloseCode {
    /// All is done.
    pub const DONE: Self = Self(0);
    /// The peer is not trusted; nothing was exchanged.
    pub const UNAUTHORISED: Self = Self(1);
    /// The peer broke the protocol.
    pub const PROTOCOL: Self = Self(2);
    /// The session was refused or cancelled.
    pub const REFUSED: Self = Self(3);
    /// The process ends.
    pub const SHUTDOWN: Self = Self(4);
}

/// Why a link is no more, or why something on it failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The peer closed it and said why.
    #[error("{peer} closed the link: {reason}")]
    PeerClosed {
        /// The peer's address.
        peer: SocketAddr,
        /// One of [`CloseCode`]'s.
        code: u32,
        /// The peer's words; not to be trusted, at most a packet long.
        reason: String,
    },
    /// Nothing was heard for the idle timeout.
    #[error("nothing was heard from {peer} for {after:?}: the link, or the peer, is down")]
    TimedOut {
        /// The peer's address.
        peer: SocketAddr,
        /// How long.
        after: Duration,
    },
    /// This side closed it.
    #[error("the link was closed here: {reason}")]
    LocalClosed {
        /// What was given to `close`.
        reason: String,
    },
    /// The peer did what the protocol forbids; the link has been closed.
    #[error("{peer} broke the protocol: {what}")]
    Protocol {
        /// The peer's address.
        peer: SocketAddr,
        /// What it did.
        what: String,
    },
    /// QUIC gave up for another reason: the peer's process restarted, or a TLS alert.
    #[error("the link to {peer} broke: {what}")]
    Lost {
        /// The peer's address.
        peer: SocketAddr,
        /// What QUIC said.
        what: String,
    },
    /// What was to be sent cannot be sent; the link is unharmed.
    #[error("cannot be sent: {0}")]
    Unsendable(String),
}

/// What can go wrong before there is a link.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The UDP port could not be opened.
    #[error("opening UDP {addr}")]
    Bind {
        /// Where.
        addr: SocketAddr,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Identity and TLS do not go together.
    #[error("setting up TLS: {0}")]
    Tls(String),
    /// The address cannot be connected to.
    #[error("connecting to {peer}: {what}")]
    Address {
        /// The address.
        peer: SocketAddr,
        /// Why not.
        what: String,
    },
    /// Nobody answered, or not to the end.
    #[error(
        "{peer} did not answer within {after:?}: is hybridmig listening there, and is UDP allowed \
         through?"
    )]
    Unreachable {
        /// The address.
        peer: SocketAddr,
        /// How long was waited.
        after: Duration,
    },
    /// The peer was refused here, and has been told.
    #[error("refused {peer}: {reason}")]
    Stranger {
        /// Its address.
        peer: SocketAddr,
        /// What it presented.
        fingerprint: Option<Fingerprint>,
        /// Why, and what to do about it.
        reason: String,
    },
    /// The peer refused this side, in its own words.
    #[error("{peer} refused this side: {reason}")]
    Refused {
        /// Its address.
        peer: SocketAddr,
        /// The peer's words.
        reason: String,
    },
    /// The handshake failed otherwise.
    #[error("the handshake with {peer} failed: {what}")]
    Handshake {
        /// Its address.
        peer: SocketAddr,
        /// What QUIC said.
        what: String,
    },
    /// The endpoint was closed.
    #[error("the endpoint is closed")]
    Closed,
}

impl TransportError {
    /// What it means when a link ends before the peer has accepted this side.
    pub(crate) fn of_link(peer: SocketAddr, error: LinkError) -> Self {
        match error {
            LinkError::PeerClosed { code, reason, .. } if code == CloseCode::UNAUTHORISED.0 => {
                Self::Refused { peer, reason }
            }
            LinkError::TimedOut { after, .. } => Self::Unreachable { peer, after },
            other => Self::Handshake {
                peer,
                what: other.to_string(),
            },
        }
    }
}
