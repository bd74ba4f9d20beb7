//! Event channels, as far as the pager uses them: a thin wrapper of libxenevtchn (`xenevtchn.h`).

use std::ffi::{c_int, c_uint, c_void};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};

#[repr(C)]
struct Handle {
    _opaque: [u8; 0],
}

#[link(name = "xenevtchn")]
unsafe extern "C" {
    fn xenevtchn_open(logger: *mut c_void, flags: c_uint) -> *mut Handle;
    fn xenevtchn_close(handle: *mut Handle) -> c_int;
    fn xenevtchn_fd(handle: *mut Handle) -> c_int;
    fn xenevtchn_notify(handle: *mut Handle, port: u32) -> c_int;
    fn xenevtchn_bind_interdomain(handle: *mut Handle, domain: u32, remote: u32) -> c_int;
    fn xenevtchn_pending(handle: *mut Handle) -> c_int;
    fn xenevtchn_unmask(handle: *mut Handle, port: u32) -> c_int;
}

/// One channel to a domain (or to Xen on its behalf). Closed when dropped.
pub struct EventChannel {
    handle: NonNull<Handle>,
    port: u32,
}

// SAFETY: each call is one read, write or ioctl on the descriptor; the handle itself is not changed by any.
unsafe impl Send for EventChannel {}
// SAFETY: as above.
unsafe impl Sync for EventChannel {}

impl EventChannel {
    /// Connects to a port of a domain.
    pub fn bind(domain: u32, remote: u32) -> io::Result<Self> {
        // SAFETY: no logger, no flags.
        let handle = unsafe { xenevtchn_open(ptr::null_mut(), 0) };
        let handle = NonNull::new(handle).ok_or_else(io::Error::last_os_error)?;
        let mut channel = Self { handle, port: 0 };
        // SAFETY: an open handle.
        let port = unsafe { xenevtchn_bind_interdomain(handle.as_ptr(), domain, remote) };
        channel.port = port.try_into().map_err(|_| io::Error::last_os_error())?;
        Ok(channel)
    }

    /// Signals the other end.
    pub fn notify(&self) -> io::Result<()> {
        // SAFETY: an open handle.
        done(unsafe { xenevtchn_notify(self.handle.as_ptr(), self.port) })
    }

    /// Takes a signal that has come, so that the next one is told. Does not wait where the descriptor is readable.
    pub fn take(&self) -> io::Result<()> {
        // SAFETY: an open handle.
        let port = unsafe { xenevtchn_pending(self.handle.as_ptr()) };
        let port = port.try_into().map_err(|_| io::Error::last_os_error())?;
        // SAFETY: an open handle.
        done(unsafe { xenevtchn_unmask(self.handle.as_ptr(), port) })
    }
}

impl AsFd for EventChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to the handle, which lives as long as this value.
        unsafe { BorrowedFd::borrow_raw(xenevtchn_fd(self.handle.as_ptr())) }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: an open handle, not used again.
        unsafe { xenevtchn_close(self.handle.as_ptr()) };
    }
}

fn done(returned: c_int) -> io::Result<()> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
