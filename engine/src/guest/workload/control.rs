//! The control socket of the embedded guest: what can be asked, what is answered, and the client.
//! `docs/workload.md` describes it for people. One request is one line of JSON, one reply another;
//! replies come in the order of the requests. This file must never decide what a request does.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hybridmig_pager::handover::GuestMapping;
use serde::{Deserialize, Serialize};

use super::disk::Served;
use super::stats::{Latencies, Stats};
use super::wire::{self, LineReader};
use super::workers::Plan;

/// Version of the control protocol, of the saved state and of the page contents together. Two
/// guests of different formats cannot take each other's place.
pub const FORMAT: u32 = 2;

/// What can be asked of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
pub enum Request {
    /// What the guest is and how it stands.
    Describe,
    /// A userfaultfd of the guest, its mappings, its memory and its figures page.
    Memory {
        /// What the userfaultfd is for.
        purpose: Purpose,
    },
    /// Keep the one descriptor that comes with this line for the next pager: the map of what is
    /// missing, which must outlive the pager that writes it.
    Keep,
    /// The disk's file, and the marks of what was written to it and used.
    Disk,
    /// Use the disk by way of this server from now on, since blocks of it will be missing. For a guest
    /// that waits for its state. The guest waits for a server that has gone: another takes its place
    /// at the same socket.
    Serve {
        /// The server.
        by: Served,
    },
    /// Every page and every block is in place and the pager has unregistered: the guest closes its own
    /// copy of the userfaultfd, and what it keeps, and uses the disk's file itself. Doing it earlier
    /// would turn what is missing into zeroes. When this is answered no operation by way of the disk's
    /// server is under way.
    Settled,
    /// Stop all workers between two accesses.
    Freeze {
        /// How long to wait for workers that wait for pages.
        patience_ms: u32,
    },
    /// Let a frozen guest go on.
    Thaw,
    /// The state of a frozen guest.
    Save,
    /// Give a waiting guest its state; it is frozen then.
    Load {
        /// What `save` returned, in hexadecimal digits.
        state: String,
    },
    /// Let a loaded guest run.
    Resume,
    /// Verify all of guest memory and of the disk; a running guest is frozen meanwhile.
    Verify,
    /// End the process.
    Stop,
}

/// What a userfaultfd of the guest is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// To track writes. Always a new one; the guest keeps no copy.
    Track,
    /// To serve missing pages. The guest keeps a copy, and hands the same one to the next pager,
    /// until it is told [`Request::Settled`].
    Page,
}

/// Answers of a guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "reply")]
pub enum Reply {
    /// Answer to [`Request::Describe`].
    Description(Box<Description>),
    /// Answer to [`Request::Memory`], with three descriptors: userfaultfd, memory, figures; and
    /// what was given to keep, if anything was.
    Memory {
        /// In the form in which Firecracker tells its page-fault handler.
        mappings: Vec<GuestMapping>,
    },
    /// Answer to [`Request::Disk`], with two descriptors: the disk's file, its marks.
    Disk {
        /// Absolute path of the file.
        path: PathBuf,
        /// Size in bytes.
        bytes: u64,
    },
    /// Answer to [`Request::Save`].
    State {
        /// In hexadecimal digits.
        state: String,
    },
    /// Answer to [`Request::Verify`] if all is right.
    Verified {
        /// Number of pages and of sectors of the disk.
        blocks: u64,
    },
    /// Done; nothing to tell.
    Done,
    /// Not done.
    Failed {
        /// What failed, on what, what to do about it.
        error: String,
    },
}

/// How a guest stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// Incoming, without state: it may be given one.
    Waiting,
    /// It has its state and does not run.
    Frozen,
    /// It runs.
    Running,
}

/// What a guest is and how it stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// [`FORMAT`] of the guest's program.
    pub format: u32,
    /// Process id.
    pub pid: u32,
    /// Size of its memory in bytes.
    pub bytes: u64,
    /// Size of its disk in bytes; 0: it has none.
    pub disk_bytes: u64,
    /// How it stands.
    pub standing: Standing,
    /// Whether it keeps a userfaultfd for missing pages.
    pub paged: bool,
    /// Who serves its disk, where blocks of it are missing.
    pub served: Option<Served>,
    /// What it does; none while it waits.
    pub plan: Option<Plan>,
    /// Its figures.
    pub stats: Stats,
    /// How long its operations on the disk took, on this host.
    pub latencies: Latencies,
    /// The first wrong pages, wrong sectors and failures that its threads came across.
    pub wrong: Vec<String>,
}

/// Why a guest did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens on the socket.
    #[error("no guest answers at {}: start one, or give the path of its control socket", .0.display())]
    Unreachable(PathBuf, #[source] io::Error),
    /// The connection broke, or the guest did not answer in time.
    #[error("the guest did not answer '{0}'")]
    Broken(&'static str, #[source] io::Error),
    /// Something else than a guest answers.
    #[error("what answers '{0}' is not a guest of this version of hybridmig: {1}")]
    Foreign(&'static str, String),
    /// The guest said no.
    #[error("the guest refused '{0}': {1}")]
    Refused(&'static str, String),
}

/// What [`Control::memory`] brings.
#[derive(Debug)]
pub struct MemoryHandover {
    /// The userfaultfd, before its API handshake if it is new.
    pub uffd: OwnedFd,
    /// The guest's memory.
    pub memory: OwnedFd,
    /// The figures page, for [`super::StatsPage::attach`].
    pub stats: OwnedFd,
    /// What an earlier pager gave to keep.
    pub kept: Option<OwnedFd>,
    /// Where the guest has its memory.
    pub mappings: Vec<GuestMapping>,
}

/// What [`Control::disk`] brings.
#[derive(Debug)]
pub struct DiskHandover {
    /// The file.
    pub file: OwnedFd,
    /// What was written to it and used.
    pub marks: OwnedFd,
    /// Absolute path of the file.
    pub path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
}

/// A client of a guest's control socket. One that has lost its connection makes a new one.
pub struct Control {
    path: PathBuf,
    reader: Option<LineReader>,
}

/// Longest wait for an answer that needs no work.
const PROMPT: Duration = Duration::from_secs(30);
/// Longest wait for the first answer: a new guest fills its memory before it answers.
const FILLING: Duration = Duration::from_secs(180);
/// Longest wait for a verification: 8 GiB on a slow and busy machine.
const VERIFICATION: Duration = Duration::from_secs(600);

impl Control {
    /// Connects to the guest that listens at `path`.
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        Ok(Self {
            path: path.to_owned(),
            reader: Some(open(path)?),
        })
    }

    /// Where the guest listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Connects to a guest that is about to listen, as long as `alive` says that it may come.
    pub fn wait(
        path: &Path,
        patience: Duration,
        mut alive: impl FnMut() -> bool,
    ) -> Result<Self, ControlError> {
        let deadline = Instant::now() + patience;
        loop {
            match Self::connect(path) {
                Err(ControlError::Unreachable(..)) if alive() && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                result => return result,
            }
        }
    }

    /// [`Request::Describe`].
    pub fn describe(&mut self) -> Result<Description, ControlError> {
        const WHAT: &str = "describe";
        match self.ask(WHAT, &Request::Describe, FILLING)?.0 {
            Reply::Description(description) if description.format == FORMAT => Ok(*description),
            Reply::Description(description) => Err(ControlError::Foreign(
                WHAT,
                format!(
                    "it has format {} where {FORMAT} is expected",
                    description.format
                ),
            )),
            reply => Err(unexpected(WHAT, &reply)),
        }
    }

    /// [`Request::Memory`].
    pub fn memory(&mut self, purpose: Purpose) -> Result<MemoryHandover, ControlError> {
        const WHAT: &str = "memory";
        let (reply, fds) = self.ask(WHAT, &Request::Memory { purpose }, PROMPT)?;
        let Reply::Memory { mappings } = reply else {
            return Err(unexpected(WHAT, &reply));
        };
        let count = fds.len();
        let mut fds = fds.into_iter();
        match (fds.next(), fds.next(), fds.next(), fds.next()) {
            (Some(uffd), Some(memory), Some(stats), kept) => Ok(MemoryHandover {
                uffd,
                memory,
                stats,
                kept,
                mappings,
            }),
            _ => Err(ControlError::Foreign(
                WHAT,
                format!("{count} descriptors instead of 3 or 4"),
            )),
        }
    }

    /// [`Request::Keep`].
    pub fn keep(&mut self, fd: BorrowedFd<'_>) -> Result<(), ControlError> {
        const WHAT: &str = "keep";
        match self.ask_with(WHAT, &Request::Keep, &[fd], PROMPT)?.0 {
            Reply::Done => Ok(()),
            reply => Err(unexpected(WHAT, &reply)),
        }
    }

    /// [`Request::Disk`].
    pub fn disk(&mut self) -> Result<DiskHandover, ControlError> {
        const WHAT: &str = "disk";
        let (reply, fds) = self.ask(WHAT, &Request::Disk, PROMPT)?;
        let Reply::Disk { path, bytes } = reply else {
            return Err(unexpected(WHAT, &reply));
        };
        let [file, marks] = <[OwnedFd; 2]>::try_from(fds).map_err(|fds| {
            ControlError::Foreign(WHAT, format!("{} descriptors instead of 2", fds.len()))
        })?;
        Ok(DiskHandover {
            file,
            marks,
            path,
            bytes,
        })
    }

    /// [`Request::Serve`].
    pub fn serve(&mut self, by: &Served) -> Result<(), ControlError> {
        let by = by.clone();
        self.command("serve", &Request::Serve { by }, PROMPT)
    }

    /// [`Request::Settled`].
    pub fn settled(&mut self) -> Result<(), ControlError> {
        self.command("settled", &Request::Settled, PROMPT)
    }

    /// [`Request::Freeze`].
    pub fn freeze(&mut self, patience: Duration) -> Result<(), ControlError> {
        let patience_ms = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
        let request = Request::Freeze { patience_ms };
        self.command("freeze", &request, patience + PROMPT)
    }

    /// [`Request::Thaw`].
    pub fn thaw(&mut self) -> Result<(), ControlError> {
        self.command("thaw", &Request::Thaw, PROMPT)
    }

    /// [`Request::Save`].
    pub fn save(&mut self) -> Result<Vec<u8>, ControlError> {
        const WHAT: &str = "save";
        match self.ask(WHAT, &Request::Save, PROMPT)?.0 {
            Reply::State { state } => {
                from_hex(&state).map_err(|error| ControlError::Foreign(WHAT, error))
            }
            reply => Err(unexpected(WHAT, &reply)),
        }
    }

    /// [`Request::Load`].
    pub fn load(&mut self, state: &[u8]) -> Result<(), ControlError> {
        let state = to_hex(state);
        self.command("load", &Request::Load { state }, PROMPT)
    }

    /// [`Request::Resume`].
    pub fn resume(&mut self) -> Result<(), ControlError> {
        self.command("resume", &Request::Resume, PROMPT)
    }

    /// [`Request::Verify`]: number of pages and sectors.
    pub fn verify(&mut self) -> Result<u64, ControlError> {
        const WHAT: &str = "verify";
        match self.ask(WHAT, &Request::Verify, VERIFICATION)?.0 {
            Reply::Verified { blocks } => Ok(blocks),
            reply => Err(unexpected(WHAT, &reply)),
        }
    }

    /// [`Request::Stop`]. Returns when the process has given its memory back.
    pub fn stop(&mut self) -> Result<(), ControlError> {
        const WHAT: &str = "stop";
        self.command(WHAT, &Request::Stop, PROMPT)?;
        // The connection ends with the process.
        match self
            .reader
            .take()
            .map(|mut reader| reader.receive::<Reply>())
        {
            None | Some(Ok(None)) => Ok(()),
            Some(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            Some(Ok(Some((reply, _)))) => Err(unexpected(WHAT, &reply)),
            Some(Err(error)) => Err(ControlError::Broken(WHAT, error)),
        }
    }

    fn command(
        &mut self,
        what: &'static str,
        request: &Request,
        patience: Duration,
    ) -> Result<(), ControlError> {
        match self.ask(what, request, patience)?.0 {
            Reply::Done => Ok(()),
            reply => Err(unexpected(what, &reply)),
        }
    }

    fn ask(
        &mut self,
        what: &'static str,
        request: &Request,
        patience: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>), ControlError> {
        self.ask_with(what, request, &[], patience)
    }

    fn ask_with(
        &mut self,
        what: &'static str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>), ControlError> {
        // Taken out for the time of the dialogue: after a failure a late answer to this request
        // must not pass for the answer to the next one, so that one begins a new connection.
        let mut reader = match self.reader.take() {
            Some(reader) => reader,
            None => open(&self.path)?,
        };
        let (reply, fds) = converse(&mut reader, request, fds, patience)
            .map_err(|error| ControlError::Broken(what, error))?;
        self.reader = Some(reader);
        match reply {
            Reply::Failed { error } => Err(ControlError::Refused(what, error)),
            reply => Ok((reply, fds)),
        }
    }
}

fn open(path: &Path) -> Result<LineReader, ControlError> {
    UnixStream::connect(path)
        .map(LineReader::new)
        .map_err(|error| ControlError::Unreachable(path.to_owned(), error))
}

fn converse(
    reader: &mut LineReader,
    request: &Request,
    fds: &[BorrowedFd<'_>],
    patience: Duration,
) -> io::Result<(Reply, Vec<OwnedFd>)> {
    reader.stream().set_read_timeout(Some(patience))?;
    reader.stream().set_write_timeout(Some(PROMPT))?;
    wire::send(reader.stream(), request, fds)?;
    reader
        .receive()?
        .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn unexpected(what: &'static str, reply: &Reply) -> ControlError {
    let text: String = format!("{reply:?}").chars().take(80).collect();
    ControlError::Foreign(what, format!("it answered {text}"))
}

/// Bytes as hexadecimal digits.
pub fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
        text
    })
}

/// Hexadecimal digits as bytes.
pub fn from_hex(text: &str) -> Result<Vec<u8>, String> {
    let bad = || "the state is not a string of hexadecimal digits".to_string();
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return Err(bad());
    }
    text.as_bytes()
        .chunks(2)
        .map(|pair| {
            let digit = |byte: u8| char::from(byte).to_digit(16).ok_or_else(bad);
            Ok((digit(pair[0])? * 16 + digit(pair[1])?) as u8)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn hex_goes_round(bytes: Vec<u8>) {
            prop_assert_eq!(from_hex(&to_hex(&bytes)), Ok(bytes));
        }

        #[test]
        fn any_text_is_hex_or_an_error(text: String) {
            if let Ok(bytes) = from_hex(&text) {
                prop_assert_eq!(to_hex(&bytes), text.to_ascii_lowercase());
            }
        }
    }

    #[test]
    fn requests_read_well() {
        let line = |request: &Request| serde_json::to_string(request).unwrap();
        assert_eq!(line(&Request::Describe), r#"{"do":"describe"}"#);
        let purpose = Purpose::Track;
        assert_eq!(
            line(&Request::Memory { purpose }),
            r#"{"do":"memory","purpose":"track"}"#
        );
    }
}
