//! The emulated WAN: what a link does to packets ([`model`]), how it is described ([`spec`], with a
//! [`ladder`] of named links), and runners that put real traffic through it: a [`relay`] of datagrams,
//! and a link between two network [namespaces](namespace) for any protocol ([`tun`]).
//!
//! This crate knows nothing of migrations, and nothing else of the workspace.
//!
//! ```
//! use hybridmig_netem::{Relay, RelayConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let server = std::net::UdpSocket::bind("127.0.0.1:0")?;
//! let relay = Relay::start(RelayConfig {
//!     listen: "127.0.0.1:0".parse()?,
//!     target: server.local_addr()?,
//!     link: "delay 25ms rate 200mbit".parse()?,
//!     seed: 1,
//! })?;
//! let client = std::net::UdpSocket::bind("127.0.0.1:0")?;
//! client.send_to(b"hello", relay.local_addr())?;
//! let mut buffer = [0; 16];
//! let (length, _) = server.recv_from(&mut buffer)?;
//! assert_eq!(&buffer[..length], b"hello");
//! assert_eq!(relay.stop().forward.delivered_packets, 1);
//! # Ok(())
//! # }
//! ```

pub mod check;
pub mod ladder;
pub mod model;
pub mod namespace;
pub mod relay;
pub mod runner;
pub mod spec;
mod sys;
pub mod tc;
pub mod tun;

pub use namespace::Namespace;
pub use relay::{Relay, RelayConfig, RelayHandle};
pub use runner::{DirectionStats, LinkStats};
pub use spec::{DirectionSpec, LinkSpec, SpecError};
pub use tun::{TunConfig, TunError, TunHandle, TunLink};
