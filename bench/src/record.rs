//! One run as one line of JSON. The version goes up when a field changes its meaning or goes away; fields may
//! be added within a version. Times are in seconds, sizes in bytes, unless a name says otherwise.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::link::{LinkFacts, Tcp, Traffic};
use crate::machine::Machine;
use crate::measure::Measured;
use crate::scenario::{Guest, Times};
use crate::storage::Storage;

/// Version of the format.
pub const SCHEMA: u32 = 1;

/// One run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The scenario's name.
    pub scenario: String,
    /// The link, in the words of `hybridmig-netem`.
    pub link: String,
    /// Its figures.
    pub link_facts: LinkFacts,
    /// The guest.
    pub guest: Guest,
    /// How fast it was told to dirty its memory, in MB/s.
    pub dirty_mb_s: f64,
    /// The speed that the guest was told to have, in page operations per second; `measured.v0` is less where
    /// the machine could not do that.
    pub told_speed: f64,
    /// The engine's name.
    pub engine: String,
    /// Counted from 0.
    pub repetition: u32,
    /// Counted from 0; more than that if the emulator had declared the ones before invalid.
    pub attempt: u32,
    /// Seed of the link's losses and of the guest.
    pub seed: u64,
    /// The scenario's times.
    pub times: Times,
    /// When the migration started, in seconds since 1970.
    pub started_unix: f64,
    /// The machine.
    pub machine: Machine,
    /// How it ended.
    pub outcome: Outcome,
    /// Whether the emulator kept to its own times. What an invalid run shows is not the engine's doing.
    pub valid: bool,
    /// Why not.
    pub invalid: Option<String>,
    /// What the guest's ticks show.
    pub measured: Option<Measured>,
    /// Contents of memory, as the guest's own checker sees them.
    pub checked: Option<Checked>,
    /// What becomes of the guest's disk, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<Storage>,
    /// What the emulator counted from the start of the migration to its end.
    pub traffic: Option<Traffic>,
    /// TCP's settings on both hosts.
    pub tcp: Option<Tcp>,
    /// What the engine says of itself: recorded, not trusted.
    pub claimed: Value,
    /// The end of the source's console and the beginning of the destination's: the seam, if all is well. Of a
    /// guest that was not moved, more lines, and the end of the destination's.
    pub consoles: [String; 2],
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest runs at the destination with all of its memory, and every page of it is right.
    Moved,
    /// The guest still depends on the source.
    NotFinished {
        /// What was seen.
        why: String,
    },
    /// The guest is dead, wrong, or has run twice; or the engine has failed.
    Failed {
        /// What was seen.
        why: String,
    },
}

/// What the guest's checker says after the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Pages verified.
    pub pages: u64,
    /// Pages found wrong since the boot.
    pub bad: u64,
    /// Whether the guest's clock and work only ever grew: it has never run twice.
    pub one_life: bool,
}

impl Record {
    /// Appends this as a line.
    pub fn append(&self, path: &Path) -> Result<()> {
        let mut line = serde_json::to_string(self).context("a record is JSON")?;
        line.push('\n');
        let file = OpenOptions::new().create(true).append(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes()))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads all lines of a file.
    pub fn read_all(path: &Path) -> Result<Vec<Self>> {
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut records = Vec::new();
        for (number, line) in BufReader::new(file).lines().enumerate() {
            let whence = || format!("{}, line {}", path.display(), number + 1);
            let line = line.with_context(whence)?;
            if line.trim().is_empty() {
                continue;
            }
            let record: Self = serde_json::from_str(&line).with_context(whence)?;
            ensure!(
                record.schema == SCHEMA,
                "{}: schema {}, this program knows {SCHEMA}",
                whence(),
                record.schema
            );
            records.push(record);
        }
        Ok(records)
    }
}
