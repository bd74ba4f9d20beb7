//! The source's data plane: takes chunks from the machine, reads the guest, encodes, sends. One
//! thread encodes what is urgent, another what is frozen, others the bulk, each with a way of its own to
//! the link, so that a page that the guest waits for never stands behind any other batch.

use std::iter;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hybridmig_transport::codec::{
    BatchHeader, BatchMaker, CodecStats, EncodeError, EncoderConfig, EncoderMemory, Refer,
    SeedNames,
};
use hybridmig_transport::error::CloseCode;
use hybridmig_transport::link::{Incoming, Link};
use hybridmig_transport::message::{Features, Message};
use tokio::sync::{Notify, mpsc};

use super::encoding::{Place, Recollection, bulk_threads, thread_time};
use super::level::{Effort, Level, LevelControl, LevelsUsed};
use super::source::{chain, is_fetch};
use super::{DriverError, LinkTasks};
use crate::guest::SourceGuest;
use crate::session::io::{Chunk, ChunkBody, Lane, Phase, SourceCommand, SourceInput};
use crate::session::source::{SourceMachine, SourceProgress};

/// Batches that may wait, encoded, for the transport, on each of the ways. The machine bounds
/// what is in flight; this only keeps encoder and link from waiting for each other.
const ENCODED: usize = 4;

/// How long an idle encoder sleeps at the most before it asks the machine again (what the machine
/// allows may change with time alone).
const IDLE: Duration = Duration::from_millis(20);

/// What was sent in one phase, by codec.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// Pre-copy.
    pub pre: CodecStats,
    /// Freeze set and device state.
    pub freeze: CodecStats,
    /// Demand-paged and pushed.
    pub post: CodecStats,
}

/// State shared by the driver, the encoding threads and the sending tasks.
pub struct DataPlane {
    machine: Mutex<SourceMachine>,
    changed: Condvar,
    guest: Arc<dyn SourceGuest>,
    started: Instant,
    inputs: mpsc::Sender<SourceInput>,
    /// Taking a chunk can make the machine want something: the driver is told.
    nudge: Notify,
    state: Mutex<Arc<Vec<u8>>>,
    traffic: Mutex<Traffic>,
    /// What was sent: for differences and names.
    memory: Recollection,
    /// What the destination has in files of its own.
    seeds: SeedNames,
    /// Where encoded batches go: the current link's senders.
    exits: Mutex<Option<Exits>>,
    /// Forms of records that the encoder uses.
    features: AtomicU64,
    /// zstd's level on the bulk lane now, and what decides about it.
    level: AtomicI32,
    levels: Mutex<LevelControl>,
    /// Level of what a guest waits for.
    front_level: i32,
    /// Every batch made so far has an id below this.
    made: AtomicU64,
    stopped: AtomicBool,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

#[derive(Clone)]
struct Exits {
    urgent: mpsc::Sender<Encoded>,
    front: mpsc::Sender<Encoded>,
    bulk: mpsc::Sender<Encoded>,
}

struct Encoded {
    lane: Lane,
    batch: u64,
    bytes: Bytes,
    /// The handover waits for it.
    awaited: bool,
}

/// A chunk to be encoded.
struct Task<'a> {
    chunk: Chunk,
    phase: Phase,
    /// Where it may refer to what was sent before.
    place: Option<Place<'a>>,
    /// How long the thread waited for the link to have room for it.
    waited: Duration,
}

/// What an encoding thread has of its own.
struct Encoder {
    maker: BatchMaker,
    contents: Vec<u8>,
    /// For what may refer to nothing: it remembers nothing.
    nothing: EncoderMemory,
}

impl Encoder {
    fn new(level: i32) -> Result<Self, EncodeError> {
        Ok(Self {
            maker: BatchMaker::new(level)?,
            contents: Vec::new(),
            nothing: EncoderMemory::new(&EncoderConfig {
                features: 0,
                index_entries: 1,
                delta_cache_bytes: 0,
                level,
            }),
        })
    }

    fn set_level(&mut self, level: i32) -> Result<(), String> {
        self.maker.set_level(level).map_err(|error| chain(&error))
    }
}

impl DataPlane {
    /// Starts the encoding threads.
    pub fn start(
        machine: SourceMachine,
        guest: Arc<dyn SourceGuest>,
        started: Instant,
        level: Level,
        inputs: mpsc::Sender<SourceInput>,
    ) -> Result<Arc<Self>, DriverError> {
        let threads = bulk_threads();
        let plane = Arc::new(Self {
            machine: Mutex::new(machine),
            changed: Condvar::new(),
            guest,
            started,
            inputs,
            nudge: Notify::new(),
            state: Mutex::new(Arc::new(Vec::new())),
            traffic: Mutex::new(Traffic::default()),
            memory: Recollection::new(&EncoderConfig::default()),
            seeds: SeedNames::default(),
            exits: Mutex::new(None),
            features: AtomicU64::new(Features::ALL),
            level: AtomicI32::new(level.first()),
            levels: Mutex::new(LevelControl::new(level, threads)),
            front_level: level.first(),
            made: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            threads: Mutex::new(Vec::new()),
        });
        let urgent = ("encode-urgent", &[Lane::Urgent][..]);
        let front = ("encode-front", &[Lane::Freeze][..]);
        let bulk = ("encode-bulk", &[Lane::Bulk][..]);
        let bulk = iter::repeat_n(bulk, threads);
        for (name, lanes) in [urgent, front].into_iter().chain(bulk) {
            let worker = plane.clone();
            let encoder = Encoder::new(level.first()).map_err(DriverError::Encoder)?;
            let thread = thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || worker.encode_loop(lanes, encoder))
                .map_err(DriverError::Thread)?;
            plane.threads.lock().expect("not poisoned").push(thread);
        }
        Ok(plane)
    }

    /// Gives the machine an input and wakes whoever waits for work.
    pub fn handle(&self, input: SourceInput) {
        if let SourceInput::Message(Message::Welcome { features, .. }) = &input {
            self.speak(*features);
        }
        if let SourceInput::Message(Message::Applied { batches, rejected }) = &input {
            let made = self.made.load(Ordering::Relaxed);
            self.memory.change(|memory| {
                for (first, end) in batches {
                    // A range beyond what was made is the peer's error; the machine judges it.
                    for batch in *first..(*end).min(made) {
                        memory.acknowledge(batch);
                    }
                }
                for (region, block) in rejected {
                    memory.reject(*region, *block);
                }
            });
        }
        if let SourceInput::Message(Message::Applied { rejected, .. }) = &input {
            // Before the machine hands the blocks out again.
            for (region, block) in rejected {
                let info = self.guest.regions().get(usize::from(region.0));
                // Others are the peer's error; the machine judges it.
                if info.is_some_and(|info| *block < info.blocks) {
                    self.seeds.refuse(*region, *block);
                }
            }
        }
        let now = self.started.elapsed();
        self.machine().handle(now, input);
        self.changed.notify_all();
    }

    /// Learns a piece of what the destination has in files of its own; what is wrong with it, if
    /// anything is. It may come before the welcome, which travels on another stream.
    fn learn(&self, block_size: u32, names: Vec<u64>) -> Result<(), String> {
        if !self.has_seeds() {
            return Err("names of seeds, which it has not agreed to".to_owned());
        }
        self.seeds
            .learn(block_size, names)
            .map_err(|error| error.to_string())
    }

    fn has_seeds(&self) -> bool {
        self.features.load(Ordering::Relaxed) & Features::SEEDS != 0
    }

    /// Uses only the forms of records that both sides have. Comes before the first batch; where it
    /// changes anything later (another build answers after a lost link) what was sent is forgotten.
    fn speak(&self, features: u64) {
        let chosen = features & Features::ALL;
        if self.features.swap(chosen, Ordering::Relaxed) != chosen {
            let config = EncoderConfig {
                features: chosen,
                ..EncoderConfig::default()
            };
            self.memory
                .change(|memory| *memory = EncoderMemory::new(&config));
        }
    }

    /// The machine's next wish.
    pub fn next_command(&self) -> Option<SourceCommand> {
        self.machine().poll_command()
    }

    /// When the machine wants to be woken, since the start.
    pub fn next_timeout(&self) -> Option<Duration> {
        self.machine().poll_timeout()
    }

    /// Completes when the machine may have new wishes.
    pub async fn nudged(&self) {
        self.nudge.notified().await;
    }

    /// Whether the machine has a use for a new link.
    pub fn wants_link(&self) -> bool {
        self.machine().wants_link()
    }

    /// The phase of the session.
    pub fn phase(&self) -> Phase {
        self.machine().phase()
    }

    /// Where it stands.
    pub fn progress(&self) -> SourceProgress {
        let now = self.started.elapsed();
        self.machine().progress(now)
    }

    /// The machine, for its figures.
    pub fn machine(&self) -> MutexGuard<'_, SourceMachine> {
        self.machine.lock().expect("the machine does not panic")
    }

    /// What was sent so far.
    pub fn traffic(&self) -> Traffic {
        self.traffic.lock().expect("not poisoned").clone()
    }

    /// The levels of compression that were used.
    pub fn levels(&self) -> LevelsUsed {
        self.levels.lock().expect("not poisoned").used()
    }

    /// Keeps the device state to send pieces of it.
    pub fn keep_state(&self, state: Vec<u8>) -> SourceInput {
        let saved = SourceInput::StateSaved {
            len: state.len() as u64,
            hash: *blake3::hash(&state).as_bytes(),
        };
        *self.state.lock().expect("not poisoned") = Arc::new(state);
        saved
    }

    /// Sends over this link from now on, until it is gone.
    pub fn serve(self: Arc<Self>, link: &Link, tasks: &mut LinkTasks) {
        let (urgent, urgent_queue) = mpsc::channel(ENCODED * 4);
        let (front, front_queue) = mpsc::channel(ENCODED * 4);
        let (bulk, bulk_queue) = mpsc::channel(ENCODED);
        *self.exits.lock().expect("not poisoned") = Some(Exits {
            urgent,
            front,
            bulk,
        });
        for queue in [urgent_queue, front_queue, bulk_queue] {
            tasks.spawn(send_loop(link.clone(), queue, self.inputs.clone()));
        }
        tasks.spawn(receive_loop(link.clone(), self.clone()));
    }

    /// Ends the threads.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        *self.exits.lock().expect("not poisoned") = None;
        self.changed.notify_all();
        for thread in self.threads.lock().expect("not poisoned").drain(..) {
            if thread.join().is_err() {
                tracing::error!("an encoding thread panicked; see the message above");
            }
        }
    }

    fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn encode_loop(&self, lanes: &[Lane], mut encoder: Encoder) {
        let bulk = lanes.contains(&Lane::Bulk);
        while let Some(task) = self.next_chunk(lanes) {
            let Chunk {
                lane,
                batch,
                awaited,
                ..
            } = task.chunk;
            let level = if bulk {
                self.level.load(Ordering::Relaxed)
            } else {
                self.front_level
            };
            let (began, on_core) = (Instant::now(), thread_time());
            let waited = task.waited;
            let encoded = encoder
                .set_level(level)
                .and_then(|()| self.encode(task, &mut encoder));
            let mut effort = Effort {
                encoding: began.elapsed(),
                on_core: thread_time().saturating_sub(on_core),
                waiting: waited,
            };
            match encoded {
                Ok(bytes) => {
                    let began = Instant::now();
                    self.hand_on(Encoded {
                        lane,
                        batch,
                        bytes,
                        awaited,
                    });
                    effort.waiting += began.elapsed();
                }
                Err(error) => {
                    // The receiver is gone only when the session has ended.
                    let _ = self.inputs.blocking_send(SourceInput::Unreadable { error });
                }
            }
            if bulk {
                let level = self.levels.lock().expect("not poisoned").note(effort);
                self.level.store(level, Ordering::Relaxed);
            }
        }
    }

    /// Waits for the next chunk of the lanes, the most urgent first.
    fn next_chunk(&self, lanes: &[Lane]) -> Option<Task<'_>> {
        let mut machine = self.machine();
        let mut waited = Duration::ZERO;
        loop {
            if self.stopped() {
                return None;
            }
            let now = self.started.elapsed();
            for lane in lanes {
                if let Some(chunk) = machine.poll_chunk(now, *lane) {
                    let phase = machine.phase();
                    // What goes before the handover must all be in the memory of what was sent
                    // last, in the order of the batches, which is why the machine stays locked.
                    let remembered = phase <= Phase::FreezeCopy
                        && chunk.lane != Lane::Urgent
                        && matches!(chunk.body, ChunkBody::Blocks { .. });
                    let place = remembered.then(|| self.memory.place());
                    self.nudge.notify_one();
                    return Some(Task {
                        chunk,
                        phase,
                        place,
                        waited,
                    });
                }
            }
            // Only where there is something to send is it the link that is waited for.
            let full = machine.bulk_is_full();
            let began = Instant::now();
            machine = self
                .changed
                .wait_timeout(machine, IDLE)
                .expect("the machine does not panic")
                .0;
            if full {
                waited += began.elapsed();
            } else {
                waited = Duration::ZERO;
            }
        }
    }

    fn encode(&self, task: Task<'_>, encoder: &mut Encoder) -> Result<Bytes, String> {
        let Task {
            chunk,
            phase,
            place,
            ..
        } = task;
        let header = BatchHeader {
            id: chunk.batch,
            pass: chunk.pass,
            lane: chunk.lane,
        };
        let (encoded, stats) = match &chunk.body {
            ChunkBody::Blocks { region, blocks } => {
                let info = self
                    .guest
                    .regions()
                    .get(usize::from(region.0))
                    .ok_or_else(|| format!("{region} does not exist"))?;
                let size = info.block_size as usize;
                encoder.contents.resize(size * blocks.len(), 0);
                let buffers = encoder.contents.chunks_exact_mut(size);
                for (block, buffer) in blocks.iter().zip(buffers) {
                    self.guest.read(*region, *block, buffer).map_err(|error| {
                        format!("reading block {block} of {region}: {}", error.chain())
                    })?;
                }
                let looked = encoder.maker.look(
                    *region,
                    info.block_size,
                    blocks,
                    &encoder.contents,
                    place.is_some(),
                );
                let sorted = looked.map(|looked| {
                    if self.has_seeds() {
                        looked.with_seeds(&self.seeds)
                    } else {
                        looked
                    }
                });
                let sorted = sorted.and_then(|looked| match place {
                    Some(place) => place.recall(looked, chunk.batch, chunk.refer),
                    None => looked.recall(&mut encoder.nothing, chunk.batch, Refer::Nothing),
                });
                let encoded = sorted.and_then(|sorted| sorted.write(header));
                let encoded = encoded.map_err(|error| chain(&error))?;
                (encoded.bytes, encoded.stats)
            }
            ChunkBody::State { offset, len } => {
                let state = self.state.lock().expect("not poisoned").clone();
                let start = usize::try_from(*offset).map_err(|error| error.to_string())?;
                let piece = state
                    .get(start..start + *len as usize)
                    .ok_or_else(|| format!("the device state has no piece at {offset}+{len}"))?;
                let encoded = encoder
                    .maker
                    .encode_state(header, *offset, piece)
                    .map_err(|error| chain(&error))?;
                (encoded.bytes, encoded.stats)
            }
        };
        self.made.fetch_max(chunk.batch + 1, Ordering::Relaxed);
        let mut traffic = self.traffic.lock().expect("not poisoned");
        let counter = match (phase, chunk.lane) {
            (Phase::Negotiation | Phase::PreCopy, _) => &mut traffic.pre,
            // What is pushed before the answer to the handover stays behind by the plan.
            (Phase::FreezeCopy, Lane::Bulk) => &mut traffic.post,
            (Phase::FreezeCopy, _) => &mut traffic.freeze,
            (Phase::PostCopy | Phase::Done, _) => &mut traffic.post,
        };
        counter.merge(&stats);
        Ok(encoded)
    }

    /// Gives a batch to the link. Without a link it is dropped: the machine was told, and asks
    /// anew for what the destination lacks when there is one again.
    fn hand_on(&self, encoded: Encoded) {
        let exits = self.exits.lock().expect("not poisoned").clone();
        let Some(exits) = exits else { return };
        let exit = match encoded.lane {
            Lane::Bulk => exits.bulk,
            Lane::Urgent => exits.urgent,
            Lane::Control | Lane::Freeze => exits.front,
        };
        if exit.blocking_send(encoded).is_err() {
            tracing::debug!("a batch was dropped with its link");
        }
    }
}

async fn send_loop(
    link: Link,
    mut queue: mpsc::Receiver<Encoded>,
    inputs: mpsc::Sender<SourceInput>,
) {
    while let Some(encoded) = queue.recv().await {
        let Encoded {
            lane, batch, bytes, ..
        } = encoded;
        let len = bytes.len() as u64;
        let sent = if encoded.awaited {
            link.send_batch_with_parity(lane, bytes).await
        } else {
            link.send_batch(lane, bytes).await
        };
        // A link that fails is reported by the control task.
        if sent.is_err() {
            return;
        }
        if inputs
            .send(SourceInput::Sent { batch, bytes: len })
            .await
            .is_err()
        {
            return;
        }
    }
}

async fn receive_loop(link: Link, plane: Arc<DataPlane>) {
    loop {
        let input = match link.next_incoming().await {
            Ok(Incoming::Message(message)) if is_fetch(&message) => SourceInput::Message(message),
            Ok(Incoming::Message(Message::Seeds { block_size, names })) => {
                match plane.learn(block_size, names) {
                    Ok(()) => continue,
                    Err(what) => {
                        link.close(CloseCode::PROTOCOL, &what);
                        return;
                    }
                }
            }
            Ok(_) => {
                link.close(
                    CloseCode::PROTOCOL,
                    "a source takes only fetches and names of seeds outside of the control lane",
                );
                return;
            }
            Err(error) => {
                tracing::debug!("no more requests: {}", chain(&error));
                return;
            }
        };
        if plane.inputs.send(input).await.is_err() {
            return;
        }
    }
}
