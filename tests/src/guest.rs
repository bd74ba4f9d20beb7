//! What the checkers inside the guest have in common with whoever prepares their disks and reads what they say.

#[path = "../guest/latency.rs"]
pub mod latency;
#[path = "../guest/layout.rs"]
pub mod layout;
#[path = "../guest/pattern.rs"]
pub mod pattern;
