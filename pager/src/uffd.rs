//! The userfaultfd of a guest's process, as raw ioctls: the kernel interface of
//! `linux/userfaultfd.h` and nothing more. No policy, no retries.
//!
//! Own definitions, because asynchronous write-protection, partial results of `UFFDIO_ZEROPAGE`
//! and reading into a caller's buffer are not to be had otherwise.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::{PagerError, Result};

/// Features of a userfaultfd (`UFFD_FEATURE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// Write-protection works and is told in faults.
    pub const PAGEFAULT_FLAG_WP: Self = Self(1 << 0);
    /// `MADV_REMOVE` and the like are events.
    pub const EVENT_REMOVE: Self = Self(1 << 3);
    /// Missing faults on shared memory.
    pub const MISSING_SHMEM: Self = Self(1 << 5);
    /// `munmap` is an event.
    pub const EVENT_UNMAP: Self = Self(1 << 6);
    /// Faults say which thread waits.
    pub const THREAD_ID: Self = Self(1 << 8);
    /// Write-protection of shared memory.
    pub const WP_HUGETLBFS_SHMEM: Self = Self(1 << 12);
    /// Write-protection covers pages that are not present.
    pub const WP_UNPOPULATED: Self = Self(1 << 13);
    /// The kernel resolves write-protect faults by itself and only marks the page.
    pub const WP_ASYNC: Self = Self(1 << 15);

    /// What a [`Tracker`](crate::Tracker) needs.
    pub const TRACKING: Self = Self(
        Self::PAGEFAULT_FLAG_WP.0
            | Self::WP_HUGETLBFS_SHMEM.0
            | Self::WP_UNPOPULATED.0
            | Self::WP_ASYNC.0,
    );
    /// What a [`Placer`](crate::Placer) needs.
    pub const PLACING: Self = Self(
        Self::MISSING_SHMEM.0 | Self::EVENT_REMOVE.0 | Self::EVENT_UNMAP.0 | Self::THREAD_ID.0,
    );

    /// Whether every feature of `other` is in.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Names of the features of `self` that are not in `have`.
    fn names_missing_in(self, have: Self) -> String {
        const NAMES: [(u64, &str); 8] = [
            (Features::PAGEFAULT_FLAG_WP.0, "PAGEFAULT_FLAG_WP"),
            (Features::EVENT_REMOVE.0, "EVENT_REMOVE"),
            (Features::MISSING_SHMEM.0, "MISSING_SHMEM"),
            (Features::EVENT_UNMAP.0, "EVENT_UNMAP"),
            (Features::THREAD_ID.0, "THREAD_ID"),
            (Features::WP_HUGETLBFS_SHMEM.0, "WP_HUGETLBFS_SHMEM"),
            (Features::WP_UNPOPULATED.0, "WP_UNPOPULATED"),
            (Features::WP_ASYNC.0, "WP_ASYNC"),
        ];
        let missing = self.0 & !have.0;
        let names: Vec<_> = NAMES
            .iter()
            .filter(|(bit, _)| missing & bit != 0)
            .map(|(_, name)| *name)
            .collect();
        names.join(", ")
    }
}

/// What a range is registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegisterMode {
    /// Access to absent pages waits for us.
    Missing,
    /// Writes are tracked.
    WriteProtect,
}

/// What was read from a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for the page at `address`.
    Fault {
        /// Address of the access, rounded down to the page.
        address: u64,
        /// Thread id, 0 if not told.
        thread: u32,
    },
    /// The guest gives `start..end` back: absent from now on, but still mapped.
    Remove {
        /// First address.
        start: u64,
        /// First address behind.
        end: u64,
    },
    /// The guest unmapped `start..end`.
    Unmap {
        /// First address.
        start: u64,
        /// First address behind.
        end: u64,
    },
    /// An event that was not asked for.
    Other(u8),
}

/// `struct uffd_msg`, 32 bytes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct RawEvent {
    event: u8,
    reserved: [u8; 7],
    argument: [u64; 3],
}

impl RawEvent {
    /// What it says.
    pub fn decode(&self) -> Event {
        let [a, b, c] = self.argument;
        match self.event {
            0x12 => Event::Fault {
                // a: flags. The address may carry an offset with UFFD_FEATURE_EXACT_ADDRESS.
                address: b & !(crate::PAGE_SIZE as u64 - 1),
                thread: c as u32,
            },
            0x15 => Event::Remove { start: a, end: b },
            0x16 => Event::Unmap { start: a, end: b },
            other => Event::Other(other),
        }
    }
}

/// Outcome of [`Uffd::copy`] and [`Uffd::zeropage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that were placed; who waited there has been woken.
    pub done: u64,
    /// What stopped it before the end. `EAGAIN` with nothing done means that the guest's layout
    /// is changing.
    pub stopped: Option<Errno>,
}

/// A userfaultfd, of this or another process.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

const UFFD_API: u64 = 0xAA;
const UFFDIO_API: u64 = ioc(3, 0x3F, size_of::<UffdioApi>());
const UFFDIO_REGISTER: u64 = ioc(3, 0x00, size_of::<UffdioRegister>());
const UFFDIO_UNREGISTER: u64 = ioc(2, 0x01, size_of::<UffdioRange>());
const UFFDIO_WAKE: u64 = ioc(2, 0x02, size_of::<UffdioRange>());
const UFFDIO_COPY: u64 = ioc(3, 0x03, size_of::<UffdioCopy>());
const UFFDIO_ZEROPAGE: u64 = ioc(3, 0x04, size_of::<UffdioZeropage>());
const UFFDIO_WRITEPROTECT: u64 = ioc(3, 0x06, size_of::<UffdioWriteprotect>());
/// `USERFAULTFD_IOC_NEW` on `/dev/userfaultfd`.
pub(crate) const USERFAULTFD_IOC_NEW: u64 = ioc(0, 0x00, 0);
/// `UFFD_USER_MODE_ONLY`.
const USER_MODE_ONLY: i32 = 1;
/// `UFFD_FEATURE_INITIALIZED`, the kernel's own mark in `/proc/PID/fdinfo`.
const INITIALIZED: u64 = 1 << 31;

/// `_IOC(direction, 0xAA, number, size)` of `asm-generic/ioctl.h`.
const fn ioc(direction: u64, number: u64, size: usize) -> u64 {
    (direction << 30) | ((size as u64) << 16) | (0xAA << 8) | number
}

impl Uffd {
    /// Takes a userfaultfd that came from elsewhere. Makes it non-blocking: `poll` on a blocking
    /// one reports an error.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        let fail = |error| PagerError::os("making the userfaultfd non-blocking", error);
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(fail)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(fail)?;
        Ok(Self { fd })
    }

    /// A userfaultfd for this very process: by the system call, by `/dev/userfaultfd`, or, if
    /// `allow_user_mode_only`, one that does not see faults that the kernel takes on behalf of the
    /// process (an embedded guest that touches its memory by itself only can live with that).
    pub fn for_this_process(allow_user_mode_only: bool) -> Result<Self> {
        match crate::kernel::open_own() {
            Ok((fd, crate::kernel::UffdAccess::UserModeOnly)) if !allow_user_mode_only => {
                drop(fd);
                Err(PagerError::NotPermitted {
                    who: "this process".into(),
                    hint: "run as root or with CAP_SYS_PTRACE, or grant access to /dev/userfaultfd",
                })
            }
            Ok((fd, _)) => Self::from_fd(fd),
            Err(error) => Err(error),
        }
    }

    /// Agrees on features with the kernel. On a userfaultfd where someone else has done that
    /// already, checks that they include `wanted`. Returns the features in force.
    pub fn handshake(&self, wanted: Features) -> Result<Features> {
        if let Some(have) = self.features()? {
            return if have.contains(wanted) {
                Ok(have)
            } else {
                Err(PagerError::MissingFeatures {
                    missing: wanted.names_missing_in(have),
                    hint: "whoever created it must enable them, or leave the UFFDIO_API handshake to the pager",
                })
            };
        }
        let mut api = UffdioApi {
            api: UFFD_API,
            features: wanted.0,
            ioctls: 0,
        };
        match self.ioctl(UFFDIO_API, &mut api) {
            Ok(()) => Ok(wanted),
            Err(Errno::INVAL) => Err(PagerError::MissingFeatures {
                missing: match crate::kernel::probe().features {
                    Some(have) => wanted.names_missing_in(have),
                    None => "some of what is needed".into(),
                },
                hint: "tracking needs Linux 6.7, placing needs Linux 4.14 or later",
            }),
            Err(error) => Err(PagerError::os("UFFDIO_API", error)),
        }
    }

    /// Features in force, or none if the handshake has not been done. From `/proc/self/fdinfo`:
    /// the kernel offers no other way to ask.
    pub fn features(&self) -> Result<Option<Features>> {
        let path = format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd());
        let text = std::fs::read_to_string(&path)
            .map_err(|error| PagerError::os(format!("reading {path}"), error))?;
        // "API:\taa:<features in force>:<features known>"
        let features = text
            .lines()
            .find_map(|line| line.strip_prefix("API:"))
            .and_then(|rest| rest.trim().split(':').nth(1))
            .and_then(|field| u64::from_str_radix(field, 16).ok())
            .ok_or_else(|| {
                PagerError::os(
                    format!("{path} is not that of a userfaultfd"),
                    io::Error::from(io::ErrorKind::InvalidData),
                )
            })?;
        Ok((features & INITIALIZED != 0).then_some(Features(features & !INITIALIZED)))
    }

    /// Every feature of this kernel. Uses up the handshake of this descriptor.
    pub(crate) fn ask_features(&self) -> std::result::Result<Features, Errno> {
        let mut api = UffdioApi {
            api: UFFD_API,
            features: 0,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_API, &mut api)?;
        Ok(Features(api.features))
    }

    /// Registers a range of the process's addresses. Registering again the same way is harmless.
    pub fn register(
        &self,
        address: u64,
        len: u64,
        mode: RegisterMode,
    ) -> std::result::Result<(), Errno> {
        let mut register = UffdioRegister {
            range: UffdioRange {
                start: address,
                len,
            },
            mode: match mode {
                RegisterMode::Missing => 1,
                RegisterMode::WriteProtect => 2,
            },
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut register)
    }

    /// Ends all trapping and tracking in a range and wakes everyone who waits there.
    pub fn unregister(&self, address: u64, len: u64) -> std::result::Result<(), Errno> {
        let mut range = UffdioRange {
            start: address,
            len,
        };
        self.ioctl(UFFDIO_UNREGISTER, &mut range)?;
        // The kernel wakes the waiting threads before it locks out those that are about to wait under the lock of
        // their mapping alone (seen on Linux 6.18): such a thread would wait for ever. By now it is in the queue.
        self.wake(address, len)
    }

    /// Lets who waits in the range try again.
    pub fn wake(&self, address: u64, len: u64) -> std::result::Result<(), Errno> {
        let mut range = UffdioRange {
            start: address,
            len,
        };
        self.ioctl(UFFDIO_WAKE, &mut range)
    }

    /// Write-protects a range.
    pub fn write_protect(&self, address: u64, len: u64) -> std::result::Result<(), Errno> {
        let mut protect = UffdioWriteprotect {
            range: UffdioRange {
                start: address,
                len,
            },
            mode: 1,
        };
        self.ioctl(UFFDIO_WRITEPROTECT, &mut protect)
    }

    /// Places whole pages of `data` at `address` and wakes who waits there.
    pub fn copy(&self, address: u64, data: &[u8]) -> Progress {
        let mut copy = UffdioCopy {
            dst: address,
            src: data.as_ptr() as u64,
            len: data.len() as u64,
            mode: 0,
            copy: 0,
        };
        let result = self.ioctl(UFFDIO_COPY, &mut copy);
        progress(result, copy.copy, data.len() as u64)
    }

    /// Places zero pages and wakes who waits there.
    pub fn zeropage(&self, address: u64, len: u64) -> Progress {
        let mut zero = UffdioZeropage {
            range: UffdioRange {
                start: address,
                len,
            },
            mode: 0,
            zeropage: 0,
        };
        let result = self.ioctl(UFFDIO_ZEROPAGE, &mut zero);
        progress(result, zero.zeropage, len)
    }

    /// Whether the guest is changing its layout: an event of its is unread, or was read just now. The
    /// kernel looks at that before it looks at an (empty, hence refused) range.
    pub fn layout_changes(&self) -> bool {
        self.zeropage(0, 0).stopped == Some(Errno::AGAIN)
    }

    /// Reads pending events without waiting; returns how many.
    pub fn read(&self, events: &mut [RawEvent]) -> std::result::Result<usize, Errno> {
        let size = size_of_val(events);
        loop {
            // SAFETY: the buffer is ours, `size` bytes long, and any bytes are valid `RawEvent`s.
            let read = unsafe { libc::read(self.fd.as_raw_fd(), events.as_mut_ptr().cast(), size) };
            if read >= 0 {
                return Ok(read as usize / size_of::<RawEvent>());
            }
            match last_errno() {
                Errno::AGAIN => return Ok(0),
                Errno::INTR => {}
                error => return Err(error),
            }
        }
    }

    fn ioctl<T>(&self, request: u64, argument: &mut T) -> std::result::Result<(), Errno> {
        loop {
            // SAFETY: every caller in this file passes the structure that the request's number
            // encodes the size of; addresses within are the other process's, except
            // `UffdioCopy::src`, which points into a slice borrowed for the call.
            let result =
                unsafe { libc::ioctl(self.fd.as_raw_fd(), request as _, &raw mut *argument) };
            if result >= 0 {
                return Ok(());
            }
            match last_errno() {
                Errno::INTR => {}
                error => return Err(error),
            }
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> Self {
        uffd.fd
    }
}

fn progress(result: std::result::Result<(), Errno>, field: i64, len: u64) -> Progress {
    match result {
        Ok(()) => Progress {
            done: len,
            stopped: None,
        },
        // The kernel answers EAGAIN and says in the field how far it came.
        Err(Errno::AGAIN) if field > 0 => Progress {
            done: field as u64,
            stopped: Some(Errno::AGAIN),
        },
        Err(error) => Progress {
            done: 0,
            stopped: Some(error),
        },
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// A new userfaultfd of this process by the system call.
pub(crate) fn create_by_syscall(user_mode_only: bool) -> std::result::Result<OwnedFd, Errno> {
    use std::os::fd::FromRawFd;
    let flags =
        libc::O_CLOEXEC | libc::O_NONBLOCK | if user_mode_only { USER_MODE_ONLY } else { 0 };
    // SAFETY: the call takes flags only; a result >= 0 is a new descriptor that nobody else owns.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, flags);
        if fd < 0 {
            return Err(last_errno());
        }
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// A new userfaultfd of this process by `/dev/userfaultfd`.
pub(crate) fn create_by_device(device: BorrowedFd<'_>) -> std::result::Result<OwnedFd, Errno> {
    use std::os::fd::FromRawFd;
    // SAFETY: the request takes flags by value; a result >= 0 is a new descriptor that nobody
    // else owns.
    unsafe {
        let fd = libc::ioctl(
            device.as_raw_fd(),
            USERFAULTFD_IOC_NEW as _,
            libc::O_CLOEXEC | libc::O_NONBLOCK,
        );
        if fd < 0 {
            return Err(last_errno());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::words::Words;

    #[test]
    fn request_numbers_are_those_of_the_kernel_header() {
        assert_eq!(UFFDIO_API, 0xC018_AA3F);
        assert_eq!(UFFDIO_REGISTER, 0xC020_AA00);
        assert_eq!(UFFDIO_UNREGISTER, 0x8010_AA01);
        assert_eq!(UFFDIO_WAKE, 0x8010_AA02);
        assert_eq!(UFFDIO_COPY, 0xC028_AA03);
        assert_eq!(UFFDIO_ZEROPAGE, 0xC020_AA04);
        assert_eq!(UFFDIO_WRITEPROTECT, 0xC018_AA06);
        assert_eq!(USERFAULTFD_IOC_NEW, 0xAA00);
        assert_eq!(size_of::<RawEvent>(), 32);
    }

    #[test]
    fn a_handshake_done_by_another_is_recognised() {
        let uffd = Uffd::for_this_process(true).unwrap();
        assert_eq!(uffd.features().unwrap(), None);
        uffd.handshake(Features::PLACING).unwrap();
        assert_eq!(uffd.features().unwrap(), Some(Features::PLACING));
        uffd.handshake(Features::MISSING_SHMEM).unwrap();
        let error = uffd.handshake(Features::TRACKING).unwrap_err();
        assert!(error.to_string().contains("WP_ASYNC"), "{error}");
    }

    /// Whether the thread that touches the page gets it within `patience`.
    fn wait_for(done: &AtomicU64, round: u64, patience: Duration) -> bool {
        let began = Instant::now();
        while done.load(Ordering::SeqCst) != round {
            if began.elapsed() > patience {
                return false;
            }
            std::hint::spin_loop();
        }
        true
    }

    #[test]
    fn whoever_begins_to_wait_while_the_trap_goes_is_woken() {
        let file = rustix::fs::memfd_create("uffd-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, crate::PAGE_SIZE as u64).unwrap();
        let memory = Words::map(&file.into(), 0, crate::PAGE_SIZE / 8).unwrap();
        let (base, len) = (memory.slice().as_ptr() as u64, crate::PAGE_SIZE as u64);
        let uffd = Uffd::for_this_process(true).unwrap();
        uffd.handshake(Features::MISSING_SHMEM).unwrap();
        let (turn, done) = (AtomicU64::new(0), AtomicU64::new(0));
        const END: u64 = u64::MAX;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut seen = 0;
                while seen != END {
                    let next = turn.load(Ordering::SeqCst);
                    if next != seen {
                        memory.slice()[0].load(Ordering::SeqCst);
                        done.store(next, Ordering::SeqCst);
                    }
                    seen = next;
                }
            });
            let left_waiting = (1..=2000).find(|&round| {
                uffd.register(base, len, RegisterMode::Missing).unwrap();
                // SAFETY: the page of the mapping made above; it becomes a hole, and reads as zero.
                let removed = unsafe { libc::madvise(base as _, len as _, libc::MADV_REMOVE) };
                assert_eq!(removed, 0);
                turn.store(round, Ordering::SeqCst);
                for _ in 0..round % 50 * 10 {
                    std::hint::spin_loop();
                }
                uffd.unregister(base, len).unwrap();
                !wait_for(&done, round, Duration::from_secs(10))
            });
            turn.store(END, Ordering::SeqCst);
            uffd.wake(base, len).unwrap(); // or it would be left waiting now
            assert_eq!(left_waiting, None, "a thread was left waiting for a page");
        });
    }
}
