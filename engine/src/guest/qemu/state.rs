//! The device state: QEMU's own migration with RAM left out, through a socket that QEMU is given
//! over QMP. Nothing here waits without a deadline or keeps more than a bound.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::commands::{
    Capability, Migrate, MigrateCancel, MigrateIncoming, MigrateSetCapabilities, Migration,
    QueryMigrate, QueryMigrateCapabilities, QueryStatus,
};
use super::qmp::{QemuVersion, Qmp, QmpError};
use crate::guest::{GuestError, GuestResult};

/// Largest device state that is taken, in bytes. A PC without graphics has 0.5 MB; video memory
/// is part of it.
const STATE_LIMIT: usize = 256 << 20;
/// How long QEMU may take to write the state.
const SAVE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long QEMU may take to read the state: it may have to wait for pages that cross the network.
const LOAD_TIMEOUT: Duration = Duration::from_secs(180);
/// How often QEMU is asked how far it is: there is no call that waits.
const POLL: Duration = Duration::from_millis(1);
/// First QEMU that can be told not to exit when it cannot load a state.
const EXIT_ON_ERROR: QemuVersion = QemuVersion {
    major: 9,
    minor: 1,
    micro: 0,
};
/// Capabilities that have to be on: RAM in shared files is left out.
const WANTED: [&str; 2] = ["x-ignore-shared", "events"];
/// Capabilities that would change the stream or pause it half-way.
const UNWANTED: [&str; 13] = [
    "postcopy-ram",
    "multifd",
    "xbzrle",
    "compress",
    "x-colo",
    "release-ram",
    "block",
    "return-path",
    "pause-before-switchover",
    "background-snapshot",
    "mapped-ram",
    "switchover-ack",
    "dirty-bitmaps",
];

/// Sets the capabilities for a device-state stream; returns those that were changed, as they were.
pub fn set_capabilities(qmp: &Qmp) -> GuestResult<Vec<Capability>> {
    let cannot = |error| GuestError::caused("cannot set QEMU's migration capabilities", error);
    let now: BTreeMap<String, bool> = qmp
        .execute(&QueryMigrateCapabilities {})
        .map_err(cannot)?
        .into_iter()
        .map(|capability| (capability.capability, capability.state))
        .collect();
    let mut changes = Vec::new();
    for (names, state) in [(&WANTED[..], true), (&UNWANTED[..], false)] {
        for name in names {
            match now.get(*name) {
                Some(current) if *current != state => changes.push(Capability {
                    capability: (*name).to_owned(),
                    state,
                }),
                None if state => {
                    return Err(GuestError::new(format!(
                        "this QEMU ({}) lacks the migration capability {name}: use 7.2 or later",
                        qmp.version()
                    )));
                }
                _ => {}
            }
        }
    }
    if !changes.is_empty() {
        qmp.execute(&MigrateSetCapabilities {
            capabilities: changes.clone(),
        })
        .map_err(cannot)?;
    }
    for change in &mut changes {
        change.state = !change.state;
    }
    Ok(changes)
}

/// Undoes [`set_capabilities`].
pub fn restore_capabilities(qmp: &Qmp, before: Vec<Capability>) -> GuestResult<()> {
    if before.is_empty() {
        return Ok(());
    }
    qmp.execute(&MigrateSetCapabilities {
        capabilities: before,
    })
    .map(drop)
    .map_err(|error| GuestError::caused("cannot restore QEMU's migration capabilities", error))
}

/// Takes the device state out of a stopped guest. Afterwards its run state is `postmigrate`.
pub fn save(qmp: &Qmp) -> GuestResult<Vec<u8>> {
    let deadline = Instant::now() + SAVE_TIMEOUT;
    let (ours, name) = share_socket(qmp)?;
    thread::scope(|scope| {
        let drain = scope.spawn(|| drain(&ours));
        let result = qmp
            .execute(&Migrate {
                uri: format!("fd:{name}"),
            })
            .map_err(|error| {
                // QEMU still holds the socket; if it does not answer, the shutdown below ends it.
                if let Err(error) = qmp.close_fd(&name) {
                    tracing::debug!(%error, "closing the state socket in QEMU");
                }
                GuestError::caused("QEMU does not start to save the device state", error)
            })
            .and_then(|_| wait_completed(qmp, deadline));
        if result.is_err() {
            // Ends the draining thread, whatever QEMU does.
            let _ = ours.shutdown(Shutdown::Both);
        }
        let drained = drain
            .join()
            .map_err(|_| GuestError::new("the thread that reads the device state panicked"))?;
        match (result, drained) {
            // What the reader says is the cause of what QEMU says.
            (_, Err(error)) if error.kind() == io::ErrorKind::FileTooLarge => {
                Err(GuestError::caused("cannot save the device state", error))
            }
            (Err(error), _) => Err(error),
            (Ok(()), Err(error)) => Err(GuestError::caused("cannot read the device state", error)),
            (Ok(()), Ok(state)) => Ok(state),
        }
    })
}

/// Gives up a migration that may be under way, so that the guest can be run again: a migration
/// that completes later would stop it once more.
pub fn cancel(qmp: &Qmp) -> Result<(), QmpError> {
    let deadline = Instant::now() + SAVE_TIMEOUT;
    if !is_under_way(&qmp.execute(&QueryMigrate {})?) {
        return Ok(());
    }
    qmp.execute(&MigrateCancel {})?;
    while is_under_way(&qmp.execute(&QueryMigrate {})?) {
        if Instant::now() > deadline {
            return Err(QmpError::Timeout {
                socket: qmp.socket().to_owned(),
                command: "migrate_cancel",
                seconds: SAVE_TIMEOUT.as_secs(),
            });
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// Gives the device state to a QEMU that waits with `-incoming defer`, and waits until it has been
/// loaded. The guest does not run afterwards. A QEMU that could not load it may have exited.
pub fn load(qmp: &Qmp, state: &[u8]) -> GuestResult<()> {
    let deadline = Instant::now() + LOAD_TIMEOUT;
    let (ours, name) = share_socket(qmp)?;
    thread::scope(|scope| {
        let feed = scope.spawn(|| feed(&ours, state));
        let result = qmp
            .execute(&MigrateIncoming {
                uri: format!("fd:{name}"),
                exit_on_error: (qmp.version() >= EXIT_ON_ERROR).then_some(false),
            })
            .map_err(|error| {
                GuestError::caused("QEMU does not take the guest in (-incoming defer?)", error)
            })
            .and_then(|_| wait_loaded(qmp, deadline));
        let _ = ours.shutdown(Shutdown::Both);
        let fed = feed
            .join()
            .map_err(|_| GuestError::new("the thread that writes the device state panicked"))?;
        result?;
        // QEMU was content without having read all: it was not this state that it loaded.
        fed.map_err(|error| GuestError::caused("QEMU did not read all of the device state", error))
    })
}

/// One end of a new socket, and the name under which QEMU has the other.
fn share_socket(qmp: &Qmp) -> GuestResult<(UnixStream, String)> {
    let (ours, theirs) = UnixStream::pair()
        .map_err(|error| GuestError::caused("cannot create a socket for the state", error))?;
    let name = fd_name();
    qmp.send_fd(&name, theirs.as_fd())
        .map_err(|error| GuestError::caused("cannot give QEMU a socket for the state", error))?;
    Ok((ours, name))
}

/// A name that no earlier descriptor of ours can still have in QEMU.
fn fd_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!(
        "hybridmig-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

fn drain(socket: &UnixStream) -> io::Result<Vec<u8>> {
    socket.set_read_timeout(Some(SAVE_TIMEOUT))?;
    let mut state = Vec::new();
    socket
        .take(STATE_LIMIT as u64 + 1)
        .read_to_end(&mut state)?;
    if state.len() > STATE_LIMIT {
        socket.shutdown(Shutdown::Both)?;
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!(
                "QEMU sent more than {} MiB: it seems to send RAM, which must be in \
                 memory-backend-file,share=on",
                STATE_LIMIT >> 20
            ),
        ));
    }
    Ok(state)
}

fn feed(mut socket: &UnixStream, state: &[u8]) -> io::Result<()> {
    socket.set_write_timeout(Some(LOAD_TIMEOUT))?;
    socket.write_all(state)?;
    socket.shutdown(Shutdown::Write)
}

fn wait_completed(qmp: &Qmp, deadline: Instant) -> GuestResult<()> {
    loop {
        let migration = qmp
            .execute(&QueryMigrate {})
            .map_err(|error| GuestError::caused("lost QEMU while it saved the state", error))?;
        match migration.status.as_deref() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                return Err(GuestError::new(format!(
                    "QEMU could not save the device state: {}",
                    migration
                        .error_desc
                        .as_deref()
                        .unwrap_or("it does not say why")
                )));
            }
            _ if Instant::now() > deadline => {
                return Err(GuestError::new(format!(
                    "QEMU did not save the device state within {} s",
                    SAVE_TIMEOUT.as_secs()
                )));
            }
            _ => thread::sleep(POLL),
        }
    }
}

fn wait_loaded(qmp: &Qmp, deadline: Instant) -> GuestResult<()> {
    let cannot = |error| GuestError::caused("lost QEMU while it loaded the device state", error);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(GuestError::new(format!(
                "QEMU did not load the device state within {} s",
                LOAD_TIMEOUT.as_secs()
            )));
        }
        // QEMU answers only between two pages that it waits for.
        let migration = qmp.execute_within(&QueryMigrate {}, left).map_err(cannot)?;
        if migration.status.as_deref() == Some("failed") {
            return Err(GuestError::new(format!(
                "QEMU could not load the device state: {}",
                migration
                    .error_desc
                    .as_deref()
                    .unwrap_or("it does not say why")
            )));
        }
        let status = qmp.execute_within(&QueryStatus {}, left).map_err(cannot)?;
        if status.status != "inmigrate" {
            return Ok(());
        }
        thread::sleep(POLL);
    }
}

fn is_under_way(migration: &Migration) -> bool {
    !matches!(
        migration.status.as_deref(),
        None | Some("none" | "completed" | "failed" | "cancelled")
    )
}
