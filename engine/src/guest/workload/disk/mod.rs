//! The guest's disk: a sparse file whose sectors check themselves like the pages of memory, and the
//! threads that read and write it by the profile's disk pattern.
//!
//! - what is done: `spec` (numbers), `pattern` (which sectors next), `share` (what a thread owns:
//!   contents, generations, verification);
//! - how it is done: `io` (by the file, or by whoever serves it while blocks are missing), `marks`
//!   (what was written and used), `left` (what the source of a migration makes of it).
//!
//! The generations of the sectors lie in guest memory, in its last pages, so that disk and memory
//! vouch for each other: a disk that is older than its memory, or the reverse, is found.

mod io;
mod left;
mod marks;
mod pattern;
mod share;
mod spec;

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::pages::PAGE;

pub use io::DiskIo;
pub use left::DiskLeft;
pub use marks::DiskMarks;
pub use pattern::{DiskPattern, DiskPatternState, Kind as OperationKind, Operation};
pub use share::{DiskContents, DiskHand, DiskWorkerState, Share, Trouble, table_pages};
pub use spec::DiskSpec;

/// Bytes of a sector, the unit of contents and checks.
pub const SECTOR: usize = PAGE;
/// Bytes of a block, the unit of migration.
pub const BLOCK: usize = 64 << 10;
/// Sectors of a block.
pub const BLOCK_SECTORS: u32 = (BLOCK / SECTOR) as u32;
/// Smallest disk of a guest in bytes.
pub const MIN_DISK_BYTES: u64 = 4 << 20;
/// Largest disk of a guest in bytes.
pub const MAX_DISK_BYTES: u64 = 64 << 30;
/// A disk has at most this many times the bytes of memory, since memory holds its generations.
const MEMORY_RATIO: u64 = 128;

/// Whether a guest can have a disk of so many bytes.
pub fn check_size(disk: u64, memory: u64) -> std::result::Result<(), String> {
    if !(MIN_DISK_BYTES..=MAX_DISK_BYTES).contains(&disk) {
        return Err(format!(
            "a disk of {disk} bytes is out of range: 4 MiB to 64 GiB are possible"
        ));
    }
    if !disk.is_multiple_of(BLOCK as u64) {
        return Err(format!(
            "a disk of {disk} bytes is not whole blocks of 64 KiB"
        ));
    }
    if disk / MEMORY_RATIO > memory {
        return Err(format!(
            "a disk of {disk} bytes is too large for {memory} bytes of memory, which hold its \
             generations: {MEMORY_RATIO} times the memory is possible"
        ));
    }
    Ok(())
}

/// Who serves a disk whose blocks are missing, and by what another process goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// Unix socket of the NBD server.
    pub socket: PathBuf,
    /// Name of the export.
    pub export: String,
    /// The pager's map of what is missing.
    pub map: PathBuf,
}

/// A guest's disk. Dropping it leaves the file.
pub struct Disk {
    path: PathBuf,
    file: File,
    bytes: u64,
    marks: DiskMarks,
    route: Mutex<Route>,
    /// Told when the last operation by way of the server has ended.
    quiet: Condvar,
}

/// How operations reach the disk.
#[derive(Default)]
struct Route {
    /// By this server; by the file if none.
    server: Option<Arc<Served>>,
    /// Operations under way by a server.
    remote: u32,
}

impl Disk {
    /// Makes the file, `bytes` long and all holes. One that has contents is an error unless it may be
    /// replaced.
    pub fn create(path: &Path, bytes: u64, replace: bool) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Error::other("not a regular file"));
        }
        if metadata.len() > 0 && !replace {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                "the file has contents: name another, or remove it",
            ));
        }
        file.set_len(0)?;
        file.set_len(bytes)?;
        Ok(Self {
            path: path.canonicalize()?,
            marks: DiskMarks::create((bytes / BLOCK as u64) as u32)?,
            file,
            bytes,
            route: Mutex::default(),
            quiet: Condvar::new(),
        })
    }

    /// Absolute path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Number of sectors.
    pub fn sectors(&self) -> u32 {
        (self.bytes / SECTOR as u64) as u32
    }

    /// The file and the marks, for another process.
    pub fn descriptors(&self) -> Result<[OwnedFd; 2]> {
        Ok([
            self.file.as_fd().try_clone_to_owned()?,
            self.marks.as_fd().try_clone_to_owned()?,
        ])
    }

    /// Who serves it.
    pub fn served(&self) -> Option<Served> {
        self.route().server.as_deref().cloned()
    }

    /// From the next operation on the disk is used by way of this server.
    pub fn serve(&self, by: Served) {
        self.route().server = Some(Arc::new(by));
    }

    /// From the next operation on the file itself is used, and when this returns no operation by way
    /// of the server is under way any more: the server may go. Two ways at once would be wrong: a
    /// write that the server is slow with could come after a later one to the file.
    pub fn unserve(&self, patience: Duration) -> std::result::Result<(), String> {
        let deadline = Instant::now() + patience;
        let mut route = self.route();
        let server = route.server.take();
        while route.remote > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let count = route.remote;
                route.server = server;
                return Err(format!(
                    "{count} disk operations wait for the server still: blocks of the disk are \
                     missing, or it hangs"
                ));
            }
            route = self
                .quiet
                .wait_timeout(route, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    fn route(&self) -> MutexGuard<'_, Route> {
        self.route.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
