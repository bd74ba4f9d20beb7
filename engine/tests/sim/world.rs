//! The world of one run: the clock, the events, both processes and what lies between them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::Duration;

use hybridmig_engine::blocks::{Blocks, RegionId};
use hybridmig_engine::session::destination::{DestinationConfig, DestinationMachine};
use hybridmig_engine::session::io::{
    AppliedBatch, Chunk, ChunkBody, DestinationCommand, DestinationInput, DestinationOutcome,
    DestinationRecord, Lane, LinkFigures, Refer, SourceCommand, SourceInput, SourceOutcome,
    SourceRecord,
};
use hybridmig_engine::session::ledger::Ledger;
use hybridmig_engine::session::source::{SourceConfig, SourceMachine};
use hybridmig_transport::message::{
    GuestDescription, Message, Refusal, RefusalCode, RegionInfo, RegionKind, SessionId,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::guest::{Access, Block, Guest};
use super::net::{Batch, Direction, Item};
use super::scenario::{End, Scenario};
use super::verdict;

/// How long the machines wait for each other.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// No run may take longer than this: nobody waits for ever.
const LONGEST: Duration = Duration::from_secs(900);
/// Chunks that a lane takes at once.
const LANE_ROOM: usize = 4;

#[derive(Debug)]
pub enum Event {
    Tick,
    Job(End, u64),
    Transmitted(End, u64),
    Arrive(End, u64, Item),
    Encode(u64, Chunk),
    Apply(Batch),
    Report(AppliedBatch),
    Cut(Duration),
    Loss(End, u64),
    Dial,
    Cancel(End),
    Crash(End),
    Figures,
}

/// A command at work.
#[derive(Debug)]
pub struct Job<C> {
    pub token: u64,
    pub command: C,
    /// Took effect; what is left is the answer.
    pub done: bool,
    pub fails: bool,
}

/// A process: one machine and its driver.
#[derive(Debug)]
pub struct Process<M, C, R, O> {
    pub machine: M,
    pub jobs: VecDeque<C>,
    pub job: Option<Job<C>>,
    pub started: u64,
    pub journal: Vec<R>,
    pub outcome: Option<O>,
    pub crashed: bool,
    /// The connection that its driver holds.
    pub epoch: Option<u64>,
}

impl<M, C, R, O> Process<M, C, R, O> {
    fn new(machine: M) -> Self {
        Self {
            machine,
            jobs: VecDeque::new(),
            job: None,
            started: 0,
            journal: Vec::new(),
            outcome: None,
            crashed: false,
            epoch: None,
        }
    }

    pub fn alive(&self) -> bool {
        !self.crashed && self.outcome.is_none()
    }
}

type Source = Process<SourceMachine, SourceCommand, SourceRecord, SourceOutcome>;
type Destination =
    Process<DestinationMachine, DestinationCommand, DestinationRecord, DestinationOutcome>;

pub struct World {
    pub scenario: Scenario,
    pub rng: SmallRng,
    pub now: Duration,
    events: BinaryHeap<Reverse<(Duration, u64)>>,
    due: BTreeMap<u64, Event>,
    sequence: u64,
    pub guest: Guest,
    pub source: Source,
    pub destination: Destination,
    // The link. Index 0: from the source, 1: from the destination.
    directions: [Direction; 2],
    epoch: u64,
    up: bool,
    outage_until: Duration,
    messages: u64,
    encoding: [usize; 4],
    dialling: bool,
    ticking: bool,
    // The destination's data plane.
    pub ledger: Option<Ledger>,
    pub armed: bool,
    /// The answer to `Arm`.
    pub arm_missing: Blocks,
    /// Pieces of the state that have come: offset → (length, which state).
    pub state: BTreeMap<u64, (u32, u64)>,
    /// Which state was saved last.
    pub states_saved: u64,
    /// Blocks that `LoadState` waits for.
    pub load_waits: Vec<Block>,
    last_report: Duration,
    trace: bool,
}

impl World {
    pub fn new(scenario: Scenario) -> Self {
        let mut rng = SmallRng::seed_from_u64(scenario.seed ^ 0x5eed);
        let directions = [0, 1].map(|way| scenario.direction(way));
        let guest = Guest::new(
            &scenario.regions,
            scenario.memory_regions,
            scenario.vcpus,
            &mut rng,
        );
        let regions: Vec<RegionInfo> = scenario
            .regions
            .iter()
            .enumerate()
            .map(|(id, blocks)| {
                let id = RegionId(id as u16);
                let kind = if scenario.is_disk(id) {
                    RegionKind::Disk
                } else {
                    RegionKind::Memory
                };
                RegionInfo {
                    id,
                    kind,
                    name: id.to_string(),
                    blocks: *blocks,
                    block_size: scenario.block_bytes(id),
                }
            })
            .collect();
        let description = GuestDescription {
            kind: "model".into(),
            name: "guest".into(),
            facts: BTreeMap::new(),
        };
        let mut config = SourceConfig::new(SessionId([7; 8]), scenario.mode);
        config.mem_frac = scenario.mem_frac;
        config.disk_frac = scenario.disk_frac;
        config.max_downtime = scenario.max_downtime;
        config.target_downtime = Duration::from_millis([5, 90, 300][rng.random_range(0..3)]);
        config.patience = PATIENCE;
        config.chunk_pages = [1, 8, 64][rng.random_range(0..3)];
        config.prefetch = [0, 4, 24][rng.random_range(0..3)];
        config.min_in_flight = [40_000, 2 << 20][rng.random_range(0..2)];
        config.min_round = Duration::from_millis(10);
        config.max_rounds = [2, 10, 30][rng.random_range(0..3)];
        let interval = Duration::from_millis([10, 60, 1000][rng.random_range(0..3)]);
        config.observe = scenario.observe;
        config.scan_interval = scenario.scan_interval.unwrap_or(interval);
        let listen = DestinationConfig {
            patience: PATIENCE,
            ..DestinationConfig::default()
        };
        let mut world = Self {
            rng,
            now: Duration::ZERO,
            events: BinaryHeap::new(),
            due: BTreeMap::new(),
            sequence: 0,
            guest,
            source: Process::new(SourceMachine::new(config, description, regions)),
            destination: Process::new(DestinationMachine::new(listen)),
            directions,
            epoch: 0,
            up: false,
            outage_until: Duration::ZERO,
            messages: 0,
            encoding: [0; 4],
            dialling: false,
            ticking: false,
            ledger: None,
            armed: false,
            arm_missing: Blocks::new(),
            state: BTreeMap::new(),
            states_saved: 0,
            load_waits: Vec::new(),
            last_report: Duration::ZERO,
            trace: std::env::var_os("HYBRIDMIG_SIM_TRACE").is_some(),
            scenario,
        };
        for (at, outage) in world.scenario.cuts.clone() {
            world.at(at, Event::Cut(outage));
        }
        for (end, at) in world.scenario.cancels.clone() {
            world.at(at, Event::Cancel(end));
        }
        if let Some((end, at)) = world.scenario.crash_at {
            world.at(at, Event::Crash(end));
        }
        world.at(Duration::from_millis(5), Event::Figures);
        world
    }

    /// Runs until both processes have ended, and checks the end.
    pub fn run(mut self) -> verdict::End {
        self.pump();
        let mut steps = 0u64;
        let mut timeouts_here = 0;
        while self.source.alive() || self.destination.alive() {
            steps += 1;
            assert!(steps < 3_000_000, "no end in sight at {:?}", self.now);
            assert!(self.now < LONGEST, "it takes too long: {:?}", self.stand());
            let timeout = self.next_timeout();
            let event = self.events.peek().map(|Reverse((at, _))| *at);
            let Some(next) = [timeout, event].into_iter().flatten().min() else {
                panic!("nothing will ever happen again: {:?}", self.stand());
            };
            if next > self.now {
                timeouts_here = 0;
                self.now = next;
            }
            if timeout.is_some_and(|at| at <= self.now) {
                timeouts_here += 1;
                assert!(timeouts_here < 1000, "a timeout that never passes");
                self.source_input(SourceInput::Timeout);
                self.destination_input(DestinationInput::Timeout);
            } else if let Some(Reverse((_, id))) = self.events.pop()
                && let Some(event) = self.due.remove(&id)
            {
                self.event(event);
            }
            self.pump();
            self.guest.check_one_side();
        }
        let end = verdict::End {
            source: self.source.outcome.clone(),
            destination: self.destination.outcome.clone(),
            source_journal: self.source.journal.clone(),
            destination_journal: self.destination.journal.clone(),
            source_crashed: self.source.crashed,
            destination_crashed: self.destination.crashed,
            figures: self.source.machine.figures().clone(),
        };
        self.note(|_| format!("ends: {end:?}"));
        end.check(&self.guest);
        end
    }

    fn stand(&self) -> String {
        format!(
            "source {:?} {:?} {:?}, destination {:?} {:?} {:?}",
            self.source.machine.phase(),
            self.source.outcome,
            self.source.epoch,
            self.destination.machine.phase(),
            self.destination.outcome,
            self.destination.epoch
        )
    }

    fn next_timeout(&self) -> Option<Duration> {
        let source = self
            .source
            .alive()
            .then(|| self.source.machine.poll_timeout());
        let destination = self
            .destination
            .alive()
            .then(|| self.destination.machine.poll_timeout());
        [source.flatten(), destination.flatten()]
            .into_iter()
            .flatten()
            .min()
    }

    pub fn note(&self, what: impl FnOnce(&Self) -> String) {
        if self.trace {
            eprintln!("{:>12?} {}", self.now, what(self));
        }
    }

    pub fn at(&mut self, at: Duration, event: Event) {
        self.sequence += 1;
        self.due.insert(self.sequence, event);
        self.events.push(Reverse((at, self.sequence)));
    }

    /// Something between the two, from now.
    pub fn after_us(&mut self, least: u64, most: u64, event: Event) {
        let wait = Duration::from_micros(self.rng.random_range(least..=most));
        self.at(self.now + wait, event);
    }

    pub fn source_input(&mut self, input: SourceInput) {
        if self.source.alive() {
            self.note(|_| format!("source      <- {}", brief(&input)));
            self.source.machine.handle(self.now, input);
        }
    }

    pub fn destination_input(&mut self, input: DestinationInput) {
        if self.destination.alive() {
            self.note(|_| format!("destination <- {}", brief(&input)));
            self.destination.machine.handle(self.now, input);
        }
    }

    /// Carries out what the machines want, until they want nothing more.
    fn pump(&mut self) {
        loop {
            let mut idle = true;
            while self.source.alive()
                && let Some(command) = self.source.machine.poll_command()
            {
                idle = false;
                self.note(|_| format!("source      -> {}", brief(&command)));
                self.source_command(command);
            }
            while self.destination.alive()
                && let Some(command) = self.destination.machine.poll_command()
            {
                idle = false;
                self.note(|_| format!("destination -> {}", brief(&command)));
                self.destination_command(command);
            }
            self.fill_lanes(&mut idle);
            self.start_jobs();
            if idle {
                break;
            }
        }
        self.transmit(End::Source);
        self.transmit(End::Destination);
        if !self.dialling
            && self.source.alive()
            && self.source.epoch.is_none()
            && self.source.machine.wants_link()
        {
            self.dialling = true;
            self.after_us(100, 200_000, Event::Dial);
        }
        if !self.ticking && self.guest.active() {
            self.ticking = true;
            self.at(self.now + self.scenario.access, Event::Tick);
        }
        // Nobody ever came.
        if !self.source.alive()
            && self.destination.alive()
            && self.destination.machine.session().is_none()
            && self.destination.job.is_none()
        {
            let reason = "the operator stops waiting".into();
            self.destination_input(DestinationInput::Cancel { reason });
            while let Some(command) = self.destination.machine.poll_command() {
                self.destination_command(command);
            }
        }
    }

    fn fill_lanes(&mut self, idle: &mut bool) {
        let Some(epoch) = self.source.epoch.filter(|_| self.source.alive()) else {
            return;
        };
        for lane in [Lane::Urgent, Lane::Freeze, Lane::Bulk] {
            while self.encoding[lane as usize] + self.directions[0].queued(lane) < LANE_ROOM {
                let Some(chunk) = self.source.machine.poll_chunk(self.now, lane) else {
                    break;
                };
                assert_eq!(chunk.lane, lane);
                *idle = false;
                self.encoding[lane as usize] += 1;
                self.after_us(20, 3_000, Event::Encode(epoch, chunk));
            }
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Tick => self.tick(),
            Event::Job(end, token) => self.job_due(end, token),
            Event::Transmitted(end, epoch) => {
                if epoch == self.epoch {
                    self.directions[index(end)].busy = false;
                }
            }
            Event::Arrive(end, epoch, item) => {
                if self.up && epoch == self.epoch {
                    self.arrive(end, epoch, item);
                }
            }
            Event::Encode(epoch, chunk) => self.encode(epoch, chunk),
            Event::Apply(batch) => self.apply(batch),
            Event::Report(batch) => self.destination_input(DestinationInput::Applied(batch)),
            Event::Cut(outage) => self.cut(outage),
            Event::Loss(end, epoch) => {
                if !(self.up && epoch == self.epoch) {
                    self.lose(end, epoch, "timed out");
                }
            }
            Event::Dial => self.dial(),
            Event::Cancel(end) => {
                let reason = "the operator said so".to_owned();
                match end {
                    End::Source => self.source_input(SourceInput::Cancel { reason }),
                    End::Destination => {
                        self.destination_input(DestinationInput::Cancel { reason });
                    }
                }
            }
            Event::Crash(end) => self.crash(end),
            Event::Figures => {
                if self.source.epoch.is_some() {
                    let figures = LinkFigures {
                        rtt: 2 * self.scenario.delay,
                        min_rtt: 2 * self.scenario.delay,
                        bandwidth: self.scenario.bandwidth as f64,
                        loss: self.scenario.loss.mean(),
                        ..LinkFigures::default()
                    };
                    self.source_input(SourceInput::Link(figures));
                }
                if self.source.alive() {
                    self.after_us(100_000, 300_000, Event::Figures);
                }
            }
        }
    }

    // The guest.

    fn tick(&mut self) {
        self.ticking = false;
        match self.guest.access(self.scenario.writes, &mut self.rng) {
            Access::Done => {}
            Access::Faulted((region, block)) => {
                self.destination_input(DestinationInput::Fault { region, block });
            }
            Access::Overwritten(block) => self.not_needed(block),
        }
        if self.guest.destination_runs && self.rng.random_bool(0.002) {
            let block = self.guest.remove(&mut self.rng);
            self.not_needed(block);
        }
        if self.guest.active() {
            self.ticking = true;
            // A guest that nobody serves need not be watched closely.
            let slow = if self.source.epoch.is_some() { 1 } else { 20 };
            let wait = self.scenario.access.as_micros() as u64 * slow;
            self.after_us(wait / 2, wait * 3 / 2, Event::Tick);
        }
    }

    fn not_needed(&mut self, (region, block): Block) {
        if let Some(ledger) = &mut self.ledger {
            ledger.removed(region, block, 1);
        }
        let removed: Blocks = std::iter::once((region, [block].into_iter().collect())).collect();
        self.destination_input(DestinationInput::Removed(removed));
    }

    // The link.

    /// Hands something to the transport of one end.
    pub fn send(&mut self, end: End, lane: Lane, item: Item) {
        let epoch = match end {
            End::Source => self.source.epoch,
            End::Destination => self.destination.epoch,
        };
        if self.up && epoch == Some(self.epoch) {
            self.directions[index(end)].push(lane, item);
        }
    }

    /// One end closes its connection, after everything that it has sent.
    pub fn close(&mut self, end: End) {
        self.send(end, Lane::Control, Item::Close);
        match end {
            End::Source => self.source.epoch = None,
            End::Destination => self.destination.epoch = None,
        }
    }

    fn transmit(&mut self, end: End) {
        let direction = &mut self.directions[index(end)];
        if !self.up || direction.busy {
            return;
        }
        let Some((lane, item)) = direction.pop() else {
            return;
        };
        if matches!(item, Item::Message(_)) {
            self.messages += 1;
            if self.scenario.cut_at_message == Some((self.messages, true)) {
                self.cut_now();
                return;
            }
        }
        direction.busy = true;
        let (sent, arrival) = direction.carry(self.now, lane, &item);
        let cut = matches!(item, Item::Message(_))
            && self.scenario.cut_at_message == Some((self.messages, false));
        self.at(sent, Event::Transmitted(end, self.epoch));
        self.at(arrival, Event::Arrive(other(end), self.epoch, item));
        if cut {
            self.at(arrival, Event::Cut(Duration::from_millis(50)));
        }
    }

    fn cut_now(&mut self) {
        let outage = Duration::from_millis(self.rng.random_range(1..3_000));
        self.cut(outage);
    }

    fn cut(&mut self, outage: Duration) {
        self.note(|_| format!("the link is cut for {outage:?}"));
        self.outage_until = self.outage_until.max(self.now + outage);
        self.hang_up();
    }

    /// The connection is dead; each end finds out in its own time.
    fn hang_up(&mut self) {
        if std::mem::replace(&mut self.up, false) {
            self.directions.iter_mut().for_each(Direction::clear);
            self.after_us(1_000, 800_000, Event::Loss(End::Source, self.epoch));
            self.after_us(1_000, 800_000, Event::Loss(End::Destination, self.epoch));
        }
    }

    fn lose(&mut self, end: End, epoch: u64, reason: &str) {
        let reason = reason.to_owned();
        match end {
            End::Source if self.source.epoch == Some(epoch) => {
                self.source.epoch = None;
                self.source_input(SourceInput::Disconnected { reason });
            }
            End::Destination if self.destination.epoch == Some(epoch) => {
                self.destination.epoch = None;
                self.destination_input(DestinationInput::Disconnected { reason });
            }
            _ => {}
        }
    }

    fn dial(&mut self) {
        self.dialling = false;
        if !self.source.alive() || !self.source.machine.wants_link() {
            return;
        }
        let answers = self.destination.alive() || self.scenario.fresh_listener;
        if self.now < self.outage_until || !answers {
            if self.epoch == 0 {
                let reason = "nobody answers".into();
                self.source_input(SourceInput::Disconnected { reason });
            }
            return;
        }
        self.hang_up();
        self.epoch += 1;
        self.up = true;
        self.directions.iter_mut().for_each(Direction::clear);
        self.note(|world| format!("connection {} is up", world.epoch));
        self.source.epoch = Some(self.epoch);
        if self.destination.alive() && self.destination.epoch.is_none() {
            self.destination.epoch = Some(self.epoch);
            self.destination_input(DestinationInput::Connected);
        }
        self.source_input(SourceInput::Connected);
    }

    fn arrive(&mut self, end: End, epoch: u64, item: Item) {
        match (end, item) {
            (_, Item::Close) => {
                self.up = false;
                self.directions.iter_mut().for_each(Direction::clear);
                self.lose(end, epoch, "closed by the peer");
            }
            (End::Source, Item::Message(message)) if self.source.epoch == Some(epoch) => {
                self.source_input(SourceInput::Message(message));
            }
            (End::Destination, item) if !self.destination.alive() => {
                // A listener that knows nothing of the session.
                if let (true, Item::Message(Message::Hello { .. })) =
                    (self.scenario.fresh_listener, item)
                {
                    let reasons = vec!["never heard of it".into()];
                    let code = RefusalCode::UnknownSession;
                    self.turn_away(Refusal { code, reasons });
                }
            }
            (End::Destination, Item::Message(message)) => {
                if self.destination.epoch == Some(epoch) {
                    self.destination_input(DestinationInput::Message(message));
                } else if matches!(message, Message::Hello { .. }) {
                    self.second_connection(epoch, message);
                }
            }
            (End::Destination, Item::Batch(batch)) if self.destination.epoch == Some(epoch) => {
                self.after_us(10, 4_000, Event::Apply(batch));
            }
            _ => {}
        }
    }

    fn second_connection(&mut self, epoch: u64, hello: Message) {
        if let Some(refusal) = self.destination.machine.refuse_other(&hello) {
            self.turn_away(refusal);
            return;
        }
        if let Some(old) = self.destination.epoch {
            self.lose(End::Destination, old, "replaced by a new connection");
        }
        if self.destination.alive() {
            self.destination.epoch = Some(epoch);
            self.destination_input(DestinationInput::Connected);
            self.destination_input(DestinationInput::Message(hello));
        }
    }

    fn turn_away(&mut self, refusal: Refusal) {
        let back = &mut self.directions[1];
        back.push(Lane::Control, Item::Message(Message::Refuse(refusal)));
        back.push(Lane::Control, Item::Close);
    }

    // The data planes.

    fn encode(&mut self, epoch: u64, chunk: Chunk) {
        self.encoding[chunk.lane as usize] -= 1;
        if !self.source.alive() || self.source.epoch != Some(epoch) {
            return;
        }
        let (mut blocks, mut state, mut bytes) = (Vec::new(), None, 30);
        match chunk.body {
            ChunkBody::Blocks { region, blocks: of } => {
                let share = self.rng.random_range(0.1..1.0);
                let size = self.scenario.block_bytes(region);
                bytes += (of.len() as f64 * share * f64::from(size)) as u64;
                for block in of {
                    let content = self.guest.source.read((region, block));
                    blocks.push(((region, block), content));
                }
            }
            ChunkBody::State { offset, len } => {
                bytes += u64::from(len);
                state = Some((offset, len, self.states_saved));
            }
        }
        let batch = Batch {
            id: chunk.batch,
            pass: chunk.pass,
            may_refer: chunk.refer == Refer::Anything,
            blocks,
            state,
            bytes,
        };
        self.send(End::Source, chunk.lane, Item::Batch(batch));
        let batch = chunk.batch;
        self.source_input(SourceInput::Sent { batch, bytes });
    }

    fn apply(&mut self, batch: Batch) {
        let Some(ledger) = self.ledger.as_mut().filter(|_| self.destination.alive()) else {
            return;
        };
        let mut report = AppliedBatch {
            batch: batch.id,
            ..AppliedBatch::default()
        };
        for (block, content) in batch.blocks {
            let (region, number) = block;
            let admitted = ledger.admit(region, number, batch.pass);
            if !admitted.expect("the source names blocks that exist") {
                continue;
            }
            let rejections = if batch.may_refer {
                self.scenario.rejections
            } else {
                self.scenario.rejections / 5.0
            };
            if self.rng.random_bool(rejections) {
                ledger.rejected(region, number, batch.pass);
                report.rejected.push((region, number));
                continue;
            }
            if self.armed {
                if self.guest.place(block, content) {
                    report.placed.insert(region, number);
                }
            } else {
                self.guest.destination.set(block, Some(content));
            }
            if ledger.applied(region, number, batch.pass) {
                report.repaired.push((region, number));
            }
        }
        if let Some((offset, len, which)) = batch.state {
            self.state.insert(offset, (len, which));
        }
        // Reports keep the order of the ledger.
        let delay = Duration::from_micros(self.rng.random_range(0..2_000));
        self.last_report = (self.now + delay).max(self.last_report + Duration::from_nanos(1));
        self.at(self.last_report, Event::Report(report));
        self.load_may_go_on();
    }

    /// A process dies. The destination's guest lives on in its own process if it had been started.
    pub fn crash(&mut self, end: End) {
        let (alive, epoch) = match end {
            End::Source => (self.source.alive(), self.source.epoch.take()),
            End::Destination => (self.destination.alive(), self.destination.epoch.take()),
        };
        if !alive {
            return;
        }
        self.note(|_| format!("{end:?} crashes"));
        match end {
            End::Source => {
                self.source.crashed = true;
                self.source.job = None;
                self.source.jobs.clear();
            }
            End::Destination => {
                self.destination.crashed = true;
                self.destination.job = None;
                self.destination.jobs.clear();
            }
        }
        if epoch == Some(self.epoch) {
            self.hang_up();
        }
    }
}

fn index(end: End) -> usize {
    match end {
        End::Source => 0,
        End::Destination => 1,
    }
}

fn other(end: End) -> End {
    match end {
        End::Source => End::Destination,
        End::Destination => End::Source,
    }
}

fn brief(what: &impl std::fmt::Debug) -> String {
    let mut text = format!("{what:?}");
    if let Some((cut, _)) = text.char_indices().nth(160) {
        text.truncate(cut);
    }
    text
}
