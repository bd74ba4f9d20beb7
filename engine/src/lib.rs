//! What to move and when: sessions, plan, journal and guests.

pub mod blocks;
pub mod guest;
pub mod session;
