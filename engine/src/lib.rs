//! What to move and when: sessions, plan, journal and guests.

pub mod agility;
pub mod blocks;
pub mod driver;
pub mod guest;
pub mod journal;
pub mod nbd;
pub mod plan;
pub mod predict;
pub mod profile;
mod records;
pub mod regions;
pub mod report;
pub mod seeds;
pub mod session;

/// Name and version of this software, as it introduces itself to a peer and in reports.
pub const SOFTWARE: &str = concat!("hybridmig ", env!("CARGO_PKG_VERSION"));
