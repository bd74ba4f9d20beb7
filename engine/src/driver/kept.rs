//! What a destination writes down of its session for the case that its process is killed while blocks
//! are missing: with it, and with what the guest's pager keeps beside it, another process goes on.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hybridmig_transport::message::{Offer, SessionId};
use serde::{Deserialize, Serialize};

use crate::records;

const VERSION: u32 = 1;
/// Largest record that is read, in bytes.
const SIZE_LIMIT: u64 = 16 << 20;

/// The record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeptSession {
    version: u32,
    /// The session, 16 hexadecimal digits.
    session: String,
    /// The guest and its regions.
    pub offer: Offer,
    /// From this pass on batches belong to what stayed behind.
    pub postcopy_pass: u32,
}

/// A record that cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// The file could not be written, read or removed.
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
    /// It is not what this program writes.
    #[error("{} is not a usable record of a session: {why}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

impl KeptSession {
    /// A record of a session whose guest is armed here.
    pub fn new(session: SessionId, offer: Offer, postcopy_pass: u32) -> Self {
        Self {
            version: VERSION,
            session: session.to_string(),
            offer,
            postcopy_pass,
        }
    }

    /// The session.
    pub fn session(&self) -> Result<SessionId, String> {
        self.session.parse()
    }

    /// Writes it in place of an earlier one: whole, or not at all.
    pub fn write(&self, folder: &Path) -> Result<(), KeptError> {
        let path = path(folder);
        records::write(&path, self).map_err(|source| KeptError::Io {
            action: "write",
            path,
            source,
        })
    }

    /// Reads it.
    pub fn read(folder: &Path) -> Result<Self, KeptError> {
        let path = path(folder);
        let unusable = |why: String| KeptError::Unusable {
            path: path.clone(),
            why,
        };
        let kept: Self = records::read(&path, SIZE_LIMIT).map_err(|source| {
            if source.kind() == io::ErrorKind::InvalidData {
                return unusable(source.to_string());
            }
            KeptError::Io {
                action: "read",
                path: path.clone(),
                source,
            }
        })?;
        if kept.version != VERSION {
            return Err(unusable(format!("its version is {}", kept.version)));
        }
        kept.session().map_err(unusable)?;
        Ok(kept)
    }

    /// Removes it: every block is here.
    pub fn remove(folder: &Path) -> Result<(), KeptError> {
        let path = path(folder);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(KeptError::Io {
                action: "remove",
                path,
                source: error,
            }),
            _ => Ok(()),
        }
    }
}

fn path(folder: &Path) -> PathBuf {
    folder.join("session.json")
}
