//! The embedded guest: a process with memory and a disk that it verifies, an access pattern and a speed. It
//! needs nothing installed and no privileges. `docs/workload.md` describes it.
//!
//! - what it does: `profile` (numbers), `pattern` (which page next), `pages` (contents),
//!   `partition` (the generation table and the final verification), `disk`, `workers` (threads);
//! - how it is reached: `options`, `process` (`run`), `service`, `control`, `stats`;
//! - what it is to the engine: [`WorkloadSource`], [`WorkloadDestination`].

pub mod control;
mod destination;
mod disk;
mod facts;
mod here;
mod launch;
mod memory;
mod options;
mod pages;
mod partition;
mod pattern;
mod process;
mod profile;
mod service;
mod source;
mod stats;
mod wire;
mod workers;

pub use destination::WorkloadDestination;
pub use disk::{
    DiskContents, DiskPattern, DiskPatternState, DiskSpec, MAX_DISK_BYTES, MIN_DISK_BYTES,
    Operation, OperationKind, Served, table_pages,
};
pub use launch::Launch;
pub use memory::SharedMemory;
pub use options::{GuestOptions, MAX_BYTES, MIN_BYTES};
pub use pages::{Class as ContentClass, Contents, PAGE, Page};
pub use partition::Partition;
pub use pattern::{Access, Pattern, PatternState, mix};
pub use process::{Ending, GuestProcessError, run};
pub use profile::{ContentShares, PhaseSpec, Profile, ProfileSpec};
pub use source::WorkloadSource;
pub use stats::{Latencies, MAX_THREADS, Stats, StatsPage};
pub use workers::Plan;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Every holder leaves a whole value behind at every point.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
