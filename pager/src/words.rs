//! A file's bits as memory that outlives the process: what was stored here is in the page cache
//! and so survives kill -9, though not the host.

use std::fs::File;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

use crate::{PagerError, Result};

/// A shared mapping of whole words.
#[derive(Debug)]
pub(crate) struct Words {
    start: *const AtomicU64,
    count: usize,
}

// SAFETY: the mapping belongs to this value alone until it is dropped, and it is accessed as
// atomics only.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Maps `count` words from `offset`, a multiple of the host's page size, on.
    pub(crate) fn map(file: &File, offset: u64, count: usize) -> Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing in this
        // process. Other processes that map the same file use atomics too; a file that is
        // truncated behind our back is outside of what can be defended against.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                count * 8,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                offset,
            )
        }
        .map_err(|error| PagerError::os("mapping a map of missing blocks", error))?;
        Ok(Self {
            start: start.cast(),
            count,
        })
    }

    pub(crate) fn slice(&self) -> &[AtomicU64] {
        // SAFETY: `start` is page-aligned, `count` words long, mapped until drop.
        unsafe { std::slice::from_raw_parts(self.start, self.count) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping of `map`; no borrow of it outlives this value.
        let result = unsafe { rustix::mm::munmap(self.start.cast_mut().cast(), self.count * 8) };
        debug_assert!(result.is_ok(), "unmapping our own mapping: {result:?}");
    }
}
