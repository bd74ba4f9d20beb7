//! The embedded guest as a model: the same accesses, versions for contents.

use std::time::Duration;

use hybridmig_engine::blocks::{BlockSet, Blocks, RegionId};
use hybridmig_engine::guest::workload::{
    ContentClass, Contents, DiskContents, DiskPattern, DiskPatternState, DiskSpec, OperationKind,
    Partition, Pattern, PatternState, table_pages,
};

use hybridmig_engine::profile::AccessSample;
use rand::Rng;
use rand::rngs::SmallRng;

use super::Setting;
use super::codec::Kind;

pub const MEMORY: RegionId = RegionId(0);
pub const DISK: RegionId = RegionId(1);
/// Sectors of a block of the disk.
const BLOCK_SECTORS: u32 = 16;
/// Generations in a page of a table.
const ENTRIES: u32 = 1024;
/// How long a block of a disk counts as used.
const USED: Duration = Duration::from_secs(60);
/// The working set is what is accessed in so long.
const WORKING: Duration = Duration::from_secs(10);

/// Pages whose accesses a host samples at a time.
const SAMPLED: u32 = 1024;
/// A block.
pub type Block = (RegionId, u32);

/// One region on both hosts.
struct Region {
    /// Writes so far; of a disk, in sectors.
    truth: Vec<u32>,
    /// Whether the host has the block, be it for zeroes.
    present: Vec<bool>,
    there: Vec<Option<u32>>,
    /// Writes at the destination to what is missing there.
    landed: Vec<u32>,
    touched: Vec<Option<Duration>>,
}

/// What is done with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Touch {
    Read,
    /// So many sectors, or the page, after a look.
    Write(u32),
    /// Sectors, without one: it does not wait for what is missing.
    Replace(u32),
}

/// Who accesses.
enum Hand {
    Memory(Pattern, PatternState, Partition),
    Disk(DiskHand),
}

struct DiskHand {
    pattern: DiskPattern,
    state: DiskPatternState,
    /// First block of its share.
    first: u32,
    /// First page of the generations of the disk's sectors.
    table: u32,
}

/// A thread of the guest.
pub struct Worker {
    hand: Hand,
    /// Accesses per second of a disk thread.
    rate: f64,
    /// What it is in the midst of: not yet done because a block was missing.
    due: Vec<(Block, Touch)>,
    pub waits: Option<Block>,
    pub since: Duration,
    /// Part of an access that fell due.
    credit: f64,
    /// Time in which it waited for blocks.
    pub waited: Duration,
    /// Its share of the guest's work.
    pub weight: f64,
}

pub struct Guest {
    contents: Contents,
    tables: BlockSet,
    regions: Vec<Region>,
    pub workers: Vec<Worker>,
    /// Multiplies their rates.
    factor: f64,
    pub runs_here: bool,
    pub runs_there: bool,
    dirty: Blocks,
    /// Blocks whose access faults at the destination.
    pub trapped: Blocks,
}

impl Guest {
    pub fn new(setting: &Setting) -> Self {
        let (profile, seed, threads) = (setting.profile, setting.seed, setting.threads);
        let pages = (setting.memory_mib << 8) as u32;
        let disk = (setting.disk_mib << 4) as u32;
        let spec = DiskSpec::of(profile);
        // The last pages hold the generations of the disk's sectors.
        let own = pages - table_pages(disk * BLOCK_SECTORS);
        let mut regions = vec![Region::new(pages)];
        let mut tables: BlockSet = (own..pages).collect();
        let mut workers = Vec::new();
        for worker in 0..threads {
            let partition = Partition::of(worker, threads, own);
            let table = partition.pages() - partition.data_pages();
            tables.extend(partition.page(0) - table..partition.page(0));
            let pattern = Pattern::new(profile, threads, partition.data_pages());
            let state = PatternState::new(seed, worker);
            let rate = pattern.rate(&state);
            workers.push(Worker::new(Hand::Memory(pattern, state, partition), rate));
        }
        if disk > 0 {
            regions.push(Region::new(disk));
            let threads = spec.threads.min(threads);
            for worker in 0..threads {
                let bound = |of: u32| disk * of / threads;
                let (first, end) = (bound(worker), bound(worker + 1));
                let hand = DiskHand {
                    pattern: DiskPattern::new(spec, end - first),
                    state: DiskPatternState::new(seed, worker),
                    first,
                    table: own,
                };
                let rate = f64::from(spec.rate()) / f64::from(threads);
                let mut worker = Worker::new(Hand::Disk(hand), rate);
                // Sectors count as work.
                worker.weight = rate * sectors(spec);
                workers.push(worker);
            }
        }
        let all: f64 = workers.iter().map(|worker| worker.weight).sum();
        for worker in &mut workers {
            worker.weight /= all;
        }
        let mut guest = Self {
            contents: Contents::new(profile, profile.spec().contents, seed),
            tables,
            regions,
            workers,
            factor: setting.rate_factor,
            runs_here: true,
            runs_there: false,
            dirty: Blocks::new(),
            trapped: Blocks::new(),
        };
        for page in 0..pages {
            let first = guest
                .contents
                .first_generation(page)
                .max(u32::from(guest.tables.contains(page)));
            guest.regions[0].begin(page, first);
        }
        let contents = DiskContents::new(profile, seed);
        for block in 0..disk {
            guest.regions[1].begin(block, u32::from(contents.is_used(block)));
        }
        guest
    }

    /// Blocks per region.
    pub fn blocks(&self) -> Vec<u32> {
        self.regions
            .iter()
            .map(|region| region.truth.len() as u32)
            .collect()
    }

    /// What is in a block.
    pub fn kind(&self, block: Block) -> Kind {
        let (region, number) = block;
        let version = self.version(block);
        if version == 0 {
            Kind::Zero
        } else if region == DISK {
            Kind::Disk
        } else if self.tables.contains(number) {
            Kind::Table
        } else {
            match self.contents.class(number) {
                ContentClass::Duplicate => {
                    Kind::Shared(self.contents.shared_content(number, version))
                }
                class => Kind::Page(class),
            }
        }
    }

    /// What the source has of a block: what the destination wrote to it while it was missing there is not part of it.
    pub fn version(&self, (region, block): Block) -> u32 {
        let region = &self.regions[usize::from(region.0)];
        region.truth[block as usize] - region.landed[block as usize]
    }

    /// Lets all workers do what falls due in `dt` until `now`; the blocks that they then wait for.
    pub fn run(&mut self, now: Duration, dt: Duration) -> Vec<Block> {
        let mut faults = Vec::new();
        for index in 0..self.workers.len() {
            if self.workers[index].waits.is_some() {
                continue;
            }
            let worker = &mut self.workers[index];
            let rate = match &worker.hand {
                Hand::Memory(pattern, state, _) => pattern.rate(state),
                Hand::Disk(..) => worker.rate,
            };
            worker.credit += self.factor * rate * dt.as_secs_f64();
            while self.workers[index].credit >= 1.0 {
                let worker = &mut self.workers[index];
                worker.credit -= 1.0;
                if worker.due.is_empty() {
                    worker.due = worker.hand.next();
                }
                if let Some(block) = self.go_on(index, now) {
                    let worker = &mut self.workers[index];
                    // What is late by more than a moment is not made up for.
                    worker.credit = 0.0;
                    worker.waits = Some(block);
                    worker.since = now;
                    faults.push(block);
                    break;
                }
            }
        }
        faults
    }

    /// Does what worker `index` is in the midst of; the block that it has to wait for.
    fn go_on(&mut self, index: usize, now: Duration) -> Option<Block> {
        while let Some((block, touch)) = self.workers[index].due.last().copied() {
            let waits = !matches!(touch, Touch::Replace(_));
            if waits && self.runs_there && self.trapped.contains(block.0, block.1) {
                return Some(block);
            }
            self.workers[index].due.pop();
            self.access(block, touch, now);
        }
        None
    }

    fn access(&mut self, (id, block): Block, touch: Touch, now: Duration) {
        let region = &mut self.regions[usize::from(id.0)];
        let at = block as usize;
        region.touched[at] = Some(now);
        let missing = self.runs_there && self.trapped.contains(id, block);
        if self.runs_there && !missing {
            let there = region.there[at].unwrap_or(0);
            assert_eq!(
                there, region.truth[at],
                "{id} {block} is wrong at the destination"
            );
        } else if self.runs_here && id == MEMORY && !region.present[at] {
            // Reading a hole of memory fills it with zeroes.
            region.present[at] = true;
            self.dirty.insert(id, block);
        }
        if let Touch::Write(count) | Touch::Replace(count) = touch {
            region.truth[at] += count;
            region.present[at] = true;
            if !self.runs_there {
                self.dirty.insert(id, block);
            } else if missing {
                region.landed[at] += count;
            } else {
                region.there[at] = Some(region.truth[at]);
            }
        }
    }

    pub fn content(&self) -> Blocks {
        let mut content = Blocks::new();
        for (id, region) in self.regions.iter().enumerate() {
            let with = |(block, present): (usize, &bool)| present.then_some(block as u32);
            let set: BlockSet = region.present.iter().enumerate().filter_map(with).collect();
            *content.entry(RegionId(id as u16)) = set;
        }
        content
    }

    pub fn take_dirty(&mut self) -> Blocks {
        std::mem::take(&mut self.dirty)
    }

    /// Which of some pages with content were touched in the interval since `since`, as a host that samples accesses
    /// sees it.
    pub fn samples(&self, since: Duration, now: Duration, rng: &mut SmallRng) -> Vec<AccessSample> {
        let region = &self.regions[0];
        let (mut watched, mut accessed) = (BlockSet::new(), BlockSet::new());
        for _ in 0..SAMPLED {
            let block = rng.random_range(0..region.truth.len() as u32);
            if region.present[block as usize] {
                watched.insert(block);
                if region.touched[block as usize].is_some_and(|at| at > since) {
                    accessed.insert(block);
                }
            }
        }
        vec![AccessSample {
            region: MEMORY,
            watched,
            accessed,
            seconds: now.saturating_sub(since).as_secs_f64(),
        }]
    }

    /// Blocks of the disk that were used lately.
    pub fn accessed(&self, now: Duration) -> Blocks {
        self.touched(1, now, USED)
    }

    /// Pages of memory that were.
    pub fn working_set(&self, now: Duration) -> u64 {
        self.touched(0, now, WORKING).len()
    }

    fn touched(&self, region: usize, now: Duration, within: Duration) -> Blocks {
        let Some(of) = self.regions.get(region) else {
            return Blocks::new();
        };
        let lately = |at: &Option<Duration>| at.is_some_and(|at| at + within >= now);
        let found = of.touched.iter().enumerate().filter(|(_, at)| lately(at));
        let set: BlockSet = found.map(|(block, _)| block as u32).collect();
        std::iter::once((RegionId(region as u16), set)).collect()
    }

    /// Makes a block current at the destination; false if it was there.
    pub fn place(&mut self, block: Block, version: u32, armed: bool, now: Duration) -> bool {
        if armed && !self.trapped.remove(block.0, block.1) {
            return false;
        }
        let region = &mut self.regions[usize::from(block.0.0)];
        let at = block.1 as usize;
        // What was written meanwhile without a look stays; the rest must be what was frozen.
        let landed = region.landed[at];
        if armed {
            assert_eq!(
                version + landed,
                region.truth[at],
                "{} {} is stale",
                block.0,
                block.1
            );
        }
        region.there[at] = Some(version + landed);
        for worker in &mut self.workers {
            if worker.waits == Some(block) {
                worker.waits = None;
                worker.waited += now.saturating_sub(worker.since);
            }
        }
        true
    }

    /// Whether all of it is at the destination.
    pub fn check(&self) {
        for region in &self.regions {
            for (block, (truth, there)) in region.truth.iter().zip(&region.there).enumerate() {
                assert_eq!(*truth, there.unwrap_or(0), "block {block}");
            }
        }
    }
}

impl Region {
    fn new(blocks: u32) -> Self {
        Self {
            truth: vec![0; blocks as usize],
            present: vec![false; blocks as usize],
            there: vec![None; blocks as usize],
            landed: vec![0; blocks as usize],
            touched: vec![None; blocks as usize],
        }
    }

    /// What a block is when the guest starts.
    fn begin(&mut self, block: u32, version: u32) {
        self.truth[block as usize] = version;
        self.present[block as usize] = version > 0;
    }
}

impl Worker {
    fn new(hand: Hand, rate: f64) -> Self {
        Self {
            hand,
            rate,
            due: Vec::new(),
            waits: None,
            since: Duration::ZERO,
            credit: 0.0,
            waited: Duration::ZERO,
            weight: rate,
        }
    }
}

impl Hand {
    /// Blocks of the next access and what is done with them, the first to be touched last in the list.
    fn next(&mut self) -> Vec<(Block, Touch)> {
        match self {
            Self::Memory(pattern, state, partition) => {
                let access = pattern.next(state);
                let page = partition.page(access.index);
                let table = partition.page(0) + partition.data_pages() - partition.pages();
                let entry = table + access.index / ENTRIES;
                let touch = if access.write {
                    Touch::Write(1)
                } else {
                    Touch::Read
                };
                vec![((MEMORY, page), touch), ((MEMORY, entry), touch)]
            }
            Self::Disk(hand) => {
                let operation = hand.pattern.next(&mut hand.state);
                let sector = hand.first * BLOCK_SECTORS + operation.first;
                let entry = hand.table + sector / ENTRIES;
                let (of_block, of_entry) = match operation.kind {
                    OperationKind::Read => (Touch::Read, Touch::Read),
                    OperationKind::Update => (Touch::Write(operation.count), Touch::Write(1)),
                    OperationKind::Replace => (Touch::Replace(operation.count), Touch::Write(1)),
                };
                let block = (DISK, sector / BLOCK_SECTORS);
                vec![(block, of_block), ((MEMORY, entry), of_entry)]
            }
        }
    }
}

/// Sectors of an operation, on average: powers of two, each as likely.
fn sectors(spec: &DiskSpec) -> f64 {
    let (small, large) = (spec.sizes.0.ilog2(), spec.sizes.1.ilog2());
    let sum: u32 = (small..=large).map(|power| 1 << power).sum();
    f64::from(sum) / f64::from(large - small + 1)
}
