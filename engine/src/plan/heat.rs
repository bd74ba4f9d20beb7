//! How hot every block is, and how often blocks of each level are used.

use hybridmig_transport::message::{RegionInfo, RegionKind};

use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::profile::rates::{LEVELS, READ, Rates};
use crate::profile::spread::{Spread, spread};
use crate::profile::{AccessSample, HotnessClass};
use crate::regions::Regions;

/// Shortest interval, in seconds, that is a bit of history of its own.
const STEP: f64 = 0.25;
/// Weight of a new interval in what is known of how used blocks lie.
const SPREAD_WEIGHT: f64 = 0.4;

/// How recently and how often each block was written: one byte per block, its **level**, one bit per scan, the
/// newest on top. History older than eight scans is forgotten. A block that was only read lately has level
/// [`READ`]. What a level means in writes and accesses per second is counted ([`Rates`]); where nothing was counted
/// the levels' numeric order stands: recency first, then frequency.
#[derive(Debug, Default)]
pub struct Heat {
    regions: Vec<Vec<u8>>,
    read: Blocks,
    /// What the last scan has found.
    last: Blocks,
    /// When reads were told of last, in seconds.
    looked: Option<f64>,
    /// Seconds since the levels were moved on.
    since: f64,
    pub(super) shapes: Regions,
    /// Of memory, and of disks.
    kinds: [KindHeat; 2],
}

#[derive(Debug, Default)]
struct KindHeat {
    rates: Rates,
    /// How near each other used blocks lie, and how much of that is walks, where it was seen: see [`Spread`].
    spread: (Option<f64>, Option<f64>),
}

/// Pages by level, of memory and of disks.
#[derive(Clone, Debug, PartialEq)]
pub struct Tally(pub [Vec<f64>; 2]);

impl Default for Tally {
    fn default() -> Self {
        Self([vec![0.0; LEVELS], vec![0.0; LEVELS]])
    }
}

impl Tally {
    /// Pages of this kind.
    pub fn pages(&self, kind: RegionKind) -> f64 {
        self.0[index(kind)].iter().sum()
    }

    /// Adds another one.
    #[must_use]
    pub fn plus(mut self, other: &Self) -> Self {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            for (mine, theirs) in mine.iter_mut().zip(theirs) {
                *mine += theirs;
            }
        }
        self
    }
}

/// Place of a kind in arrays of two.
pub fn index(kind: RegionKind) -> usize {
    usize::from(kind == RegionKind::Disk)
}

impl Heat {
    /// Nothing has been written yet.
    pub fn new(regions: &[RegionInfo]) -> Self {
        Self {
            regions: regions.iter().map(|r| vec![0; r.blocks as usize]).collect(),
            read: Blocks::new(),
            last: Blocks::new(),
            looked: None,
            since: 0.0,
            shapes: Regions::new(regions.to_vec()),
            kinds: Default::default(),
        }
    }

    /// The guest is known to have read these lately (or written: not every guest can tell), `now` in seconds. Blocks
    /// that are new among them tell how often what was not used before comes to be used.
    pub fn accessed(&mut self, blocks: &Blocks, content: &Blocks, now: f64) {
        if let Some(before) = self.looked.replace(now).filter(|before| *before < now) {
            let disk = index(RegionKind::Disk);
            let new = self.count(blocks)[disk][0];
            let cold = self.count(&self.shapes.of_kind(content, RegionKind::Disk))[disk][0];
            let only = |count| {
                let mut levels = vec![0; LEVELS];
                levels[0] = count;
                levels
            };
            let rates = &mut self.kinds[disk].rates;
            rates.sampled(&only(cold), &only(new), now - before);
        }
        self.read.union_with(blocks);
    }

    /// What is known from an earlier look at the guest: runs of a region's blocks with their levels. Counts for nothing
    /// once a scan has been made.
    pub fn known(&mut self, region: RegionId, runs: &[(u32, u32, u8)]) {
        let Some(bytes) = self.regions.get_mut(usize::from(region.0)) else {
            return;
        };
        for (first, count, level) in runs {
            let end = (*first as usize).saturating_add(*count as usize);
            let end = end.min(bytes.len());
            if let Some(run) = bytes.get_mut(*first as usize..end) {
                run.fill(*level);
            }
        }
    }

    /// A scan has found `dirty`, of blocks with content, in the `seconds` since the scan before.
    pub fn scanned(&mut self, dirty: &Blocks, content: &Blocks, seconds: f64) {
        let before = self.count(content);
        // Everything that is written has content, if only since now.
        let written = self.count(dirty);
        for (kind, heat) in self.kinds.iter_mut().enumerate() {
            heat.rates.scanned(&before[kind], &written[kind], seconds);
        }
        // A scan soon after another one belongs to the same interval: else "not written lately" would mean less.
        self.since += seconds;
        if self.since >= STEP {
            self.since = 0.0;
            for bytes in &mut self.regions {
                for byte in bytes {
                    *byte >>= 1;
                }
            }
        }
        for (region, set) in dirty.iter() {
            let Some(bytes) = self.regions.get_mut(usize::from(region.0)) else {
                continue;
            };
            for block in set {
                if let Some(byte) = bytes.get_mut(block as usize) {
                    *byte |= 0x80;
                }
            }
            let heat = &mut self.kinds[index(self.shapes.kind(region))];
            heat.lies(set, self.last.get(region), bytes.len() as u32);
        }
        self.last.clone_from(dirty);
    }

    /// Which of a sample of blocks were accessed.
    pub fn sampled(&mut self, sample: &AccessSample) {
        let watched = self.levels(sample.region, &sample.watched);
        let accessed = self.levels(sample.region, &sample.accessed);
        let kind = index(self.shapes.kind(sample.region));
        let rates = &mut self.kinds[kind].rates;
        rates.sampled(&watched, &accessed, sample.seconds);
    }

    /// Pages by level of everything that has content. Quicker than [`Self::tally`]: what was never written is
    /// not looked at.
    pub fn content(&self, content: &Blocks) -> Tally {
        let mut tally = Tally::default();
        for info in self.shapes.infos() {
            let kind = index(info.kind);
            let pages = self.shapes.pages_per_block(info.id) as f64;
            let mut levels = [0u64; LEVELS];
            for byte in &self.regions[usize::from(info.id.0)] {
                levels[usize::from(*byte)] += 1;
            }
            let written: u64 = levels[1..].iter().sum();
            let all = content.get(info.id).map_or(0, BlockSet::len);
            levels[0] = all.saturating_sub(written);
            let read = self.read.get(info.id).map_or(0, |read| {
                let cold = |block: &u32| {
                    self.regions[usize::from(info.id.0)].get(*block as usize) == Some(&0)
                };
                read.iter().filter(cold).count() as u64
            });
            let read = read.min(levels[0]);
            levels[0] -= read;
            levels[usize::from(READ)] += read;
            for (sum, count) in tally.0[kind].iter_mut().zip(levels) {
                *sum += count as f64 * pages;
            }
        }
        tally
    }

    /// After the freeze: of `exposed[h]` blocks of level h that the guest lacked, it asked for `asked[h]` in so many
    /// seconds in which it ran.
    pub fn asked_for(&mut self, kind: RegionKind, exposed: &[u64], asked: &[u64], seconds: f64) {
        self.kinds[index(kind)]
            .rates
            .sampled(exposed, asked, seconds);
    }

    /// Blocks by level, of memory and of disks.
    pub(crate) fn count(&self, among: &Blocks) -> [Vec<u64>; 2] {
        let mut counts = [vec![0; LEVELS], vec![0; LEVELS]];
        for (region, set) in among.iter() {
            let own = &mut counts[index(self.shapes.kind(region))];
            for (sum, count) in own.iter_mut().zip(self.levels(region, set)) {
                *sum += count;
            }
        }
        counts
    }

    /// Pages by level.
    pub fn tally(&self, among: &Blocks) -> Tally {
        let mut tally = Tally::default();
        for (region, set) in among.iter() {
            let own = &mut tally.0[index(self.shapes.kind(region))];
            let pages = self.shapes.pages_per_block(region) as f64;
            for (sum, count) in own.iter_mut().zip(self.levels(region, set)) {
                *sum += count as f64 * pages;
            }
        }
        tally
    }

    /// Blocks of a region by level. Of a guest with millions of them this is done at every scan, so nothing is looked
    /// up that need not be.
    fn levels(&self, region: RegionId, set: &BlockSet) -> [u64; LEVELS] {
        let mut levels = [0; LEVELS];
        let Some(bytes) = self.regions.get(usize::from(region.0)) else {
            return levels;
        };
        let read = self.read.get(region).filter(|read| !read.is_empty());
        for block in set {
            let level = bytes.get(block as usize).copied().unwrap_or(0);
            let only_read = level == 0 && read.is_some_and(|read| read.contains(block));
            levels[usize::from(if only_read { READ } else { level })] += 1;
        }
        levels
    }

    /// The block's level; 0 for one that was not accessed lately.
    pub fn of(&self, region: RegionId, block: u32) -> u8 {
        let written = self
            .regions
            .get(usize::from(region.0))
            .and_then(|bytes| bytes.get(block as usize))
            .copied()
            .unwrap_or(0);
        if written == 0 && self.read.contains(region, block) {
            READ
        } else {
            written
        }
    }

    /// What is known of the rates of this kind.
    pub fn rates(&self, kind: RegionKind) -> &Rates {
        &self.kinds[index(kind)].rates
    }

    /// How what is used of this kind lies.
    pub fn spread(&self, kind: RegionKind) -> Spread {
        let (near, walk) = self.kinds[index(kind)].spread;
        Spread {
            near: near.unwrap_or_default(),
            walk: walk.unwrap_or_default(),
        }
    }

    /// Every level with its rates, `pages` those of a tally; the most accessed first.
    pub fn classes(&self, kind: RegionKind, tally: &Tally) -> Vec<HotnessClass> {
        let rates = self.rates(kind);
        let pages = &tally.0[index(kind)];
        let of = |level: u8| HotnessClass {
            level,
            pages: pages[usize::from(level)],
            writes: rates.writes(level),
            accesses: rates.accesses(level),
        };
        let mut classes: Vec<_> = (0..=u8::MAX)
            .filter(|level| pages[usize::from(*level)] > 0.0)
            .map(of)
            .collect();
        classes.sort_by(|a, b| {
            let rate = b.accesses.total_cmp(&a.accesses);
            rate.then_with(|| b.level.cmp(&a.level))
        });
        classes
    }

    /// Rank of every level of this kind, the most accessed highest.
    pub(super) fn ranks(&self, kind: RegionKind) -> [u8; LEVELS] {
        let rates = self.rates(kind);
        let mut levels: Vec<(f64, u8)> = (0..=u8::MAX)
            .map(|level| (rates.accesses(level), level))
            .collect();
        levels.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
        let mut ranks = [0; LEVELS];
        for (rank, (_, level)) in levels.into_iter().enumerate() {
            ranks[usize::from(level)] = rank as u8;
        }
        ranks
    }

    /// The hottest blocks of `among` that come to `pages`; of equally hot ones the lowest.
    pub fn hottest(&self, among: &Blocks, pages: u64) -> Blocks {
        if pages >= self.shapes.pages(among) {
            return among.clone();
        }
        let ranks = [self.ranks(RegionKind::Memory), self.ranks(RegionKind::Disk)];
        let rank = |region: RegionId, block: u32| {
            let kind = index(self.shapes.kind(region));
            usize::from(ranks[kind][usize::from(self.of(region, block))])
        };
        let mut histogram = [0u64; LEVELS];
        for (region, block) in among.iter_blocks() {
            histogram[rank(region, block)] += self.shapes.pages_per_block(region);
        }
        let (mut threshold, mut above) = (LEVELS - 1, 0);
        while threshold > 0 && above + histogram[threshold] < pages {
            above += histogram[threshold];
            threshold -= 1;
        }
        let mut at_threshold = pages - above;
        let mut chosen = Blocks::new();
        for (region, block) in among.iter_blocks() {
            let heat = rank(region, block);
            let size = self.shapes.pages_per_block(region);
            if heat > threshold {
                chosen.insert(region, block);
            } else if heat == threshold && at_threshold >= size {
                at_threshold -= size;
                chosen.insert(region, block);
            }
        }
        chosen
    }
}

impl KindHeat {
    /// These were used in one interval.
    fn lies(&mut self, used: &BlockSet, before: Option<&BlockSet>, blocks: u32) {
        let Some(seen) = spread(used, before, blocks) else {
            return;
        };
        let known = &mut self.spread;
        let take = |known: &mut Option<f64>, seen: f64| {
            let before = known.unwrap_or(seen);
            *known = Some(before + SPREAD_WEIGHT * (seen - before));
        };
        take(&mut known.0, seen.near);
        if let Some(walk) = seen.walk {
            take(&mut known.1, walk);
        }
    }
}
