//! The listening socket and the life of connections.

use std::io;
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::connection;
use super::handshake::Export;
use crate::disk::{DiskError, DiskImage, Result};

/// Connections at a time; more are hung up on.
const MAX_CONNECTIONS: usize = 32;
/// Longest name of an export by the protocol.
const MAX_NAME: usize = 4096;
/// How long to wait after an `accept` that found no descriptor or memory left.
const PAUSE: Duration = Duration::from_millis(100);

/// How to serve a disk.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Where to listen. Created with mode 0600.
    pub socket: PathBuf,
    /// Name of the export; the empty name finds it too.
    pub export: String,
    /// Refuse everything that changes the disk.
    pub read_only: bool,
}

/// A server that runs until it is stopped or dropped.
///
/// Before the disk is armed it serves reads of what the migration has written so far, and refuses
/// writes with `EPERM`: QEMU opens its disks long before the guest runs.
#[derive(Debug)]
pub struct NbdServer {
    socket: PathBuf,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    image: Arc<DiskImage>,
    export: Export,
    stop: AtomicBool,
    bell: std::os::fd::OwnedFd,
    connections: Mutex<Vec<Open>>,
}

/// A connection that may still be in use.
#[derive(Debug)]
struct Open {
    stream: UnixStream,
    thread: JoinHandle<()>,
}

impl NbdServer {
    /// Listens and serves. A socket that nobody listens on is replaced.
    pub fn start(options: &NbdOptions, image: Arc<DiskImage>) -> Result<Self> {
        if options.export.len() > MAX_NAME {
            return Err(DiskError::BadOptions {
                reason: format!("an export's name has at most {MAX_NAME} bytes"),
            });
        }
        let listener = listen(&options.socket)?;
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(DiskError::io("eventfd for", &options.socket))?;
        let shared = Arc::new(Shared {
            export: Export {
                name: options.export.clone(),
                bytes: image.bytes(),
                read_only: options.read_only,
            },
            image,
            stop: AtomicBool::new(false),
            bell,
            connections: Mutex::default(),
        });
        let acceptor = std::thread::Builder::new()
            .name("nbd-accept".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.accept(&listener)
            })
            .map_err(DiskError::io("starting a thread for", &options.socket))?;
        Ok(Self {
            socket: options.socket.clone(),
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Hangs up on every client and ends; what was answered has been done. Requests that wait for
    /// missing blocks are dropped unanswered, and clients that reconnect send them again.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // Full only if it rings already.
        let _ = rustix::io::write(&self.shared.bell, &1_u64.to_ne_bytes());
        if let Err(error) = std::fs::remove_file(&self.socket) {
            tracing::debug!(socket = %self.socket.display(), %error, "removing the NBD socket");
        }
        if let Some(acceptor) = self.acceptor.take()
            && acceptor.join().is_err()
        {
            tracing::error!("the NBD server's thread has panicked");
        }
        let open = std::mem::take(&mut *self.shared.connections());
        for connection in &open {
            // It may have been shut down from the other side.
            let _ = connection.stream.shutdown(Shutdown::Both);
        }
        for connection in open {
            ended(connection.thread);
        }
    }
}

impl Shared {
    fn accept(&self, listener: &UnixListener) {
        loop {
            let mut fds = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(&self.bell, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "poll of the NBD socket: no more clients");
                    return;
                }
            }
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            match listener.accept() {
                Ok((stream, _)) => self.welcome(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, "accepting an NBD client");
                    std::thread::sleep(PAUSE);
                }
            }
        }
    }

    fn welcome(&self, stream: UnixStream) {
        let mut connections = self.connections();
        let mut index = 0;
        while let Some(connection) = connections.get(index) {
            if connection.thread.is_finished() {
                ended(connections.swap_remove(index).thread);
            } else {
                index += 1;
            }
        }
        if connections.len() >= MAX_CONNECTIONS {
            tracing::warn!("more than {MAX_CONNECTIONS} NBD connections: hanging up on the newest");
            return;
        }
        let started = stream.try_clone().and_then(|clone| {
            let (image, export) = (Arc::clone(&self.image), self.export.clone());
            std::thread::Builder::new()
                .name("nbd".into())
                .spawn(move || connection::run(stream, &export, image))
                .map(|thread| Open {
                    stream: clone,
                    thread,
                })
        });
        match started {
            Ok(open) => connections.push(open),
            Err(error) => tracing::warn!(%error, "an NBD client could not be served"),
        }
    }

    fn connections(&self) -> std::sync::MutexGuard<'_, Vec<Open>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn ended(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("the thread of an NBD connection has panicked");
    }
}

/// A socket that only this user can connect to, at no moment anybody else.
fn listen(path: &Path) -> Result<UnixListener> {
    let failed = |what: &'static str| DiskError::io::<io::Error>(what, path);
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed("removing the stale socket"))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("connecting to")(error)),
            Ok(_) => {
                return Err(DiskError::Socket {
                    path: path.into(),
                    reason: "another process listens on it",
                });
            }
        },
        Ok(_) => {
            return Err(DiskError::Socket {
                path: path.into(),
                reason: "it exists and is not a socket",
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("looking at")(error)),
    }
    let address = SocketAddrUnix::new(path).map_err(DiskError::io("binding", path))?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(DiskError::io("socket for", path))?;
    rustix::net::bind(&socket, &address).map_err(DiskError::io("binding", path))?;
    // Nobody can connect before `listen`: there is no moment with a wider mode.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(failed("chmod of"))?;
    rustix::net::listen(&socket, 16).map_err(DiskError::io("listening on", path))?;
    Ok(socket.into())
}
