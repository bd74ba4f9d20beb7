//! A disk of the guest at the destination, on which it runs while blocks are still missing.
//!
//! [`DiskImage`] keeps a sparse raw image and, beside it, a map of what is missing; [`NbdServer`]
//! lets QEMU run on it. A read of what is missing asks the [`FaultSink`](crate::FaultSink) for the
//! block and waits until it is placed; everything else goes on meanwhile. A write lands at once:
//! the map knows *granules* of 4 KiB, so that what the guest has written is never overwritten by
//! what arrives later, and never fetched.
//!
//! What survives what, and the format of the map, stands in `docs/disk.md`.

mod error;
mod flush;
mod geometry;
mod guest;
mod header;
mod image;
mod map;
mod nbd;
mod pending;
mod stats;

pub use error::{DiskError, Result};
pub use geometry::GRANULE;
pub use image::{DiskImage, DiskOptions};
pub use nbd::{NbdOptions, NbdServer};
pub use stats::DiskStats;

#[cfg(test)]
mod tests;
