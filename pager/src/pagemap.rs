//! The pagemap of the guest's process: by `PAGEMAP_SCAN`, which pages carry the kernel's written mark;
//! by reading, how single pages are mapped. Kernel interface only (`linux/fs.h`,
//! `Documentation/admin-guide/mm/pagemap.rst`).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

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

/// How a page is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageState(u64);

impl PageState {
    const PRESENT: u64 = 1 << 63;
    const UFFD_WP: u64 = 1 << 57;

    /// Mapped: a touch costs nothing.
    pub fn is_present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }

    /// Write-protected, mapped or not (a marker then keeps the place): not written since its mark
    /// was taken.
    pub fn is_protected(self) -> bool {
        self.0 & Self::UFFD_WP != 0
    }
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

    /// How each page between two addresses is mapped.
    pub fn states(&self, start: u64, end: u64) -> Result<Vec<PageState>> {
        const ENTRY: u64 = size_of::<u64>() as u64;
        let pages = (end - start) / PAGE_SIZE as u64;
        let mut bytes = vec![0; (pages * ENTRY) as usize];
        let at = start / PAGE_SIZE as u64 * ENTRY;
        self.file.read_exact_at(&mut bytes, at).map_err(|error| {
            PagerError::os(
                format!("reading the pagemap of process {} at {start:#x}", self.pid),
                error,
            )
        })?;
        let (entries, _) = bytes.as_chunks();
        Ok(entries
            .iter()
            .map(|entry| PageState(u64::from_ne_bytes(*entry)))
            .collect())
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

    /// What the tracker and the sampler of accesses rest on: how a page of a shared file that is tracked
    /// looks before and after `MADV_DONTNEED`.
    #[test]
    fn a_page_that_is_unmapped_keeps_its_mark_or_shows_as_written() {
        const PAGES: usize = 1024;
        let file = File::from(
            rustix::fs::memfd_create("states", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
        );
        file.set_len((PAGES * PAGE_SIZE) as u64).unwrap();
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGES * PAGE_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert!(start != libc::MAP_FAILED);
        let base = start as u64;
        let at = |page: usize| base + (page * PAGE_SIZE) as u64;
        // SAFETY: within the mapping of this test, by volatile accesses only.
        let write = |page: usize| unsafe { (at(page) as *mut u64).write_volatile(1) };
        // SAFETY: as above.
        let read = |page: usize| unsafe { (at(page) as *const u64).read_volatile() };
        let forget = |page: usize, count: usize| {
            // SAFETY: pages of a shared file, whose contents stay in it.
            let result = unsafe {
                libc::madvise(at(page) as *mut _, count * PAGE_SIZE, libc::MADV_DONTNEED)
            };
            assert_eq!(result, 0);
        };
        (0..PAGES).for_each(write);
        let uffd = crate::Uffd::for_this_process(true).unwrap();
        uffd.handshake(crate::Features::TRACKING).unwrap();
        let len = (PAGES * PAGE_SIZE) as u64;
        uffd.register(base, len, crate::uffd::RegisterMode::WriteProtect)
            .unwrap();
        uffd.write_protect(base, len).unwrap();
        let pagemap = Pagemap::open(std::process::id()).unwrap();
        let state = |page: usize| pagemap.states(at(page), at(page + 1)).unwrap()[0];
        let scan = |from: usize, to: usize, scan: Scan| {
            let mut pages = Vec::new();
            pagemap
                .written(at(from), at(to), scan, |start, end| {
                    let number = |address: u64| ((address - base) / PAGE_SIZE as u64) as usize;
                    pages.extend(number(start)..number(end));
                })
                .unwrap();
            pages
        };
        let seen = |page: usize| (state(page).is_present(), state(page).is_protected());

        // 0 clean, 1 written; both unmapped. The clean one leaves a marker, the other one nothing.
        write(1);
        assert_eq!((seen(0), seen(1)), ((true, true), (true, false)));
        forget(0, 2);
        assert_eq!((seen(0), seen(1)), ((false, true), (false, false)));
        // Nothing at all counts as written, and is marked when that is taken.
        assert_eq!(scan(0, 8, Scan::Look), [1]);
        assert_eq!(scan(0, 8, Scan::Take), [1]);
        assert_eq!((seen(0), seen(1)), ((false, true), (false, true)));
        // A read maps exactly that page, protected as before; a write shows.
        assert_eq!(read(0), 1);
        assert_eq!(
            (seen(0), seen(1), seen(2)),
            ((true, true), (false, true), (true, true))
        );
        assert!(scan(0, 8, Scan::Look).is_empty());
        write(1);
        assert_eq!(scan(0, 8, Scan::Take), [1]);

        // A whole table of pages of which none is left is overlooked on some kernels: they free the table.
        let first = (base as usize).next_multiple_of(512 * PAGE_SIZE);
        let first = (first - base as usize) / PAGE_SIZE;
        (first..first + 512).for_each(write);
        forget(first, 512);
        assert_eq!(
            (seen(first), seen(first + 511)),
            ((false, false), (false, false))
        );
        println!(
            "a table that is empty: {} of 512 pages show as written",
            scan(first, first + 512, Scan::Look).len()
        );
        // Protecting them again works in any case, and keeps them watched.
        uffd.write_protect(at(first), 512 * PAGE_SIZE as u64)
            .unwrap();
        assert_eq!(seen(first), (false, true));
        write(first + 3);
        assert_eq!(scan(first, first + 512, Scan::Look), [first + 3]);
        uffd.unregister(base, len).unwrap();
        // SAFETY: the mapping made above, used no more.
        unsafe { libc::munmap(start, PAGES * PAGE_SIZE) };
    }
}
