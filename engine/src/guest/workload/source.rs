//! The embedded guest at the source. This file must never end the guest's process but by
//! [`SourceGuest::release`].

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hybridmig_pager::{
    Features, Region, RegionMemory, Settle, Tracker, TrackerConfig, Uffd, kernel,
};
use hybridmig_transport::message::{GuestDescription, RegionInfo, RegionKind};

use super::control::{Control, Description, Purpose, Standing};
use super::facts;
use super::pages::PAGE;
use super::stats::StatsPage;
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::guest::{GuestError, GuestResult, SourceGuest};

/// The one region of a guest.
const MEMORY: u16 = 0;
/// How long the workers may take to stop. They wait for nothing but the processor.
const FREEZE: Duration = Duration::from_secs(10);

/// An embedded guest on the host that it leaves.
pub struct WorkloadSource {
    description: GuestDescription,
    regions: [RegionInfo; 1],
    pid: u32,
    control: Mutex<Control>,
    memory: Arc<RegionMemory>,
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
        let memory = RegionMemory::open(handover.memory, MEMORY, 0, guest.bytes)?;
        let stats = StatsPage::attach(handover.stats)
            .map_err(|error| GuestError::caused("the guest's figures cannot be mapped", error))?;
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
            regions: [RegionInfo {
                id: RegionId(MEMORY),
                kind: RegionKind::Memory,
                name: "ram".into(),
                blocks: memory.blocks(),
                block_size: PAGE as u32,
            }],
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
        tracking.tracker = Some(tracker);
        Ok(named(present))
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
        Ok(named(tracker.take_dirty(settle)?))
    }

    fn read(&self, region: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        if region.0 != MEMORY {
            return Err(GuestError::new(format!(
                "an embedded guest has no {region}"
            )));
        }
        Ok(self.memory.read(block, buf)?)
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every holder leaves a whole value behind at every point.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
