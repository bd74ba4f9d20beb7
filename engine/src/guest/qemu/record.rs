//! What a destination writes down for the case that it is killed: which QEMU it paged, where that
//! QEMU's RAM is and how far the guest had come. Another process takes over by it without asking
//! QEMU, whose main loop may itself wait for a page.
//!
//! It outlives the process, not the host: a QEMU does not either.

use std::fs;
use std::path::{Path, PathBuf};

use hybridmig_transport::message::{GuestDescription, RegionInfo};
use serde::{Deserialize, Serialize};

use super::here::DisksRecord;
use super::process::{Mapping, QemuProcess};
use crate::guest::{GuestError, GuestResult};
use crate::records;

const VERSION: u32 = 2;
/// Largest record that is read, in bytes.
const SIZE_LIMIT: u64 = 1 << 20;

/// How far the guest has come; it decides what may be done to QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Progress {
    /// QEMU waits, its memory may have been written.
    #[default]
    Waiting,
    /// QEMU has begun to load the state.
    Loading,
    /// The guest has been told to run.
    Resumed,
}

/// The record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// QEMU.
    pub process: QemuProcess,
    /// When QEMU was started, in the kernel's ticks: tells it from a later process with its id.
    pub started: u64,
    /// Its monitor.
    pub socket: PathBuf,
    /// The folder that was made for it, if it was started here.
    pub folder: Option<PathBuf>,
    /// The guest.
    pub description: GuestDescription,
    /// Its regions.
    pub regions: Vec<RegionInfo>,
    /// Where each region is mapped, by region.
    pub mappings: Vec<Mapping>,
    /// Thread and number of each vCPU.
    pub vcpus: Vec<(u32, u32)>,
    /// How far the guest had come.
    pub progress: Progress,
    /// The disks, where the guest has any.
    pub disks: Option<DisksRecord>,
}

impl Record {
    /// A record of a QEMU that waits.
    pub fn new(
        process: QemuProcess,
        socket: PathBuf,
        folder: Option<PathBuf>,
        description: GuestDescription,
        regions: Vec<RegionInfo>,
        mappings: Vec<Mapping>,
        vcpus: Vec<(u32, u32)>,
    ) -> GuestResult<Self> {
        let started = process
            .started()
            .ok_or_else(|| GuestError::new(format!("QEMU (process {}) has ended", process.pid)))?;
        Ok(Self {
            version: VERSION,
            process,
            started,
            socket,
            folder,
            description,
            regions,
            mappings,
            vcpus,
            progress: Progress::Waiting,
            disks: None,
        })
    }

    /// Writes it in place of an earlier one: whole, or not at all.
    pub fn write(&self, folder: &Path) -> GuestResult<()> {
        let path = path(folder);
        records::write(&path, self)
            .map_err(|error| GuestError::caused(format!("cannot write {}", path.display()), error))
    }

    /// Reads it, and makes sure that its QEMU still runs.
    pub fn read(folder: &Path) -> GuestResult<Self> {
        let path = path(folder);
        let unusable = |why: String| {
            GuestError::new(format!(
                "{} is not a usable record of a guest: {why}",
                path.display()
            ))
        };
        let record: Self =
            records::read(&path, SIZE_LIMIT).map_err(|error| unusable(error.to_string()))?;
        if record.version != VERSION {
            return Err(unusable(format!("its version is {}", record.version)));
        }
        if record.mappings.len() != record.regions.len() {
            return Err(unusable("its regions and mappings do not match".to_owned()));
        }
        if record.process.started() != Some(record.started) {
            return Err(GuestError::new(format!(
                "QEMU (process {}) of {} does not run any more: the guest is lost with it",
                record.process.pid,
                path.display()
            )));
        }
        Ok(record)
    }
}

/// The map of missing blocks that belongs to the record.
pub fn missing_map(folder: &Path) -> PathBuf {
    folder.join("missing-blocks")
}

/// Removes record and map: the guest needs nobody any more.
pub fn remove(folder: &Path) {
    for path in [path(folder), missing_map(folder)] {
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove a file");
        }
    }
}

fn path(folder: &Path) -> PathBuf {
    folder.join("qemu.json")
}
