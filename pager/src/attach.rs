//! Getting the userfaultfd of a process that knows nothing of us, and letting go of it again.
//! Needs root, or the same user with permission to ptrace. Touches the process only by the few
//! system calls that one of its threads is made to execute; every failure puts the thread back as
//! it was.

use std::os::fd::RawFd;

use crate::inject::{self, Syscall};
use crate::process::{Process, find_userfaultfds};
use crate::{Features, PagerError, Result, Uffd};

/// How the process is made to create a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `userfaultfd(2)`: the process must be privileged (or the sysctl
    /// `vm.unprivileged_userfaultfd` be 1).
    Syscall,
    /// `USERFAULTFD_IOC_NEW` on this descriptor *of the process*, which is an open
    /// [`/dev/userfaultfd`](crate::kernel::DEVICE): for a process without privileges. QEMU is
    /// handed one by QMP `getfd`.
    Device(RawFd),
}

/// A userfaultfd for the memory of another process.
#[derive(Debug)]
pub struct Attached {
    /// Our copy.
    pub uffd: Uffd,
    /// Its number in the process, where a copy stays open. At the destination it must: the kernel
    /// lets faulting threads go on with zero pages when the last copy is closed.
    pub target_fd: RawFd,
}

/// Makes process `pid` create a userfaultfd, and fetches it. The handshake is not done yet.
pub fn attach(pid: u32, method: Method) -> Result<Attached> {
    let process = Process::open(pid)?;
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    let (number, arguments) = match method {
        Method::Syscall => (libc::SYS_userfaultfd, [flags, 0, 0]),
        Method::Device(fd) => (
            libc::SYS_ioctl,
            [fd as u64, crate::uffd::USERFAULTFD_IOC_NEW, flags],
        ),
    };
    let target_fd = call(pid, Syscall { number, arguments }, "creating a userfaultfd")?;
    let target_fd = RawFd::try_from(target_fd).map_err(|_| PagerError::Attach {
        pid,
        reason: format!("creating a userfaultfd gave descriptor {target_fd}"),
    })?;
    let fetched = process.fetch_fd(target_fd).and_then(Uffd::from_fd);
    match fetched {
        Ok(uffd) => Ok(Attached { uffd, target_fd }),
        Err(error) => {
            close_in_target(pid, target_fd)?;
            Err(error)
        }
    }
}

/// Closes the copy of a descriptor that [`attach`] left in the process: at the source at once, so
/// that a tracker that dies leaves no trace; at the destination once it is disarmed. Refuses
/// anything that is not a userfaultfd.
pub fn close_in_target(pid: u32, fd: RawFd) -> Result<()> {
    if !find_userfaultfds(pid)?.contains(&fd) {
        return Err(PagerError::Attach {
            pid,
            reason: format!("its descriptor {fd} is not a userfaultfd"),
        });
    }
    let close = Syscall {
        number: libc::SYS_close,
        arguments: [fd as u64, 0, 0],
    };
    call(pid, close, "closing the userfaultfd").map(drop)
}

/// Fetches the userfaultfd that an earlier pager armed and left in the process.
pub fn recover(pid: u32) -> Result<Attached> {
    let process = Process::open(pid)?;
    for target_fd in find_userfaultfds(pid)? {
        let uffd = Uffd::from_fd(process.fetch_fd(target_fd)?)?;
        if uffd
            .features()?
            .is_some_and(|features| features.contains(Features::PLACING))
        {
            return Ok(Attached { uffd, target_fd });
        }
    }
    Err(PagerError::NoTrap { pid })
}

fn call(pid: u32, syscall: Syscall, what: &str) -> Result<u64> {
    let result = inject::call(pid, syscall)?;
    // The kernel returns -errno in the last page of numbers.
    if (-4095..0).contains(&result) {
        let error = std::io::Error::from_raw_os_error(-result as i32);
        return Err(match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => PagerError::NotPermitted {
                who: format!("process {pid}"),
                hint: "hand it an open /dev/userfaultfd (QMP getfd) and use that",
            },
            _ => PagerError::os(format!("{what} in process {pid}"), error),
        });
    }
    Ok(result as u64)
}
