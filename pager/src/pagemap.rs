//! `PAGEMAP_SCAN` on the pagemap of the guest's process: which pages carry the kernel's
//! written mark. Kernel interface only (`linux/fs.h`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::{PAGE_SIZE, PagerError, Result};

/// `struct pm_scan_arg`, 96 bytes.
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`: a run of pages of one category.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = (3 << 30) | (96 << 16) | ((b'f' as u64) << 8) | 16;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// Runs that one ioctl can return: 12 KiB on the stack.
const RUNS_PER_CALL: usize = 512;

/// What a scan does with the pages that it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan {
    /// Only looks.
    Look,
    /// Takes the mark away, atomically per page with reporting it, and write-protects the page.
    Take,
}

/// The pagemap of a process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    pid: u32,
}

impl Pagemap {
    /// Opens the pagemap of a process.
    pub fn open(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => PagerError::GuestGone { pid },
            _ => PagerError::os(format!("opening {path}"), error),
        })?;
        Ok(Self { file, pid })
    }

    /// Whether this kernel has `PAGEMAP_SCAN`.
    pub fn supported() -> bool {
        let Ok(own) = Self::open(std::process::id()) else {
            return false;
        };
        let page = &raw const own as u64 & !(PAGE_SIZE as u64 - 1);
        let mut runs = [PageRegion::default(); 1];
        own.scan_once(page, page + PAGE_SIZE as u64, 0, &mut runs)
            .is_ok()
    }

    /// Calls `found` with every run `start..end` of written pages between two addresses. With
    /// [`Scan::Take`], a write after the report of its page marks the page again.
    pub fn written(
        &self,
        start: u64,
        end: u64,
        scan: Scan,
        mut found: impl FnMut(u64, u64),
    ) -> Result<()> {
        let flags = PM_SCAN_CHECK_WPASYNC
            | match scan {
                Scan::Look => 0,
                Scan::Take => PM_SCAN_WP_MATCHING,
            };
        let mut runs = [PageRegion::default(); RUNS_PER_CALL];
        let mut at = start;
        while at < end {
            let (count, walked) = self.scan_once(at, end, flags, &mut runs).map_err(|error| {
                PagerError::os(
                    format!("PAGEMAP_SCAN of process {} at {at:#x}", self.pid),
                    error,
                )
            })?;
            for run in &runs[..count] {
                found(run.start, run.end);
            }
            if walked <= at {
                return Err(PagerError::os(
                    format!(
                        "PAGEMAP_SCAN of process {} at {at:#x}: no progress",
                        self.pid
                    ),
                    io::Error::from(io::ErrorKind::InvalidData),
                ));
            }
            at = walked;
        }
        Ok(())
    }

    /// One ioctl: the number of runs, and the address that the walk reached.
    fn scan_once(
        &self,
        start: u64,
        end: u64,
        flags: u64,
        runs: &mut [PageRegion],
    ) -> io::Result<(usize, u64)> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags,
            start,
            end,
            walk_end: 0,
            vec: runs.as_mut_ptr() as u64,
            vec_len: runs.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: PAGE_IS_WRITTEN,
            category_anyof_mask: 0,
            return_mask: PAGE_IS_WRITTEN,
        };
        loop {
            // SAFETY: `arg` is the structure that the request names, and `vec` points to
            // `vec_len` elements borrowed for the call.
            let count =
                unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) };
            if count >= 0 {
                return Ok((count as usize, arg.walk_end));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_the_kernels() {
        assert_eq!(size_of::<ScanArg>(), 96);
        assert_eq!(size_of::<PageRegion>(), 24);
        assert_eq!(PAGEMAP_SCAN, 0xC060_6610);
    }
}
