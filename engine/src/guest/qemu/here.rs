//! The disks of a QEMU that a guest comes to: images that are filled from afar, and the switches that
//! put them under the guest and take them away again.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use hybridmig_transport::message::{Offer, Refusal, RefusalCode, RegionInfo, RegionKind};
use serde::{Deserialize, Serialize};

use super::disk::{DestinationDisks, WantedDisk};
use super::facts::disk_fact;
use super::process::QemuProcess;
use super::qmp::Qmp;
use crate::guest::folder::{make_folder, remove_folder};
use crate::guest::paged_disks::{DiskPlan, DiskRecord, PagedDisks};
use crate::guest::{GuestError, GuestResult};

/// How long it is tried to give the local images back to the guest.
const DETACH_PATIENCE: Duration = Duration::from_secs(600);
/// How long between two tries.
const DETACH_PAUSE: Duration = Duration::from_secs(2);

/// What another process takes the disks over by.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DisksRecord {
    /// Region of the first of them.
    first: u16,
    /// In QEMU.
    found: DestinationDisks,
    /// Of the pager.
    paged: Vec<DiskRecord>,
    /// Folder of the sockets.
    sockets: PathBuf,
}

/// The disks, served by this process.
pub struct DisksHere {
    first: u16,
    found: DestinationDisks,
    sockets: PathBuf,
    /// What the guest reads and writes.
    pub paged: PagedDisks,
}

impl DisksHere {
    /// Looks whether the disks of the offer have their places here. Returns notes; changes nothing.
    pub fn check(
        qmp: &Qmp,
        process: QemuProcess,
        offer: &Offer,
        overwrite: bool,
    ) -> Result<Vec<String>, Refusal> {
        let refuse = |error: GuestError| Refusal {
            code: RefusalCode::Guest,
            reasons: vec![error.chain()],
        };
        let wanted = wanted(offer).map_err(refuse)?;
        let found = DestinationDisks::find(qmp, process, &wanted).map_err(refuse)?;
        let mut notes = Vec::new();
        for disk in found.disks() {
            let path = disk.path.display();
            let held = contents(&disk.path).map_err(refuse)?;
            if held > 0 && !overwrite {
                return Err(refuse(GuestError::new(format!(
                    "the image of disk '{}' here ({path}) is not empty: {} KiB. Give QEMU an empty one \
                     (truncate -s {} FILE), or allow `recv` to replace it with --overwrite-disks",
                    disk.name,
                    held >> 10,
                    disk.bytes
                ))));
            }
            notes.push(format!(
                "disk '{}' ({} MiB) comes to {path}{}",
                disk.name,
                disk.bytes >> 20,
                if held > 0 {
                    ", whose contents are replaced"
                } else {
                    ""
                }
            ));
        }
        Ok(notes)
    }

    /// Makes the images and puts them under the guest's devices; `None` for an offer without disks.
    /// `maps` is where what another process needs is kept.
    pub fn prepare(
        qmp: &Qmp,
        process: QemuProcess,
        offer: &Offer,
        maps: Option<&Path>,
    ) -> GuestResult<Option<Self>> {
        let regions = disk_regions(offer);
        let Some(first) = regions.first().map(|region| region.id.0) else {
            return Ok(None);
        };
        let wanted = wanted(offer)?;
        let found = DestinationDisks::find(qmp, process, &wanted)?;
        let plans: Vec<DiskPlan> = regions
            .into_iter()
            .zip(found.disks())
            .map(|(region, disk)| DiskPlan {
                region,
                image: disk.path.clone(),
                bytes: disk.bytes,
            })
            .collect();
        let sockets = make_folder("hybridmig-disks-")?;
        let made = PagedDisks::create(&plans, maps.unwrap_or(&sockets), &sockets);
        let paged = made.inspect_err(|_| remove_folder(&sockets))?;
        let here = Self {
            first,
            found,
            sockets,
            paged,
        };
        if let Err(error) = here.attach(qmp, process) {
            here.give_up(qmp);
            return Err(error);
        }
        Ok(Some(here))
    }

    /// Serves disks again that another process has served.
    pub fn adopt(
        record: &DisksRecord,
        process: QemuProcess,
        paged: PagedDisks,
    ) -> GuestResult<Self> {
        let here = Self {
            first: record.first,
            found: record.found.clone(),
            sockets: record.sockets.clone(),
            paged,
        };
        here.let_in(process)?;
        Ok(here)
    }

    /// The images that are written.
    pub fn images(&self) -> Vec<PathBuf> {
        let disks = self.found.disks().iter();
        disks.map(|disk| disk.path.clone()).collect()
    }

    /// What another process would need.
    pub fn record(&self) -> DisksRecord {
        DisksRecord {
            first: self.first,
            found: self.found.clone(),
            paged: self.paged.records(),
            sockets: self.sockets.clone(),
        }
    }

    /// Every block is here: the images are made durable and given to the guest, which needs nobody any
    /// more. It runs, and goes on running if this fails: then our server is still under it.
    pub fn finish(&self, qmp: &Qmp) -> GuestResult<()> {
        self.paged.finish()?;
        let deadline = Instant::now() + DETACH_PATIENCE;
        for disk in 0..self.found.disks().len() {
            // The guest depends on this process until it has succeeded.
            while let Err(error) = self.found.detach(qmp, disk) {
                if Instant::now() > deadline {
                    return Err(error);
                }
                tracing::warn!(error = error.chain(), "trying again");
                thread::sleep(DETACH_PAUSE);
            }
        }
        remove_folder(&self.sockets);
        Ok(())
    }

    /// The guest will not run here: QEMU, where it stays, gets its own images back.
    pub fn give_up(&self, qmp: &Qmp) {
        for disk in 0..self.found.disks().len() {
            if let Err(error) = self.found.detach(qmp, disk) {
                tracing::warn!(error = error.chain(), "QEMU keeps a disk of ours");
            }
        }
        self.discard();
    }

    /// The guest will not run here, and QEMU has ended or uses its own images again.
    pub fn discard(&self) {
        self.paged.empty();
        remove_folder(&self.sockets);
    }

    fn attach(&self, qmp: &Qmp, process: QemuProcess) -> GuestResult<()> {
        self.let_in(process)?;
        for (disk, record) in self.paged.records().iter().enumerate() {
            self.found
                .attach(qmp, disk, &record.socket, &record.export)?;
        }
        Ok(())
    }

    /// QEMU may run as another user, and only it and we may reach the sockets.
    fn let_in(&self, process: QemuProcess) -> GuestResult<()> {
        let cannot = |error| {
            GuestError::caused(
                format!(
                    "cannot give QEMU's user the sockets in {}: run hybridmig as root or as that user",
                    self.sockets.display()
                ),
                error,
            )
        };
        let owner = fs::metadata(format!("/proc/{}", process.pid)).map_err(cannot)?;
        if owner.uid() == rustix::process::geteuid().as_raw() {
            return Ok(());
        }
        let sockets = self.paged.records().into_iter().map(|record| record.socket);
        for path in sockets.chain([self.sockets.clone()]) {
            chown(&path, Some(owner.uid()), None).map_err(cannot)?;
        }
        Ok(())
    }
}

impl DisksRecord {
    /// Region of the first disk, and what the pager takes over by.
    pub fn paged(&self) -> (u16, &[DiskRecord]) {
        (self.first, &self.paged)
    }
}

/// The disks of an offer, in the order of their regions.
pub fn disk_regions(offer: &Offer) -> Vec<RegionInfo> {
    let disks = |region: &&RegionInfo| region.kind == RegionKind::Disk;
    offer.regions.iter().filter(disks).cloned().collect()
}

fn wanted(offer: &Offer) -> GuestResult<Vec<WantedDisk>> {
    disk_regions(offer)
        .into_iter()
        .map(|region| {
            let bytes: Option<u64> = offer
                .guest
                .facts
                .get(&disk_fact(&region.name))
                .and_then(|bytes| bytes.parse().ok());
            match bytes {
                // The last block may be shorter than the others.
                Some(bytes)
                    if bytes.div_ceil(u64::from(region.block_size)) == u64::from(region.blocks) =>
                {
                    Ok(WantedDisk {
                        name: region.name,
                        bytes,
                    })
                }
                _ => Err(GuestError::new(format!(
                    "the source does not say how long disk '{}' is",
                    region.name
                ))),
            }
        })
        .collect()
}

/// Bytes that the image holds: holes do not count.
fn contents(path: &Path) -> GuestResult<u64> {
    fs::metadata(path)
        .map(|metadata| metadata.blocks() * 512)
        .map_err(|error| GuestError::caused(format!("cannot look at {}", path.display()), error))
}
