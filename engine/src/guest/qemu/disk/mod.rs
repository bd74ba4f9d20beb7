//! The disks of a QEMU guest, moved by QEMU's own means: exports and dirty bitmaps at the source, an NBD
//! client under the guest's device at the destination. No byte of a disk passes through QMP.
//!
//! - `choice` is what the operator wants, `facts` what there is and what becomes of it;
//! - `source` reads the disks of a guest that leaves, over NBD (`pool`), and tells what it
//!   writes; `page_cache` tells what it has used lately;
//! - `destination` puts a server of ours under the disks of a guest that comes, and takes it away.

mod choice;
mod commands;
mod destination;
mod facts;
mod page_cache;
mod pool;
mod source;
#[cfg(test)]
mod tests;

pub use choice::{DiskChoice, DiskOption, DiskTreatment};
pub use destination::{DestinationDisks, LocalDisk, WantedDisk};
pub use facts::{Disk, DiskFacts, Survey};
pub use source::SourceDisks;

/// Length of a block of a disk in bytes.
pub const BLOCK_SIZE: u32 = 64 << 10;

/// What every node, bitmap and export of ours in QEMU is called, with more behind it. QEMU takes
/// names of up to 31 bytes.
const NODE_PREFIX: &str = "hybridmig-";
