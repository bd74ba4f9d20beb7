//! Bytes of blocks in batches: the codec's rules on what it may refer to, over versions instead of bytes, and sizes
//! that the real codec gave for pages as the guest makes them.

use std::collections::{BTreeMap, HashMap, HashSet};

use hybridmig_engine::blocks::RegionId;
use hybridmig_engine::guest::workload::{
    ContentClass, ContentShares, Contents, DiskContents, PAGE, Page, Profile,
};
use hybridmig_engine::session::io::{Lane, Refer};
use hybridmig_transport::codec::{BatchHeader, BlockEncoder, EncoderConfig};

use super::guest::Block;

/// Pages that a size is measured over.
const SAMPLE: u32 = 48;
/// Blocks of the disk.
const DISK_SAMPLE: u32 = 24;
/// Sectors of a block of the disk.
const SECTORS: u32 = 16;
/// Header of a batch and of its records.
const BATCH: f64 = 40.0;
/// A page of generations, in full and as a difference.
const TABLE: [f64; 2] = [600.0, 120.0];
/// A page that is named by its content.
const NAMED: f64 = 38.0;
/// A run of zero pages, shared out.
const ZERO: f64 = 2.0;

/// What is to be known of a block to tell its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing but zeroes.
    Zero,
    /// A page of data.
    Page(ContentClass),
    /// The same, one of the contents that many have.
    Shared(u64),
    /// A page of generations.
    Table,
    /// A block of the disk.
    Disk,
}

/// Sizes that were measured, by class.
struct Sizes {
    full: BTreeMap<u32, f64>,
    /// After so many writes.
    delta: BTreeMap<(u32, u32), f64>,
    disk: f64,
    /// Of a sector that was written.
    disk_delta: f64,
    /// Writes that replace a whole page.
    parts: u32,
}

/// The codec of one session.
pub struct Codec {
    sizes: Sizes,
    /// Of what a guest waits for: zstd's first level.
    front: Sizes,
    latest: HashMap<Block, u64>,
    kept: HashMap<Block, (u64, u32)>,
    origins: HashMap<u64, (u64, Block)>,
    applied: HashSet<u64>,
}

impl Codec {
    /// Of a guest's contents, with this level for bulk.
    pub fn new(profile: Profile, seed: u64, level: i32) -> Self {
        Self {
            sizes: Sizes::measure(profile, seed, level),
            front: Sizes::measure(profile, seed, 1),
            latest: HashMap::new(),
            kept: HashMap::new(),
            origins: HashMap::new(),
            applied: HashSet::new(),
        }
    }

    /// Batches that the destination has applied.
    pub fn acknowledge(&mut self, batches: &[(u64, u64)]) {
        for (first, end) in batches {
            self.applied.extend(*first..*end);
        }
    }

    /// Mean bytes of blocks of these kinds that go in full; each shared content goes once.
    pub fn mean_bytes(&self, kinds: impl Iterator<Item = Kind>) -> f64 {
        let (mut seen, mut blocks, mut bytes) = (HashSet::new(), 0.0, 0.0);
        for kind in kinds {
            blocks += 1.0;
            bytes += match kind {
                Kind::Shared(content) if !seen.insert(content) => NAMED,
                kind => self.sizes.full(kind),
            };
        }
        bytes / blocks
    }

    /// Bytes of a batch of blocks, each with its version and what is in it.
    pub fn batch(
        &mut self,
        id: u64,
        lane: Lane,
        refer: Refer,
        blocks: &[(Block, u32, Kind)],
    ) -> f64 {
        let mut bytes = BATCH;
        for (block, version, kind) in blocks {
            let known = self.latest.get(block).copied();
            let may = refer != Refer::Nothing;
            let base = self
                .kept
                .get(block)
                .filter(|(batch, _)| may && known == Some(*batch) && self.applied.contains(batch));
            let writes = base.map(|(_, base)| version.wrapping_sub(*base));
            let sizes = if lane == Lane::Bulk {
                &self.sizes
            } else {
                &self.front
            };
            let delta = writes.and_then(|writes| sizes.delta(*kind, writes));
            bytes += match (*kind, delta) {
                (Kind::Zero, _) => ZERO,
                (_, Some(delta)) => delta,
                (Kind::Shared(content), None) => {
                    let named = refer == Refer::Anything && self.origin(content).is_some();
                    if named { NAMED } else { PAGE as f64 }
                }
                (kind, None) => sizes.full(kind),
            };
            if !may {
                continue;
            }
            if let Kind::Shared(content) = *kind
                && self.origin(content).is_none_or(|origin| origin == *block)
            {
                self.origins.insert(content, (id, *block));
            }
            self.latest.insert(*block, id);
            if *kind == Kind::Zero {
                self.kept.remove(block);
            } else {
                self.kept.insert(*block, (id, *version));
            }
        }
        bytes
    }

    /// A block with this content at the destination.
    fn origin(&self, content: u64) -> Option<Block> {
        let (batch, block) = self.origins.get(&content)?;
        let current = self.latest.get(block) == Some(batch) && self.applied.contains(batch);
        current.then_some(*block)
    }
}

impl Sizes {
    fn measure(profile: Profile, seed: u64, level: i32) -> Self {
        let parts = profile.spec().parts;
        let (mut full, mut delta) = (BTreeMap::new(), BTreeMap::new());
        for (class, shares) in [
            (ContentClass::Zero, [100, 0, 0]),
            (ContentClass::Text, [0, 100, 0]),
            (ContentClass::Random, [0, 0, 0]),
        ] {
            let [zero, text, duplicate] = shares;
            let shares = ContentShares {
                zero,
                text,
                duplicate,
            };
            let contents = Contents::new(profile, shares, seed);
            let made = |generation| {
                let mut all = Vec::new();
                for page in 0..SAMPLE {
                    let mut data: Page = [0; PAGE];
                    contents.produce(page, generation, &mut data);
                    all.extend_from_slice(&data);
                }
                all
            };
            let first = made(parts + 1);
            let all = pages(level, PAGE as u32, &[&first], Refer::Nothing)[0];
            full.insert(class as u32, all / f64::from(SAMPLE));
            // The header always changes.
            for writes in 1..=parts {
                let next = made(parts + 1 + writes);
                let sizes = pages(level, PAGE as u32, &[&first, &next], Refer::Itself);
                let size = sizes[1] / f64::from(SAMPLE);
                delta.insert((class as u32, writes), size);
            }
        }
        let disk = DiskContents::new(profile, seed);
        let block = |number: u32, written: u32| {
            let mut all = Vec::new();
            for sector in number * SECTORS..(number + 1) * SECTORS {
                let mut data: Page = [0; PAGE];
                let generation = parts + 1 + u32::from(sector % SECTORS < written);
                disk.sectors().produce(sector, generation, &mut data);
                all.extend_from_slice(&data);
            }
            all
        };
        let mut sums = [0.0; 2];
        for number in 0..DISK_SAMPLE {
            let data = [block(number, 0), block(number, 1)];
            let data = [&data[0][..], &data[1][..]];
            let sizes = pages(level, PAGE as u32 * SECTORS, &data, Refer::Itself);
            sums[0] += sizes[0];
            sums[1] += sizes[1];
        }
        Self {
            full,
            delta,
            disk: sums[0] / f64::from(DISK_SAMPLE),
            disk_delta: sums[1] / f64::from(DISK_SAMPLE),
            parts,
        }
    }

    fn full(&self, kind: Kind) -> f64 {
        match kind {
            Kind::Zero => ZERO,
            Kind::Page(class) => self.full[&(class as u32)],
            Kind::Shared(_) => PAGE as f64,
            Kind::Table => TABLE[0],
            Kind::Disk => self.disk,
        }
    }

    /// As a difference, after so many writes, where that is what the codec would choose.
    fn delta(&self, kind: Kind, writes: u32) -> Option<f64> {
        match kind {
            Kind::Page(class) => {
                let writes = writes.clamp(1, self.parts);
                let size = self.delta.get(&(class as u32, writes)).copied()?;
                Some(size)
            }
            Kind::Table => Some(TABLE[1]),
            // Sectors, each in part: up to a quarter of the block.
            Kind::Disk => {
                let changed = f64::from(writes.min(SECTORS)) / f64::from(self.parts * SECTORS);
                let size = self.disk_delta * f64::from(writes.min(SECTORS));
                (changed <= 0.25).then_some(size)
            }
            Kind::Zero | Kind::Shared(_) => None,
        }
    }
}

/// Bytes of batches of blocks numbered from 0, one after the other, each acknowledged before the next.
fn pages(level: i32, size: u32, batches: &[&[u8]], refer: Refer) -> Vec<f64> {
    let config = EncoderConfig {
        level,
        index_entries: 1 << 10,
        delta_cache_bytes: 16 << 20,
        ..EncoderConfig::default()
    };
    let mut encoder = BlockEncoder::new(config).expect("zstd has these levels");
    let encoded = batches.iter().zip(0..).map(|(data, id)| {
        let blocks: Vec<u32> = (0..data.len() as u32 / size).collect();
        let header = BatchHeader {
            id,
            pass: 1,
            lane: Lane::Bulk,
        };
        let batch = encoder
            .encode_blocks(header, RegionId(0), size, &blocks, data, refer)
            .expect("blocks of such sizes can be encoded");
        encoder.acknowledge(id);
        batch.bytes.len() as f64
    });
    encoded.collect()
}
