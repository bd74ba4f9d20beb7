//! The session machines: destination.
