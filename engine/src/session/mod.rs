//! The two ends of a session as pure state machines.

pub mod io;
