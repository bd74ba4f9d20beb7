//! Small records that one process leaves for another in a file of its own: written whole or not at
//! all, read with a bound.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Writes a record in place of an earlier one: whole, or not at all.
pub fn write<T: Serialize>(path: &Path, record: &T) -> io::Result<()> {
    let folder = path.parent().unwrap_or_else(|| Path::new("."));
    let text = serde_json::to_vec_pretty(record)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(&text)?;
    file.persist(path).map(drop).map_err(|error| error.error)
}

/// Reads a record of at most `limit` bytes. What is longer, or none, is [`io::ErrorKind::InvalidData`].
pub fn read<T: DeserializeOwned>(path: &Path, limit: u64) -> io::Result<T> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let size = fs::metadata(path)?.len();
    if size > limit {
        return Err(invalid(format!("it has {size} bytes")));
    }
    let text = fs::read(path)?;
    serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))
}
