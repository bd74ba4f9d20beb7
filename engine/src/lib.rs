//! What to move and when: sessions, plan, journal and guests.

pub mod agility;
pub mod blocks;
pub mod driver;
pub mod guest;
pub mod journal;
pub mod plan;
pub mod session;
