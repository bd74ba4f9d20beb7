//! A QMP client: one monitor connection, commands one at a time, every one with a deadline, file
//! descriptors along with a command where it takes one.
//!
//! The dialogue itself is [`qapi::Qmp`]; what is here is the stream under it, which bounds the time
//! and the size of every answer, keeps events away from it (their types follow one version of
//! QEMU, and an unknown one would fail the command) and sends descriptors. It must never wait
//! without a deadline: QEMU's main loop may hang on a page that is still at the other host.

use std::collections::VecDeque;
use std::io::{self, BufRead, IoSlice, Read, Write};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt};
use qapi::{Command, ExecuteError};
use serde::Deserialize;

use super::commands::{CloseFd, GetFd};

/// How long a command may take unless told otherwise.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a monitor may take to greet. Another client keeps it silent for ever.
const GREETING_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest line that is taken from a monitor, in bytes.
const LINE_LIMIT: usize = 16 << 20;
/// Events that are kept; older ones are dropped.
const EVENTS_KEPT: usize = 256;

/// Why a monitor did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nothing listens there.
    #[error(
        "cannot connect to the QMP socket {socket}: is QEMU running, with -qmp unix:{socket},server=on,wait=off?"
    )]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It listens but is no QMP monitor, or is busy.
    #[error("{socket} is not a QMP socket that can be used: {why}")]
    NotQmp {
        /// The socket.
        socket: PathBuf,
        /// What was seen instead of a greeting.
        why: String,
    },
    /// QEMU refused the command.
    #[error("QEMU ({socket}) refused {command}: {message}")]
    Refused {
        /// The socket.
        socket: PathBuf,
        /// The command.
        command: &'static str,
        /// QEMU's words.
        message: String,
    },
    /// QEMU did not answer in time.
    #[error("QEMU ({socket}) did not answer {command} within {seconds} s")]
    Timeout {
        /// The socket.
        socket: PathBuf,
        /// The command.
        command: &'static str,
        /// The deadline.
        seconds: u64,
    },
    /// QEMU has gone.
    #[error("QEMU ({socket}) closed the connection during {command}: it has exited")]
    Closed {
        /// The socket.
        socket: PathBuf,
        /// The command.
        command: &'static str,
    },
    /// The connection failed, or what came is no QMP.
    #[error("the dialogue with QEMU ({socket}) failed at {command}")]
    Io {
        /// The socket.
        socket: PathBuf,
        /// The command.
        command: &'static str,
        /// What happened.
        #[source]
        source: io::Error,
    },
}

impl QmpError {
    /// Whether QEMU answered, with a no: the dialogue is intact.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether QEMU is gone.
    pub fn is_closed(&self) -> bool {
        match self {
            Self::Closed { .. } => true,
            Self::Io { source, .. } | Self::Connect { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionRefused
                    | io::ErrorKind::NotFound
            ),
            _ => false,
        }
    }
}

/// The version that QEMU greets with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct QemuVersion {
    /// 7 in 7.2.22.
    pub major: u32,
    /// 2 in 7.2.22.
    pub minor: u32,
    /// 22 in 7.2.22.
    pub micro: u32,
}

impl std::fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Something that QEMU told without being asked.
#[derive(Clone, Debug, Deserialize)]
pub struct QmpEvent {
    /// `STOP`, `RESUME`, `MIGRATION` …
    pub event: String,
    /// What comes with it.
    #[serde(default)]
    pub data: qapi::Any,
}

/// One monitor of a QEMU.
pub struct Qmp {
    socket: PathBuf,
    version: QemuVersion,
    peer_pid: Option<i32>,
    dialogue: Mutex<Dialogue>,
}

/// The connection, absent after an answer that did not come: what comes later would be taken for
/// the answer to another command.
struct Dialogue {
    connection: Option<qapi::Qmp<Wire>>,
    events: VecDeque<QmpEvent>,
}

impl Qmp {
    /// Connects and negotiates.
    pub fn connect(socket: &Path) -> Result<Self, QmpError> {
        let (connection, version, peer_pid) = open(socket)?;
        Ok(Self {
            socket: socket.to_owned(),
            version,
            peer_pid,
            dialogue: Mutex::new(Dialogue {
                connection: Some(connection),
                events: VecDeque::new(),
            }),
        })
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// QEMU's version.
    pub fn version(&self) -> QemuVersion {
        self.version
    }

    /// The process that listens on the socket: QEMU, unless a manager opened the socket for it.
    pub fn peer_pid(&self) -> Option<i32> {
        self.peer_pid
    }

    /// Runs a command within [`COMMAND_TIMEOUT`].
    pub fn execute<C: Command>(&self, command: &C) -> Result<C::Ok, QmpError> {
        self.execute_within(command, COMMAND_TIMEOUT)
    }

    /// Runs a command. After a timeout the connection is given up and opened anew with the next
    /// command; whether QEMU carried the command out is then unknown.
    pub fn execute_within<C: Command>(
        &self,
        command: &C,
        timeout: Duration,
    ) -> Result<C::Ok, QmpError> {
        self.run(command, timeout, None)
    }

    /// Gives QEMU a descriptor, kept there under `name` until it is used or closed by name.
    pub fn send_fd(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        let command = GetFd {
            fdname: name.to_owned(),
        };
        self.run(&command, COMMAND_TIMEOUT, Some(fd)).map(drop)
    }

    /// Makes QEMU close a descriptor given by [`Self::send_fd`].
    pub fn close_fd(&self, name: &str) -> Result<(), QmpError> {
        let command = CloseFd {
            fdname: name.to_owned(),
        };
        self.execute(&command).map(drop)
    }

    /// The events that came with the answers so far, oldest first.
    pub fn take_events(&self) -> Vec<QmpEvent> {
        let mut dialogue = self.lock();
        dialogue.collect_events();
        dialogue.events.drain(..).collect()
    }

    fn run<C: Command>(
        &self,
        command: &C,
        timeout: Duration,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<C::Ok, QmpError> {
        let mut dialogue = self.lock();
        let connection = match &mut dialogue.connection {
            Some(connection) => connection,
            none => none.insert(self.reconnect()?),
        };
        let wire = connection.inner_mut();
        wire.deadline = Instant::now() + timeout;
        wire.pending_fd = match fd.map(|fd| fd.try_clone_to_owned()).transpose() {
            Ok(fd) => fd,
            Err(source) => return Err(self.failed(C::NAME, timeout, source)),
        };
        let result = connection.execute(command);
        match result {
            Ok(answer) => Ok(answer),
            Err(ExecuteError::Qapi(refusal)) => Err(QmpError::Refused {
                socket: self.socket.clone(),
                command: C::NAME,
                message: refusal.desc,
            }),
            Err(ExecuteError::Io(source)) => {
                dialogue.collect_events();
                dialogue.connection = None;
                Err(self.failed(C::NAME, timeout, source))
            }
        }
    }

    fn reconnect(&self) -> Result<qapi::Qmp<Wire>, QmpError> {
        let (connection, version, peer_pid) = open(&self.socket)?;
        if (version, peer_pid) == (self.version, self.peer_pid) {
            Ok(connection)
        } else {
            Err(QmpError::NotQmp {
                socket: self.socket.clone(),
                why: "another QEMU listens there than the one this began with".to_owned(),
            })
        }
    }

    fn failed(&self, command: &'static str, timeout: Duration, source: io::Error) -> QmpError {
        let socket = self.socket.clone();
        match source.kind() {
            io::ErrorKind::TimedOut => QmpError::Timeout {
                socket,
                command,
                seconds: timeout.as_secs(),
            },
            io::ErrorKind::UnexpectedEof => QmpError::Closed { socket, command },
            _ => QmpError::Io {
                socket,
                command,
                source,
            },
        }
    }

    fn lock(&self) -> MutexGuard<'_, Dialogue> {
        // A panic while the lock was held leaves at worst a half-read answer, which the next
        // command reports as a failure.
        self.dialogue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dialogue {
    fn collect_events(&mut self) {
        if let Some(connection) = &mut self.connection {
            self.events
                .append(&mut mem::take(&mut connection.inner_mut().events));
            while self.events.len() > EVENTS_KEPT {
                self.events.pop_front();
            }
        }
    }
}

/// Connects, reads the greeting and leaves the negotiation mode.
fn open(socket: &Path) -> Result<(qapi::Qmp<Wire>, QemuVersion, Option<i32>), QmpError> {
    let stream = UnixStream::connect(socket).map_err(|source| QmpError::Connect {
        socket: socket.to_owned(),
        source,
    })?;
    let peer_pid = getsockopt(&stream, sockopt::PeerCredentials)
        .ok()
        .map(|credentials| credentials.pid());
    let mut wire = Wire::new(stream, Instant::now() + GREETING_TIMEOUT);
    let not_qmp = |why: String| QmpError::NotQmp {
        socket: socket.to_owned(),
        why,
    };
    let line = wire
        .greeting_line()
        .map_err(|error| not_qmp(explain_silence(&error)))?;
    let version = parse_greeting(&line).map_err(not_qmp)?;
    let mut connection = qapi::Qmp::new(wire);
    connection.inner_mut().deadline = Instant::now() + COMMAND_TIMEOUT;
    connection
        .execute(&qapi::qmp::qmp_capabilities { enable: None })
        .map_err(|error| not_qmp(format!("it greeted like QEMU but then failed: {error}")))?;
    Ok((connection, version, peer_pid))
}

fn explain_silence(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut => format!(
            "it accepted the connection but sent no QMP greeting within {} s; either it is not a \
             QMP socket, or another client (libvirt, a second hybridmig) holds the monitor: give \
             QEMU one more -qmp socket",
            GREETING_TIMEOUT.as_secs()
        ),
        io::ErrorKind::UnexpectedEof => {
            "it closed the connection without a QMP greeting".to_owned()
        }
        _ => format!("reading the QMP greeting failed: {error}"),
    }
}

/// Takes the version out of QEMU's greeting, or says what came in its place.
fn parse_greeting(line: &[u8]) -> Result<QemuVersion, String> {
    #[derive(Deserialize)]
    struct Greeting {
        #[serde(rename = "QMP")]
        qmp: GreetingBody,
    }
    #[derive(Deserialize)]
    struct GreetingBody {
        version: GreetingVersion,
    }
    #[derive(Deserialize)]
    struct GreetingVersion {
        qemu: QemuVersion,
    }
    if let Ok(greeting) = serde_json::from_slice::<Greeting>(line) {
        return Ok(greeting.qmp.version.qemu);
    }
    let seen: String = String::from_utf8_lossy(&line[..line.len().min(60)])
        .trim()
        .chars()
        .flat_map(char::escape_default)
        .collect();
    let hint = if seen.starts_with("QEMU ") && seen.contains("monitor") {
        "; that is QEMU's human monitor (-monitor): give QEMU a -qmp socket"
    } else if seen.starts_with('{') {
        "; it speaks JSON but not QMP (a guest agent, perhaps)"
    } else {
        ""
    };
    Err(format!("it said '{seen}' in place of a QMP greeting{hint}"))
}

/// The stream under the dialogue. Reading yields answers only, line by line.
struct Wire {
    stream: UnixStream,
    deadline: Instant,
    /// Received and not yet split into lines.
    received: Vec<u8>,
    /// Where in `received` to look for the next end of a line.
    searched: usize,
    /// The answer that is being read.
    line: Vec<u8>,
    line_read: usize,
    /// The command that is being written.
    outgoing: Vec<u8>,
    pending_fd: Option<OwnedFd>,
    events: VecDeque<QmpEvent>,
}

impl Wire {
    fn new(stream: UnixStream, deadline: Instant) -> Self {
        Self {
            stream,
            deadline,
            received: Vec::new(),
            searched: 0,
            line: Vec::new(),
            line_read: 0,
            outgoing: Vec::new(),
            pending_fd: None,
            events: VecDeque::new(),
        }
    }

    /// The first line; what is no line within the deadline is given back as it is, to be named.
    fn greeting_line(&mut self) -> io::Result<Vec<u8>> {
        match self.next_line() {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::TimedOut | io::ErrorKind::UnexpectedEof
                ) && !self.received.is_empty() =>
            {
                Ok(mem::take(&mut self.received))
            }
            other => other,
        }
    }

    fn next_line(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.received[self.searched..]
                .iter()
                .position(|byte| *byte == b'\n')
            {
                let rest = self.received.split_off(self.searched + end + 1);
                self.searched = 0;
                return Ok(mem::replace(&mut self.received, rest));
            }
            self.searched = self.received.len();
            if self.received.len() > LINE_LIMIT {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("a line of more than {LINE_LIMIT} bytes"),
                ));
            }
            self.receive()?;
        }
    }

    fn receive(&mut self) -> io::Result<()> {
        let mut buffer = [0; 16 << 10];
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.received.extend_from_slice(&buffer[..count]);
                    return Ok(());
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn send(&mut self) -> io::Result<()> {
        let outgoing = mem::take(&mut self.outgoing);
        let fd = self.pending_fd.take();
        let mut sent = 0;
        while sent < outgoing.len() {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_write_timeout(Some(left))?;
            let raw = fd.as_ref().map(|fd| [fd.as_raw_fd()]);
            // The descriptor travels with the first byte; QEMU takes it with the command.
            let control: Vec<ControlMessage<'_>> = raw
                .iter()
                .filter(|_| sent == 0)
                .map(|fds| ControlMessage::ScmRights(fds))
                .collect();
            match sendmsg::<()>(
                self.stream.as_raw_fd(),
                &[IoSlice::new(&outgoing[sent..])],
                &control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(count) => sent += count,
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buf.len());
        buf[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl BufRead for Wire {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.line_read == self.line.len() {
            let line = self.next_line()?;
            if let Ok(event) = serde_json::from_slice::<QmpEvent>(&line) {
                if self.events.len() == EVENTS_KEPT {
                    self.events.pop_front();
                }
                self.events.push_back(event);
                continue;
            }
            self.line = line;
            self.line_read = 0;
        }
        Ok(&self.line[self.line_read..])
    }

    fn consume(&mut self, count: usize) {
        self.line_read += count;
    }
}

impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.outgoing.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}
