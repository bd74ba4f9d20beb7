//! The disks of a guest that comes, whatever kind of guest it is: for each an image that fills, and a
//! server on which the guest runs while blocks of it are missing. Regions with the ids from `first` on.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hdrhistogram::Histogram;
use hybridmig_pager::disk::{DiskError, DiskImage, DiskOptions, DiskStats, NbdOptions, NbdServer};
use hybridmig_transport::message::RegionInfo;
use serde::{Deserialize, Serialize};

use super::folder::make_folder_again;
use super::paging::PagerSink;
use super::{FaultSink, GuestError, GuestResult};
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::report::DiskIo;

/// What another process needs to go on with a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// The map of what is missing, which names the image.
    pub map: PathBuf,
    /// Where it is served, and under which name.
    pub socket: PathBuf,
    /// See `socket`.
    pub export: String,
}

/// A disk to be made.
#[derive(Clone, Debug)]
pub struct DiskPlan {
    /// The region that it is.
    pub region: RegionInfo,
    /// Its image here.
    pub image: PathBuf,
    /// Its exact length in bytes: the last block may be shorter than the others.
    pub bytes: u64,
}

/// See the module's text.
pub struct PagedDisks {
    first: u16,
    disks: Vec<Disk>,
}

struct Disk {
    image: Arc<DiskImage>,
    /// Dropped last of all: it lets go of the guest.
    _server: NbdServer,
    record: DiskRecord,
}

impl PagedDisks {
    /// Makes the images, all zero, and serves them. `maps` is the folder for what another process
    /// would take over by, `sockets` one that the guest's process can look into. Images that have
    /// contents are replaced: to ask before is the caller's business.
    pub fn create(plans: &[DiskPlan], maps: &Path, sockets: &Path) -> GuestResult<Self> {
        let first = plans.first().map_or(0, |plan| plan.region.id.0);
        let mut disks = Vec::new();
        for (index, plan) in plans.iter().enumerate() {
            let cannot = |error| failed("make", &plan.region.name, error);
            let image = DiskImage::create(&DiskOptions {
                region: plan.region.id.0,
                image: plan.image.clone(),
                map: maps.join(format!("missing-disk-{index}")),
                bytes: plan.bytes,
                block_size: plan.region.block_size,
                overwrite: true,
            })
            .map_err(cannot)?;
            let record = DiskRecord {
                map: image.map_path().to_owned(),
                socket: sockets.join(format!("disk-{index}")),
                export: format!("disk-{index}"),
            };
            disks.push(Disk::serve(image, record).map_err(cannot)?);
        }
        Ok(Self { first, disks })
    }

    /// Goes on where another process ended. Whoever waits for a block asks for it again. Before any
    /// disk is served, and so before any fault, `note` is told what is missing of it.
    pub fn adopt(
        first: u16,
        records: &[DiskRecord],
        faults: &Arc<dyn FaultSink>,
        mut note: impl FnMut(&Blocks) -> GuestResult<()>,
    ) -> GuestResult<Self> {
        let mut disks = Vec::new();
        for (index, record) in records.iter().enumerate() {
            let cannot = |error| failed("take over", &record.export, error);
            let image = DiskImage::adopt(&record.map, sink(faults)).map_err(cannot)?;
            let region = RegionId(first + index as u16);
            note(&std::iter::once((region, image.missing())).collect())?;
            if let Some(folder) = record.socket.parent() {
                make_folder_again(folder)?;
            }
            disks.push(Disk::serve(image, record.clone()).map_err(cannot)?);
        }
        Ok(Self { first, disks })
    }

    /// By disk, where it is served.
    pub fn records(&self) -> Vec<DiskRecord> {
        self.disks.iter().map(|disk| disk.record.clone()).collect()
    }

    /// Whether the region is one of these disks.
    pub fn has(&self, region: RegionId) -> bool {
        self.image(region).is_some()
    }

    /// Writes whole blocks before the disks are armed.
    pub fn write(&self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        self.on(region, "write", |image| image.write(first, data))
    }

    /// Makes blocks zero before the disks are armed.
    pub fn write_zero(&self, region: RegionId, first: u32, count: u32) -> GuestResult<()> {
        self.on(region, "write", |image| image.write_zero(first, count))
    }

    /// Copies one block, as written so far, into `buf`.
    pub fn read(&self, region: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        self.on(region, "read", |image| image.read(block, buf))
    }

    /// Everything in `missing` is to be waited for from now on.
    pub fn arm(&self, missing: &Blocks, faults: &Arc<dyn FaultSink>) -> GuestResult<()> {
        let none = BlockSet::new();
        for (index, _) in self.disks.iter().enumerate() {
            let region = RegionId(self.first + index as u16);
            let missing = missing.get(region).unwrap_or(&none);
            self.on(region, "arm", |image| image.arm(missing, sink(faults)))?;
        }
        Ok(())
    }

    /// Places whole blocks where they are missing still.
    pub fn place(&self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        self.on(region, "fill", |image| image.place(first, data))
    }

    /// Like `place`, with zeroes.
    pub fn place_zero(&self, region: RegionId, first: u32, count: u32) -> GuestResult<()> {
        self.on(region, "fill", |image| image.place_zero(first, count))
    }

    /// What is missing.
    pub fn missing(&self) -> Blocks {
        let sets = self.disks.iter().enumerate();
        sets.map(|(index, disk)| (RegionId(self.first + index as u16), disk.image.missing()))
            .collect()
    }

    /// Nothing is missing: what has come is made durable. Where the maps lie is the caller's to remove, when the
    /// guest needs no server any more.
    pub fn finish(&self) -> GuestResult<()> {
        (0..self.disks.len()).try_for_each(|index| {
            let region = RegionId(self.first + index as u16);
            self.on(region, "complete", DiskImage::finish)
        })
    }

    /// The guest will not run here: the images are as empty as before. What cannot be emptied is only
    /// told: the next guest that comes is refused for it, by name.
    pub fn empty(&self) {
        for disk in &self.disks {
            let (path, bytes) = (disk.image.path(), disk.image.bytes());
            let emptied = File::options()
                .write(true)
                .open(path)
                .and_then(|file| file.set_len(0).and_then(|()| file.set_len(bytes)));
            if let Err(error) = emptied {
                tracing::warn!(path = %path.display(), %error, "an image keeps what had come of a guest");
            }
        }
    }

    /// By disk, what the guest has done.
    pub fn io(&self) -> Vec<DiskIo> {
        let disks = self.disks.iter();
        disks
            .map(|disk| disk_io(disk.image.region(), &disk.image.stats()))
            .collect()
    }

    fn image(&self, region: RegionId) -> Option<&DiskImage> {
        let index = region.0.checked_sub(self.first)?;
        let disk = self.disks.get(usize::from(index))?;
        Some(&disk.image)
    }

    fn on(
        &self,
        region: RegionId,
        what: &str,
        act: impl FnOnce(&DiskImage) -> Result<(), DiskError>,
    ) -> GuestResult<()> {
        let image = self
            .image(region)
            .ok_or_else(|| GuestError::new(format!("the guest has no {region}")))?;
        act(image).map_err(|error| failed(what, &image.path().to_string_lossy(), error))
    }
}

impl Disk {
    fn serve(image: Arc<DiskImage>, record: DiskRecord) -> Result<Self, DiskError> {
        let options = NbdOptions {
            socket: record.socket.clone(),
            export: record.export.clone(),
            read_only: false,
        };
        Ok(Self {
            _server: NbdServer::start(&options, Arc::clone(&image))?,
            image,
            record,
        })
    }
}

fn disk_io(region: u16, stats: &DiskStats) -> DiskIo {
    let ms = |us: &Histogram<u64>, quantile| us.value_at_quantile(quantile) as f64 / 1e3;
    DiskIo {
        region,
        reads: stats.reads,
        read_p50_ms: ms(&stats.read_us, 0.5),
        read_p99_ms: ms(&stats.read_us, 0.99),
        writes: stats.writes,
        write_p50_ms: ms(&stats.write_us, 0.5),
        write_p99_ms: ms(&stats.write_us, 0.99),
        waited: stats.waited,
        waited_seconds: stats.waited_time.as_secs_f64(),
        errors: stats.errors,
    }
}

fn sink(faults: &Arc<dyn FaultSink>) -> Arc<dyn hybridmig_pager::FaultSink> {
    Arc::new(PagerSink(Arc::clone(faults)))
}

fn failed(what: &str, disk: &str, error: DiskError) -> GuestError {
    GuestError::caused(format!("cannot {what} the disk '{disk}'"), error)
}
