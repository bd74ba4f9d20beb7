//! The session machines: ledger.
