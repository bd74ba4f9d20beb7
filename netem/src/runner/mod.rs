//! What all runners share: what they count, and how they follow the wishes of their handle and the
//! timed changes of a link. No packet passes through here.

mod stats;
mod steering;

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

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

/// Waits for threads that have been told to end.
pub(crate) fn join(threads: &mut Vec<JoinHandle<()>>) {
    for thread in threads.drain(..) {
        let name = thread.thread().name().unwrap_or("of a link").to_owned();
        if thread.join().is_err() {
            tracing::error!("the thread {name} panicked");
        }
    }
}

/// Asks the kernel that no core sleeps while the file is open (PM quality of service, as cyclictest does it):
/// a core that has to be woken, or a virtual one that its host has to bring back first, delivers packets
/// a millisecond late and more. Without the right to ask, the link runs all the same.
pub(crate) fn keep_awake() -> Option<File> {
    const REQUESTS: &str = "/dev/cpu_dma_latency";
    let ask = || -> io::Result<File> {
        let mut file = File::options().write(true).open(REQUESTS)?;
        // The latency that is tolerated, in µs.
        file.write_all(&0i32.to_ne_bytes())?;
        Ok(file)
    };
    let asked = ask();
    if let Err(error) = &asked {
        tracing::debug!(%error, "cores may sleep beside the emulated link: {REQUESTS} cannot be used");
    }
    asked.ok()
}
