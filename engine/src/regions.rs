//! What the regions of a guest are made of: blocks of different length, memory and disks. Everything
//! that compares blocks of different regions, or makes batches of them, asks here.
//!
//! Amounts are in *pages*: 4 KiB of contents. A block of memory is one page, a disk's block of 64 KiB
//! is sixteen, so that one figure tells what blocks of both cost on a link.

use hybridmig_transport::message::{RegionInfo, RegionKind};

use crate::blocks::{Blocks, RegionId};

/// Bytes of a page.
pub const PAGE: u32 = 4096;

/// The regions of a guest.
#[derive(Clone, Debug, Default)]
pub struct Regions(Vec<RegionInfo>);

impl Regions {
    /// The regions of an offer: `regions[i].id == RegionId(i)`.
    pub fn new(regions: Vec<RegionInfo>) -> Self {
        Self(regions)
    }

    /// All of them.
    pub fn infos(&self) -> &[RegionInfo] {
        &self.0
    }

    /// Memory or disk; a region that does not exist counts as memory.
    pub fn kind(&self, region: RegionId) -> RegionKind {
        self.get(region)
            .map_or(RegionKind::Memory, |info| info.kind)
    }

    /// Whether it is a disk.
    pub fn is_disk(&self, region: RegionId) -> bool {
        self.kind(region) == RegionKind::Disk
    }

    /// The disks.
    pub fn disks(&self) -> impl Iterator<Item = RegionId> + '_ {
        let disks = self.0.iter().filter(|info| info.kind == RegionKind::Disk);
        disks.map(|info| info.id)
    }

    /// Pages per block, at least one.
    pub fn pages_per_block(&self, region: RegionId) -> u64 {
        self.get(region)
            .map_or(1, |info| u64::from((info.block_size / PAGE).max(1)))
    }

    /// Pages of these blocks.
    pub fn pages(&self, blocks: &Blocks) -> u64 {
        blocks
            .iter()
            .map(|(region, set)| set.len() * self.pages_per_block(region))
            .sum()
    }

    /// Pages of those that are in regions of this kind.
    pub fn pages_of_kind(&self, blocks: &Blocks, kind: RegionKind) -> u64 {
        blocks
            .iter()
            .filter(|(region, _)| self.kind(*region) == kind)
            .map(|(region, set)| set.len() * self.pages_per_block(region))
            .sum()
    }

    /// Those of the blocks that are in regions of this kind.
    pub fn of_kind(&self, blocks: &Blocks, kind: RegionKind) -> Blocks {
        blocks
            .iter()
            .filter(|(region, _)| self.kind(*region) == kind)
            .map(|(region, set)| (region, set.clone()))
            .collect()
    }

    /// Number of these blocks that belong to disks.
    pub fn on_disks(&self, blocks: &Blocks) -> u64 {
        blocks
            .iter()
            .filter(|(region, _)| self.is_disk(*region))
            .map(|(_, set)| set.len())
            .sum()
    }

    /// Most blocks of the region in a batch of so many pages, at least one.
    pub fn chunk(&self, region: RegionId, pages: usize) -> usize {
        (pages / self.pages_per_block(region) as usize).max(1)
    }

    /// Takes the next chunk of up to `pages` out of the set, memory before disks.
    pub fn pop(&self, blocks: &mut Blocks, pages: usize) -> Option<(RegionId, Vec<u32>)> {
        let region = self
            .first(blocks, RegionKind::Memory)
            .or_else(|| self.first(blocks, RegionKind::Disk))?;
        Some((region, blocks.pop_of(region, self.chunk(region, pages))))
    }

    /// The same, disks before memory.
    pub fn pop_disks_first(
        &self,
        blocks: &mut Blocks,
        pages: usize,
    ) -> Option<(RegionId, Vec<u32>)> {
        match self.first(blocks, RegionKind::Disk) {
            Some(region) => Some((region, blocks.pop_of(region, self.chunk(region, pages)))),
            None => self.pop(blocks, pages),
        }
    }

    fn first(&self, blocks: &Blocks, kind: RegionKind) -> Option<RegionId> {
        blocks
            .iter()
            .map(|(region, _)| region)
            .find(|region| self.kind(*region) == kind)
    }

    fn get(&self, region: RegionId) -> Option<&RegionInfo> {
        self.0.get(usize::from(region.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: RegionId = RegionId(0);
    const DISK: RegionId = RegionId(1);

    fn regions() -> Regions {
        let info = |id, kind, block_size| RegionInfo {
            id,
            kind,
            name: String::new(),
            blocks: 100,
            block_size,
        };
        Regions::new(vec![
            info(RAM, RegionKind::Memory, 4096),
            info(DISK, RegionKind::Disk, 65_536),
        ])
    }

    #[test]
    fn a_batch_of_either_kind_has_the_same_bytes() {
        let regions = regions();
        let mut blocks = Blocks::new();
        blocks.entry(RAM).extend(0..100);
        blocks.entry(DISK).extend(0..100);
        assert_eq!(regions.pages(&blocks), 1700);
        assert_eq!(regions.on_disks(&blocks), 100);
        let disk = regions.pop_disks_first(&mut blocks, 64);
        assert_eq!(disk, Some((DISK, vec![0, 1, 2, 3])));
        let memory = regions.pop(&mut blocks, 64);
        assert_eq!(memory, Some((RAM, (0..64).collect())));
        assert_eq!(regions.chunk(DISK, 1), 1);
        let only = regions.of_kind(&blocks, RegionKind::Memory);
        assert_eq!(only.len(), 36);
        assert_eq!(regions.pop(&mut blocks, 64).map(|(id, _)| id), Some(RAM));
        assert_eq!(regions.pop(&mut blocks, 64).map(|(id, _)| id), Some(DISK));
    }
}
