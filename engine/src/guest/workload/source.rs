//! The embedded guest at the source. This file must never end the guest's process but by
//! [`SourceGuest::release`].

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hybridmig_pager::{
    Features, Region, RegionMemory, Settle, Tracker, TrackerConfig, Uffd, kernel,
};
use hybridmig_transport::message::{GuestDescription, RegionInfo, RegionKind};

use super::control::{Control, Description, Purpose, Standing};
use super::disk::{self, DiskLeft};
use super::facts;
use super::lock;
use super::pages::PAGE;
use super::stats::StatsPage;
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::guest::paging::sampled;
use crate::guest::{DiskCounts, GuestError, GuestResult, SourceGuest};
use crate::profile::AccessSample;
use crate::session::source::GuestUse;

/// The region of the guest's memory.
const MEMORY: RegionId = RegionId(0);
/// The region of its disk, where it has one.
const DISK: RegionId = RegionId(1);
/// How long the workers may take to stop. They wait for nothing but the processor.
const FREEZE: Duration = Duration::from_secs(10);

/// An embedded guest on the host that it leaves.
pub struct WorkloadSource {
    description: GuestDescription,
    regions: Vec<RegionInfo>,
    pid: u32,
    control: Mutex<Control>,
    memory: Arc<RegionMemory>,
    disk: Option<DiskLeft>,
    stats: StatsPage,
    tracking: Mutex<Tracking>,
}

struct Tracking {
    tracker: Option<Tracker>,
    frozen: bool,
}

impl WorkloadSource {
    /// Attaches to the guest that listens at `control`. Changes nothing about it.
    pub fn attach(control: &Path) -> GuestResult<Self> {
        kernel::probe().check_source()?;
        let mut client = Control::connect(control)?;
        let guest = client.describe()?;
        let Some(plan) = guest.plan.filter(|_| guest.standing != Standing::Waiting) else {
            return Err(GuestError::new(format!(
                "the guest at {} waits for its state: there is nothing to move",
                control.display()
            )));
        };
        // Its userfaultfd is thrown away; each tracking begins with a new one.
        let handover = client.memory(Purpose::Track)?;
        let memory = RegionMemory::open(handover.memory, MEMORY.0, 0, guest.bytes)?;
        let stats = StatsPage::attach(handover.stats)
            .map_err(|error| GuestError::caused("the guest's figures cannot be mapped", error))?;
        let disk = match guest.disk_bytes {
            0 => None,
            _ => Some(DiskLeft::new(client.disk()?)?),
        };
        let mut regions = vec![RegionInfo {
            id: MEMORY,
            kind: RegionKind::Memory,
            name: "ram".into(),
            blocks: memory.blocks(),
            block_size: PAGE as u32,
        }];
        if let Some(disk) = &disk {
            regions.push(RegionInfo {
                id: DISK,
                kind: RegionKind::Disk,
                name: "disk".into(),
                blocks: disk.blocks(),
                block_size: disk::BLOCK as u32,
            });
        }
        Ok(Self {
            description: GuestDescription {
                kind: facts::KIND.into(),
                name: format!(
                    "{} workload of {} MiB, process {}",
                    plan.profile,
                    guest.bytes >> 20,
                    guest.pid
                ),
                facts: facts::facts(),
            },
            regions,
            disk,
            pid: guest.pid,
            control: Mutex::new(client),
            memory: Arc::new(memory),
            stats,
            tracking: Mutex::new(Tracking {
                tracker: None,
                frozen: guest.standing == Standing::Frozen,
            }),
        })
    }

    /// How the guest stands.
    pub fn describe_guest(&self) -> GuestResult<Description> {
        Ok(lock(&self.control).describe()?)
    }

    /// The page where the guest publishes its figures.
    pub fn stats(&self) -> &StatsPage {
        &self.stats
    }

    /// Asks the guest to verify all of its contents.
    pub fn verify(&self) -> GuestResult<u64> {
        Ok(lock(&self.control).verify()?)
    }
}

impl SourceGuest for WorkloadSource {
    fn describe(&self) -> &GuestDescription {
        &self.description
    }

    fn regions(&self) -> &[RegionInfo] {
        &self.regions
    }

    fn start_tracking(&self) -> GuestResult<Blocks> {
        let mut tracking = lock(&self.tracking);
        // A tracker from before would hold on to the memory.
        tracking.tracker = None;
        let handover = lock(&self.control).memory(Purpose::Track)?;
        let region: Region = facts::region(&self.memory, &handover.mappings)?;
        let uffd = Uffd::from_fd(handover.uffd)?;
        uffd.handshake(Features::TRACKING)?;
        // The guest does no DMA, so that no page needs a second look.
        let config = TrackerConfig::default();
        let (tracker, present) = Tracker::start(uffd, self.pid, vec![region], config)?;
        let mut present = named(present);
        if let Some(disk) = &self.disk {
            present.union_with(&on_disk(disk.start()?));
        }
        tracking.tracker = Some(tracker);
        Ok(present)
    }

    fn take_dirty(&self) -> GuestResult<Blocks> {
        let tracking = lock(&self.tracking);
        let tracker = tracking
            .tracker
            .as_ref()
            .ok_or_else(|| GuestError::new("the guest's writes are not being tracked"))?;
        let settle = if tracking.frozen {
            Settle::Final
        } else {
            Settle::Running
        };
        let mut dirty = named(tracker.take_dirty(settle)?);
        if let Some(disk) = &self.disk {
            dirty.union_with(&on_disk(disk.take_dirty()));
        }
        Ok(dirty)
    }

    fn access_samples(&self) -> Vec<AccessSample> {
        let tracking = lock(&self.tracking);
        match &tracking.tracker {
            Some(tracker) if !tracking.frozen => sampled(tracker),
            _ => Vec::new(),
        }
    }

    fn access_samples_off(&self) -> Option<String> {
        let tracking = lock(&self.tracking);
        tracking.tracker.as_ref()?.sampling().off
    }

    fn disk_counts(&self) -> GuestResult<Vec<DiskCounts>> {
        if self.disk.is_none() {
            return Ok(Vec::new());
        }
        let stats = self.stats.sample();
        Ok(vec![DiskCounts {
            region: DISK,
            reads: stats.disk_operations.saturating_sub(stats.disk_writes),
            writes: stats.disk_writes,
            bytes: None,
        }])
    }

    fn guest_use(&self) -> GuestUse {
        let stats = self.stats.sample();
        GuestUse {
            parallelism: stats.threads.max(1),
            disk_parallelism: f64::from(stats.disk_threads.max(1)),
            disk_weight: self.stats.disk_share(),
            ..GuestUse::default()
        }
    }

    fn accessed(&self) -> Blocks {
        match &self.disk {
            Some(disk) if !lock(&self.tracking).frozen => on_disk(disk.accessed()),
            _ => Blocks::new(),
        }
    }

    fn read(&self, region: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        match &self.disk {
            _ if region == MEMORY => Ok(self.memory.read(block, buf)?),
            Some(disk) if region == DISK => disk.read(block, buf),
            _ => Err(GuestError::new(format!("the guest has no {region}"))),
        }
    }

    fn freeze(&self) -> GuestResult<()> {
        let mut tracking = lock(&self.tracking);
        lock(&self.control).freeze(FREEZE)?;
        tracking.frozen = true;
        Ok(())
    }

    fn save_state(&self) -> GuestResult<Vec<u8>> {
        Ok(lock(&self.control).save()?)
    }

    fn thaw(&self) -> GuestResult<()> {
        let mut tracking = lock(&self.tracking);
        let stopped = tracking
            .tracker
            .take()
            .map_or(Ok(()), |tracker| tracker.stop());
        // Before the request: a scan must not be called final once the guest may run.
        tracking.frozen = false;
        // Whatever became of the tracker: above all the guest goes on.
        lock(&self.control).thaw()?;
        Ok(stopped?)
    }

    fn release(&self) -> GuestResult<()> {
        lock(&self.tracking).tracker = None;
        facts::ended(lock(&self.control).stop())
    }

    fn work_done(&self) -> Option<u64> {
        Some(self.stats.sample().operations)
    }
}

fn named(sets: Vec<(u16, BlockSet)>) -> Blocks {
    sets.into_iter()
        .map(|(region, set)| (RegionId(region), set))
        .collect()
}

fn on_disk(set: BlockSet) -> Blocks {
    std::iter::once((DISK, set)).collect()
}
