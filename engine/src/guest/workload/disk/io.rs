//! One thread's way to the disk. A server that has gone is waited for, as long as it takes: another
//! process takes its place at the same socket, or the guest is told to use the file. This file must
//! never turn a server that is not there into an error of the disk.

use std::io::{Error, Result};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::{BLOCK, Disk, SECTOR, Served};
use crate::nbd::{Client, NbdError, NbdResult};

/// How long between two looks for a server. There is nothing to wait on: it is a process that does
/// not exist yet.
const RETRY: Duration = Duration::from_millis(20);

/// What is done to the disk, at an offset in bytes.
pub enum Act<'a> {
    Read(u64, &'a mut [u8]),
    Write(u64, &'a [u8]),
    Flush,
}

/// One thread's way to the disk, with a connection of its own.
pub struct DiskIo {
    disk: Arc<Disk>,
    client: Option<(PathBuf, Client<UnixStream>)>,
}

impl DiskIo {
    /// Connects to nothing yet.
    pub fn new(disk: Arc<Disk>) -> Self {
        Self { disk, client: None }
    }

    /// Does it, and waits for a server that has gone until it is back, or until `give_up`: then the
    /// error is of kind `Interrupted`. Any other error is the storage's. Marks what was read and
    /// written.
    pub fn perform(&mut self, mut act: Act<'_>, give_up: impl Fn() -> bool) -> Result<()> {
        let result = loop {
            match self.once(&mut act) {
                Ok(result) => break result,
                Err(error) => {
                    tracing::debug!(%error, "the disk's server is waited for");
                    if give_up() {
                        break Err(Error::new(std::io::ErrorKind::Interrupted, error));
                    }
                    std::thread::sleep(RETRY);
                }
            }
        };
        match act {
            // A write that has failed may have changed something: it is marked too. Only now: see
            // `marks`.
            Act::Write(offset, data) => self.disk.marks.written(blocks(offset, data.len())),
            Act::Read(offset, buf) => self.disk.marks.used(blocks(offset, buf.len())),
            Act::Flush => {}
        }
        result
    }

    /// One try, by the way that is right now. The outer error is one of the connection.
    fn once(&mut self, act: &mut Act<'_>) -> NbdResult<Result<()>> {
        let disk = Arc::clone(&self.disk);
        let Some(way) = Remote::begin(&disk) else {
            self.client = None;
            return Ok(by_file(&disk.file, act));
        };
        let served = Arc::clone(&way.served);
        match self.by_server(&served, act) {
            Ok(()) => Ok(Ok(())),
            Err(error @ NbdError::Remote { .. }) => Ok(Err(Error::other(error))),
            Err(error) => {
                self.client = None;
                Err(error)
            }
        }
    }

    fn by_server(&mut self, served: &Served, act: &mut Act<'_>) -> NbdResult<()> {
        let (_, client) = match &mut self.client {
            Some(open) if open.0 == served.socket => open,
            other => other.insert((served.socket.clone(), self.disk.connect(served)?)),
        };
        match act {
            Act::Read(offset, buf) => client.read(*offset, buf),
            Act::Write(offset, data) => client.write(*offset, data),
            Act::Flush => client.flush(),
        }
    }
}

impl Disk {
    fn connect(&self, served: &Served) -> NbdResult<Client<UnixStream>> {
        let stream = UnixStream::connect(&served.socket).map_err(|source| NbdError::Io {
            doing: "connecting",
            source,
        })?;
        // No deadlines: an answer may wait for a block that crosses the network, and the end of the
        // server ends the connection.
        let client = Client::open(stream, &served.export, None)?;
        if client.size() != self.bytes {
            return Err(NbdError::Protocol(format!(
                "the export has {} bytes, the disk {}",
                client.size(),
                self.bytes
            )));
        }
        Ok(client)
    }
}

/// An operation under way by a server.
struct Remote<'a> {
    disk: &'a Disk,
    served: Arc<Served>,
}

impl<'a> Remote<'a> {
    /// None if the way is by the file.
    fn begin(disk: &'a Disk) -> Option<Self> {
        let mut route = disk.route();
        let served = route.server.clone()?;
        route.remote += 1;
        drop(route);
        Some(Self { disk, served })
    }
}

impl Drop for Remote<'_> {
    fn drop(&mut self) {
        let mut route = self.disk.route();
        route.remote -= 1;
        if route.remote == 0 {
            self.disk.quiet.notify_all();
        }
    }
}

fn by_file(file: &std::fs::File, act: &mut Act<'_>) -> Result<()> {
    match act {
        Act::Read(offset, buf) => file.read_exact_at(buf, *offset),
        Act::Write(offset, data) => file.write_all_at(data, *offset),
        Act::Flush => file.sync_data(),
    }
}

fn blocks(offset: u64, len: usize) -> std::ops::Range<u32> {
    debug_assert!(len > 0 && len.is_multiple_of(SECTOR));
    let block = BLOCK as u64;
    (offset / block) as u32..(offset + len as u64).div_ceil(block) as u32
}
