//! The order in which what stayed behind is pushed.

use hybridmig_transport::message::RegionKind;

use super::Heat;
use crate::blocks::{BlockSet, Blocks, RegionId};
use crate::regions::Regions;

/// The order in which blocks that stayed behind are pushed: memory before disks, and of each kind
/// after what the guest touched last, then by heat, then ascending.
#[derive(Debug, Default)]
pub struct PushOrder {
    shapes: Regions,
    /// Pages after a fault in memory that are pushed before others.
    reach: u32,
    pub(super) memory: KindOrder,
    disks: KindOrder,
}

/// The order within one kind.
#[derive(Debug, Default)]
pub(super) struct KindOrder {
    /// The blocks by heat, the hottest last.
    levels: Vec<Blocks>,
    /// Where the guest faulted, the newest last.
    pub(super) recent: Vec<(RegionId, u32)>,
}

/// Faults whose neighbourhood is pushed first.
const RECENT_FAULTS: usize = 8;
/// Pages after a fault that are pushed before others.
const NEIGHBOURHOOD: u32 = 512;
/// The same of a guest that does not walk: a batch.
const NEAR: u32 = 64;
/// A guest walks from this share on.
const WALKS: f64 = 0.2;

impl PushOrder {
    /// Orders `behind` by its heat.
    pub fn new(behind: &Blocks, heat: &Heat) -> Self {
        let shapes = heat.shapes.clone();
        let order = |kind| KindOrder::new(&shapes.of_kind(behind, kind), kind, heat);
        // Where the guest walks, what comes next is what it needs next; else what is hot is.
        let walks = heat.spread(RegionKind::Memory).walk > WALKS;
        Self {
            reach: if walks { NEIGHBOURHOOD } else { NEAR },
            memory: order(RegionKind::Memory),
            disks: order(RegionKind::Disk),
            shapes,
        }
    }

    /// The same blocks, ordered by what is known of the heat by now. Where the guest faulted stays first.
    pub fn again(&mut self, behind: &Blocks, heat: &Heat) {
        let recent =
            [&mut self.memory, &mut self.disks].map(|kind| std::mem::take(&mut kind.recent));
        *self = Self::new(behind, heat);
        [self.memory.recent, self.disks.recent] = recent;
    }

    /// The guest faulted here.
    pub fn faulted(&mut self, region: RegionId, block: u32) {
        let order = if self.shapes.is_disk(region) {
            &mut self.disks
        } else {
            &mut self.memory
        };
        if order.recent.len() == RECENT_FAULTS {
            order.recent.remove(0);
        }
        order.recent.push((region, block));
    }

    /// Takes blocks of one region, up to `pages`, out of `remaining`, the next in order.
    pub fn next(&mut self, remaining: &mut Blocks, pages: usize) -> Option<(RegionId, Vec<u32>)> {
        self.memory
            .next(remaining, &self.shapes, pages, self.reach)
            .or_else(|| (self.disks).next(remaining, &self.shapes, pages, NEIGHBOURHOOD))
            // Nothing is forgotten, whatever happened to the order.
            .or_else(|| self.shapes.pop(remaining, pages))
    }
}

impl KindOrder {
    fn new(behind: &Blocks, kind: RegionKind, heat: &Heat) -> Self {
        let ranks = heat.ranks(kind);
        let mut levels = vec![Blocks::new(); 256];
        for (region, set) in behind.iter() {
            let mut by_heat: Vec<BlockSet> = vec![BlockSet::new(); 256];
            for block in set {
                let rank = ranks[usize::from(heat.of(region, block))];
                by_heat[usize::from(rank)].insert(block);
            }
            for (level, set) in by_heat.into_iter().enumerate() {
                if !set.is_empty() {
                    *levels[level].entry(region) = set;
                }
            }
        }
        levels.retain(|level| !level.is_empty());
        Self {
            levels,
            recent: Vec::new(),
        }
    }

    fn next(
        &mut self,
        remaining: &mut Blocks,
        shapes: &Regions,
        pages: usize,
        reach: u32,
    ) -> Option<(RegionId, Vec<u32>)> {
        while let Some((region, block)) = self.recent.last().copied() {
            let reach = reach / shapes.pages_per_block(region) as u32;
            let last = block.saturating_add(reach);
            let near = take_range(remaining, region, block, last, shapes.chunk(region, pages));
            if near.is_empty() {
                self.recent.pop();
            } else {
                return Some((region, near));
            }
        }
        while let Some(level) = self.levels.last_mut() {
            let Some((region, blocks)) = shapes.pop(level, pages) else {
                self.levels.pop();
                continue;
            };
            let blocks: Vec<u32> = blocks
                .into_iter()
                .filter(|block| remaining.remove(region, *block))
                .collect();
            if !blocks.is_empty() {
                return Some((region, blocks));
            }
        }
        None
    }
}

/// Takes up to `limit` lowest blocks of `first..=last` out of a set.
pub fn take_range(
    blocks: &mut Blocks,
    region: RegionId,
    first: u32,
    last: u32,
    limit: usize,
) -> Vec<u32> {
    let taken: Vec<u32> = blocks.get(region).map_or_else(Vec::new, |set| {
        set.range(first..=last).take(limit).collect()
    });
    for block in &taken {
        blocks.remove(region, *block);
    }
    taken
}
