//! Tables and plots of results, the same for the same input. It leaves no cell out: what did not work stands
//! where its figures would.

mod cells;
mod format;
pub(crate) mod plot;
mod storage;
mod tables;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::record::Record;
use cells::Results;

pub use cells::Figure;
pub(crate) use format::figure;

/// Writes `results.md` and its plots into `out` and returns how many files these are. `made_by` is the command
/// that made the results.
pub fn write(records: &[Record], out: &Path, made_by: &str) -> Result<usize> {
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let results = Results::new(records);
    let mut files = plot::all(&results)?;
    let text = tables::markdown(&results, made_by, &files);
    files.push(("results.md".to_owned(), text));
    for (name, text) in &files {
        let path = out.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(files.len())
}
