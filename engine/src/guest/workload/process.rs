//! The guest's process: when it starts, where it listens, when it ends. It survives its pager,
//! since a guest that waits for pages must not be lost; so it has to end by itself where nobody
//! will come for it. This file must never decide what a request does.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags};

use super::options::GuestOptions;
use super::service::Service;

/// How long a guest that ends when abandoned waits for its first connection.
const FIRST_CONNECTION: Duration = Duration::from_secs(60);

/// Why a guest process did not start, or did not go on.
#[derive(Debug, thiserror::Error)]
pub enum GuestProcessError {
    /// An option is out of its range.
    #[error("{0}")]
    Options(String),
    /// Memory for the guest could not be had.
    #[error("cannot make {bytes} bytes of guest memory: free memory or choose a smaller guest")]
    Memory {
        /// What was asked for.
        bytes: u64,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The disk's file could not be made.
    #[error("cannot make the disk {}", path.display())]
    Disk {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The control socket cannot be used.
    #[error("cannot listen on {}", path.display())]
    Control {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else that a process needs.
    #[error("{0}")]
    System(&'static str, #[source] io::Error),
}

/// Why a guest process has ended in an orderly way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was told to.
    Stopped,
    /// Nobody came for it, or nobody was left, before it had a state.
    Abandoned,
    /// The process that it was to die with has ended.
    Orphaned,
}

/// Runs a guest in this process until it ends. The caller must exit then: workers may still wait
/// for pages that will never come.
pub fn run(options: GuestOptions) -> Result<Ending, GuestProcessError> {
    options.check()?;
    if options.detach {
        // Fails only for a process that already leads its group, which is as detached as it gets.
        if let Err(error) = rustix::process::setsid() {
            tracing::debug!(%error, "no new session");
        }
    }
    let (end, ended) = sync_channel(1);
    if let Some(pid) = options.die_with {
        die_with(pid, end.clone())?;
    }
    // First of all, so that a path that is taken costs no filling of memory. Clients that connect
    // meanwhile wait.
    let listener = listen(&options.control).map_err(|source| GuestProcessError::Control {
        path: options.control.clone(),
        source,
    })?;
    let result = serve(&options, listener, end, &ended);
    if let Err(error) = std::fs::remove_file(&options.control) {
        tracing::warn!(%error, "the control socket was not removed");
    }
    result
}

fn serve(
    options: &GuestOptions,
    listener: UnixListener,
    end: SyncSender<Ending>,
    ended: &Receiver<Ending>,
) -> Result<Ending, GuestProcessError> {
    let guest = Arc::new(Service::create(options, end)?);
    let acceptor = Arc::clone(&guest);
    std::thread::Builder::new()
        .name("control".into())
        .spawn(move || acceptor.accept(&listener))
        .map_err(|error| GuestProcessError::System("cannot start a thread", error))?;
    let mut ending = None;
    if options.end_when_abandoned {
        ending = ended.recv_timeout(FIRST_CONNECTION).ok();
        if ending.is_none() {
            guest.end_if_abandoned();
        }
    }
    // The senders live in `guest`, so this ends only by a message.
    let ending = ending.unwrap_or_else(|| ended.recv().unwrap_or(Ending::Stopped));
    guest.remove_disk();
    Ok(ending)
}

/// Listens at `path`, where a socket that nobody listens on may lie.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        result => return result,
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another guest listens there",
        )),
        Err(error) => Err(error),
    }
}

/// Ends the guest when process `pid` has ended; at once if there is no such process.
fn die_with(pid: u32, end: SyncSender<Ending>) -> Result<(), GuestProcessError> {
    let no_process = |pid: u32| {
        GuestProcessError::Options(format!("{pid} is not the id of a process to die with"))
    };
    let raw = i32::try_from(pid).map_err(|_| no_process(pid))?;
    let pid = Pid::from_raw(raw).ok_or_else(|| no_process(pid))?;
    let process = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(rustix::io::Errno::SRCH) => {
            _ = end.try_send(Ending::Orphaned);
            return Ok(());
        }
        Err(error) => {
            return Err(GuestProcessError::System(
                "cannot watch the process to die with",
                error.into(),
            ));
        }
    };
    std::thread::Builder::new()
        .name("die-with".into())
        .spawn(move || {
            use rustix::event::{PollFd, PollFlags, poll};
            let mut watched = [PollFd::new(&process, PollFlags::IN)];
            loop {
                match poll(&mut watched, None) {
                    Err(rustix::io::Errno::INTR) => {}
                    Ok(_) => break,
                    Err(error) => {
                        tracing::error!(%error, "cannot watch the process to die with");
                        break;
                    }
                }
            }
            _ = end.try_send(Ending::Orphaned);
        })
        .map(|_| ())
        .map_err(|error| GuestProcessError::System("cannot start a thread", error))
}
