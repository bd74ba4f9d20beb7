//! How hot every block is.

use hybridmig_transport::message::RegionInfo;

use crate::blocks::{Blocks, RegionId};
use crate::regions::Regions;

/// How recently and how often each block was written: one byte per block, one bit per scan, the
/// newest on top. Its numeric order is recency first, then frequency, and history older than eight
/// scans is forgotten. A block that was only read lately is the least of the warm ones.
#[derive(Debug, Default)]
pub struct Heat {
    regions: Vec<Vec<u8>>,
    read: Blocks,
    shapes: Regions,
}

/// Heat of a block that was read lately and not written.
const READ: u8 = 1;

impl Heat {
    /// Nothing has been written yet.
    pub fn new(regions: &[RegionInfo]) -> Self {
        Self {
            regions: regions.iter().map(|r| vec![0; r.blocks as usize]).collect(),
            read: Blocks::new(),
            shapes: Regions::new(regions.to_vec()),
        }
    }

    /// The guest is known to have read these (or written: not every guest can tell).
    pub fn accessed(&mut self, blocks: &Blocks) {
        self.read.union_with(blocks);
    }

    /// A scan has found `dirty`.
    pub fn scanned(&mut self, dirty: &Blocks) {
        for bytes in &mut self.regions {
            for byte in bytes {
                *byte >>= 1;
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
        }
    }

    /// The block's heat; 0 for one that was not accessed lately.
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

    /// The hottest blocks of `among` that come to `pages`; of equally hot ones the lowest.
    pub fn hottest(&self, among: &Blocks, pages: u64) -> Blocks {
        if pages >= self.shapes.pages(among) {
            return among.clone();
        }
        let mut histogram = [0u64; 256];
        for (region, block) in among.iter_blocks() {
            histogram[usize::from(self.of(region, block))] += self.shapes.pages_per_block(region);
        }
        let (mut threshold, mut above) = (255, 0);
        while threshold > 0 && above + histogram[threshold] < pages {
            above += histogram[threshold];
            threshold -= 1;
        }
        let mut at_threshold = pages - above;
        let mut chosen = Blocks::new();
        for (region, block) in among.iter_blocks() {
            let heat = usize::from(self.of(region, block));
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

