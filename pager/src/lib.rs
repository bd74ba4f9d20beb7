//! How blocks of memory are tracked, read and placed: dirty tracking of another process,
//! userfaultfd in another process, and how to get there.
//!
//! A region is a `u16` index, a block is the number of a 4 KiB page within its region, a set of
//! blocks is a [`RoaringBitmap`](roaring::RoaringBitmap). This crate knows no transport, no session
//! and no VMM, and it never decides what moves when.
//!
//! Where to look:
//! - source: [`attach`] or [`handover`] gives a [`Uffd`], [`Tracker`] reports what was written,
//!   [`RegionMemory`] reads it, [`Tracker::sample_accesses`] tells what is read, too;
//! - destination: [`RegionMemory`] writes before the guest runs; [`Placer`] takes away what is
//!   not current, traps access to it, places what arrives and says who waits;
//! - [`MissingMap`] outlives a pager that is killed, [`Placer::take_over`] is how the next one goes on;
//! - [`disk`]: a disk image that the guest runs on while blocks are missing, and an NBD server over it;
//! - [`xen`]: the same for a Xen domain, by the hypervisor's own paging;
//! - [`kernel::probe`] says what this host can do.

mod accessed;
pub mod attach;
pub mod disk;
mod error;
mod grace;
pub mod handover;
mod inject;
pub mod kernel;
mod layout;
mod memory;
mod missing;
mod pagemap;
mod place;
pub mod process;
mod ranges;
mod serve;
mod stats;
mod track;
pub mod uffd;
mod words;
pub mod xen;

pub use accessed::{Accesses, FAULT, MAX_PAGES, PAGES_PER_SECOND, SamplingStats};
pub use error::{PagerError, Result};
pub use memory::RegionMemory;
pub use missing::MissingMap;
pub use place::{FaultAnswer, FaultSink, Placer, PlacerConfig};
pub use process::{Mapping, Region};
pub use ranges::Ranges;
pub use stats::{FaultStats, ThreadBlocked};
pub use track::{Settle, Tracker, TrackerConfig};
pub use uffd::{Features, Uffd};

/// Bytes of a block of memory: one page. Regions of huge pages are refused.
pub const PAGE_SIZE: usize = 4096;
