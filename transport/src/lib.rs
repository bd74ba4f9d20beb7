//! QUIC lanes, identities, wire format and block codec.
//!
//! - [`endpoint`] opens a UDP port and makes [`link`]s of connections whose peer is trusted
//!   ([`identity`], [`trust`]). There is no way without certificates on both sides.
//! - [`link`] carries messages ([`message`], [`frame`]) and batches of blocks ([`codec`]) on
//!   [`lane`]s with strict priorities.
//! - [`congestion`] decides how much is in flight.
//!
//! What is sent in which order is the engine's business; `docs/protocol.md` has both.

pub mod codec;
mod config;
pub mod congestion;
pub mod endpoint;
pub mod error;
pub mod frame;
pub mod identity;
pub mod lane;
pub mod link;
pub mod message;
mod reset;
mod socket;
mod tls;
pub mod trust;

pub use config::TransportConfig;
pub use congestion::Congestion;
pub use endpoint::Endpoint;
pub use error::{CloseCode, LinkError, TransportError};
pub use identity::{Fingerprint, Identity, IdentityError};
pub use lane::Lane;
pub use link::repair::RepairStats;
pub use link::urgent::UrgentStats;
pub use link::{ControlReceiver, ControlSender, Incoming, Link, LinkStats};
pub use tls::ALPN;
pub use trust::{PeerIdentity, Rejection, Trust};
