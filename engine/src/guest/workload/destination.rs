//! The embedded guest at the destination: started there (or found waiting), filled, paged, and
//! taken over by the next pager if one is killed. This file must never let go of the guest while a
//! page or a block of its disk is missing.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use hybridmig_pager::{Placer, PlacerConfig, kernel};
use hybridmig_transport::message::{Offer, Refusal, RefusalCode, RegionInfo, RegionKind};
use serde::{Deserialize, Serialize};

use super::control::{Control, ControlError, Description, Purpose, Standing};
use super::disk;
use super::facts;
use super::here::{DiskHere, Here, MEMORY};
use super::launch::{self, Launch, available_memory, start};
use super::lock;
use super::options::{MAX_BYTES, MIN_BYTES};
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::guest::paged_disks::{DiskRecord, PagedDisks};
use crate::guest::{
    BlockedTime, DestinationGuest, FaultSink, GuestError, GuestResult, paging::PagerSink,
};
use crate::records;

/// What another process finds in the folder that is kept for it.
const RECORD: &str = "workload.json";
/// Largest record that is read, in bytes.
const RECORD_LIMIT: u64 = 1 << 16;

/// An embedded guest on the host that it comes to.
pub struct WorkloadDestination {
    launch: Launch,
    placer_config: PlacerConfig,
    /// Folder for what another process would take over by.
    keep_in: Option<PathBuf>,
    here: Mutex<Option<Arc<Here>>>,
}

/// Where the guest is: the rest another process learns from the guest itself.
#[derive(Serialize, Deserialize)]
struct Record {
    control: PathBuf,
}

/// The regions of a guest that is offered.
struct Regions<'a> {
    memory: &'a RegionInfo,
    disk: Option<&'a RegionInfo>,
}

impl<'a> Regions<'a> {
    /// None if they are not those of an embedded guest.
    fn of(offer: &'a Offer) -> Option<Self> {
        let memory =
            |region: &RegionInfo| region.kind == RegionKind::Memory && region.block_size == 4096;
        let disk = |region: &RegionInfo| {
            region.kind == RegionKind::Disk && region.block_size as usize == disk::BLOCK
        };
        match offer.regions.as_slice() {
            [first] if memory(first) => Some(Self {
                memory: first,
                disk: None,
            }),
            [first, second] if memory(first) && disk(second) => Some(Self {
                memory: first,
                disk: Some(second),
            }),
            _ => None,
        }
    }

    fn disk_bytes(&self) -> u64 {
        self.disk.map_or(0, |disk| disk.bytes())
    }
}

impl WorkloadDestination {
    /// A destination that has nothing yet.
    pub fn new(launch: Launch, placer_config: PlacerConfig) -> Self {
        Self {
            launch,
            placer_config,
            keep_in: None,
            here: Mutex::new(None),
        }
    }

    /// Keeps in this folder, which exists, what another process takes over by: see
    /// [`Self::adopt_kept`].
    #[must_use]
    pub fn keep_in(self, folder: &Path) -> Self {
        Self {
            keep_in: Some(folder.to_owned()),
            ..self
        }
    }

    /// Whether another process has kept an embedded guest in this folder.
    pub fn is_kept_in(folder: &Path) -> bool {
        folder.join(RECORD).exists()
    }

    /// Like [`Self::adopt`], of the guest that another process has kept in this folder.
    pub fn adopt_kept(
        folder: &Path,
        placer_config: PlacerConfig,
        faults: Arc<dyn FaultSink>,
        note: &dyn Fn(&Blocks) -> GuestResult<()>,
    ) -> GuestResult<(Self, Blocks)> {
        let path = folder.join(RECORD);
        let cannot = |error: std::io::Error| {
            GuestError::caused(format!("cannot use {}", path.display()), error)
        };
        let record: Record = records::read(&path, RECORD_LIMIT).map_err(cannot)?;
        let (guest, missing) = Self::adopt(&record.control, placer_config, faults, note)?;
        Ok((guest.keep_in(folder), missing))
    }

    /// Takes over a guest that has been given its state and whose pager has ended, however it
    /// ended. Returns the blocks that are still missing; the faults of threads that wait are told
    /// again. Before any fault `note` is told what is missing.
    pub fn adopt(
        control: &Path,
        placer_config: PlacerConfig,
        faults: Arc<dyn FaultSink>,
        note: &dyn Fn(&Blocks) -> GuestResult<()>,
    ) -> GuestResult<(Self, Blocks)> {
        let mut client = Control::connect(control)?;
        let description = client.describe()?;
        if description.standing == Standing::Waiting {
            return Err(GuestError::new(format!(
                "the guest at {} was never given its state: end it and migrate again",
                control.display()
            )));
        }
        // The other process may have settled everything, and been ended before it had told the source.
        let settled = !description.paged;
        let handover = client.memory(if settled {
            Purpose::Track
        } else {
            Purpose::Page
        })?;
        let image = match &description.served {
            Some(_) => Some(client.disk()?.path),
            None => None,
        };
        let mut here = Here::new(&description, client, None, handover)?;
        let mut missing: Blocks =
            std::iter::once((RegionId(MEMORY), here.missing.to_bitmap(MEMORY))).collect();
        note(&missing)?;
        if let (Some(served), Some(image)) = (&description.served, image) {
            let record = DiskRecord {
                map: served.map.clone(),
                socket: served.socket.clone(),
                export: served.export.clone(),
            };
            let paged = PagedDisks::adopt(MEMORY + 1, &[record], &faults, |of_disk| {
                missing.union_with(of_disk);
                note(of_disk)
            })?;
            here.disk = Some(DiskHere::adopted(paged, image, served));
        }
        here.settled = settled;
        if !settled {
            let placer = Placer::take_over(
                here.take_uffd()?,
                here.pid,
                vec![here.region.clone()],
                Arc::clone(&here.missing),
                Arc::new(PagerSink(faults)),
                placer_config,
            )?;
            *lock(&here.placer) = Some(Arc::new(placer));
        }
        let launch = Launch::Waiting {
            control: control.to_owned(),
        };
        let this = Self {
            here: Mutex::new(Some(Arc::new(here))),
            ..Self::new(launch, placer_config)
        };
        Ok((this, missing))
    }

    /// How the guest stands.
    pub fn describe_guest(&self) -> GuestResult<Description> {
        Ok(lock(&self.here()?.control).describe()?)
    }

    /// Ends the guest's process, for a demonstration or a test that is over.
    pub fn end_guest(&self) -> GuestResult<()> {
        match lock(&self.here).take() {
            Some(here) => here.end(),
            None => Ok(()),
        }
    }

    fn here(&self) -> GuestResult<Arc<Here>> {
        lock(&self.here)
            .clone()
            .ok_or_else(|| GuestError::new("the guest has not been prepared here"))
    }

    fn write_record(&self, folder: &Path) -> GuestResult<()> {
        let path = folder.join(RECORD);
        // Another process has another working directory.
        std::path::absolute(self.launch.control())
            .and_then(|control| records::write(&path, &Record { control }))
            .map_err(|error| GuestError::caused(format!("cannot write {}", path.display()), error))
    }
}

impl DestinationGuest for WorkloadDestination {
    fn check(&self, offer: &Offer) -> Result<Vec<String>, Refusal> {
        let mut reasons = facts::mismatches(&offer.guest);
        let regions = Regions::of(offer);
        if regions.is_none() {
            reasons.push(
                "an embedded guest has one region of memory in pages of 4 KiB, and perhaps one of a \
                 disk in blocks of 64 KiB"
                    .into(),
            );
        }
        if let Err(error) = kernel::probe().check_destination() {
            reasons.push(GuestError::from(error).chain());
        }
        let mut notes = vec![];
        if let Some(regions) = regions {
            match self.check_size(&regions) {
                Ok(found) => notes.extend(found),
                Err(reason) => reasons.push(reason),
            }
        }
        if reasons.is_empty() {
            notes.push(format!(
                "the embedded guest's format is {} on both sides",
                super::control::FORMAT
            ));
            Ok(notes)
        } else {
            Err(Refusal {
                code: RefusalCode::Guest,
                reasons,
            })
        }
    }

    fn prepare(&self, offer: &Offer) -> GuestResult<()> {
        let regions = Regions::of(offer)
            .ok_or_else(|| GuestError::new("the regions are not those of an embedded guest"))?;
        let bytes = regions.memory.bytes();
        let mut slot = lock(&self.here);
        if slot.is_some() {
            return Err(GuestError::new("a guest has been prepared here already"));
        }
        let (client, child) = match &self.launch {
            Launch::Start {
                program,
                args,
                control,
                disk_dir,
            } => {
                let disk_bytes = regions.disk_bytes();
                let options = launch::options(control, disk_dir.as_deref(), bytes, disk_bytes);
                let (client, child) = start(program, args, &options)?;
                (client, Some(child))
            }
            Launch::Waiting { control } => (Control::connect(control)?, None),
        };
        let here = Here::prepare(client, child, bytes, regions.disk)?;
        *slot = Some(Arc::new(here));
        Ok(())
    }

    fn written_files(&self) -> Vec<PathBuf> {
        let here = lock(&self.here).clone();
        let disk = here.as_ref().and_then(|here| here.disk.as_ref());
        disk.map(|disk| disk.image.clone()).into_iter().collect()
    }

    fn write(&self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        let here = self.here()?;
        if let Some(disk) = here.disk_of(region) {
            return disk.write(region, first, data);
        }
        Ok(here.memory_of(region)?.write(first, data)?)
    }

    fn write_zero(&self, region: RegionId, first: u32, count: u32) -> GuestResult<()> {
        let here = self.here()?;
        if let Some(disk) = here.disk_of(region) {
            return disk.write_zero(region, first, count);
        }
        Ok(here.memory_of(region)?.zero(first, count)?)
    }

    fn read(&self, region: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        let here = self.here()?;
        if let Some(disk) = here.disk_of(region) {
            return disk.read(region, block, buf);
        }
        Ok(here.memory_of(region)?.read(block, buf)?)
    }

    fn arm(
        &self,
        missing: &Blocks,
        written: &Blocks,
        faults: Arc<dyn FaultSink>,
    ) -> GuestResult<()> {
        let here = self.here()?;
        let mut slot = lock(&here.placer);
        if slot.is_some() {
            return Err(GuestError::new("the guest's pager is armed already"));
        }
        for (region, _) in missing.iter().chain(written.iter()) {
            if here.disk_of(region).is_none() {
                here.memory_of(region)?;
            }
        }
        // Without it the guest is taken all the same, and cannot be taken over.
        if let Some(folder) = &self.keep_in
            && let Err(error) = self.write_record(folder)
        {
            tracing::error!("nobody could follow this process: {}", error.chain());
        }
        if let Some(disk) = &here.disk {
            disk.paged.arm(missing, &faults)?;
        }
        let region = RegionId(MEMORY);
        here.missing.insert(MEMORY, &set_of(missing, region))?;
        let placer = Placer::arm(
            here.take_uffd()?,
            here.pid,
            vec![here.region.clone()],
            Arc::clone(&here.missing),
            &[(MEMORY, set_of(written, region))],
            Arc::new(PagerSink(faults)),
            self.placer_config,
        )?;
        *slot = Some(Arc::new(placer));
        Ok(())
    }

    fn load_state(&self, state: &[u8]) -> GuestResult<()> {
        let here = self.here()?;
        here.placer()?; // without a trap a missing page would read as zeroes
        Ok(lock(&here.control).load(state)?)
    }

    fn resume(&self) -> GuestResult<()> {
        Ok(lock(&self.here()?.control).resume()?)
    }

    fn place(&self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        let here = self.here()?;
        if let Some(disk) = here.disk_of(region) {
            return disk.place(region, first, data);
        }
        match here.placer()? {
            Some(placer) => Ok(placer.place(region.0, first, data)?),
            None => Ok(()), // late: it is here
        }
    }

    fn place_zero(&self, region: RegionId, first: u32, count: u32) -> GuestResult<()> {
        let here = self.here()?;
        if let Some(disk) = here.disk_of(region) {
            return disk.place_zero(region, first, count);
        }
        match here.placer()? {
            Some(placer) => Ok(placer.place_zero(region.0, first, count)?),
            None => Ok(()), // late: it is here
        }
    }

    fn disarm(&self) -> GuestResult<BlockedTime> {
        let here = self.here()?;
        if let Some(placer) = here.placer()? {
            placer.disarm()?;
        }
        here.settle()?;
        Ok(here.blocked_time())
    }

    fn abandon(&self) -> GuestResult<()> {
        self.end_guest()
    }

    fn work_done(&self) -> Option<u64> {
        Some(self.here().ok()?.stats.sample().operations)
    }

    fn blocked_time(&self) -> BlockedTime {
        self.here()
            .map_or_else(|_| BlockedTime::default(), |here| here.blocked_time())
    }

    fn verify(&self) -> Option<Result<u64, String>> {
        if let Err(error) = self.here() {
            return Some(Err(error.chain()));
        }
        // A connection of its own: a verification takes time.
        let result =
            Control::connect(self.launch.control()).and_then(|mut control| control.verify());
        Some(match result {
            Ok(pages) => Ok(pages),
            Err(ControlError::Refused(_, damage)) => Err(damage),
            Err(error) => Err(GuestError::from(error).chain()),
        })
    }
}

impl WorkloadDestination {
    /// Whether the host, and the guest that waits here, are large enough.
    fn check_size(&self, regions: &Regions<'_>) -> Result<Vec<String>, String> {
        let bytes = regions.memory.bytes();
        if !(MIN_BYTES..=MAX_BYTES).contains(&bytes) {
            return Err(format!(
                "a guest of {bytes} bytes is out of range: 16 MiB to 8 GiB are possible"
            ));
        }
        let disk_bytes = regions.disk_bytes();
        if disk_bytes > 0 {
            disk::check_size(disk_bytes, bytes)?;
        }
        if let Launch::Waiting { control } = &self.launch {
            let described = Control::connect(control).and_then(|mut client| client.describe());
            let description = described.map_err(|error| GuestError::from(error).chain())?;
            if description.standing != Standing::Waiting {
                return Err(format!(
                    "the guest at {} does not wait for another: start one with --incoming",
                    control.display()
                ));
            }
            if description.bytes != bytes || description.disk_bytes != disk_bytes {
                return Err(format!(
                    "the guest at {} has {} bytes of memory and a disk of {}, the one that comes has \
                     {bytes} and {disk_bytes}: start it with the same sizes",
                    control.display(),
                    description.bytes,
                    description.disk_bytes
                ));
            }
        }
        let available = available_memory().map_err(|error| {
            format!("the free memory of this host cannot be read from /proc/meminfo: {error}")
        })?;
        if available < bytes {
            return Err(format!(
                "{} MiB of memory are available here, the guest needs {} MiB: free memory",
                available >> 20,
                bytes >> 20
            ));
        }
        let mut notes = vec![format!(
            "{} MiB of memory are available for {} MiB of guest",
            available >> 20,
            bytes >> 20
        )];
        if let Launch::Start {
            control, disk_dir, ..
        } = &self.launch
            && disk_bytes > 0
        {
            notes.push(check_room(control, disk_dir.as_deref(), disk_bytes)?);
        }
        Ok(notes)
    }
}

/// Whether the disk has room: all of it, since the guest may come to write all of it.
fn check_room(control: &Path, disk_dir: Option<&Path>, bytes: u64) -> Result<String, String> {
    let folder = match disk_dir {
        Some(folder) => folder,
        None => match control.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        },
    };
    let shown = folder.display();
    let room = rustix::fs::statvfs(folder)
        .map_err(|error| format!("the room for the disk in {shown} cannot be told: {error}"))?;
    let free = room.f_bavail * room.f_frsize;
    if free < bytes {
        return Err(format!(
            "{shown} has {} MiB free, the guest's disk needs {} MiB: free some, or name another \
             folder with --disk-dir",
            free >> 20,
            bytes >> 20
        ));
    }
    Ok(format!(
        "a disk of {} MiB comes to {shown}, which has {} MiB free",
        bytes >> 20,
        free >> 20
    ))
}

fn set_of(blocks: &Blocks, region: RegionId) -> BlockSet {
    blocks.get(region).cloned().unwrap_or_default()
}
