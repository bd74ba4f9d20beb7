//! What each side has bound itself to, on disk: one append-only file per session and side in a state
//! directory, so that after a crash nobody has to guess who owns the guest.
//!
//! A record counts once [`Journal::append`] has returned: it and its file's name are then durable.
//! Each line is one JSON object with the xxh3 checksum of its entry. A last line that is torn (the
//! machine died while it was written) is passed over; damage anywhere else is an error.
//! It must never be rewritten, and only one process at a time may append.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use hybridmig_transport::message::SessionId;
use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::session::io::{DestinationRecord, SourceRecord};

/// Which end of a session a journal belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The host that the guest leaves.
    Source,
    /// The host that it comes to.
    Destination,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// A record that a journal can hold.
pub trait Record: Serialize + DeserializeOwned {
    /// The side whose journal holds it.
    const SIDE: Side;
}

impl Record for SourceRecord {
    const SIDE: Side = Side::Source;
}

impl Record for DestinationRecord {
    const SIDE: Side = Side::Destination;
}

/// What a person wants to know of a journal; its first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// The session.
    pub session: SessionId,
    /// What the operator calls the guest.
    pub guest: String,
    /// The other side, as far as known: address or fingerprint.
    pub peer: String,
    /// Who wrote it.
    pub software: String,
}

/// Why a journal could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// There is one for this session and side already.
    #[error(
        "the journal {} exists already: the session has been run before on this host; see \
         `hybridmig resolve`", path.display()
    )]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Another process appends to it.
    #[error("the journal {} is in use: the process of that session still runs", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file or its directory could not be read or written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A line that is not the last one is damaged.
    #[error("line {line} of the journal {} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// An append failed half-way and could not be undone.
    #[error("the journal {} cannot be appended to after a failed write", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
    },
}

/// One line.
#[derive(Debug, Serialize, Deserialize)]
struct Entry<R> {
    /// Milliseconds since 1970, by this host's clock. For people only.
    at_ms: u64,
    #[serde(flatten)]
    what: What<R>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum What<R> {
    Opened(Context),
    Bound(R),
}

/// A journal that is being written. Locked against other processes until it is dropped.
#[derive(Debug)]
pub struct Journal<R> {
    path: PathBuf,
    file: File,
    /// Length of what is durable.
    len: u64,
    broken: bool,
    records: PhantomData<fn(R)>,
}

/// What a journal says.
#[derive(Clone, Debug)]
pub struct Recorded<R> {
    /// The file.
    pub path: PathBuf,
    /// Its first line; `None` if the machine died before it was durable.
    pub context: Option<Context>,
    /// The records with their time in milliseconds since 1970, the oldest first.
    pub records: Vec<(u64, R)>,
    /// Whether the last line was torn and passed over.
    pub torn: bool,
    /// Length of the part that is whole.
    whole: u64,
}

impl<R> Recorded<R> {
    /// The record that holds now.
    pub fn last(&self) -> Option<&R> {
        self.records.last().map(|(_, record)| record)
    }
}

impl<R: Record> Journal<R> {
    /// Starts the journal of a session. Makes the directory (for this user only) if there is none.
    pub fn create(dir: &Path, context: &Context) -> Result<Self, JournalError> {
        make_dir(dir)?;
        let path = path(dir, context.session, R::SIDE);
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .open(&path)
            .map_err(|source| match source.kind() {
                io::ErrorKind::AlreadyExists => JournalError::Exists { path: path.clone() },
                _ => JournalError::Io {
                    action: "create the journal",
                    path: path.clone(),
                    source,
                },
            })?;
        let mut journal = Self::locked(path, file, 0)?;
        journal.write(What::Opened(context.clone()))?;
        sync_dir(dir)?;
        Ok(journal)
    }

    /// Takes up a journal again to append to it, with what it says. Fails while the session's own
    /// process still holds it.
    pub fn open(path: &Path) -> Result<(Self, Recorded<R>), JournalError> {
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(|source| JournalError::Io {
                action: "open the journal",
                path: path.into(),
                source,
            })?;
        let mut journal = Self::locked(path.into(), file, 0)?;
        let recorded = Self::read(path)?;
        journal.len = recorded.whole;
        if recorded.torn {
            journal.cut()?;
        }
        Ok((journal, recorded))
    }

    /// What a journal says, whether or not its process still runs.
    pub fn read(path: &Path) -> Result<Recorded<R>, JournalError> {
        let text = fs::read(path).map_err(|source| JournalError::Io {
            action: "read the journal",
            path: path.into(),
            source,
        })?;
        parse(path, &text)
    }

    /// Makes a record durable. On an error nothing of it remains.
    pub fn append(&mut self, record: &R) -> Result<(), JournalError>
    where
        R: Clone,
    {
        self.write(What::Bound(record.clone()))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn locked(path: PathBuf, file: File, len: u64) -> Result<Self, JournalError> {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self {
                path,
                file,
                len,
                broken: false,
                records: PhantomData,
            }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(JournalError::InUse { path }),
            Err(source) => Err(JournalError::Io {
                action: "lock the journal",
                path,
                source: source.into(),
            }),
        }
    }

    fn write(&mut self, what: What<R>) -> Result<(), JournalError> {
        if self.broken {
            return Err(JournalError::Broken {
                path: self.path.clone(),
            });
        }
        let at_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |elapsed| elapsed.as_millis() as u64);
        let line = line(&Entry { at_ms, what }).map_err(|source| self.io("encode for", source))?;
        let written = self
            .file
            .write_all(line.as_bytes())
            .and_then(|()| self.file.sync_all());
        if let Err(source) = written {
            // A half-written line must not stand in front of the next one.
            self.broken = self.cut().is_err();
            return Err(self.io("write to the journal", source));
        }
        self.len += line.len() as u64;
        Ok(())
    }

    fn cut(&mut self) -> Result<(), JournalError> {
        self.file
            .set_len(self.len)
            .and_then(|()| self.file.sync_all())
            .map_err(|source| self.io("cut the torn end off the journal", source))
    }

    fn io(&self, action: &'static str, source: io::Error) -> JournalError {
        JournalError::Io {
            action,
            path: self.path.clone(),
            source,
        }
    }
}

/// Where the journal of a session lies.
pub fn path(dir: &Path, session: SessionId, side: Side) -> PathBuf {
    dir.join(format!("{session}.{}.jsonl", side.name()))
}

/// The journals in a directory, by session; none if there is no such directory.
pub fn list(dir: &Path) -> Result<Vec<(SessionId, Side, PathBuf)>, JournalError> {
    let io = |source| JournalError::Io {
        action: "list the journals in",
        path: dir.into(),
        source,
    };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(io)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let parsed = name.and_then(|name| {
            let (session, rest) = name.split_once('.')?;
            let side = [Side::Source, Side::Destination]
                .into_iter()
                .find(|side| rest == format!("{}.jsonl", side.name()))?;
            Some((session.parse().ok()?, side))
        });
        if let Some((session, side)) = parsed {
            found.push((session, side, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Who may run the guest, by what is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The source.
    Source,
    /// The destination.
    Destination,
    /// Ownership was sent, and what is known does not say how it was answered. Neither side may run
    /// the guest until that is known.
    Undecided,
}

/// Reads the two journals together. `None` for one that cannot be seen from here; an empty slice
/// for one that certainly holds no record, *and* whose process has ended.
pub fn owner(source: Option<&[SourceRecord]>, destination: Option<&[DestinationRecord]>) -> Owner {
    // The destination's word is the decision; the source only notes it.
    match destination.map(<[_]>::last) {
        Some(Some(DestinationRecord::Accepted { .. } | DestinationRecord::Complete)) => {
            return Owner::Destination;
        }
        Some(Some(DestinationRecord::Declined { .. }) | None) => return Owner::Source,
        None => {}
    }
    match source.map(<[_]>::last) {
        Some(None | Some(SourceRecord::Declined { .. })) => Owner::Source,
        Some(Some(SourceRecord::Accepted | SourceRecord::Released)) => Owner::Destination,
        Some(Some(SourceRecord::HandoverOffered { .. })) | None => Owner::Undecided,
    }
}

const PREFIX: &str = "{\"entry\":";
const MIDDLE: &str = ",\"xxh3\":\"";
const SUFFIX: &str = "\"}";
const DIGITS: usize = 16;

fn line<R: Serialize>(entry: &Entry<R>) -> io::Result<String> {
    let entry = serde_json::to_string(entry)?;
    let sum = xxh3_64(entry.as_bytes());
    Ok(format!("{PREFIX}{entry}{MIDDLE}{sum:016x}{SUFFIX}\n"))
}

fn parse<R: Record>(path: &Path, text: &[u8]) -> Result<Recorded<R>, JournalError> {
    let mut recorded = Recorded {
        path: path.into(),
        context: None,
        records: Vec::new(),
        torn: false,
        whole: 0,
    };
    let mut lines = text.split_inclusive(|byte| *byte == b'\n').enumerate();
    while let Some((index, bytes)) = lines.next() {
        match parse_line(bytes) {
            Ok(Entry {
                what: What::Opened(context),
                ..
            }) => recorded.context = Some(context),
            Ok(Entry {
                at_ms,
                what: What::Bound(record),
            }) => recorded.records.push((at_ms, record)),
            Err(_) if lines.next().is_none() => {
                recorded.torn = true;
                break;
            }
            Err(what) => {
                return Err(JournalError::Damaged {
                    path: path.into(),
                    line: index + 1,
                    what,
                });
            }
        }
        recorded.whole += bytes.len() as u64;
    }
    Ok(recorded)
}

fn parse_line<R: DeserializeOwned>(bytes: &[u8]) -> Result<Entry<R>, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
    let (entry, sum) = text
        .strip_suffix('\n')
        .and_then(|text| text.strip_prefix(PREFIX))
        .and_then(|text| text.strip_suffix(SUFFIX))
        .filter(|text| text.len() >= DIGITS && text.is_char_boundary(text.len() - DIGITS))
        .map(|text| text.split_at(text.len() - DIGITS))
        .and_then(|(entry, sum)| Some((entry.strip_suffix(MIDDLE)?, sum)))
        .ok_or("it is not an entry with a checksum")?;
    let expected = u64::from_str_radix(sum, 16).map_err(|error| error.to_string())?;
    if xxh3_64(entry.as_bytes()) != expected {
        return Err("its checksum does not hold".into());
    }
    serde_json::from_str(entry).map_err(|error| error.to_string())
}

fn make_dir(dir: &Path) -> Result<(), JournalError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| JournalError::Io {
            action: "make the state directory",
            path: dir.into(),
            source,
        })
}

fn sync_dir(dir: &Path) -> Result<(), JournalError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| JournalError::Io {
            action: "make durable the state directory",
            path: dir.into(),
            source,
        })
}

#[cfg(test)]
mod tests;
