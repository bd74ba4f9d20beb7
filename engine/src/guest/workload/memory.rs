//! A memfd and its mapping: the guest's memory, and the page in which it publishes its figures.
//! All access is by plain loads and stores in user mode: a page of the guest may be missing, and a
//! user-mode-only userfaultfd does not serve faults of system calls. So this file must never give
//! an address of the mapping to the kernel, save to map and unmap it.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, ftruncate, memfd_create,
};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use super::pages::{PAGE, Page};

/// A shared mapping of a whole memfd.
pub struct SharedMemory {
    base: NonNull<u8>,
    len: usize,
    fd: OwnedFd,
}

// SAFETY: the mapping belongs to the process, not to a thread; every access goes through raw
// pointers or atomics, never through references to plain bytes.
unsafe impl Send for SharedMemory {}
// SAFETY: as above. Who may write which page at what time is the callers' protocol.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// New memory of `len` bytes, a multiple of the page size. Its length is sealed, so that nobody
    /// who is given the descriptor can make an access fail.
    pub fn create(name: &CStr, len: usize) -> io::Result<Self> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, len as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Self::map(fd, len)
    }

    /// Memory that another process has made with [`Self::create`]: all of the file.
    pub fn attach(fd: OwnedFd) -> io::Result<Self> {
        if !fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
            return Err(io::Error::other("the length of the file is not sealed"));
        }
        let file = File::from(fd);
        let len = usize::try_from(file.metadata()?.len())
            .ok()
            .filter(|len| *len > 0 && len.is_multiple_of(PAGE))
            .ok_or_else(|| io::Error::other("not a file of whole pages"))?;
        Self::map(file.into(), len)
    }

    fn map(fd: OwnedFd, len: usize) -> io::Result<Self> {
        assert!(len > 0 && len.is_multiple_of(PAGE));
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &fd,
                0,
            )
        }?;
        // Tracking and placing work on 4 KiB pages. A kernel without huge pages refuses the advice,
        // and then needs none.
        // SAFETY: the advice is about the mapping just made and does not change its contents.
        if let Err(error) = unsafe { madvise(base, len, Advice::LinuxNoHugepage) } {
            tracing::debug!(%error, "huge pages cannot be turned off");
        }
        let base = NonNull::new(base.cast()).expect("mmap never returns null without MAP_FIXED");
        Ok(Self { base, len, fd })
    }

    /// Address of the first byte in this process.
    pub fn address(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no pages: never.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Length in pages.
    pub fn pages(&self) -> u32 {
        u32::try_from(self.len / PAGE).expect("guests are smaller than 16 TiB")
    }

    /// Copies a page out.
    pub fn read_page(&self, page: u32, out: &mut Page) {
        let from = self.pointer(page as usize * PAGE, PAGE);
        // SAFETY: the range is within the mapping and `out` is not. Another process may write the
        // page meanwhile; the copy is then torn, which the caller checks for.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), PAGE) }
    }

    /// Copies bytes in.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let to = self.pointer(offset, data.len());
        // SAFETY: the range is within the mapping and `data` is not. The caller owns the page.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) }
    }

    /// The 32-bit word at an aligned offset.
    #[expect(
        clippy::cast_ptr_alignment,
        reason = "the base is page-aligned, the offset checked"
    )]
    pub fn word32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4));
        let word = self.pointer(offset, 4).cast::<AtomicU32>();
        // SAFETY: within the mapping, which lives as long as `self`; aligned; every bit pattern is
        // a valid atomic.
        unsafe { &*word }
    }

    /// The 64-bit word at an aligned offset.
    #[expect(
        clippy::cast_ptr_alignment,
        reason = "the base is page-aligned, the offset checked"
    )]
    pub fn word64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8));
        let word = self.pointer(offset, 8).cast::<AtomicU64>();
        // SAFETY: as in `word32`.
        unsafe { &*word }
    }

    fn pointer(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset <= self.len && len <= self.len - offset);
        // SAFETY: just checked to be within the mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and references into it cannot outlive `self`.
        if let Err(error) = unsafe { munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::warn!(%error, "guest memory was not unmapped");
        }
    }
}
