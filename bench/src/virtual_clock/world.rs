//! The clock, the events, and both machines with what their drivers would do for them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hybridmig_engine::agility::{SpeedSample, agility};
use hybridmig_engine::blocks::{Blocks, RegionId};
use hybridmig_engine::predict::Costs;
use hybridmig_engine::session::destination::{DestinationConfig, DestinationMachine};
use hybridmig_engine::session::io::{
    AppliedBatch, Chunk, ChunkBody, DestinationCommand, DestinationInput, DestinationOutcome, Lane,
    LinkFigures, SourceCommand, SourceInput, SourceOutcome,
};
use hybridmig_engine::session::ledger::Ledger;
use hybridmig_engine::session::source::{GuestUse, SourceConfig, SourceMachine};
use hybridmig_transport::message::{GuestDescription, Message, RegionInfo, RegionKind, SessionId};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::codec::{Codec, Kind};
use super::guest::{Block, Guest};
use super::link::Direction;
use super::{Came, Setting, Steps, seconds};

/// A step of the guest.
const TICK: Duration = Duration::from_millis(1);
/// How long the guest runs before the session begins.
const BEFORE: Duration = Duration::from_secs(4);
/// Round trips that dialling takes.
const DIAL: f64 = 1.0;
/// Batches that may wait, encoded, for the transport.
const ENCODED: usize = 4;
/// Bytes of a control message.
const MESSAGE: f64 = 120.0;
/// Time between two samples of the guest's speed.
const SAMPLE: Duration = Duration::from_millis(50);
/// Time between two looks at the link.
const FIGURES: Duration = Duration::from_millis(100);
/// No migration takes longer.
const LONGEST: Duration = Duration::from_secs(1200);
/// Encoding a batch, and applying it, in seconds per page.
const PER_PAGE: f64 = 12e-6;
/// Length of the device state of the embedded guest.
const STATE: u64 = 4000;
/// What is left of it when it is compressed.
const STATE_RATIO: f64 = 0.5;

enum Event {
    Tick,
    Figures,
    SourceDone,
    DestinationDone,
    ToSource(Message),
    ToDestination(Message),
    Encoded(Chunk),
    Batch(Batch),
    Applied(AppliedBatch),
    /// There is something to send, there or back.
    Link(usize),
}

/// A chunk that was encoded and waits for the transport.
struct Encoded {
    awaited: bool,
    bytes: f64,
    batch: Batch,
}

struct Batch {
    id: u64,
    pass: u32,
    blocks: Vec<(Block, u32)>,
}

/// One migration under the clock.
pub struct World {
    steps: Steps,
    rng: SmallRng,
    now: Duration,
    events: BinaryHeap<Reverse<(Duration, u64)>>,
    due: BTreeMap<u64, Event>,
    sequence: u64,
    guest: Guest,
    source: SourceMachine,
    destination: DestinationMachine,
    links: [Direction; 2],
    source_jobs: VecDeque<SourceCommand>,
    destination_jobs: VecDeque<DestinationCommand>,
    working: [bool; 2],
    encoding: [usize; 4],
    ledger: Option<Ledger>,
    armed: bool,
    missing: Blocks,
    codec: Codec,
    /// Encoded, by lane.
    waiting: [VecDeque<Encoded>; 4],
    /// What the links carry.
    carried: BTreeMap<u64, Event>,
    /// When the links are to be looked at.
    wake: [Option<Duration>; 2],
    /// The guest's speed since the freeze, and the time it ran in the sample under way.
    speed: Vec<SpeedSample>,
    ran: f64,
    sampled: Duration,
    outcome: Option<SourceOutcome>,
    ended: bool,
    frozen: Option<Duration>,
    resumed: Option<Duration>,
    complete: Option<Duration>,
    working_set: u64,
    faults: u64,
    /// What the scan under way has found.
    scanned: Blocks,
    /// When the guest's accesses were looked at last.
    looked: Duration,
}

impl World {
    /// A guest that has run for some seconds, and a session that is about to begin.
    pub fn new(setting: Setting, steps: Steps, costs: Costs) -> Self {
        let mut guest = Guest::new(&setting);
        let mut warm = Duration::ZERO;
        while warm < BEFORE {
            warm += TICK;
            guest.run(warm, TICK);
        }
        guest.take_dirty();
        let kinds = [
            (RegionKind::Memory, "ram", 4096),
            (RegionKind::Disk, "disk", 65_536),
        ];
        let regions: Vec<RegionInfo> = guest
            .blocks()
            .into_iter()
            .zip(kinds)
            .enumerate()
            .map(|(id, (blocks, (kind, name, block_size)))| RegionInfo {
                id: RegionId(id as u16),
                kind,
                name: name.to_owned(),
                blocks,
                block_size,
            })
            .collect();
        let disks: Vec<f64> = guest.workers[setting.threads as usize..]
            .iter()
            .map(|w| w.weight)
            .collect();
        let config = SourceConfig {
            mem_frac: setting.mem_frac,
            disk_frac: setting.disk_frac,
            observe: setting.observe,
            costs,
            guest: GuestUse {
                parallelism: setting.threads,
                disk_parallelism: disks.len().max(1) as f64,
                disk_weight: disks.iter().sum(),
                ..GuestUse::default()
            },
            ..SourceConfig::new(SessionId([7; 8]), setting.mode)
        };
        let description = GuestDescription {
            kind: "model".into(),
            name: "guest".into(),
            facts: BTreeMap::new(),
        };
        let links = Direction::pair(&setting.link, setting.seed);
        let codec = Codec::new(setting.profile, setting.seed, level(links[0].bandwidth()));
        Self {
            rng: SmallRng::seed_from_u64(setting.seed),
            steps,
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            due: BTreeMap::new(),
            sequence: 0,
            guest,
            source: SourceMachine::new(config, description, regions),
            destination: DestinationMachine::new(DestinationConfig::default()),
            links,
            source_jobs: VecDeque::new(),
            destination_jobs: VecDeque::new(),
            working: [false; 2],
            encoding: [0; 4],
            ledger: None,
            armed: false,
            missing: Blocks::new(),
            codec,
            waiting: Default::default(),
            carried: BTreeMap::new(),
            wake: [None; 2],
            speed: Vec::new(),
            ran: 0.0,
            sampled: Duration::ZERO,
            outcome: None,
            ended: false,
            frozen: None,
            resumed: None,
            complete: None,
            working_set: 0,
            faults: 0,
            scanned: Blocks::new(),
            looked: Duration::ZERO,
        }
    }

    /// Runs it to its end. `Ok(None)`: pre-copy did not converge.
    ///
    /// # Errors
    /// Where it ends in any other way, or not at all.
    pub fn run(mut self) -> Result<Option<Came>> {
        let (rtt, _) = self.links[0].rtts(&self.links[1]);
        self.now = rtt.mul_f64(DIAL);
        self.destination
            .handle(self.now, DestinationInput::Connected);
        self.source.handle(self.now, SourceInput::Connected);
        self.at(self.now, Event::Tick);
        self.at(self.now, Event::Figures);
        self.pump();
        while self.outcome.is_none() || !self.ended {
            let timeouts = [self.source.poll_timeout(), self.destination.poll_timeout()];
            let timeout = timeouts.into_iter().flatten().min();
            let event = self.events.peek().map(|Reverse((at, _))| *at);
            let next = [timeout, event].into_iter().flatten().min();
            let next = next.context("nothing will ever happen again")?;
            self.now = self.now.max(next);
            if self.now > LONGEST {
                bail!("no end after {LONGEST:?}");
            }
            if timeout.is_some_and(|at| at <= self.now) {
                self.source.handle(self.now, SourceInput::Timeout);
                self.destination.handle(self.now, DestinationInput::Timeout);
            } else if let Some(Reverse((_, id))) = self.events.pop()
                && let Some(event) = self.due.remove(&id)
            {
                self.event(event);
            }
            self.pump();
            if let Some(SourceOutcome::NotConverged { .. }) = self.outcome {
                return Ok(None);
            }
        }
        match &self.outcome {
            Some(SourceOutcome::Moved) => self.came().map(Some),
            other => bail!("it ends as {other:?}"),
        }
    }

    fn came(&self) -> Result<Came> {
        self.guest.check();
        let frozen = self.frozen.context("never frozen")?;
        let resumed = self.resumed.context("never resumed")?;
        let downtime = resumed.saturating_sub(frozen).as_secs_f64();
        let waited: f64 = self
            .guest
            .workers
            .iter()
            .map(|worker| worker.weight * worker.waited.as_secs_f64())
            .sum();
        let figures = self.source.figures();
        Ok(Came {
            total: self.now.as_secs_f64(),
            downtime,
            remote_up: resumed.as_secs_f64(),
            lost_work: downtime + waited,
            t95: agility(&self.speed).and_then(|agility| agility.t95),
            bytes: figures.bytes(),
            sent: self.links[0].sent,
            faults: self.faults,
            rounds: figures.rounds.len(),
            freeze_set: figures.freeze_set,
            behind: figures.behind,
            working_set: self.working_set,
            prediction: self.source.plan_report().into(),
            plan: self.source.plan_report().clone(),
        })
    }

    fn at(&mut self, at: Duration, event: Event) {
        self.sequence += 1;
        self.due.insert(self.sequence, event);
        self.events.push(Reverse((at, self.sequence)));
    }

    fn after(&mut self, wait: f64, event: Event) {
        self.at(self.now + seconds(wait), event);
    }

    fn pump(&mut self) {
        loop {
            let mut idle = true;
            while let Some(command) = self.source.poll_command() {
                idle = false;
                match command {
                    SourceCommand::Send(message) => {
                        self.give(0, Lane::Control, MESSAGE, Event::ToDestination(message));
                    }
                    SourceCommand::CloseLink { .. } => {}
                    SourceCommand::Finish(outcome) => self.outcome = Some(outcome),
                    job => self.source_jobs.push_back(job),
                }
            }
            while let Some(command) = self.destination.poll_command() {
                idle = false;
                match command {
                    DestinationCommand::Send(message) => {
                        self.give(1, Lane::Control, MESSAGE, Event::ToSource(message));
                    }
                    DestinationCommand::Fetch { region, blocks } => {
                        let message = Message::Fetch { region, blocks };
                        self.give(1, Lane::Urgent, MESSAGE / 2.0, Event::ToSource(message));
                    }
                    DestinationCommand::CloseLink { .. } => {}
                    DestinationCommand::Finish(outcome) => {
                        self.ended = true;
                        assert_eq!(outcome, DestinationOutcome::Moved);
                    }
                    job => self.destination_jobs.push_back(job),
                }
            }
            self.lanes(&mut idle);
            self.start_jobs();
            if idle {
                return;
            }
        }
    }

    /// Gives something with parity to the link there (0) or back (1).
    fn give(&mut self, link: usize, lane: Lane, bytes: f64, event: Event) {
        self.load(link, lane, bytes, true, event);
    }

    fn load(&mut self, link: usize, lane: Lane, bytes: f64, guarded: bool, event: Event) {
        self.sequence += 1;
        self.carried.insert(self.sequence, event);
        self.links[link].give(self.sequence, lane, bytes, guarded);
        self.watch(link);
    }

    /// Wakes up when there is something to send.
    fn watch(&mut self, link: usize) {
        if let Some(at) = self.links[link].next().map(|at| at.max(self.now))
            && self.wake[link].is_none_or(|wake| wake > at)
        {
            self.wake[link] = Some(at);
            self.at(at, Event::Link(link));
        }
    }

    /// Lets a link send a packet.
    fn carry(&mut self, link: usize) {
        if self.wake[link] != Some(self.now) {
            return;
        }
        self.wake[link] = None;
        if let Some((at, id)) = self.links[link].step(self.now)
            && let Some(event) = self.carried.remove(&id)
        {
            self.at(at, event);
        }
        self.watch(link);
    }

    fn lanes(&mut self, idle: &mut bool) {
        for lane in [Lane::Urgent, Lane::Freeze, Lane::Bulk] {
            let queue = lane as usize;
            while (lane != Lane::Bulk || self.links[0].has_room())
                && let Some(encoded) = self.waiting[queue].pop_front()
            {
                *idle = false;
                let (bytes, batch) = (encoded.bytes, encoded.batch.id);
                let guarded = encoded.awaited || lane == Lane::Urgent;
                self.load(0, lane, bytes, guarded, Event::Batch(encoded.batch));
                let bytes = bytes as u64;
                let sent = SourceInput::Sent { batch, bytes };
                self.source.handle(self.now, sent);
            }
            // A thread a lane.
            if self.encoding[queue] == 0
                && self.waiting[queue].len() < ENCODED
                && let Some(chunk) = self.source.poll_chunk(self.now, lane)
            {
                *idle = false;
                self.encoding[queue] += 1;
                let takes = pages(&chunk) * PER_PAGE;
                self.after(takes, Event::Encoded(chunk));
            }
        }
    }

    fn start_jobs(&mut self) {
        let steps = self.steps;
        if !self.working[0]
            && let Some(job) = self.source_jobs.front()
        {
            let takes = match job {
                SourceCommand::Scan => {
                    steps.scan + steps.scan_page * f64::from(self.guest.blocks()[0])
                }
                SourceCommand::Freeze => steps.stop,
                SourceCommand::SaveState => steps.save,
                SourceCommand::Journal(_) => steps.journal,
                _ => 0.002,
            };
            if matches!(job, SourceCommand::Scan) {
                // What is written while it is scanned is found the next time.
                self.scanned = self.guest.take_dirty();
            }
            if matches!(job, SourceCommand::Freeze) {
                self.frozen = Some(self.now);
                self.working_set = self.guest.working_set(self.now + BEFORE);
                self.guest.runs_here = false;
            }
            self.working[0] = true;
            self.after(takes, Event::SourceDone);
        }
        if !self.working[1]
            && let Some(job) = self.destination_jobs.front()
        {
            let takes = match job {
                DestinationCommand::Prepare(_) => steps.prepare,
                DestinationCommand::Arm { behind, .. } => {
                    let there = self.guest.blocks()[0].saturating_sub(behind.len() as u32);
                    steps.arm + steps.arm_page * f64::from(there)
                }
                DestinationCommand::LoadState { .. } => steps.load,
                DestinationCommand::Journal(_) => steps.journal,
                DestinationCommand::Resume => steps.resume,
                _ => 0.002,
            };
            self.working[1] = true;
            self.after(takes, Event::DestinationDone);
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Link(link) => self.carry(link),
            Event::Tick => {
                if self.guest.runs_here || self.guest.runs_there {
                    for (region, block) in self.guest.run(self.now + BEFORE, TICK) {
                        self.destination
                            .handle(self.now, DestinationInput::Fault { region, block });
                    }
                }
                self.sample();
                if self.complete.is_none() {
                    self.after(TICK.as_secs_f64(), Event::Tick);
                }
            }
            Event::Figures => {
                let (rtt, min_rtt) = self.links[0].rtts(&self.links[1]);
                let figures = LinkFigures {
                    rtt,
                    min_rtt,
                    bandwidth: self.links[0].bandwidth(),
                    loss: self.links[0].loss(),
                    loss_burst: self.links[0].burst(),
                    ..LinkFigures::default()
                };
                self.source.handle(self.now, SourceInput::Link(figures));
                if self.complete.is_none() {
                    self.after(FIGURES.as_secs_f64(), Event::Figures);
                }
            }
            Event::ToSource(message) => {
                match &message {
                    Message::Fetch { .. } => self.faults += 1,
                    Message::Applied { batches, .. } => self.codec.acknowledge(batches),
                    _ => {}
                }
                self.source.handle(self.now, SourceInput::Message(message));
            }
            Event::ToDestination(message) => {
                self.destination
                    .handle(self.now, DestinationInput::Message(message));
            }
            Event::SourceDone => self.source_done(),
            Event::DestinationDone => self.destination_done(),
            Event::Encoded(chunk) => self.encoded(chunk),
            Event::Batch(batch) => self.apply(batch),
            Event::Applied(applied) => {
                self.destination
                    .handle(self.now, DestinationInput::Applied(applied));
            }
        }
    }

    fn source_done(&mut self) {
        self.working[0] = false;
        let Some(job) = self.source_jobs.pop_front() else {
            return;
        };
        let look = matches!(job, SourceCommand::StartTracking | SourceCommand::Scan);
        if look && self.guest.runs_here {
            if matches!(job, SourceCommand::Scan) {
                let (since, now) = (self.looked + BEFORE, self.now + BEFORE);
                let samples = self.guest.samples(since, now, &mut self.rng);
                self.source.handle(self.now, SourceInput::Sampled(samples));
            }
            self.looked = self.now;
            let accessed = self.guest.accessed(self.now + BEFORE);
            self.source
                .handle(self.now, SourceInput::Accessed(accessed));
        }
        let answer = match job {
            SourceCommand::StartTracking => {
                self.guest.take_dirty();
                SourceInput::Tracking(self.guest.content())
            }
            SourceCommand::Scan => SourceInput::Dirty(std::mem::take(&mut self.scanned)),
            SourceCommand::Freeze => SourceInput::Frozen {
                needed: Blocks::new(),
            },
            SourceCommand::SaveState => SourceInput::StateSaved {
                len: STATE,
                hash: [1; 32],
            },
            SourceCommand::Journal(_) => SourceInput::Journaled,
            SourceCommand::Thaw => SourceInput::Thawed,
            SourceCommand::Release => SourceInput::Released,
            SourceCommand::Send(_) | SourceCommand::CloseLink { .. } | SourceCommand::Finish(_) => {
                return;
            }
        };
        let begun = match &answer {
            SourceInput::Tracking(content) => Some(content.clone()),
            _ => None,
        };
        self.source.handle(self.now, answer);
        if let Some(content) = begun {
            self.look_at_contents(&content);
        }
    }

    /// What pages of what the guest has take in full, as the driver finds out from a sample.
    fn look_at_contents(&mut self, content: &Blocks) {
        for (region, blocks) in content.iter() {
            let kinds = blocks.iter().map(|block| self.guest.kind((region, block)));
            let disk = region.0 == 1;
            let input = SourceInput::Contents {
                disk,
                bytes_per_page: self.codec.mean_bytes(kinds) / if disk { 16.0 } else { 1.0 },
            };
            self.source.handle(self.now, input);
        }
    }

    fn destination_done(&mut self) {
        self.working[1] = false;
        let Some(job) = self.destination_jobs.pop_front() else {
            return;
        };
        let answer = match job {
            DestinationCommand::Check(_) => DestinationInput::Checked(Ok(Vec::new())),
            DestinationCommand::Prepare(offer) => {
                self.ledger = Some(Ledger::new(&offer.regions));
                DestinationInput::Prepared
            }
            DestinationCommand::Arm {
                behind,
                postcopy_pass,
            } => {
                let ledger = self.ledger.as_mut().expect("prepared before");
                self.missing = ledger.missing_at_handover(&behind, postcopy_pass);
                self.guest.trapped = self.missing.clone();
                self.armed = true;
                DestinationInput::Armed {
                    missing: self.missing.clone(),
                }
            }
            DestinationCommand::LoadState { .. } => DestinationInput::Loaded,
            DestinationCommand::Journal(_) => DestinationInput::Journaled,
            DestinationCommand::Resume => {
                self.guest.runs_there = true;
                self.resumed = Some(self.now);
                DestinationInput::Resumed
            }
            DestinationCommand::Disarm => {
                assert!(self.guest.trapped.is_empty());
                self.complete = Some(self.now);
                DestinationInput::Disarmed
            }
            DestinationCommand::Abandon => DestinationInput::Abandoned,
            _ => return,
        };
        self.destination.handle(self.now, answer);
    }

    fn encoded(&mut self, chunk: Chunk) {
        self.encoding[chunk.lane as usize] -= 1;
        let (mut blocks, mut bytes) = (Vec::new(), STATE_RATIO);
        match chunk.body {
            ChunkBody::Blocks { region, blocks: of } => {
                let kinds: Vec<(Block, u32, Kind)> = of
                    .iter()
                    .map(|number| (region, *number))
                    .map(|block| (block, self.guest.version(block), self.guest.kind(block)))
                    .collect();
                let (id, lane) = (chunk.batch, chunk.lane);
                bytes = self.codec.batch(id, lane, chunk.refer, &kinds);
                blocks.extend(kinds.iter().map(|(block, version, _)| (*block, *version)));
            }
            ChunkBody::State { len, .. } => bytes *= f64::from(len),
        }
        let encoded = Encoded {
            awaited: chunk.awaited,
            bytes,
            batch: Batch {
                id: chunk.batch,
                pass: chunk.pass,
                blocks,
            },
        };
        self.waiting[chunk.lane as usize].push_back(encoded);
    }

    /// Notes the guest's speed since the freeze.
    fn sample(&mut self) {
        let Some(frozen) = self.frozen else {
            return;
        };
        if self.guest.runs_there {
            let running = self.guest.workers.iter().filter(|of| of.waits.is_none());
            let speed: f64 = running.map(|worker| worker.weight).sum();
            self.ran += speed * TICK.as_secs_f64();
        }
        self.sampled = self.sampled.max(frozen);
        let took = self.now.saturating_sub(self.sampled);
        if took >= SAMPLE {
            self.speed.push(SpeedSample {
                t: self.now.saturating_sub(frozen).as_secs_f64(),
                ratio: self.ran / took.as_secs_f64(),
            });
            (self.sampled, self.ran) = (self.now, 0.0);
        }
    }

    fn apply(&mut self, batch: Batch) {
        let Some(ledger) = &mut self.ledger else {
            return;
        };
        let mut applied = AppliedBatch {
            batch: batch.id,
            ..AppliedBatch::default()
        };
        for (block, version) in batch.blocks {
            let admitted = ledger.admit(block.0, block.1, batch.pass);
            if !admitted.expect("the source names blocks that exist") {
                continue;
            }
            if self
                .guest
                .place(block, version, self.armed, self.now + BEFORE)
                && self.armed
            {
                applied.placed.insert(block.0, block.1);
            }
            ledger.applied(block.0, block.1, batch.pass);
        }
        self.after(0.0002, Event::Applied(applied));
    }
}

fn pages(chunk: &Chunk) -> f64 {
    match &chunk.body {
        ChunkBody::Blocks { region, blocks } => {
            blocks.len() as f64 * if region.0 == 0 { 1.0 } else { 16.0 }
        }
        ChunkBody::State { .. } => 1.0,
    }
}

/// The level of zstd that a link of so many bytes a second leaves time for.
fn level(bandwidth: f64) -> i32 {
    match bandwidth {
        fast if fast > 50e6 => 1,
        slow if slow > 15e6 => 6,
        _ => 9,
    }
}
