//! The destination's data plane: decodes batches and applies them to the guest. Before the pager is
//! armed blocks are written in the order of their passes; from then on they are placed, and only
//! where they are missing: what the guest has written since is never overwritten.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::thread;
use std::time::Instant;

use bytes::Bytes;
use crossbeam_channel as channel;
use hybridmig_pager::MissingMap;
use hybridmig_transport::codec::{Batch, BatchTarget, CodecStats, Limits, decode_batch};
use hybridmig_transport::error::CloseCode;
use hybridmig_transport::link::{Incoming, Link};
use hybridmig_transport::message::{Message, Offer, RegionInfo};
use tokio::sync::mpsc;

use super::fault_desk::FaultDesk;
use super::source::chain;
use super::{DriverError, LinkTasks};
use crate::blocks::{Blocks, RegionId};
use crate::guest::{BlockedTime, DestinationGuest, GuestError, GuestResult};
use crate::seeds::Seeds;
use crate::session::io::{AppliedBatch, DestinationInput, Lane};
use crate::session::ledger::Ledger;

/// The largest device state that is taken, in bytes. VGA adds up to 16 MiB to a QEMU's.
const MAX_DEVICE_STATE: u64 = 256 << 20;

/// Batches that may wait to be applied on each way. Applying is many times faster than any link
/// that this is made for, so they hardly ever do.
const WAITING: usize = 64;

/// What was applied, by phase.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// Before the pager was armed.
    pub before: CodecStats,
    /// Since then.
    pub after: CodecStats,
    /// Blocks copied from seeds.
    pub seeded: u64,
    /// Their bytes.
    pub seeded_bytes: u64,
    /// Blocks that no seed had any more.
    pub unseeded: u64,
}

/// State shared by the driver, the applying threads and the fault threads.
pub struct ApplyPlane {
    guest: Arc<dyn DestinationGuest>,
    inputs: mpsc::Sender<DestinationInput>,
    regions: OnceLock<Vec<RegionInfo>>,
    stage: RwLock<Stage>,
    state: Mutex<StateBuffer>,
    traffic: Mutex<Traffic>,
    desk: OnceLock<Arc<FaultDesk>>,
    resumed: OnceLock<Instant>,
    blocked: OnceLock<BlockedTime>,
    /// Whether the operator has been told that blocks cannot be placed.
    complained: AtomicBool,
    seeds: Option<Arc<Seeds>>,
    /// Whether the source has been told of all seeds.
    told: Arc<AtomicBool>,
    front: channel::Sender<Bytes>,
    bulk: channel::Sender<Bytes>,
    stop: Mutex<Option<Stop>>,
}

struct Stop {
    signals: Vec<channel::Sender<()>>,
    threads: Vec<thread::JoinHandle<()>>,
}

/// How blocks are applied. The lock around it is held for reading while a batch is applied.
enum Stage {
    /// Nothing is prepared.
    Idle,
    /// Written by pass.
    Write(Box<Mutex<Ledger>>),
    /// Placed where missing.
    Place {
        missing: Arc<MissingMap>,
        /// What is of an earlier pass belongs to what the handover superseded.
        first_pass: u32,
    },
}

#[derive(Default)]
struct StateBuffer {
    bytes: Vec<u8>,
    received: u64,
}

impl ApplyPlane {
    /// Starts the applying threads.
    pub fn start(
        guest: Arc<dyn DestinationGuest>,
        inputs: mpsc::Sender<DestinationInput>,
        seeds: Option<Arc<Seeds>>,
    ) -> Result<Arc<Self>, DriverError> {
        let (front, front_queue) = channel::bounded(WAITING);
        let (bulk, bulk_queue) = channel::bounded(WAITING);
        let plane = Arc::new(Self {
            guest,
            inputs,
            regions: OnceLock::new(),
            stage: RwLock::new(Stage::Idle),
            state: Mutex::new(StateBuffer::default()),
            traffic: Mutex::new(Traffic::default()),
            desk: OnceLock::new(),
            resumed: OnceLock::new(),
            blocked: OnceLock::new(),
            complained: AtomicBool::new(false),
            seeds,
            told: Arc::new(AtomicBool::new(false)),
            front,
            bulk,
            stop: Mutex::new(None),
        });
        let mut stop = Stop {
            signals: Vec::new(),
            threads: Vec::new(),
        };
        for (name, queue) in [("apply-front", front_queue), ("apply-bulk", bulk_queue)] {
            let (signal, stopped) = channel::bounded(1);
            let worker = plane.clone();
            let thread = thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || worker.apply_loop(&queue, &stopped))
                .map_err(DriverError::Thread)?;
            stop.signals.push(signal);
            stop.threads.push(thread);
        }
        *plane.stop.lock().expect("not poisoned") = Some(stop);
        Ok(plane)
    }

    /// Ends the threads, after the batch that they are at.
    pub fn stop(&self) {
        let Some(stop) = self.stop.lock().expect("not poisoned").take() else {
            return;
        };
        drop(stop.signals);
        for thread in stop.threads {
            if thread.join().is_err() {
                tracing::error!("an applying thread panicked; see the message above");
            }
        }
    }

    /// Takes batches from this link until it is gone.
    pub fn serve(self: &Arc<Self>, link: &Link, tasks: &mut LinkTasks) {
        tasks.spawn(receive_loop(
            link.clone(),
            self.front.clone(),
            self.bulk.clone(),
        ));
    }

    /// Tells the source what the seeds hold, over this link, unless it knows all of it. On the bulk
    /// lane: acknowledgements and faults go before it.
    pub fn tell_of_seeds(&self, link: &Link, tasks: &mut LinkTasks) {
        let Some(seeds) = self.seeds.clone() else {
            return;
        };
        if self.told.load(Ordering::Relaxed) {
            return;
        }
        let (link, told) = (link.clone(), self.told.clone());
        tasks.spawn(async move {
            for piece in seeds.pieces() {
                if let Err(error) = link.send_message(Lane::Bulk, &piece).await {
                    // The end of the link is an input of its own; the next one is told anew.
                    tracing::debug!("the source was not told of all seeds: {error}");
                    return;
                }
            }
            told.store(true, Ordering::Relaxed);
        });
    }

    /// Why the seeds cannot serve this guest: one is what it is written to.
    pub fn conflicting_seed(&self) -> Option<String> {
        let seeds = self.seeds.as_ref()?;
        let written: Vec<PathBuf> = self.guest.written_files();
        written.iter().find_map(|path| seeds.conflict(path))
    }

    /// The seeds, where there are any.
    pub fn seeds(&self) -> Option<&Seeds> {
        self.seeds.as_deref()
    }

    /// Asks for blocks on the urgent lane.
    pub fn fetch(link: Link, region: RegionId, blocks: Vec<u32>) {
        tokio::spawn(async move {
            let fetch = Message::Fetch { region, blocks };
            if let Err(error) = link.send_message(Lane::Urgent, &fetch).await {
                // The end of the link is an input of its own; the machine asks again over the next.
                tracing::debug!("a fetch was lost with its link: {error}");
            }
        });
    }

    /// Prepares guest and ledger.
    pub fn prepare(&self, offer: &Offer) -> Result<DestinationInput, String> {
        self.guest
            .prepare(offer)
            .map_err(|error| format!("preparing the guest: {}", error.chain()))?;
        if let Some(what) = self.conflicting_seed() {
            return Err(what);
        }
        *self.stage.write().expect("not poisoned") =
            Stage::Write(Box::new(Mutex::new(Ledger::new(&offer.regions))));
        self.regions
            .set(offer.regions.clone())
            .map_err(|_| "prepared twice".to_owned())?;
        Ok(DestinationInput::Prepared)
    }

    /// From writing to placing.
    pub fn arm(&self, behind: &Blocks, postcopy_pass: u32) -> Result<DestinationInput, String> {
        let mut stage = self.stage.write().expect("not poisoned");
        let Stage::Write(ledger) = &*stage else {
            return Err("arming a guest that is not prepared".to_owned());
        };
        let mut ledger = ledger.lock().expect("not poisoned");
        let missing = ledger.missing_at_handover(behind, postcopy_pass);
        let written = ledger.written();
        drop(ledger);
        // The guest's pager keeps a durable map of its own, for whoever takes over from it.
        let map = missing_map(self.regions())?;
        note_missing(&map, &missing)?;
        let desk = Arc::new(FaultDesk::new(map.clone(), self.inputs.clone()));
        self.guest
            .arm(&missing, &written, desk.clone())
            .map_err(|error| format!("arming the pager: {}", error.chain()))?;
        self.desk.set(desk).map_err(|_| "armed twice".to_owned())?;
        *stage = Stage::Place {
            missing: map,
            first_pass: postcopy_pass,
        };
        Ok(DestinationInput::Armed { missing })
    }

    /// Goes on with a guest that another process has armed.
    pub fn take_over(
        &self,
        regions: Vec<RegionInfo>,
        map: Arc<MissingMap>,
        desk: Arc<FaultDesk>,
        first_pass: u32,
    ) {
        // None of these is set in a new plane.
        let _ = self.regions.set(regions);
        let _ = self.desk.set(desk);
        *self.stage.write().expect("not poisoned") = Stage::Place {
            missing: map,
            first_pass,
        };
    }

    /// Checks the device state and loads it.
    pub fn load_state(&self, len: u64, hash: [u8; 32]) -> Result<DestinationInput, String> {
        let state = std::mem::take(&mut *self.state.lock().expect("not poisoned"));
        if state.received != len || state.bytes.len() as u64 != len {
            return Err(format!(
                "the device state has {} of {len} bytes: the source left some out",
                state.received
            ));
        }
        if *blake3::hash(&state.bytes).as_bytes() != hash {
            return Err(
                "the device state is not what the source saved: its hash differs".to_owned(),
            );
        }
        self.guest
            .load_state(&state.bytes)
            .map(|()| DestinationInput::Loaded)
            .map_err(|error| format!("loading the device state: {}", error.chain()))
    }

    /// The guest is about to run.
    pub fn mark_resume(&self) {
        // A second resume does not exist in a session; the first mark stays.
        let _ = self.resumed.set(Instant::now());
    }

    /// Lets go of the guest.
    pub fn disarm(&self) -> Result<DestinationInput, String> {
        let blocked = self
            .guest
            .disarm()
            .map_err(|error| format!("letting go of the guest: {}", error.chain()))?;
        self.blocked
            .set(blocked)
            .map_err(|_| "disarmed twice".to_owned())?;
        Ok(DestinationInput::Disarmed)
    }

    /// Notes what the report wants of an input.
    pub fn see(&self, input: &DestinationInput) {
        if let (DestinationInput::Applied(batch), Some(desk)) = (input, self.desk.get()) {
            desk.settle(&batch.placed);
        }
    }

    /// The regions, once prepared.
    pub fn regions(&self) -> &[RegionInfo] {
        self.regions.get().map_or(&[], Vec::as_slice)
    }

    /// Number of blocks in `data`.
    fn count(&self, region: RegionId, data: &[u8]) -> u32 {
        let size = self.regions()[usize::from(region.0)].block_size as usize;
        (data.len() / size) as u32
    }

    /// When the guest was started here.
    pub fn resumed(&self) -> Option<Instant> {
        self.resumed.get().copied()
    }

    /// How long the guest's threads waited, once disarmed.
    pub fn blocked(&self) -> BlockedTime {
        self.blocked
            .get()
            .cloned()
            .unwrap_or_else(|| self.guest.blocked_time())
    }

    /// Figures of the faults, once armed.
    pub fn desk(&self) -> Option<&FaultDesk> {
        self.desk.get().map(Arc::as_ref)
    }

    /// What was applied so far.
    pub fn traffic(&self) -> Traffic {
        self.traffic.lock().expect("not poisoned").clone()
    }

    fn apply_loop(&self, queue: &channel::Receiver<Bytes>, stopped: &channel::Receiver<()>) {
        loop {
            let bytes = channel::select! {
                recv(queue) -> bytes => match bytes {
                    Ok(bytes) => bytes,
                    Err(_) => return,
                },
                recv(stopped) -> _ => return,
            };
            if !self.apply(&bytes) {
                return;
            }
        }
    }

    /// Applies a batch and tells the machine; false when nobody listens any more.
    fn apply(&self, bytes: &[u8]) -> bool {
        let tell = |input| self.inputs.blocking_send(input).is_ok();
        let limits = Limits {
            regions: self.regions(),
        };
        let batch = match decode_batch(bytes, &limits) {
            Ok(batch) => batch,
            Err(error) => {
                let what = format!("it sent a batch that cannot be used: {}", chain(&error));
                return tell(DestinationInput::Violation { what });
            }
        };
        let mut applied = AppliedBatch {
            batch: batch.header().id,
            ..AppliedBatch::default()
        };
        let stage = self.stage.read().expect("not poisoned");
        // In the first stage the ledger stays locked until the machine has been told: it must hear
        // of batches in the order in which the ledger saw them.
        let mut ledger;
        let (result, before) = match &*stage {
            Stage::Idle => {
                let what = "it sent a batch before anything was prepared".to_owned();
                return tell(DestinationInput::Violation { what });
            }
            Stage::Write(shared) => {
                ledger = shared.lock().expect("not poisoned");
                let mut target = Writing {
                    plane: self,
                    ledger: &mut ledger,
                    pass: batch.header().pass,
                    applied: &mut applied,
                };
                (batch.apply(&mut target), true)
            }
            Stage::Place {
                missing,
                first_pass,
            } => {
                let mut target = Placing {
                    plane: self,
                    map: missing,
                    first_pass: *first_pass,
                    applied: &mut applied,
                };
                (batch.apply(&mut target), false)
            }
        };
        let input = match result {
            Ok(stats) => {
                let mut traffic = self.traffic.lock().expect("not poisoned");
                let counter = if before {
                    &mut traffic.before
                } else {
                    &mut traffic.after
                };
                counter.merge(&stats.codecs);
                if let Some(seeds) = &self.seeds {
                    traffic.seeded += stats.seeded;
                    traffic.seeded_bytes += stats.seeded * u64::from(seeds.block_size());
                    if traffic.unseeded == 0 && stats.unseeded > 0 {
                        tracing::warn!(
                            "a seed no longer holds what it held when it was read; such blocks \
                             are sent in full"
                        );
                    }
                    traffic.unseeded += stats.unseeded;
                }
                DestinationInput::Applied(applied)
            }
            Err(error) => match &*stage {
                Stage::Place { missing, .. } if self.resumed().is_some() => {
                    self.ask_again(&error, &batch, missing, applied)
                }
                _ => DestinationInput::PlacementFailed {
                    error: chain(&error),
                },
            },
        };
        tell(input)
    }

    /// The running guest still needs what could not be placed (memory is full, say): it is asked
    /// for again, round trip by round trip, until there is room.
    fn ask_again(
        &self,
        error: &dyn std::error::Error,
        batch: &Batch,
        missing: &MissingMap,
        mut applied: AppliedBatch,
    ) -> DestinationInput {
        if !self.complained.swap(true, Ordering::Relaxed) {
            tracing::error!(
                "the guest waits for blocks that cannot be placed: {}",
                chain(error)
            );
        }
        for (region, first, count) in batch.runs() {
            let blocks = first..first.saturating_add(count);
            let lacking = blocks.filter(|block| missing.contains(region.0, *block));
            applied
                .rejected
                .extend(lacking.map(|block| (region, block)));
        }
        DestinationInput::Applied(applied)
    }

    fn copy_seed(&self, name: &[u8; 32], buffer: &mut [u8]) -> bool {
        self.seeds
            .as_ref()
            .is_some_and(|seeds| seeds.copy(name, buffer))
    }

    fn keep_state(&self, offset: u64, data: &[u8]) -> GuestResult<()> {
        let end = offset
            .checked_add(data.len() as u64)
            .filter(|end| *end <= MAX_DEVICE_STATE);
        let Some(end) = end else {
            return Err(GuestError::new(format!(
                "a device state beyond {MAX_DEVICE_STATE} bytes: this destination takes none that large"
            )));
        };
        let mut state = self.state.lock().expect("not poisoned");
        if state.bytes.len() < end as usize {
            state.bytes.resize(end as usize, 0);
        }
        state.bytes[offset as usize..end as usize].copy_from_slice(data);
        state.received += data.len() as u64;
        Ok(())
    }
}

/// A map of these regions in which nothing is missing yet.
pub fn missing_map(regions: &[RegionInfo]) -> Result<Arc<MissingMap>, String> {
    let lens: Vec<u32> = regions.iter().map(|region| region.blocks).collect();
    MissingMap::in_memory(&lens)
        .map(Arc::new)
        .map_err(|error| chain(&error))
}

/// Notes blocks as missing.
pub fn note_missing(map: &MissingMap, missing: &Blocks) -> Result<(), String> {
    missing
        .iter()
        .try_for_each(|(region, set)| map.insert(region.0, set))
        .map_err(|error| chain(&error))
}

/// Applies by pass, before the pager is armed.
struct Writing<'a> {
    plane: &'a ApplyPlane,
    ledger: &'a mut Ledger,
    pass: u32,
    applied: &'a mut AppliedBatch,
}

impl Writing<'_> {
    fn in_place(&mut self, region: RegionId, first: u32, count: u32) {
        for block in first..first + count {
            if self.ledger.applied(region, block, self.pass) {
                self.applied.repaired.push((region, block));
            }
        }
    }
}

impl BatchTarget for Writing<'_> {
    type Error = GuestError;

    fn admit(&mut self, region: RegionId, block: u32, pass: u32) -> bool {
        // An error means a block outside of its region, which decoding has ruled out.
        self.ledger
            .admit(region, block, pass)
            .is_ok_and(|newer| newer)
    }

    fn read(&mut self, region: RegionId, block: u32, buffer: &mut [u8]) -> GuestResult<()> {
        self.plane.guest.read(region, block, buffer)
    }

    fn seed(&mut self, name: &[u8; 32], buffer: &mut [u8]) -> bool {
        self.plane.copy_seed(name, buffer)
    }

    fn write(&mut self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        self.plane.guest.write(region, first, data)?;
        self.in_place(region, first, self.plane.count(region, data));
        Ok(())
    }

    fn zero(&mut self, region: RegionId, first: u32, count: u32) -> GuestResult<()> {
        self.plane.guest.write_zero(region, first, count)?;
        self.in_place(region, first, count);
        Ok(())
    }

    fn state(&mut self, offset: u64, data: &[u8]) -> GuestResult<()> {
        self.plane.keep_state(offset, data)
    }

    fn reject(&mut self, region: RegionId, block: u32) {
        self.ledger.rejected(region, block, self.pass);
        self.applied.rejected.push((region, block));
    }
}

/// Places what is missing, once the pager is armed.
struct Placing<'a> {
    plane: &'a ApplyPlane,
    map: &'a MissingMap,
    first_pass: u32,
    applied: &'a mut AppliedBatch,
}

impl Placing<'_> {
    /// The bits go only now, after the blocks: a fault thread that finds a bit cleared answers
    /// with a zero page.
    fn placed(&mut self, region: RegionId, first: u32, count: u32) {
        for block in first..first + count {
            if self.map.clear(region.0, block) {
                self.applied.placed.insert(region, block);
            }
        }
    }
}

impl BatchTarget for Placing<'_> {
    type Error = GuestError;

    fn admit(&mut self, region: RegionId, block: u32, pass: u32) -> bool {
        pass >= self.first_pass && self.map.contains(region.0, block)
    }

    fn read(&mut self, _: RegionId, _: u32, buffer: &mut [u8]) -> GuestResult<()> {
        // The guest runs and writes: nothing that it has can be referred to. A buffer of zeroes
        // fails the record's own check, and its blocks are rejected.
        buffer.fill(0);
        Ok(())
    }

    fn seed(&mut self, name: &[u8; 32], buffer: &mut [u8]) -> bool {
        self.plane.copy_seed(name, buffer)
    }

    fn write(&mut self, region: RegionId, first: u32, data: &[u8]) -> GuestResult<()> {
        self.plane.guest.place(region, first, data)?;
        self.placed(region, first, self.plane.count(region, data));
        Ok(())
    }

    fn zero(&mut self, region: RegionId, first: u32, count: u32) -> GuestResult<()> {
        self.plane.guest.place_zero(region, first, count)?;
        self.placed(region, first, count);
        Ok(())
    }

    fn state(&mut self, _: u64, _: &[u8]) -> GuestResult<()> {
        // A piece that was sent again after a lost link: the state has long been loaded.
        Ok(())
    }

    fn reject(&mut self, region: RegionId, block: u32) {
        self.applied.rejected.push((region, block));
    }
}

async fn receive_loop(link: Link, front: channel::Sender<Bytes>, bulk: channel::Sender<Bytes>) {
    loop {
        match link.next_incoming().await {
            Ok(Incoming::Batch { lane, bytes }) => {
                let way = if lane == Lane::Bulk { &bulk } else { &front };
                // Never blocks an async thread for long: applying outpaces the link.
                if let Err(error) = way.try_send(bytes) {
                    let (way, bytes) = (way.clone(), error.into_inner());
                    let sent = tokio::task::spawn_blocking(move || way.send(bytes)).await;
                    if !matches!(sent, Ok(Ok(()))) {
                        return;
                    }
                }
            }
            Ok(Incoming::Message(_)) => {
                link.close(
                    CloseCode::PROTOCOL,
                    "a destination takes only batches outside of the control lane",
                );
                return;
            }
            Err(error) => {
                tracing::debug!("no more batches: {}", chain(&error));
                return;
            }
        }
    }
}
