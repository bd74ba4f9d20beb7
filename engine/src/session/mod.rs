//! The two ends of a session as pure state machines.

pub mod destination;
pub mod io;
pub mod ledger;
mod pieces;
mod ranges;
mod rate;
pub mod source;
