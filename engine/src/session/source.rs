//! The session machines: source.
