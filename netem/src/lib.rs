//! The emulated WAN: what a link does to packets ([`model`]), how it is described ([`spec`]), and
//! runners that put real traffic through it ([`relay`]).
//!
//! This crate knows nothing of migrations, and nothing else of the workspace.

pub mod model;
pub mod relay;
pub mod spec;
mod sys;

pub use relay::{Relay, RelayConfig, RelayHandle, RelayStats};
pub use spec::{LinkSpec, SpecError};
