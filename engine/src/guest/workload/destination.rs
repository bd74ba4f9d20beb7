//! The embedded guest at the destination: started there (or found waiting), filled, paged, and
//! taken over by the next pager if one is killed. This file must never let go of the guest while a
//! page is missing.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hybridmig_pager::{
    Features, MissingMap, Placer, PlacerConfig, Region, RegionMemory, Uffd, kernel,
};
use hybridmig_transport::message::{Offer, Refusal, RefusalCode, RegionKind};

use super::control::{Control, ControlError, Description, MemoryHandover, Purpose, Standing};
use super::facts::{self, ended};
use super::launch::{Launch, available_memory, reap, start};
use super::options::{MAX_BYTES, MIN_BYTES};
use super::stats::StatsPage;
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::guest::{
    BlockedTime, DestinationGuest, FaultSink, GuestError, GuestResult, paging::PagerSink,
};

/// The one region of a guest.
const MEMORY: u16 = 0;

/// An embedded guest on the host that it comes to.
pub struct WorkloadDestination {
    launch: Launch,
    placer_config: PlacerConfig,
    here: Mutex<Option<Arc<Here>>>,
}

/// A guest that has been prepared.
struct Here {
    pid: u32,
    control: Mutex<Control>,
    /// The process, if it was started here.
    child: Mutex<Option<Child>>,
    stats: StatsPage,
    memory: Arc<RegionMemory>,
    region: Region,
    missing: Arc<MissingMap>,
    /// Until the placer takes it.
    uffd: Mutex<Option<Uffd>>,
    placer: Mutex<Option<Arc<Placer>>>,
}

impl WorkloadDestination {
    /// A destination that has nothing yet.
    pub fn new(launch: Launch, placer_config: PlacerConfig) -> Self {
        Self {
            launch,
            placer_config,
            here: Mutex::new(None),
        }
    }

    /// Takes over a guest that has been given its state and whose pager has ended, however it
    /// ended. Returns the blocks that are still missing; the faults of threads that wait are told
    /// again.
    pub fn adopt(
        control: &Path,
        placer_config: PlacerConfig,
        faults: Arc<dyn FaultSink>,
    ) -> GuestResult<(Self, Blocks)> {
        let mut client = Control::connect(control)?;
        let description = client.describe()?;
        if description.standing == Standing::Waiting {
            return Err(GuestError::new(format!(
                "the guest at {} was never given its state: end it and migrate again",
                control.display()
            )));
        }
        let handover = client.memory(Purpose::Page)?;
        let here = Here::new(&description, client, None, handover)?;
        let uffd = here.take_uffd()?;
        let placer = Placer::take_over(
            uffd,
            here.pid,
            vec![here.region.clone()],
            Arc::clone(&here.missing),
            Arc::new(PagerSink(faults)),
            placer_config,
        )?;
        let missing = here.missing.to_bitmap(MEMORY);
        *lock(&here.placer) = Some(Arc::new(placer));
        let this = Self {
            launch: Launch::Waiting {
                control: control.to_owned(),
            },
            placer_config,
            here: Mutex::new(Some(Arc::new(here))),
        };
        Ok((this, [(RegionId(MEMORY), missing)].into_iter().collect()))
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

    fn placer(&self) -> GuestResult<Arc<Placer>> {
        lock(&self.here()?.placer)
            .clone()
            .ok_or_else(|| GuestError::new("the guest's pager has not been armed"))
    }
}

impl DestinationGuest for WorkloadDestination {
    fn check(&self, offer: &Offer) -> Result<Vec<String>, Refusal> {
        let mut reasons = facts::mismatches(&offer.guest);
        let bytes = match offer.regions.as_slice() {
            [region] if region.kind == RegionKind::Memory && region.block_size == 4096 => {
                Some(region.bytes())
            }
            _ => {
                reasons.push(
                    "an embedded guest has exactly one region, of memory in pages of 4 KiB".into(),
                );
                None
            }
        };
        if let Err(error) = kernel::probe().check_destination() {
            reasons.push(GuestError::from(error).chain());
        }
        let mut notes = vec![];
        if let Some(bytes) = bytes {
            match self.check_size(bytes) {
                Ok(note) => notes.push(note),
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
        let bytes = offer.regions.first().map_or(0, |region| region.bytes());
        let mut slot = lock(&self.here);
        if slot.is_some() {
            return Err(GuestError::new("a guest has been prepared here already"));
        }
        let (client, child) = match &self.launch {
            Launch::Start {
                program,
                args,
                control,
            } => {
                let (client, child) = start(program, args, control, bytes)?;
                (client, Some(child))
            }
            Launch::Waiting { control } => (Control::connect(control)?, None),
        };
        let here = take_possession(client, child, bytes)?;
        *slot = Some(Arc::new(here));
        Ok(())
    }

    fn write(&self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        Ok(self.here()?.memory_of(region)?.write(first, data)?)
    }

    fn write_zero(&self, region: RegionId, first: u32, count: u32) -> GuestResult<()> {
        Ok(self.here()?.memory_of(region)?.zero(first, count)?)
    }

    fn read(&self, region: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        Ok(self.here()?.memory_of(region)?.read(block, buf)?)
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
            here.memory_of(region)?;
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
        self.placer()?; // without a trap a missing page would read as zeroes
        Ok(lock(&self.here()?.control).load(state)?)
    }

    fn resume(&self) -> GuestResult<()> {
        Ok(lock(&self.here()?.control).resume()?)
    }

    fn place(&self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        Ok(self.placer()?.place(region.0, first, data)?)
    }

    fn place_zero(&self, region: RegionId, first: u32, count: u32) -> GuestResult<()> {
        Ok(self.placer()?.place_zero(region.0, first, count)?)
    }

    fn disarm(&self) -> GuestResult<BlockedTime> {
        let here = self.here()?;
        self.placer()?.disarm()?;
        lock(&here.control).settled()?;
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
    fn check_size(&self, bytes: u64) -> Result<String, String> {
        if !(MIN_BYTES..=MAX_BYTES).contains(&bytes) {
            return Err(format!(
                "a guest of {bytes} bytes is out of range: 16 MiB to 8 GiB are possible"
            ));
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
            if description.bytes != bytes {
                return Err(format!(
                    "the guest at {} has {} bytes, the one that comes has {bytes}: start it with \
                     the same size",
                    control.display(),
                    description.bytes
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
        Ok(format!(
            "{} MiB of memory are available for {} MiB of guest",
            available >> 20,
            bytes >> 20
        ))
    }
}

impl Here {
    fn new(
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
        })
    }

    fn memory_of(&self, region: RegionId) -> GuestResult<&RegionMemory> {
        if region.0 == MEMORY {
            Ok(&self.memory)
        } else {
            Err(GuestError::new(format!(
                "an embedded guest has no {region}"
            )))
        }
    }

    fn take_uffd(&self) -> GuestResult<Uffd> {
        lock(&self.uffd)
            .take()
            .ok_or_else(|| GuestError::new("arming the guest's pager has failed before"))
    }

    fn blocked_time(&self) -> BlockedTime {
        let parallelism = self.stats.sample().threads;
        let Some(placer) = lock(&self.placer).clone() else {
            return BlockedTime {
                parallelism,
                ..BlockedTime::default()
            };
        };
        BlockedTime::from_pager(placer.stats(), parallelism)
    }

    fn end(&self) -> GuestResult<()> {
        let stopped = lock(&self.control).stop();
        match lock(&self.child).take() {
            Some(child) => reap(child),
            None => ended(stopped),
        }
    }
}

fn take_possession(mut client: Control, child: Option<Child>, bytes: u64) -> GuestResult<Here> {
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
        if description.standing != Standing::Waiting || description.bytes != bytes {
            return Err(GuestError::new(format!(
                "the guest at {} has {} bytes and is {:?}, where one of {bytes} bytes that waits \
                 is needed",
                client.path().display(),
                description.bytes,
                description.standing
            )));
        }
        let handover = client.memory(Purpose::Page)?;
        Ok((description, handover))
    })();
    let (description, handover) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            if let Some(child) = child {
                reap(child)?;
            }
            return Err(error);
        }
    };
    let here = Here::new(&description, client, child, handover)?;
    let kept = lock(&here.control).keep(here.missing.file().as_fd());
    if let Err(error) = kept {
        here.end()?;
        return Err(error.into());
    }
    Ok(here)
}

fn set_of(blocks: &Blocks, region: RegionId) -> BlockSet {
    blocks.get(region).cloned().unwrap_or_default()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every holder leaves a whole value behind at every point.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
