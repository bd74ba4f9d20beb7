//! What this host's kernel can do, asked without touching any guest.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use crate::pagemap::Pagemap;
use crate::uffd::{create_by_device, create_by_syscall};
use crate::{Features, PagerError, Result, Uffd};

/// Path of the device that gives out userfaultfds to whoever may open it.
pub const DEVICE: &str = "/dev/userfaultfd";

/// How this process may get a userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UffdAccess {
    /// By `userfaultfd(2)`.
    Syscall,
    /// By `/dev/userfaultfd`.
    Device,
    /// Only one that does not see faults taken by the kernel on the process's behalf. Not enough
    /// for a VMM.
    UserModeOnly,
    /// Not at all.
    None,
}

/// What the kernel offers.
#[derive(Clone, Debug)]
pub struct KernelSupport {
    /// `uname -r`.
    pub release: String,
    /// How a userfaultfd is to be had.
    pub access: UffdAccess,
    /// Features of the kernel's userfaultfd, if one could be opened.
    pub features: Option<Features>,
    /// Whether `PAGEMAP_SCAN` is there.
    pub pagemap_scan: bool,
}

impl KernelSupport {
    /// Whether memory can be tracked here.
    pub fn check_source(&self) -> Result<()> {
        self.check_access()?;
        let too_old = |missing| PagerError::KernelTooOld {
            release: self.release.clone(),
            missing,
            needed: "6.7",
        };
        if !self.has(Features::TRACKING) {
            return Err(too_old(
                "dirty tracking by asynchronous write-protection (UFFD_FEATURE_WP_ASYNC)",
            ));
        }
        if !self.pagemap_scan {
            return Err(too_old("dirty tracking (PAGEMAP_SCAN)"));
        }
        Ok(())
    }

    /// Whether memory can be paged in here.
    pub fn check_destination(&self) -> Result<()> {
        self.check_access()?;
        if !self.has(Features::PLACING) {
            return Err(PagerError::KernelTooOld {
                release: self.release.clone(),
                missing: "demand paging of shared memory (userfaultfd MISSING_SHMEM, THREAD_ID)",
                needed: "4.14",
            });
        }
        Ok(())
    }

    fn has(&self, wanted: Features) -> bool {
        self.features.is_some_and(|have| have.contains(wanted))
    }

    fn check_access(&self) -> Result<()> {
        match self.access {
            UffdAccess::None => Err(PagerError::NotPermitted {
                who: "this process".into(),
                hint: "the kernel lacks CONFIG_USERFAULTFD, or a sandbox forbids it",
            }),
            _ => Ok(()),
        }
    }
}

/// Asks the kernel. Changes nothing.
pub fn probe() -> KernelSupport {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(
        |_| "of unknown release".into(),
        |text| text.trim().to_owned(),
    );
    let (access, features) = match open_own() {
        Ok((fd, access)) => (
            access,
            Uffd::from_fd(fd)
                .ok()
                .and_then(|uffd| uffd.ask_features().ok()),
        ),
        Err(_) => (UffdAccess::None, None),
    };
    KernelSupport {
        release,
        access,
        features,
        pagemap_scan: Pagemap::supported(),
    }
}

/// A userfaultfd of this process, by the best way that is open.
pub(crate) fn open_own() -> Result<(OwnedFd, UffdAccess)> {
    match create_by_syscall(false) {
        Ok(fd) => return Ok((fd, UffdAccess::Syscall)),
        Err(Errno::PERM) => {}
        Err(error) => return Err(PagerError::os("userfaultfd(2)", error)),
    }
    if let Ok(device) = File::options().read(true).write(true).open(DEVICE)
        && let Ok(fd) = create_by_device(device.as_fd())
    {
        return Ok((fd, UffdAccess::Device));
    }
    create_by_syscall(true)
        .map(|fd| (fd, UffdAccess::UserModeOnly))
        .map_err(|error| PagerError::os("userfaultfd(2) for user-mode faults", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn support(features: u64, pagemap_scan: bool) -> KernelSupport {
        KernelSupport {
            release: "6.1.0-test".into(),
            access: UffdAccess::Syscall,
            features: Some(Features(features)),
            pagemap_scan,
        }
    }

    #[test]
    fn an_old_source_is_refused_by_version() {
        let old = support(Features::PLACING.0, false);
        let error = old.check_source().unwrap_err().to_string();
        assert!(
            error.contains("6.1.0-test") && error.contains("6.7"),
            "{error}"
        );
        old.check_destination().unwrap();
        support(Features::TRACKING.0, true).check_source().unwrap();
        assert!(support(Features::TRACKING.0, false).check_source().is_err());
        assert!(support(0, true).check_destination().is_err());
    }

    #[test]
    fn this_kernel_answers() {
        let support = probe();
        assert!(!support.release.is_empty());
        assert_eq!(
            support.features.is_some(),
            support.access != UffdAccess::None
        );
    }
}
