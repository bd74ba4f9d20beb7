//! What all runners share: what they count, and how they follow the wishes of their handle and the
//! timed changes of a link. No packet passes through here.

mod stats;
mod steering;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use stats::Counters;
pub use stats::{
    DirectionStats, LATE, LATE_SHARE, LATENESS_BUCKETS, LATEST, LinkStats, late, lateness_bound,
};
pub(crate) use steering::{Schedule, Steering};

/// Locks what is never left half-changed: a panic of another holder takes nothing from it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Seeds of the two directions of a link with one seed: they draw from different sequences.
pub(crate) fn seed_of(seed: u64, back: bool) -> u64 {
    seed.wrapping_mul(2).wrapping_add(u64::from(back))
}
