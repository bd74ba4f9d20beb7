//! What the destination has of a guest that comes: its control socket, its memory, its disk's pager.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Mutex};

use hybridmig_pager::{Features, MissingMap, Placer, Region, RegionMemory, Uffd};
use hybridmig_transport::message::RegionInfo;

use super::control::{Control, Description, MemoryHandover, Purpose, Standing};
use super::disk::Served;
use super::facts::{self, ended};
use super::launch::reap;
use super::lock;
use super::stats::StatsPage;
use crate::blocks::RegionId;
use crate::guest::folder::{make_folder, remove_folder};
use crate::guest::paged_disks::{DiskPlan, DiskRecord, PagedDisks};
use crate::guest::{BlockedTime, GuestError, GuestResult};

/// The region of the guest's memory.
pub const MEMORY: u16 = 0;
/// What the names of folders of disks begin with.
const FOLDER: &str = "hybridmig-disks-";

/// A guest that has been prepared.
pub struct Here {
    pub pid: u32,
    pub control: Mutex<Control>,
    /// The process, if it was started here.
    child: Mutex<Option<Child>>,
    pub stats: StatsPage,
    pub memory: Arc<RegionMemory>,
    pub region: Region,
    pub missing: Arc<MissingMap>,
    /// Until the placer takes it.
    uffd: Mutex<Option<Uffd>>,
    pub placer: Mutex<Option<Arc<Placer>>>,
    /// Nothing was missing any more when the guest was taken over.
    pub settled: bool,
    pub disk: Option<DiskHere>,
}

/// The guest's disk, served by this process.
pub struct DiskHere {
    pub paged: PagedDisks,
    pub image: PathBuf,
    /// Of the socket and of the map of what is missing: what another process needs.
    folder: PathBuf,
}

impl Here {
    /// From what a guest has handed over.
    pub fn new(
        description: &Description,
        control: Control,
        child: Option<Child>,
        handover: MemoryHandover,
    ) -> GuestResult<Self> {
        let len = description.bytes;
        let memory = Arc::new(RegionMemory::open(handover.memory, MEMORY, 0, len)?);
        let region = facts::region(&memory, &handover.mappings)?;
        let uffd = Uffd::from_fd(handover.uffd)?;
        uffd.handshake(Features::PLACING)?;
        let stats = StatsPage::attach(handover.stats)
            .map_err(|error| GuestError::caused("the guest's figures cannot be mapped", error))?;
        let missing = match handover.kept {
            Some(kept) => MissingMap::from_file(kept.into(), Path::new("the guest's map"))?,
            None => MissingMap::in_memory(&[memory.blocks()])?,
        };
        Ok(Self {
            pid: description.pid,
            control: Mutex::new(control),
            child: Mutex::new(child),
            stats,
            memory,
            region,
            missing: Arc::new(missing),
            uffd: Mutex::new(Some(uffd)),
            placer: Mutex::new(None),
            settled: false,
            disk: None,
        })
    }

    /// Takes a guest that waits for another of `bytes` bytes of memory and this disk. What was started
    /// here ends if it is not the right one.
    pub fn prepare(
        client: Control,
        child: Option<Child>,
        bytes: u64,
        disk: Option<&RegionInfo>,
    ) -> GuestResult<Self> {
        let here = Self::take_possession(client, child, bytes, disk.map_or(0, RegionInfo::bytes))?;
        let prepared = here.keep_and_serve(disk);
        match prepared {
            Ok(disk) => Ok(Self { disk, ..here }),
            Err(error) => {
                here.end()?;
                Err(error)
            }
        }
    }

    fn take_possession(
        mut client: Control,
        child: Option<Child>,
        bytes: u64,
        disk_bytes: u64,
    ) -> GuestResult<Self> {
        let prepared = (|| {
            let description = client.describe()?;
            if let Some(child) = &child
                && description.pid != child.id()
            {
                return Err(GuestError::new(format!(
                    "another guest (process {}) listens at {}: choose another path",
                    description.pid,
                    client.path().display()
                )));
            }
            if description.standing != Standing::Waiting
                || description.bytes != bytes
                || description.disk_bytes != disk_bytes
            {
                return Err(GuestError::new(format!(
                    "the guest at {} has {} bytes of memory, a disk of {} and is {:?}, where one of \
                     {bytes} bytes with a disk of {disk_bytes} that waits is needed",
                    client.path().display(),
                    description.bytes,
                    description.disk_bytes,
                    description.standing
                )));
            }
            let handover = client.memory(Purpose::Page)?;
            Ok((description, handover))
        })();
        match prepared {
            Ok((description, handover)) => Self::new(&description, client, child, handover),
            Err(error) => {
                if let Some(child) = child {
                    reap(child)?;
                }
                Err(error)
            }
        }
    }

    /// Lets the guest keep what another pager would need, and serves its disk.
    fn keep_and_serve(&self, disk: Option<&RegionInfo>) -> GuestResult<Option<DiskHere>> {
        let mut control = lock(&self.control);
        control.keep(self.missing.file().as_fd())?;
        disk.map(|region| DiskHere::create(&mut control, region))
            .transpose()
    }

    /// The memory, if the region is that.
    pub fn memory_of(&self, region: RegionId) -> GuestResult<&RegionMemory> {
        if region.0 == MEMORY {
            Ok(&self.memory)
        } else {
            Err(GuestError::new(format!("the guest has no {region}")))
        }
    }

    /// The disk, if the region is that.
    pub fn disk_of(&self, region: RegionId) -> Option<&PagedDisks> {
        let disk = self.disk.as_ref()?;
        disk.paged.has(region).then_some(&disk.paged)
    }

    /// For the placer: once.
    pub fn take_uffd(&self) -> GuestResult<Uffd> {
        lock(&self.uffd)
            .take()
            .ok_or_else(|| GuestError::new("arming the guest's pager has failed before"))
    }

    /// The placer, once it is armed; none where nothing was missing any more when the guest was taken over.
    pub fn placer(&self) -> GuestResult<Option<Arc<Placer>>> {
        match lock(&self.placer).clone() {
            None if !self.settled => Err(GuestError::new("the guest's pager has not been armed")),
            placer => Ok(placer),
        }
    }

    /// How long its threads have waited for pages.
    pub fn blocked_time(&self) -> BlockedTime {
        let stats = self.stats.sample();
        let parallelism = stats.threads + stats.disk_threads;
        let Some(placer) = lock(&self.placer).clone() else {
            return BlockedTime {
                parallelism,
                ..BlockedTime::default()
            };
        };
        BlockedTime::from_pager(placer.stats(), parallelism)
    }

    /// Every block is here: the guest is told to go on by itself, and needs nobody any more.
    pub fn settle(&self) -> GuestResult<()> {
        if let Some(disk) = &self.disk {
            disk.paged.finish()?;
        }
        // The server stays until this value goes, so that nothing that is under way breaks off.
        lock(&self.control).settled()?;
        if let Some(disk) = &self.disk {
            disk.remove_folder();
        }
        Ok(())
    }

    /// Ends the guest's process.
    pub fn end(&self) -> GuestResult<()> {
        let stopped = lock(&self.control).stop();
        let result = match lock(&self.child).take() {
            Some(child) => reap(child),
            None => ended(stopped),
        };
        if let Some(disk) = &self.disk {
            disk.remove_folder();
        }
        result
    }
}

impl DiskHere {
    /// Makes the image in the guest's file, and has the guest use it by way of a server.
    fn create(control: &mut Control, region: &RegionInfo) -> GuestResult<Self> {
        let image = control.disk()?.path;
        let folder = make_folder(FOLDER)?;
        let plan = DiskPlan {
            region: region.clone(),
            image: image.clone(),
            bytes: region.bytes(),
        };
        let served = PagedDisks::create(&[plan], &folder, &folder).and_then(|paged| {
            for DiskRecord {
                map,
                socket,
                export,
            } in paged.records()
            {
                control.serve(&Served {
                    socket,
                    export,
                    map,
                })?;
            }
            Ok(paged)
        });
        let paged = served.inspect_err(|_| remove_folder(&folder))?;
        Ok(Self {
            paged,
            image,
            folder,
        })
    }

    /// What another process has served so far, by what the guest knows of it.
    pub fn adopted(paged: PagedDisks, image: PathBuf, served: &Served) -> Self {
        let folder = served.socket.parent().unwrap_or(Path::new("/")).to_owned();
        Self {
            paged,
            image,
            folder,
        }
    }

    fn remove_folder(&self) {
        // What another process says is its folder is removed only if it looks like one of ours.
        let name = self.folder.file_name().unwrap_or_default();
        if name.to_string_lossy().starts_with(FOLDER) {
            remove_folder(&self.folder);
        }
    }
}
