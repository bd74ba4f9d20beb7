//! The way into QEMU's address space: how its userfaultfd is made and fetched, and the pager of
//! `hybridmig-pager` started on it. At the source no descriptor stays in QEMU; at the destination
//! one must, for as long as blocks are missing.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hybridmig_pager::attach::{self, Attached, Method};
use hybridmig_pager::{
    Features, MissingMap, PagerError, Placer, PlacerConfig, Region, RegionMemory, Settle, Tracker,
    TrackerConfig, kernel,
};

use super::process::QemuProcess;
use super::qmp::Qmp;
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::guest::paging::PagerSink;
use crate::guest::{FaultSink, GuestError, GuestResult};

/// Name of the descriptor of `/dev/userfaultfd` that an unprivileged QEMU is given for a moment.
const DEVICE_FD: &str = "hybridmig-userfaultfd";

/// The copy of a userfaultfd that stays open in QEMU.
#[derive(Debug)]
pub struct Door {
    pid: u32,
    target_fd: RawFd,
}

impl Door {
    /// Closes the copy. A failure costs QEMU one descriptor, so it is only told.
    pub fn close(&self) {
        if let Err(error) = attach::close_in_target(self.pid, self.target_fd) {
            tracing::warn!(pid = self.pid, %error, "QEMU keeps an unused userfaultfd");
        }
    }
}

/// Starts dirty tracking. Returns the blocks that have content, too.
pub fn track(
    qmp: &Qmp,
    process: QemuProcess,
    memory: &[Arc<RegionMemory>],
    grace: Option<Duration>,
) -> GuestResult<(Tracker, Blocks)> {
    let cannot = |error| GuestError::caused("cannot track what the guest writes", error);
    let pid = process.pid as u32;
    let Attached { uffd, target_fd } = open(qmp, pid)?;
    // A tracker that is killed then takes its trap along, and the guest runs as before.
    Door { pid, target_fd }.close();
    uffd.handshake(Features::TRACKING).map_err(cannot)?;
    let (tracker, content) =
        Tracker::start(uffd, pid, regions(pid, memory)?, TrackerConfig { grace })
            .map_err(cannot)?;
    Ok((tracker, blocks(content)))
}

/// What was written since the last call; on a frozen guest the result is final.
pub fn take_dirty(tracker: &Tracker, frozen: bool) -> GuestResult<Blocks> {
    let settle = if frozen {
        Settle::Final
    } else {
        Settle::Running
    };
    tracker
        .take_dirty(settle)
        .map(blocks)
        .map_err(|error| GuestError::caused("cannot tell what the guest has written", error))
}

/// Discards what is not current and starts to page the rest in. `keep_in` names the file for the
/// map of missing blocks.
pub fn arm(
    qmp: &Qmp,
    process: QemuProcess,
    memory: &[Arc<RegionMemory>],
    missing: &Blocks,
    written: &Blocks,
    keep_in: Option<&Path>,
    faults: Arc<dyn FaultSink>,
) -> GuestResult<(Placer, Door)> {
    let cannot = |error| GuestError::caused("cannot page the guest's memory", error);
    let pid = process.pid as u32;
    let sizes: Vec<u32> = memory.iter().map(|memory| memory.blocks()).collect();
    let map = match keep_in {
        Some(path) => MissingMap::create(path, &sizes),
        None => MissingMap::in_memory(&sizes),
    }
    .map_err(cannot)?;
    for (region, set) in missing.iter() {
        map.insert(region.0, set).map_err(cannot)?;
    }
    let written: Vec<(u16, BlockSet)> = written
        .iter()
        .map(|(region, set)| (region.0, set.clone()))
        .collect();
    let regions = regions(pid, memory)?;
    let Attached { uffd, target_fd } = open(qmp, pid)?;
    let door = Door { pid, target_fd };
    let armed = uffd.handshake(Features::PLACING).and_then(|_| {
        Placer::arm(
            uffd,
            pid,
            regions,
            Arc::new(map),
            &written,
            Arc::new(PagerSink(faults)),
            PlacerConfig::default(),
        )
    });
    match armed {
        Ok(placer) => Ok((placer, door)),
        Err(error) => {
            // The guest's state has not been loaded: nobody waits yet.
            door.close();
            Err(cannot(error))
        }
    }
}

/// Goes on where a pager that is gone has ended; none if that one had let go of the memory because nothing was missing
/// any more. Asks QEMU nothing: its main loop may itself wait for a page.
pub fn take_over(
    process: QemuProcess,
    memory: &[Arc<RegionMemory>],
    missing: MissingMap,
    faults: Arc<dyn FaultSink>,
) -> GuestResult<Option<(Placer, Door)>> {
    let cannot = |error| GuestError::caused("cannot take the guest's memory over", error);
    let pid = process.pid as u32;
    let Attached { uffd, target_fd } = match attach::recover(pid) {
        Err(PagerError::NoTrap { .. }) if missing.is_armed() && missing.is_empty() => {
            return Ok(None);
        }
        recovered => recovered.map_err(cannot)?,
    };
    let placer = Placer::take_over(
        uffd,
        pid,
        regions(pid, memory)?,
        Arc::new(missing),
        Arc::new(PagerSink(faults)),
        PlacerConfig::default(),
    )
    .map_err(cannot)?;
    Ok(Some((placer, Door { pid, target_fd })))
}

/// The blocks that a map says are missing.
pub fn missing_blocks(map: &MissingMap, memory: &[Arc<RegionMemory>]) -> Blocks {
    memory
        .iter()
        .map(|memory| (RegionId(memory.region()), map.to_bitmap(memory.region())))
        .collect()
}

/// Makes QEMU create a userfaultfd: by the system call, or where QEMU may not, from a device
/// descriptor of ours.
fn open(qmp: &Qmp, pid: u32) -> GuestResult<Attached> {
    match attach::attach(pid, Method::Syscall) {
        Ok(attached) => Ok(attached),
        Err(PagerError::NotPermitted { .. }) => open_by_device(qmp, pid),
        Err(error) => Err(GuestError::caused(
            format!("cannot get into QEMU (process {pid})"),
            error,
        )),
    }
}

fn open_by_device(qmp: &Qmp, pid: u32) -> GuestResult<Attached> {
    let device: File = OpenOptions::new()
        .read(true)
        .write(true)
        .open(kernel::DEVICE)
        .map_err(|error| {
            GuestError::caused(
                format!(
                    "QEMU (process {pid}) may not use userfaultfd, and {} cannot be opened for it: \
                     run hybridmig as root, or set the sysctl vm.unprivileged_userfaultfd to 1",
                    kernel::DEVICE
                ),
                error,
            )
        })?;
    qmp.send_fd(DEVICE_FD, device.as_fd())
        .map_err(|error| GuestError::caused("cannot give QEMU a descriptor", error))?;
    let result = device_in(pid).and_then(|number| {
        attach::attach(pid, Method::Device(number)).map_err(|error| {
            GuestError::caused(
                format!("cannot get into QEMU (process {pid}) by {}", kernel::DEVICE),
                error,
            )
        })
    });
    if let Err(error) = qmp.close_fd(DEVICE_FD) {
        tracing::warn!(%error, "QEMU keeps a descriptor of {}", kernel::DEVICE);
    }
    result
}

/// The number under which a process has `/dev/userfaultfd` open.
fn device_in(pid: u32) -> GuestResult<RawFd> {
    let cannot = |error| {
        GuestError::caused(
            format!("cannot list the descriptors of process {pid}"),
            error,
        )
    };
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        if fs::read_link(entry.path()).is_ok_and(|target| target == Path::new(kernel::DEVICE))
            && let Some(number) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
        {
            return Ok(number);
        }
    }
    Err(GuestError::new(format!(
        "QEMU (process {pid}) was given {} but does not have it open",
        kernel::DEVICE
    )))
}

fn regions(pid: u32, memory: &[Arc<RegionMemory>]) -> GuestResult<Vec<Region>> {
    memory
        .iter()
        .map(|memory| Region::find(pid, Arc::clone(memory)))
        .collect::<Result<_, _>>()
        .map_err(|error| GuestError::caused("cannot find the guest's RAM in QEMU", error))
}

fn blocks(sets: Vec<(u16, BlockSet)>) -> Blocks {
    sets.into_iter()
        .map(|(region, set)| (RegionId(region), set))
        .collect()
}
