//! Network namespaces that live by a descriptor of this process alone, so that the kernel removes
//! them with it, whatever ends it. Nothing here touches the namespace of the caller, nor any setting
//! that is not of a namespace made here.
//!
//! A namespace may also have a name in `/run/netns`, for `ip netns exec` in another terminal.
//! That is a mount, which outlives a killed process: see [`remove_stale`].

mod names;
pub(crate) mod sys;

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use nix::sched::{CloneFlags, setns, unshare};

pub use names::{NAME_PREFIX, NamedNamespace, remove_stale};

/// A network namespace of its own: loopback, and what is put into it. It ends with this value and with the
/// last process inside.
#[derive(Debug)]
pub struct Namespace {
    descriptor: Arc<File>,
}

/// Why a namespace cannot be made or named.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The kernel does not let this process make network namespaces.
    #[error(
        "a network namespace takes CAP_SYS_ADMIN: run as root, or inside \
         `unshare --user --map-root-user --net`"
    )]
    NotPermitted(#[source] io::Error),
    /// It cannot be made or set up for another reason.
    #[error("network namespace: cannot {what}")]
    SetUp {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The name is one of a process that lives, or of something else.
    #[error("the network namespace name {name} is taken; end its owner or choose another")]
    NameTaken {
        /// The whole name, prefix included.
        name: String,
    },
    /// The name cannot be a file's.
    #[error("{name:?} cannot name a network namespace: use 1 to 64 letters, digits, '-', '_'")]
    InvalidName {
        /// The name asked for.
        name: String,
    },
    /// The name cannot be given or taken away.
    #[error("network namespace name: cannot {what} {}; names take root and a writable /run", path.display())]
    Name {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl Namespace {
    /// Makes one, with loopback up.
    pub fn new() -> Result<Self, NamespaceError> {
        let set_up = |what| move |source| NamespaceError::SetUp { what, source };
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|error| match error {
                nix::Error::EPERM => NamespaceError::NotPermitted(error.into()),
                error => set_up("make one")(error.into()),
            })?;
            let descriptor =
                File::open("/proc/thread-self/ns/net").map_err(set_up("open its descriptor"))?;
            let loopback = sys::Interface {
                name: "lo",
                ..sys::Interface::default()
            };
            loopback
                .bring_up()
                .map_err(set_up("bring its loopback up"))?;
            Ok(descriptor)
        };
        // A thread that ends: the caller's own stays where it is.
        let descriptor = on_a_thread(make).map_err(set_up("start a thread"))??;
        Ok(Self {
            descriptor: Arc::new(descriptor),
        })
    }

    /// Lets `command` run inside.
    pub fn enter(&self, command: &mut Command) {
        sys::enter(command, Arc::clone(&self.descriptor));
    }

    /// The same namespace for another owner; it ends with the last.
    pub(crate) fn share(&self) -> Self {
        Self {
            descriptor: Arc::clone(&self.descriptor),
        }
    }

    /// Runs `job` on a thread inside and returns what it returns. Sockets that it opens stay of
    /// this namespace wherever they are used.
    pub fn run<T: Send>(&self, job: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_a_thread(|| {
            setns(self.descriptor.as_fd(), CloneFlags::CLONE_NEWNET)?;
            Ok(job())
        })?
    }

    /// The path of the descriptor, for `nsenter --net=PATH` while this process lives.
    pub fn path(&self) -> PathBuf {
        let number = sys::number(self.descriptor.as_fd());
        PathBuf::from(format!("/proc/{}/fd/{number}", std::process::id()))
    }

    /// Sets a sysctl of this namespace, `net.ipv4.tcp_rmem` for one. A name outside `net.` is
    /// refused: it would be of the whole machine.
    pub fn set_sysctl(&self, name: &str, value: &str) -> io::Result<()> {
        let path = sysctl_path(name)?;
        self.run(|| fs::write(path, value))?
    }

    /// Reads one.
    pub fn sysctl(&self, name: &str) -> io::Result<String> {
        let path = sysctl_path(name)?;
        let value = self.run(|| fs::read_to_string(path))??;
        Ok(value.trim_end().to_owned())
    }

    /// Sets up an interface inside.
    pub(crate) fn set_up_interface(&self, interface: &sys::Interface<'_>) -> io::Result<()> {
        self.run(|| interface.bring_up())?
    }
}

/// The file of a sysctl. `/proc/sys/net` shows the namespace of whoever opens it.
fn sysctl_path(name: &str) -> io::Result<PathBuf> {
    let parts: Vec<&str> = name.split('.').collect();
    if parts.len() < 2 || parts[0] != "net" || parts.iter().any(|p| p.is_empty() || p.contains('/'))
    {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name:?} is not a sysctl of a network namespace (net.…)"),
        ));
    }
    Ok(PathBuf::from("/proc/sys").join(parts.join("/")))
}

/// Runs `job` on a thread of its own, which ends with it.
fn on_a_thread<T: Send>(job: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("namespace".to_owned())
            .spawn_scoped(scope, job)?;
        match thread.join() {
            Ok(value) => Ok(value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_of_the_machine_are_refused() {
        for name in [
            "",
            "net",
            "net.",
            "kernel.pid_max",
            "net..x",
            "net./../kernel",
            "net/core",
        ] {
            assert!(sysctl_path(name).is_err(), "{name}");
        }
        assert_eq!(
            sysctl_path("net.ipv4.tcp_rmem").unwrap(),
            PathBuf::from("/proc/sys/net/ipv4/tcp_rmem")
        );
    }
}
