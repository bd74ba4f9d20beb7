//! Pages that a domain has granted to this one: a thin wrapper of libxengnttab (`xengnttab.h`).

use std::ffi::{c_int, c_uint, c_void};
use std::io;
use std::ptr::{self, NonNull};

#[repr(C)]
struct Handle {
    _opaque: [u8; 0],
}

#[link(name = "xengnttab")]
unsafe extern "C" {
    fn xengnttab_open(logger: *mut c_void, flags: c_uint) -> *mut Handle;
    fn xengnttab_close(handle: *mut Handle) -> c_int;
    fn xengnttab_map_grant_ref(
        handle: *mut Handle,
        domain: u32,
        reference: u32,
        protection: c_int,
    ) -> *mut c_void;
    fn xengnttab_unmap(handle: *mut Handle, start: *mut c_void, count: u32) -> c_int;
}

/// One page that a domain has granted, mapped to be read.
pub struct GrantedPage {
    handle: NonNull<Handle>,
    page: NonNull<u32>,
}

// SAFETY: the handle is used by this value alone, and only to unmap the page; reads are volatile.
unsafe impl Send for GrantedPage {}

impl GrantedPage {
    /// Maps the page that `domain` has granted to this domain under that number.
    ///
    /// # Errors
    /// When there is no such grant, or this host's kernel has no `gntdev`.
    pub fn map(domain: u32, reference: u32) -> io::Result<Self> {
        // SAFETY: no logger, no flags.
        let handle = unsafe { xengnttab_open(ptr::null_mut(), 0) };
        let handle = NonNull::new(handle).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: an open handle.
        let page =
            unsafe { xengnttab_map_grant_ref(handle.as_ptr(), domain, reference, libc::PROT_READ) };
        let Some(page) = NonNull::new(page.cast()) else {
            let error = io::Error::last_os_error();
            // SAFETY: an open handle, not used again.
            unsafe { xengnttab_close(handle.as_ptr()) };
            return Err(error);
        };
        Ok(Self { handle, page })
    }

    /// The page's first words, each as it is when it is read.
    pub fn words<const N: usize>(&self) -> [u32; N] {
        const { assert!(N <= 1024) };
        // SAFETY: a whole page is mapped; any bytes are a number.
        std::array::from_fn(|at| unsafe { self.page.add(at).read_volatile() })
    }
}

impl Drop for GrantedPage {
    fn drop(&mut self) {
        // SAFETY: mapped by this handle, which is open; neither is used again.
        unsafe {
            xengnttab_unmap(self.handle.as_ptr(), self.page.as_ptr().cast(), 1);
            xengnttab_close(self.handle.as_ptr());
        }
    }
}
