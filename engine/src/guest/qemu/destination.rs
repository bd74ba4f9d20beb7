//! A QEMU guest on the host that it comes to: a QEMU that waits with `-incoming defer`, its RAM
//! filled and then paged from outside.
//!
//! It must never run the guest before [`DestinationGuest::resume`], and never end a QEMU that runs
//! it. Ending one that has loaded the state of a guest which runs elsewhere is its duty.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hybridmig_pager::{MissingMap, Placer, RegionMemory};
use hybridmig_transport::message::{
    GuestDescription, Offer, Refusal, RefusalCode, RegionInfo, RegionKind,
};

use super::commands::{Cont, QueryStatus, Stop};
use super::compare;
use super::door::{self, Door};
use super::here::DisksHere;
use super::launch::{Launched, RamBlock, printable};
use super::preflight::{self, Level, Side};
use super::process::{Mapping, QemuProcess};
use super::qmp::Qmp;
use super::record::{self, Progress, Record};
use super::source::{connect, end, memory_of};
use super::state;
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::guest::paged_disks::PagedDisks;
use crate::guest::{BlockedTime, DestinationGuest, FaultSink, GuestError, GuestResult};
use crate::report::DiskIo;

/// How long `cont` may take: QEMU's main loop may wait for a page that crosses the network.
const CONT_TIMEOUT: Duration = Duration::from_secs(180);
/// How much free memory has to remain on a host that a guest comes to, in bytes.
const MEMORY_MARGIN: u64 = 64 << 20;

/// Where the destination's QEMU comes from.
#[derive(Clone, Debug)]
pub enum QemuOrigin {
    /// It waits already; this is its monitor.
    Waiting(PathBuf),
    /// It is started with this command line, with what it needs added.
    Exec(String),
}

/// What an operator can choose for a destination.
#[derive(Clone, Debug)]
pub struct QemuDestinationOptions {
    /// Where QEMU comes from.
    pub origin: QemuOrigin,
    /// Existing folder to keep what another process needs to take over by
    /// [`QemuDestination::adopt`]. Without one the guest cannot be taken over. It is its owner's to remove, when the
    /// session has ended.
    pub keep_in: Option<PathBuf>,
    /// Whether images that have contents may be replaced by the disks that come.
    pub overwrite_disks: bool,
}

/// A QEMU that a guest comes to.
pub struct QemuDestination {
    options: QemuDestinationOptions,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    host: Option<Arc<Host>>,
    launched: Option<Launched>,
    /// The RAM blocks that a started QEMU was given.
    launched_for: Vec<RamBlock>,
    progress: Progress,
    /// What another process would take over by, once the pager is armed.
    record: Option<Record>,
    /// Once prepared, where the guest has any.
    disks: Option<Arc<DisksHere>>,
}

impl State {
    /// Whether QEMU was started by hybridmig: by this process, or by the one that it was taken
    /// over from.
    fn was_started_here(&self) -> bool {
        let recorded = |record: &Record| record.folder.is_some();
        self.launched.is_some() || self.record.as_ref().is_some_and(recorded)
    }
}

/// A QEMU and what is known of it.
struct Host {
    socket: PathBuf,
    /// Opened when it is first needed: a QEMU that waits for a page does not greet.
    qmp: Mutex<Option<Arc<Qmp>>>,
    process: QemuProcess,
    description: GuestDescription,
    regions: Vec<RegionInfo>,
    mappings: Vec<Mapping>,
    memory: Vec<Arc<RegionMemory>>,
    notes: Vec<String>,
    /// Number of the vCPU by thread.
    vcpus: BTreeMap<u32, u32>,
    paging: Mutex<Stage>,
}

/// How the memory stands.
#[derive(Clone, Default)]
enum Stage {
    /// Nothing is trapped yet.
    #[default]
    Unarmed,
    /// What is missing is trapped and served.
    Paged(Arc<Paging>),
    /// All of it is here, and nothing is trapped any more.
    Complete,
}

struct Paging {
    placer: Placer,
    door: Door,
}

impl QemuDestination {
    /// Nothing is started or asked before [`DestinationGuest::check`].
    pub fn new(options: QemuDestinationOptions) -> Self {
        Self {
            options,
            state: Mutex::default(),
        }
    }

    /// Takes over a guest whose pager has gone (killed, say) while blocks were missing. `kept_in`
    /// is the folder that the other pager was given. Works because QEMU itself holds a copy of the
    /// userfaultfd: whoever faulted still waits.
    ///
    /// Returns the guest and the blocks that are missing. Before any fault is told, `note` is told
    /// what may be missing.
    pub fn adopt(
        kept_in: &Path,
        faults: Arc<dyn FaultSink>,
        note: &dyn Fn(&Blocks) -> GuestResult<()>,
    ) -> GuestResult<(Self, Blocks)> {
        let record = Record::read(kept_in)?;
        let missing = MissingMap::open(&record::missing_map(kept_in))
            .map_err(|error| GuestError::caused("cannot take the guest over", error))?;
        let host = Host::of_record(&record)?;
        note(&door::missing_blocks(&missing, &host.memory))?;
        let mut left = Blocks::new();
        let mut disks = None;
        if let Some(record) = &record.disks {
            let (first, paged) = record.paged();
            let paged = PagedDisks::adopt(first, paged, &faults, |missing| {
                left.union_with(missing);
                note(missing)
            })?;
            disks = Some(Arc::new(DisksHere::adopt(record, host.process, paged)?));
        }
        let taken = door::take_over(host.process, &host.memory, missing, faults)?;
        *host.lock_paging() = match taken {
            Some((placer, door)) => {
                left.union_with(&door::missing_blocks(placer.missing(), &host.memory));
                Stage::Paged(Arc::new(Paging { placer, door }))
            }
            None => Stage::Complete,
        };
        let guest = Self {
            options: QemuDestinationOptions {
                origin: QemuOrigin::Waiting(record.socket.clone()),
                keep_in: Some(kept_in.to_owned()),
                overwrite_disks: false,
            },
            state: Mutex::new(State {
                disks,
                host: Some(Arc::new(host)),
                progress: record.progress,
                record: Some(record),
                ..State::default()
            }),
        };
        Ok((guest, left))
    }

    /// The monitor of the guest's QEMU, once there is one: for the operator, who will want to talk
    /// to a guest that was started by `--exec`.
    pub fn monitor(&self) -> Option<PathBuf> {
        let state = self.lock();
        state.host.as_ref().map(|host| host.socket.clone())
    }

    /// Notes how far the guest has come, first for whoever may take over.
    fn advance(&self, progress: Progress) -> GuestResult<()> {
        let mut state = self.lock();
        if let (Some(record), Some(folder)) = (&mut state.record, &self.options.keep_in) {
            record.progress = progress;
            record.write(folder)?;
        }
        state.progress = progress;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn host(&self) -> GuestResult<Arc<Host>> {
        self.lock()
            .host
            .clone()
            .ok_or_else(|| GuestError::new("no QEMU has been prepared for the guest"))
    }

    /// The disks, if the region is one of them.
    fn disks(&self, region: RegionId) -> Option<Arc<DisksHere>> {
        let disks = self.lock().disks.clone()?;
        disks.paged.has(region).then_some(disks)
    }

    /// The pager of the memory; none where all of it is here.
    fn paging(&self) -> GuestResult<Option<Arc<Paging>>> {
        match self.host()?.lock_paging().clone() {
            Stage::Paged(paging) => Ok(Some(paging)),
            Stage::Complete => Ok(None),
            Stage::Unarmed => Err(GuestError::new("the guest's memory is not being paged")),
        }
    }

    /// Makes sure that there is a QEMU that fits the offer: connects, or starts one.
    fn ready(&self, state: &mut State, offer: &Offer) -> Result<Arc<Host>, Refusal> {
        let refuse = |error: GuestError| Refusal {
            code: RefusalCode::Guest,
            reasons: vec![error.chain()],
        };
        if offer.guest.kind != "qemu" {
            return Err(refuse(GuestError::new(format!(
                "the guest is a {} guest, this side waits for a qemu guest",
                offer.guest.kind
            ))));
        }
        if let Some(host) = &state.host {
            if state.launched.is_none() || state.launched_for == ram_blocks(offer) {
                return Ok(Arc::clone(host));
            }
            // It was started for another guest.
            self.drop_host(state);
        }
        let qmp = match &self.options.origin {
            QemuOrigin::Waiting(socket) => connect(socket).map_err(refuse)?,
            QemuOrigin::Exec(command) => {
                let blocks = ram_blocks(offer);
                let (launched, qmp) = Launched::start(command, &blocks).map_err(refuse)?;
                tracing::info!(
                    added = printable(&launched.added),
                    folder = %launched.folder().display(),
                    "started QEMU"
                );
                state.launched = Some(launched);
                state.launched_for = blocks;
                qmp
            }
        };
        match Host::inspect(qmp) {
            Ok(host) => {
                let host = Arc::new(host);
                state.host = Some(Arc::clone(&host));
                Ok(host)
            }
            Err(error) => {
                self.drop_host(state);
                Err(refuse(error))
            }
        }
    }

    /// Forgets the QEMU; ends it if it was started here.
    fn drop_host(&self, state: &mut State) {
        state.host = None;
        if let Some(disks) = state.disks.take() {
            disks.discard();
        }
        if let Some(mut launched) = state.launched.take() {
            launched.end();
        }
        state.progress = Progress::Waiting;
        if state.record.take().is_some()
            && let Some(folder) = &self.options.keep_in
        {
            record::remove(folder);
        }
    }

    /// Adds what QEMU said before it died, where that is known.
    fn with_last_words(state: &mut State, error: GuestError) -> GuestError {
        match &mut state.launched {
            Some(launched) => {
                let exit = launched
                    .exit()
                    .map_or_else(String::new, |status| format!(" ({status})"));
                GuestError::caused(
                    format!(
                        "the guest's state was refused here; QEMU{exit} said: {}",
                        launched.last_words()
                    ),
                    error,
                )
            }
            None => GuestError::caused(
                "the guest's state was refused here; QEMU's standard error tells more",
                error,
            ),
        }
    }
}

impl DestinationGuest for QemuDestination {
    fn check(&self, offer: &Offer) -> Result<Vec<String>, Refusal> {
        let mut state = self.lock();
        let host = self.ready(&mut state, offer)?;
        let result = host.check(offer, self.options.overwrite_disks);
        if (result.is_err() || offer.check_only) && state.launched.is_some() {
            drop(host);
            self.drop_host(&mut state);
        }
        result
    }

    fn prepare(&self, offer: &Offer) -> GuestResult<()> {
        let mut state = self.lock();
        let host = self
            .ready(&mut state, offer)
            .map_err(|refusal| GuestError::new(refusal.to_string()))?;
        host.check(offer, self.options.overwrite_disks)
            .map_err(|refusal| GuestError::new(refusal.to_string()))?;
        let qmp = host.qmp()?;
        let maps = self.options.keep_in.as_deref();
        state.disks = DisksHere::prepare(&qmp, host.process, offer, maps)?.map(Arc::new);
        state::set_capabilities(&qmp).map(drop)
    }

    fn write(&self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        if let Some(disks) = self.disks(region) {
            return disks.paged.write(region, first, data);
        }
        memory_of(&self.host()?.memory, region)?
            .write(first, data)
            .map_err(|error| GuestError::caused("cannot write guest memory", error))
    }

    fn write_zero(&self, region: RegionId, first: u32, count: u32) -> GuestResult<()> {
        if let Some(disks) = self.disks(region) {
            return disks.paged.write_zero(region, first, count);
        }
        memory_of(&self.host()?.memory, region)?
            .zero(first, count)
            .map_err(|error| GuestError::caused("cannot write guest memory", error))
    }

    fn read(&self, region: RegionId, block: u32, buf: &mut [u8]) -> GuestResult<()> {
        if let Some(disks) = self.disks(region) {
            return disks.paged.read(region, block, buf);
        }
        memory_of(&self.host()?.memory, region)?
            .read(block, buf)
            .map_err(|error| GuestError::caused("cannot read guest memory", error))
    }

    fn arm(
        &self,
        missing: &Blocks,
        written: &Blocks,
        faults: Arc<dyn FaultSink>,
    ) -> GuestResult<()> {
        let host = self.host()?;
        let disks = self.lock().disks.clone();
        if let Some(disks) = &disks {
            disks.paged.arm(missing, &faults)?;
        }
        let map = self.options.keep_in.as_deref().map(record::missing_map);
        let memory = |blocks: &Blocks| -> Blocks {
            let ours = |(region, _): &(RegionId, &BlockSet)| host.memory.len() > region.0.into();
            let sets = blocks.iter().filter(ours);
            sets.map(|(region, set)| (region, set.clone())).collect()
        };
        let mut paging = host.lock_paging();
        let (placer, door) = door::arm(
            &*host.qmp()?,
            host.process,
            &host.memory,
            &memory(missing),
            &memory(written),
            map.as_deref(),
            faults,
        )?;
        *paging = Stage::Paged(Arc::new(Paging { placer, door }));
        drop(paging);
        if let Some(folder) = &self.options.keep_in {
            let mut state = self.lock();
            let launched = state.launched.as_ref();
            let mut record = host.record(launched.map(|launched| launched.folder().to_owned()))?;
            record.disks = disks.map(|disks| disks.record());
            record.write(folder)?;
            state.record = Some(record);
        }
        Ok(())
    }

    fn load_state(&self, state: &[u8]) -> GuestResult<()> {
        let host = self.host()?;
        self.advance(Progress::Loading)?;
        host.load(state)
            .map_err(|error| Self::with_last_words(&mut self.lock(), error))
    }

    fn resume(&self) -> GuestResult<()> {
        let host = self.host()?;
        self.advance(Progress::Resumed)?;
        host.qmp()?
            .execute_within(&Cont {}, CONT_TIMEOUT)
            .map(drop)
            .map_err(|error| {
                GuestError::caused(
                    format!(
                        "the guest is here but could not be run: try QMP `cont` at {}",
                        host.socket.display()
                    ),
                    error,
                )
            })
    }

    fn place(&self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        if let Some(disks) = self.disks(region) {
            return disks.paged.place(region, first, data);
        }
        let Some(paging) = self.paging()? else {
            return Ok(()); // late: it is here
        };
        let placed = paging.placer.place(region.0, first, data);
        placed.map_err(|error| GuestError::caused("cannot place guest memory", error))
    }

    fn place_zero(&self, region: RegionId, first: u32, count: u32) -> GuestResult<()> {
        if let Some(disks) = self.disks(region) {
            return disks.paged.place_zero(region, first, count);
        }
        let Some(paging) = self.paging()? else {
            return Ok(()); // late: it is here
        };
        let placed = paging.placer.place_zero(region.0, first, count);
        placed.map_err(|error| GuestError::caused("cannot place guest memory", error))
    }

    fn disk_io(&self) -> Vec<DiskIo> {
        let disks = self.lock().disks.clone();
        disks.map_or_else(Vec::new, |disks| disks.paged.io())
    }

    fn written_files(&self) -> Vec<PathBuf> {
        let disks = self.lock().disks.clone();
        disks.map_or_else(Vec::new, |disks| disks.images())
    }

    fn disarm(&self) -> GuestResult<BlockedTime> {
        let host = self.host()?;
        let mut blocked = BlockedTime::default();
        if let Some(paging) = self.paging()? {
            let disarmed = paging.placer.disarm();
            let stats = disarmed
                .map_err(|error| GuestError::caused("cannot let the guest's memory go", error))?;
            paging.door.close();
            blocked = host.blocked(&stats);
        }
        *host.lock_paging() = Stage::Complete;
        let disks = self.lock().disks.clone();
        if let Some(disks) = disks {
            disks.finish(&*host.qmp()?)?;
        }
        // What another process would take over by stays: the source has yet to be told, and until then this one may
        // be killed. It goes with its folder.
        Ok(blocked)
    }

    fn abandon(&self) -> GuestResult<()> {
        let mut state = self.lock();
        if state.progress == Progress::Resumed {
            return Err(GuestError::new(
                "the guest runs here and is not abandoned any more",
            ));
        }
        let Some(host) = state.host.clone() else {
            return Ok(());
        };
        let paging = std::mem::take(&mut *host.lock_paging());
        let result = if state.launched.is_some() {
            // Ended below.
            Ok(())
        } else if state.progress == Progress::Loading || state.was_started_here() {
            // It may hold the state of a guest that runs elsewhere; nobody must ever run it.
            host.quit()
        } else {
            if let Stage::Paged(paging) = &paging {
                // The last copy of the userfaultfd takes the trap along; nobody waits yet.
                paging.placer.stop();
                paging.door.close();
            }
            match state.disks.take() {
                Some(disks) => host.qmp().map(|qmp| disks.give_up(&qmp)),
                None => Ok(()),
            }
        };
        drop(paging);
        self.drop_host(&mut state);
        result
    }

    fn blocked_time(&self) -> BlockedTime {
        let Ok(host) = self.host() else {
            return BlockedTime::default();
        };
        match host.lock_paging().clone() {
            Stage::Paged(paging) => host.blocked(&paging.placer.stats()),
            Stage::Unarmed | Stage::Complete => BlockedTime::default(),
        }
    }
}

impl Drop for QemuDestination {
    fn drop(&mut self) {
        let mut state = self.lock();
        // Once the state has been offered to QEMU, the guest may be its: only `abandon` ends it.
        if state.progress == Progress::Waiting {
            self.drop_host(&mut state);
        }
    }
}

impl Host {
    fn inspect(qmp: Qmp) -> GuestResult<Self> {
        let inspection = preflight::inspect(&qmp, Side::Destination)?;
        inspection.require()?;
        let process = inspection
            .process
            .ok_or_else(|| GuestError::new("the process of QEMU was not found"))?;
        Ok(Self {
            socket: qmp.socket().to_owned(),
            qmp: Mutex::new(Some(Arc::new(qmp))),
            process,
            description: inspection.describe(),
            regions: inspection.regions(),
            mappings: inspection
                .ram
                .iter()
                .map(|ram| ram.mapping.clone())
                .collect(),
            notes: inspection.texts(Level::Note),
            vcpus: inspection
                .facts
                .vcpus
                .iter()
                .map(|cpu| (cpu.thread_id as u32, cpu.index))
                .collect(),
            memory: inspection.into_memory()?,
            paging: Mutex::default(),
        })
    }

    /// A QEMU that another process has paged so far. Asks it nothing.
    fn of_record(record: &Record) -> GuestResult<Self> {
        let memory = record
            .mappings
            .iter()
            .zip(&record.regions)
            .map(|(mapping, region)| {
                let file = record.process.open_mapped_file(mapping).map_err(|error| {
                    GuestError::caused(
                        format!("cannot open the file of RAM block '{}'", region.name),
                        error,
                    )
                })?;
                RegionMemory::open(file, region.id.0, mapping.offset, region.bytes())
                    .map(Arc::new)
                    .map_err(|error| {
                        GuestError::caused(
                            format!("cannot use the file of RAM block '{}'", region.name),
                            error,
                        )
                    })
            })
            .collect::<GuestResult<_>>()?;
        Ok(Self {
            socket: record.socket.clone(),
            qmp: Mutex::default(),
            process: record.process,
            description: record.description.clone(),
            regions: record.regions.clone(),
            mappings: record.mappings.clone(),
            memory,
            notes: Vec::new(),
            vcpus: record.vcpus.iter().copied().collect(),
            paging: Mutex::default(),
        })
    }

    fn record(&self, folder: Option<PathBuf>) -> GuestResult<Record> {
        Record::new(
            self.process,
            self.socket.clone(),
            folder,
            self.description.clone(),
            self.regions.clone(),
            self.mappings.clone(),
            self.vcpus
                .iter()
                .map(|(thread, cpu)| (*thread, *cpu))
                .collect(),
        )
    }

    fn qmp(&self) -> GuestResult<Arc<Qmp>> {
        let mut qmp = self.qmp.lock().unwrap_or_else(PoisonError::into_inner);
        match &*qmp {
            Some(qmp) => Ok(Arc::clone(qmp)),
            None => Ok(Arc::clone(qmp.insert(Arc::new(connect(&self.socket)?)))),
        }
    }

    fn load(&self, state: &[u8]) -> GuestResult<()> {
        let qmp = self.qmp()?;
        state::load(&qmp, state)?;
        let status = qmp
            .execute_within(&QueryStatus {}, CONT_TIMEOUT)
            .map_err(|error| GuestError::caused("lost QEMU after it had loaded", error))?;
        match status.status.as_str() {
            "paused" => Ok(()),
            "running" => {
                // Never seen: the state was saved from a stopped guest. It must not go on.
                let stopped = qmp.execute_within(&Stop {}, CONT_TIMEOUT);
                Err(GuestError::new(format!(
                    "QEMU ran the guest by itself (stopping it: {stopped:?})"
                )))
            }
            other => Err(GuestError::new(format!(
                "QEMU is in run state {other} after it has loaded the state"
            ))),
        }
    }

    /// Ends QEMU.
    fn quit(&self) -> GuestResult<()> {
        let qmp = self.qmp();
        end(self.process, qmp.as_deref()).map_err(|error| {
            GuestError::caused(
                "the QEMU that has begun to load the guest's state is still there: end it by hand \
                 and never run it",
                error,
            )
        })
    }

    fn lock_paging(&self) -> MutexGuard<'_, Stage> {
        self.paging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the guest that is offered fits this QEMU and this host.
    fn check(&self, offer: &Offer, overwrite_disks: bool) -> Result<Vec<String>, Refusal> {
        let mut notes = compare::compare(&offer.guest, &self.description)?;
        let shape = |regions: &[RegionInfo]| -> Vec<(String, u32, u32)> {
            regions
                .iter()
                .filter(|region| region.kind == RegionKind::Memory)
                .map(|region| (region.name.clone(), region.blocks, region.block_size))
                .collect()
        };
        if shape(&offer.regions) != shape(&self.regions) {
            return Err(Refusal {
                code: RefusalCode::Guest,
                reasons: vec![format!(
                    "the RAM blocks differ: {:?} at the source, {:?} here; make -object \
                     memory-backend-file,id=…,size=… equal",
                    shape(&offer.regions),
                    shape(&self.regions)
                )],
            });
        }
        notes.push(self.check_memory()?);
        let qmp = self.qmp().map_err(|error| Refusal {
            code: RefusalCode::Other,
            reasons: vec![error.chain()],
        })?;
        notes.extend(DisksHere::check(
            &qmp,
            self.process,
            offer,
            overwrite_disks,
        )?);
        notes.extend(self.notes.iter().cloned());
        Ok(notes)
    }

    /// Whether the host, and the file system that the RAM is in, have room for what is to come.
    fn check_memory(&self) -> Result<String, Refusal> {
        let refuse = |reason: String| Refusal {
            code: RefusalCode::Guest,
            reasons: vec![reason],
        };
        let mut needed = 0;
        for (memory, region) in self.memory.iter().zip(&self.regions) {
            let populated = memory
                .populated()
                .map_err(|error| refuse(error.to_string()))?;
            let wanted = memory.len() - populated.len() * u64::from(region.block_size);
            needed += wanted;
            // An unnamed memory file lives in the kernel's own tmpfs, which has no limit and says
            // that it has no blocks.
            let room = nix::sys::statvfs::fstatvfs(memory.file())
                .map_err(|error| refuse(format!("cannot ask for the room for RAM: {error}")))?;
            let free = room.blocks_available() * room.fragment_size();
            if room.blocks() > 0 && free < wanted {
                return Err(refuse(format!(
                    "the file system of RAM block '{}' has {} MiB free, {} MiB are needed: \
                     enlarge it (mount -o remount,size=…) or free some",
                    region.name,
                    free >> 20,
                    wanted >> 20
                )));
            }
        }
        let available = available_memory()
            .map_err(|why| refuse(format!("cannot tell the free memory: {why}")))?;
        if available < needed + MEMORY_MARGIN {
            return Err(refuse(format!(
                "this host has {} MiB of memory available, the guest needs {} MiB and {} MiB \
                 should remain",
                available >> 20,
                needed >> 20,
                MEMORY_MARGIN >> 20
            )));
        }
        Ok(format!(
            "{} MiB of memory available for {} MiB of RAM",
            available >> 20,
            needed >> 20
        ))
    }

    fn blocked(&self, stats: &hybridmig_pager::FaultStats) -> BlockedTime {
        BlockedTime {
            total: stats.blocked,
            threads: stats
                .threads
                .iter()
                .map(|thread| {
                    let name = match self.vcpus.get(&thread.tid) {
                        Some(index) => format!("vcpu{index}"),
                        None if thread.name.is_empty() => format!("thread {}", thread.tid),
                        None => thread.name.clone(),
                    };
                    (name, thread.blocked)
                })
                .collect(),
            parallelism: self.vcpus.len() as u32,
        }
    }
}

fn ram_blocks(offer: &Offer) -> Vec<RamBlock> {
    offer
        .regions
        .iter()
        .filter(|region| region.kind == RegionKind::Memory)
        .map(|region| RamBlock {
            name: region.name.clone(),
            size: region.bytes(),
        })
        .collect()
}

/// Memory that can be had without swapping, in bytes (`MemAvailable` of proc(5)).
fn available_memory() -> Result<u64, String> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|error| error.to_string())?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .map(|kib| kib << 10)
        .ok_or_else(|| "/proc/meminfo has no MemAvailable".to_owned())
}
