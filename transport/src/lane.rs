//! Lanes: the priority classes of one connection.

use serde::{Deserialize, Serialize};

/// A lane of a connection. Lower ones wait whenever a higher one has something to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// Messages of the session.
    Control,
    /// Demand paging.
    Urgent,
    /// The freeze set, the device state, prefetch around faults.
    Freeze,
    /// Everything else.
    Bulk,
}

impl Lane {
    /// All lanes, the most urgent first.
    pub const ALL: [Self; 4] = [Self::Control, Self::Urgent, Self::Freeze, Self::Bulk];

    /// Priority of the lane's streams; larger goes first.
    pub fn priority(self) -> i32 {
        match self {
            Self::Control => 30,
            Self::Urgent => 20,
            Self::Freeze => 10,
            Self::Bulk => 0,
        }
    }
}
