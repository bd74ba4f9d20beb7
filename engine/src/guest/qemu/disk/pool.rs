//! Connections to one export, for several threads that read at once: opened when they are needed, kept
//! for the next reader, never more than a few.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::nbd::{Client, NbdError, NbdResult};

/// Most connections to one export.
pub const CONNECTIONS: u32 = 8;
/// How long an answer may take: a request waits for the storage behind the image, which may be slow
/// or far.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The connections to one export.
pub struct Pool {
    socket: PathBuf,
    export: String,
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Default)]
struct State {
    idle: Vec<Client<UnixStream>>,
    /// Idle ones and those in use.
    open: u32,
}

impl Pool {
    /// Connects to nothing yet.
    pub fn new(socket: PathBuf, export: String) -> Self {
        Self {
            socket,
            export,
            state: Mutex::default(),
            returned: Condvar::new(),
        }
    }

    /// Reads `buf.len()` bytes at `offset`. Waits while all connections are in use.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> NbdResult<()> {
        let (place, mut client) = self.take()?;
        let result = client.read(offset, buf);
        if result.as_ref().map_or_else(NbdError::is_remote, |()| true) {
            place.give_back(client);
        }
        result
    }

    /// Closes the connections that are not in use.
    pub fn close(&self) {
        let mut state = self.lock();
        state.open -= state.idle.len() as u32;
        let idle = std::mem::take(&mut state.idle);
        drop(state);
        idle.into_iter().for_each(Client::disconnect);
    }

    fn take(&self) -> NbdResult<(Place<'_>, Client<UnixStream>)> {
        let mut state = self.lock();
        loop {
            if let Some(client) = state.idle.pop() {
                return Ok((Place(self), client));
            }
            if state.open < CONNECTIONS {
                break;
            }
            state = self
                .returned
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.open += 1;
        drop(state);
        let place = Place(self);
        let client = connect(&self.socket, &self.export, None)?;
        Ok((place, client))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of a connection in use among those that are open.
struct Place<'a>(&'a Pool);

impl Place<'_> {
    /// Keeps the connection for the next reader.
    fn give_back(self, client: Client<UnixStream>) {
        let mut state = self.0.lock();
        state.idle.push(client);
        // The place of the one in use goes when this is dropped.
        state.open += 1;
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.lock().open -= 1;
        self.0.returned.notify_one();
    }
}

/// Opens a connection to an export, with a metadata context if one is wanted.
pub fn connect(
    socket: &std::path::Path,
    export: &str,
    context: Option<&str>,
) -> NbdResult<Client<UnixStream>> {
    let failed = |source| NbdError::Io {
        doing: "connecting",
        source,
    };
    let stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(TIMEOUT)).map_err(failed)?;
    stream.set_write_timeout(Some(TIMEOUT)).map_err(failed)?;
    Client::open(stream, export, context)
}
