//! QUIC lanes, identities, wire format and block codec.

pub mod codec;
pub mod lane;
pub mod message;
