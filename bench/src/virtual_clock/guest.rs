//! The embedded guest as a model: the same accesses, versions for contents.

use std::time::Duration;

use hybridmig_engine::blocks::{BlockSet, Blocks, RegionId};
use hybridmig_engine::guest::workload::{
    DiskPattern, DiskPatternState, DiskSpec, OperationKind, Partition, Pattern, PatternState,
    Profile, mix,
};

use hybridmig_engine::profile::AccessSample;
use rand::Rng;
use rand::rngs::SmallRng;

use super::Setting;

pub const MEMORY: RegionId = RegionId(0);
pub const DISK: RegionId = RegionId(1);
/// Sectors of a block of the disk.
const BLOCK_SECTORS: u32 = 16;
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
    truth: Vec<u32>,
    there: Vec<Option<u32>>,
    touched: Vec<Option<Duration>>,
}

/// Who accesses.
enum Hand {
    Memory(Pattern, PatternState, Partition),
    Disk(DiskPattern, DiskPatternState, u32),
}

/// A thread of the guest.
pub struct Worker {
    hand: Hand,
    /// Accesses per second of a disk thread.
    rate: f64,
    /// What it is in the midst of: not yet done because a block was missing.
    due: Vec<(Block, bool)>,
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
    profile: Profile,
    seed: u64,
    regions: Vec<Region>,
    pub workers: Vec<Worker>,
    pub runs_here: bool,
    pub runs_there: bool,
    dirty: Blocks,
    /// Blocks whose access faults at the destination.
    pub trapped: Blocks,
}

impl Guest {
    pub fn new(setting: &Setting) -> Self {
        let pages = (setting.memory_mib << 8) as u32;
        let disk = (setting.disk_mib << 4) as u32;
        let spec = DiskSpec::of(setting.profile);
        let mut regions = vec![Region::new(pages)];
        let mut workers: Vec<Worker> = (0..setting.threads)
            .map(|worker| {
                let partition = Partition::of(worker, setting.threads, pages);
                let pattern =
                    Pattern::new(setting.profile, setting.threads, partition.data_pages());
                let state = PatternState::new(setting.seed, worker);
                let rate = pattern.rate(&state);
                Worker::new(Hand::Memory(pattern, state, partition), rate)
            })
            .collect();
        if disk > 0 {
            regions.push(Region::new(disk));
            let threads = spec.threads.min(setting.threads);
            let share = disk / threads;
            for worker in 0..threads {
                let pattern = DiskPattern::new(spec, share);
                let state = DiskPatternState::new(setting.seed, worker);
                let rate = f64::from(spec.rate()) / f64::from(threads);
                let mut worker = Worker::new(Hand::Disk(pattern, state, worker * share), rate);
                // Sectors count as work.
                worker.weight = rate * f64::from(spec.sizes.0 + spec.sizes.1) / 2.0;
                workers.push(worker);
            }
        }
        let all: f64 = workers.iter().map(|worker| worker.weight).sum();
        for worker in &mut workers {
            worker.weight /= all;
        }
        let mut guest = Self {
            profile: setting.profile,
            seed: setting.seed,
            regions,
            workers,
            runs_here: true,
            runs_there: false,
            dirty: Blocks::new(),
            trapped: Blocks::new(),
        };
        for page in 0..pages {
            // Pages of the class zero are not there until they are touched.
            guest.regions[0].truth[page as usize] = u32::from(guest.class(page) != Class::Zero);
        }
        for block in 0..disk {
            let used =
                mix(guest.seed ^ u64::from(block / 16) ^ 0xd15c) % 100 < u64::from(spec.used);
            guest.regions[1].truth[block as usize] = u32::from(used);
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

    fn class(&self, page: u32) -> Class {
        let shares = self.profile.spec().contents;
        let draw = (mix(self.seed ^ mix(u64::from(page) + 7)) % 100) as u32;
        match draw {
            draw if draw < shares.zero => Class::Zero,
            draw if draw < shares.zero + shares.text => Class::Text,
            draw if draw < shares.zero + shares.text + shares.duplicate => Class::Duplicate,
            _ => Class::Random,
        }
    }

    /// Bytes of a block in a batch; `again` if the destination has an older version of it.
    pub fn wire_bytes(&self, (region, block): Block, again: bool) -> f64 {
        if region == DISK {
            let shares = DiskSpec::of(self.profile).contents;
            let random = 100 - shares.zero - shares.text - shares.duplicate;
            let page = f64::from(shares.text) / 100.0 * TEXT + f64::from(random) / 100.0 * RANDOM;
            return 16.0 * page + 64.0;
        }
        // A written page of the class zero has a header, and those of duplicates are named.
        let size = match self.class(block) {
            Class::Zero => 60.0,
            Class::Duplicate => 40.0,
            Class::Random => RANDOM,
            Class::Text => TEXT,
        };
        let parts = f64::from(self.profile.spec().parts);
        if again && size >= TEXT && parts > 1.0 {
            size / parts + 120.0
        } else {
            size
        }
    }

    pub fn version(&self, (region, block): Block) -> u32 {
        self.regions[usize::from(region.0)].truth[block as usize]
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
            worker.credit += rate * dt.as_secs_f64();
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
        while let Some((block, write)) = self.workers[index].due.last().copied() {
            if self.runs_there && self.trapped.contains(block.0, block.1) {
                return Some(block);
            }
            self.workers[index].due.pop();
            self.access(block, write, now);
        }
        None
    }

    fn access(&mut self, (id, block): Block, write: bool, now: Duration) {
        let region = &mut self.regions[usize::from(id.0)];
        let at = block as usize;
        region.touched[at] = Some(now);
        if self.runs_there {
            let there = region.there[at].unwrap_or(0);
            assert_eq!(
                there, region.truth[at],
                "{id} {block} is wrong at the destination"
            );
        } else if region.truth[at] == 0 {
            // Reading a hole of memory fills it with zeroes.
            region.truth[at] = 1;
            self.dirty.insert(id, block);
        }
        if write {
            region.truth[at] += 1;
            if self.runs_there {
                region.there[at] = Some(region.truth[at]);
            } else {
                self.dirty.insert(id, block);
            }
        }
    }

    pub fn content(&self) -> Blocks {
        let mut content = Blocks::new();
        for (id, region) in self.regions.iter().enumerate() {
            let with = |(block, version): (usize, &u32)| (*version > 0).then_some(block as u32);
            let set: BlockSet = region.truth.iter().enumerate().filter_map(with).collect();
            *content.entry(RegionId(id as u16)) = set;
        }
        content
    }

    pub fn take_dirty(&mut self) -> Blocks {
        std::mem::take(&mut self.dirty)
    }

    /// Which of some pages with content were touched in the interval since `since`, as a host that samples accesses sees it.
    pub fn samples(&self, since: Duration, now: Duration, rng: &mut SmallRng) -> Vec<AccessSample> {
        let region = &self.regions[0];
        let (mut watched, mut accessed) = (BlockSet::new(), BlockSet::new());
        for _ in 0..SAMPLED {
            let block = rng.random_range(0..region.truth.len() as u32);
            if region.truth[block as usize] > 0 {
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
        self.regions[usize::from(block.0.0)].there[block.1 as usize] = Some(version);
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
                let there = there.unwrap_or(0);
                assert!(
                    *truth == there || (*truth <= 1 && there == 0),
                    "{block}: {truth} {there}"
                );
            }
        }
    }
}

/// Bytes of a page of words, and of random bytes, in a batch.
const TEXT: f64 = 1450.0;
const RANDOM: f64 = 4100.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Zero,
    Text,
    Duplicate,
    Random,
}

impl Region {
    fn new(blocks: u32) -> Self {
        Self {
            truth: vec![0; blocks as usize],
            there: vec![None; blocks as usize],
            touched: vec![None; blocks as usize],
        }
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
    /// Blocks of the next access, the first to be touched last in the list, and whether each is written.
    fn next(&mut self) -> Vec<(Block, bool)> {
        match self {
            Self::Memory(pattern, state, partition) => {
                let access = pattern.next(state);
                let page = partition.page(access.index);
                let table = partition.page(0) - partition.pages() + partition.data_pages();
                // 1024 generations of 32 bits to a page of the table.
                let entry = table + access.index / 1024;
                vec![
                    ((MEMORY, page), access.write),
                    ((MEMORY, entry), access.write),
                ]
            }
            Self::Disk(pattern, state, first) => {
                let operation = pattern.next(state);
                let block = *first + operation.first / BLOCK_SECTORS;
                let whole = operation.count == BLOCK_SECTORS;
                let write = operation.kind != OperationKind::Read;
                // A write lands without the block's old contents; what is not replaced comes later.
                if operation.kind == OperationKind::Replace && whole {
                    return vec![];
                }
                vec![((DISK, block), write)]
            }
        }
    }
}
