//! A QEMU guest on the host that it leaves: dirty tracking from outside, `stop`, device state,
//! `cont` if it has to stay. It must never run a guest that was released, and never leave one
//! stopped without saying so.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hybridmig_pager::{RegionMemory, Tracker};
use hybridmig_transport::message::{GuestDescription, RegionInfo, RegionKind};

use super::commands::{Capability, Cont, QueryStatus, Quit, Stop};
use super::disk::{self, DiskChoice, SourceDisks};
use super::door;
use super::facts::disk_fact;
use super::preflight::{self, Finding, Side};
use super::process::QemuProcess;
use super::qmp::Qmp;
use super::state;
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::guest::paging::sampled;
use crate::guest::{DiskCounts, GuestError, GuestResult, SourceGuest};
use crate::profile::AccessSample;
use crate::session::source::GuestUse;

/// How long `stop` may take: it drains the guest's I/O.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
/// How long QEMU may take to end.
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a QEMU that ends is looked at.
const QUIT_POLL: Duration = Duration::from_millis(5);

/// What an operator can choose for a source.
#[derive(Clone, Debug)]
pub struct QemuSourceOptions {
    /// How long after it was seen dirty a page is sent once more, when QEMU has files open with
    /// O_DIRECT: must exceed the longest I/O.
    pub direct_io_grace: Duration,
    /// Whether QEMU stays, stopped, when the guest has left (otherwise it ends).
    pub keep: bool,
    /// Which disks move.
    pub disks: DiskChoice,
}

impl Default for QemuSourceOptions {
    fn default() -> Self {
        Self {
            direct_io_grace: Duration::from_secs(2),
            keep: false,
            disks: DiskChoice::default(),
        }
    }
}

/// A running QEMU guest that is to leave.
pub struct QemuSource {
    qmp: Arc<Qmp>,
    process: QemuProcess,
    description: GuestDescription,
    regions: Vec<RegionInfo>,
    vcpus: u32,
    memory: Vec<Arc<RegionMemory>>,
    /// Their regions follow those of memory.
    disks: SourceDisks,
    findings: Vec<Finding>,
    grace: Option<Duration>,
    keep: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    tracker: Option<Tracker>,
    /// Whether the guest has been stopped: what a scan then finds is final.
    frozen: bool,
    /// Whether that final scan has been made.
    settled: bool,
    /// Found by a scan that was not asked for, to be reported by the next that is.
    found: Blocks,
    /// Capabilities to restore, while ours are set.
    capabilities: Option<Vec<Capability>>,
    released: bool,
}

impl QemuSource {
    /// Connects to the monitor at `socket` and makes sure that the guest can leave. Changes nothing.
    pub fn open(socket: &Path, options: &QemuSourceOptions) -> GuestResult<Self> {
        let qmp = connect(socket)?;
        let inspection = preflight::inspect(&qmp, Side::Source)?;
        inspection.require()?;
        let process = inspection
            .process
            .ok_or_else(|| GuestError::new("the process of QEMU was not found"))?;
        let qmp = Arc::new(qmp);
        let disks = SourceDisks::open(&qmp, &options.disks)?;
        let mut description = inspection.describe();
        let mut regions = inspection.regions();
        for disk in disks.disks() {
            let fact = disk_fact(&disk.name);
            description.facts.insert(fact, disk.bytes.to_string());
            regions.push(RegionInfo {
                id: RegionId(regions.len() as u16),
                kind: RegionKind::Disk,
                name: disk.name.clone(),
                blocks: disk.blocks(),
                block_size: disk::BLOCK_SIZE,
            });
        }
        Ok(Self {
            process,
            description,
            regions,
            vcpus: inspection.facts.vcpus.len() as u32,
            findings: [&inspection.findings[..], disks.findings()].concat(),
            grace: (!inspection.direct_io.is_empty()).then_some(options.direct_io_grace),
            keep: options.keep,
            memory: inspection.into_memory()?,
            disks,
            qmp,
            state: Mutex::default(),
        })
    }

    /// What was found when it was opened.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// The monitor.
    pub fn qmp(&self) -> &Arc<Qmp> {
        &self.qmp
    }

    /// The index of the disk that a region is.
    fn disk(&self, region: RegionId) -> Option<usize> {
        usize::from(region.0).checked_sub(self.memory.len())
    }

    /// Sets of blocks by disk as sets of blocks by region.
    fn of_disks(&self, sets: Vec<BlockSet>) -> Blocks {
        let region = |disk: usize| RegionId((self.memory.len() + disk) as u16);
        let sets = sets.into_iter().enumerate();
        sets.map(|(disk, set)| (region(disk), set)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run_state(&self) -> GuestResult<String> {
        self.qmp
            .execute(&QueryStatus {})
            .map(|status| status.status)
            .map_err(|error| GuestError::caused("cannot ask QEMU whether the guest runs", error))
    }
}

impl State {
    fn scan(&self) -> GuestResult<Blocks> {
        let tracker = self
            .tracker
            .as_ref()
            .ok_or_else(|| GuestError::new("dirty tracking has not been started"))?;
        door::take_dirty(tracker, self.frozen)
    }
}

impl SourceGuest for QemuSource {
    fn describe(&self) -> &GuestDescription {
        &self.description
    }

    fn guest_use(&self) -> GuestUse {
        GuestUse {
            parallelism: self.vcpus.max(1),
            ..GuestUse::default()
        }
    }

    fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    fn start_tracking(&self) -> GuestResult<Blocks> {
        let mut state = self.lock();
        // One that runs already would make the trap look like somebody else's.
        state.tracker = None;
        state.found = Blocks::new();
        let disks = self.disks.start()?;
        let (tracker, mut content) =
            door::track(&self.qmp, self.process, &self.memory, self.grace)?;
        state.tracker = Some(tracker);
        content.union_with(&self.of_disks(disks));
        Ok(content)
    }

    fn take_dirty(&self) -> GuestResult<Blocks> {
        let mut state = self.lock();
        let mut dirty = state.scan()?;
        dirty.union_with(&std::mem::take(&mut state.found));
        // Nobody has written the disks of a stopped guest since they were last looked at, and QEMU may
        // have let go of them.
        if !state.settled {
            dirty.union_with(&self.of_disks(self.disks.take_dirty()?));
        }
        state.settled = state.frozen;
        Ok(dirty)
    }

    fn accessed(&self) -> Blocks {
        if self.lock().frozen {
            return Blocks::new();
        }
        self.of_disks(self.disks.accessed())
    }

    fn access_samples(&self) -> Vec<AccessSample> {
        let state = self.lock();
        match &state.tracker {
            Some(tracker) if !state.frozen => sampled(tracker),
            _ => Vec::new(),
        }
    }

    fn access_samples_off(&self) -> Option<String> {
        self.lock().tracker.as_ref()?.sampling().off
    }

    fn disk_counts(&self) -> GuestResult<Vec<DiskCounts>> {
        let counts = self.disks.counts().map_err(|error| {
            GuestError::caused(
                "QEMU does not tell what the guest does with its disks",
                error,
            )
        })?;
        let regions = (self.memory.len()..).map(|region| RegionId(region as u16));
        let named = regions.zip(counts).filter_map(|(region, stats)| {
            stats.map(|stats| DiskCounts {
                region,
                reads: stats.rd_operations,
                writes: stats.wr_operations,
                bytes: Some((stats.rd_bytes, stats.wr_bytes)),
            })
        });
        Ok(named.collect())
    }

    fn read(&self, region: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        if let Some(disk) = self.disk(region) {
            return self.disks.read(disk, block, buf);
        }
        memory_of(&self.memory, region)?
            .read(block, buf)
            .map_err(|error| GuestError::caused("cannot read guest memory", error))
    }

    fn freeze(&self) -> GuestResult<()> {
        let mut state = self.lock();
        // Before the guest stops: setting them is no part of the downtime.
        if state.capabilities.is_none() {
            state.capabilities = Some(state::set_capabilities(&self.qmp)?);
        }
        self.qmp
            .execute_within(&Stop {}, STOP_TIMEOUT)
            .map_err(|error| GuestError::caused("cannot stop the guest", error))?;
        match self.run_state()?.as_str() {
            "paused" | "postmigrate" => {
                state.frozen = true;
                Ok(())
            }
            other => Err(GuestError::new(format!(
                "the guest did not stop: its run state is {other}"
            ))),
        }
    }

    fn save_state(&self) -> GuestResult<Vec<u8>> {
        let mut state = self.lock();
        if !state.frozen {
            return Err(GuestError::new("the guest has to be frozen first"));
        }
        let saved = state::save(&self.qmp)?;
        if state.tracker.is_some() {
            // Once the final scan was made, nothing may have been written any more.
            let settled = state.settled;
            let late = state.scan()?;
            if settled && !late.is_empty() {
                return Err(GuestError::new(format!(
                    "QEMU wrote {} pages of the stopped guest's memory while it saved the state",
                    late.len()
                )));
            }
            state.found.union_with(&late);
        }
        self.disks.after_state_saved()?;
        Ok(saved)
    }

    fn thaw(&self) -> GuestResult<()> {
        let mut state = self.lock();
        if state.released {
            return Err(GuestError::new(
                "the guest has been released to the destination and must not run here",
            ));
        }
        let failed = |error| {
            GuestError::caused(
                format!(
                    "the guest could not be run again; it is stopped at {}: try QMP `cont`",
                    self.qmp.socket().display()
                ),
                error,
            )
        };
        state::cancel(&self.qmp).map_err(failed)?;
        if self.run_state()? != "running" {
            self.qmp.execute(&Cont {}).map_err(failed)?;
        }
        self.disks.stop();
        *state = State {
            capabilities: state.capabilities.take(),
            ..State::default()
        };
        if let Some(before) = state.capabilities.take() {
            // The guest runs, which is what matters.
            if let Err(error) = state::restore_capabilities(&self.qmp, before) {
                tracing::warn!(error = error.chain(), "the guest runs again, but");
            }
        }
        match self.run_state()?.as_str() {
            "running" => Ok(()),
            other => Err(GuestError::new(format!(
                "QEMU was told to run the guest again, but its run state is {other}"
            ))),
        }
    }

    fn release(&self) -> GuestResult<()> {
        let mut state = self.lock();
        state.released = true;
        state.tracker = None;
        self.disks.stop();
        if self.keep {
            return Ok(());
        }
        end(self.process, Ok(&self.qmp))
    }
}

/// Ends QEMU and waits until it is gone.
pub(super) fn end(process: QemuProcess, qmp: Result<&Qmp, &GuestError>) -> GuestResult<()> {
    let told = match qmp {
        Ok(qmp) => qmp.execute(&Quit {}).map(drop).map_err(|e| e.to_string()),
        Err(error) => Err(error.chain()),
    };
    // It may be ending by itself already, and break off any dialogue.
    let deadline = Instant::now() + QUIT_TIMEOUT;
    while process.is_alive() {
        if Instant::now() > deadline {
            return Err(GuestError::new(format!(
                "QEMU (process {}) did not end within {} s of `quit`{}",
                process.pid,
                QUIT_TIMEOUT.as_secs(),
                told.err()
                    .map_or_else(String::new, |why| format!(" ({why})"))
            )));
        }
        thread::sleep(QUIT_POLL);
    }
    Ok(())
}

pub(super) fn connect(socket: &Path) -> GuestResult<Qmp> {
    Qmp::connect(socket).map_err(|error| GuestError::caused("cannot use the guest's QEMU", error))
}

pub(super) fn memory_of(
    memory: &[Arc<RegionMemory>],
    region: RegionId,
) -> GuestResult<&Arc<RegionMemory>> {
    memory
        .get(usize::from(region.0))
        .ok_or_else(|| GuestError::new(format!("the guest has no {region}")))
}
