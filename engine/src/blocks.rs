//! Sets of blocks over all regions of a guest: the only form in which guest contents pass through
//! the session machines.

use std::collections::BTreeMap;

pub use hybridmig_transport::message::{BlockSet, RegionId};

/// A set of blocks per region. A region that is absent and one with an empty set mean the same.
#[derive(Clone, Debug, Default)]
pub struct Blocks(BTreeMap<RegionId, BlockSet>);

impl Blocks {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of blocks over all regions.
    pub fn len(&self) -> u64 {
        self.0.values().map(BlockSet::len).sum()
    }

    /// Whether no region has a block.
    pub fn is_empty(&self) -> bool {
        self.0.values().all(BlockSet::is_empty)
    }

    /// The set of one region, if it has been touched.
    pub fn get(&self, region: RegionId) -> Option<&BlockSet> {
        self.0.get(&region)
    }

    /// The set of one region, to change it.
    pub fn entry(&mut self, region: RegionId) -> &mut BlockSet {
        self.0.entry(region).or_default()
    }

    /// Adds a block; true if it was not there.
    pub fn insert(&mut self, region: RegionId, block: u32) -> bool {
        self.entry(region).insert(block)
    }

    /// Removes a block; true if it was there.
    pub fn remove(&mut self, region: RegionId, block: u32) -> bool {
        self.0.get_mut(&region).is_some_and(|set| set.remove(block))
    }

    /// Whether the block is in the set.
    pub fn contains(&self, region: RegionId, block: u32) -> bool {
        self.0.get(&region).is_some_and(|set| set.contains(block))
    }

    /// Adds every block of `other`.
    pub fn union_with(&mut self, other: &Self) {
        for (region, set) in &other.0 {
            *self.entry(*region) |= set;
        }
    }

    /// Takes away every block of `other`.
    pub fn subtract(&mut self, other: &Self) {
        for (region, set) in &mut self.0 {
            if let Some(gone) = other.0.get(region) {
                *set -= gone;
            }
        }
    }

    /// Non-empty regions with their sets, by region.
    pub fn iter(&self) -> impl Iterator<Item = (RegionId, &BlockSet)> {
        self.0
            .iter()
            .filter(|(_, set)| !set.is_empty())
            .map(|(id, set)| (*id, set))
    }

    /// Every block, by region and number.
    pub fn iter_blocks(&self) -> impl Iterator<Item = (RegionId, u32)> + '_ {
        self.iter()
            .flat_map(|(id, set)| set.iter().map(move |block| (id, block)))
    }

    /// Takes up to `limit` lowest blocks of the first non-empty region out of the set.
    pub fn pop_front(&mut self, limit: usize) -> Option<(RegionId, Vec<u32>)> {
        let (region, _) = self.iter().next()?;
        Some((region, self.pop_of(region, limit)))
    }

    /// Takes up to `limit` lowest blocks of this region out of the set.
    pub fn pop_of(&mut self, region: RegionId, limit: usize) -> Vec<u32> {
        let Some(set) = self.0.get_mut(&region) else {
            return Vec::new();
        };
        let taken: Vec<u32> = set.iter().take(limit).collect();
        for block in &taken {
            set.remove(*block);
        }
        taken
    }

    /// The blocks that are in both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.iter()
            .filter_map(|(region, set)| Some((region, set & other.get(region)?)))
            .collect()
    }
}

impl PartialEq for Blocks {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl FromIterator<(RegionId, BlockSet)> for Blocks {
    fn from_iter<I: IntoIterator<Item = (RegionId, BlockSet)>>(sets: I) -> Self {
        Self(sets.into_iter().collect())
    }
}
