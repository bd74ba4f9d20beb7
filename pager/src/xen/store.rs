//! Xenstore, as far as suspending a domain and waiting for its disks need it: a thin wrapper of libxenstore
//! (`xenstore.h`).

use std::ffi::{CStr, CString, c_char, c_uint, c_ulong, c_void};
use std::io;
use std::ptr::NonNull;
use std::sync::Mutex;

#[repr(C)]
struct Handle {
    _opaque: [u8; 0],
}

#[link(name = "xenstore")]
unsafe extern "C" {
    fn xs_open(flags: c_ulong) -> *mut Handle;
    fn xs_close(handle: *mut Handle);
    fn xs_read(
        handle: *mut Handle,
        transaction: u32,
        path: *const c_char,
        len: *mut c_uint,
    ) -> *mut c_void;
    fn xs_write(
        handle: *mut Handle,
        transaction: u32,
        path: *const c_char,
        data: *const c_void,
        len: c_uint,
    ) -> bool;
    fn xs_directory(
        handle: *mut Handle,
        transaction: u32,
        path: *const c_char,
        count: *mut c_uint,
    ) -> *mut *mut c_char;
    fn xs_resume_domain(handle: *mut Handle, domain: c_uint) -> bool;
}

/// No transaction (`XBT_NULL`).
const NO_TRANSACTION: u32 = 0;

/// A connection to xenstore.
pub struct Store(Mutex<NonNull<Handle>>);

// SAFETY: used by one thread at a time, see the mutex.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// Connects.
    pub fn open() -> io::Result<Self> {
        // SAFETY: no flags.
        let handle = NonNull::new(unsafe { xs_open(0) }).ok_or_else(io::Error::last_os_error)?;
        Ok(Self(Mutex::new(handle)))
    }

    fn with<T>(&self, act: impl FnOnce(*mut Handle) -> T) -> T {
        let handle = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        act(handle.as_ptr())
    }

    /// A value; none if there is no such key.
    pub fn read(&self, path: &str) -> io::Result<Option<Vec<u8>>> {
        let path = CString::new(path)?;
        self.with(|handle| {
            let mut len = 0;
            // SAFETY: an open handle and a string with its end.
            let value = unsafe { xs_read(handle, NO_TRANSACTION, path.as_ptr(), &raw mut len) };
            let Some(value) = NonNull::new(value.cast::<u8>()) else {
                return nothing();
            };
            // SAFETY: so many bytes were allocated by malloc for us.
            let bytes =
                unsafe { std::slice::from_raw_parts(value.as_ptr(), len as usize) }.to_vec();
            // SAFETY: as above; not used again.
            unsafe { libc::free(value.as_ptr().cast()) };
            Ok(Some(bytes))
        })
    }

    /// The names below a key; none if there is no such key.
    pub fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let path = CString::new(path)?;
        self.with(|handle| {
            let mut count = 0;
            // SAFETY: an open handle and a string with its end.
            let names =
                unsafe { xs_directory(handle, NO_TRANSACTION, path.as_ptr(), &raw mut count) };
            let Some(names) = NonNull::new(names) else {
                return nothing();
            };
            let name = |at: usize| {
                // SAFETY: so many pointers to strings with an end were allocated for us.
                let name = unsafe { CStr::from_ptr(*names.add(at).as_ptr()) };
                name.to_string_lossy().into_owned()
            };
            let found = (0..count as usize).map(name).collect();
            // SAFETY: one piece of memory, made by malloc; not used again.
            unsafe { libc::free(names.as_ptr().cast()) };
            Ok(found)
        })
    }

    /// A number; none if there is no such key, or none in it.
    pub fn number(&self, path: &str) -> io::Result<Option<u32>> {
        let value = self.read(path)?;
        Ok(value.and_then(|value| std::str::from_utf8(&value).ok()?.parse().ok()))
    }

    /// Sets a value.
    pub fn write(&self, path: &str, value: &str) -> io::Result<()> {
        let path = CString::new(path)?;
        // SAFETY: an open handle, a string with its end, and the bytes of `value`.
        let done = self.with(|handle| unsafe {
            let data = value.as_ptr().cast();
            xs_write(
                handle,
                NO_TRANSACTION,
                path.as_ptr(),
                data,
                value.len() as c_uint,
            )
        });
        if done {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Tells xenstore that a domain which had suspended itself runs again.
    pub fn resumed(&self, domain: u32) -> io::Result<()> {
        // SAFETY: an open handle.
        let done = self.with(|handle| unsafe { xs_resume_domain(handle, domain) });
        if done {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// What it means that a call returned nothing: that there is no such key, or that it failed.
fn nothing<T: Default>() -> io::Result<T> {
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::NotFound => Ok(T::default()),
        _ => Err(error),
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: an open handle, not used again.
        self.with(|handle| unsafe { xs_close(handle) });
    }
}
