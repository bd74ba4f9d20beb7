//! What the destination has of every block: the newest pass that was put in place, and what was
//! rejected. Shared by the drivers and the simulation, kept under the data plane's lock.
//!
//! It must never let an older version of a block follow a newer one, whatever the order in which
//! batches arrive. Memory: four bytes per block.

use hybridmig_transport::message::RegionInfo;

use crate::blocks::{BlockSet, Blocks, RegionId};

/// A block that was given back by the guest: nothing that still travels may fill it again.
const REMOVED: u32 = u32::MAX;

/// The peer named something that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// No such region in the offer.
    #[error("{0} was never offered")]
    Region(RegionId),
    /// The block lies beyond its region.
    #[error("block {block} lies beyond the {blocks} blocks of {region}")]
    Block {
        /// The region.
        region: RegionId,
        /// The block.
        block: u32,
        /// The region's length.
        blocks: u32,
    },
    /// Passes count from 1.
    #[error("pass {0} is not a pass: they count from 1")]
    Pass(u32),
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Per region and block the newest pass that is superseded or in place; 0 for none.
    passes: Vec<Vec<u32>>,
    /// Rejected, and no newer version has come.
    outstanding: Blocks,
    /// Once the handover is settled: passes below this one belong to what it superseded.
    floor: u32,
}

impl Ledger {
    /// A ledger in which nothing has come yet.
    pub fn new(regions: &[RegionInfo]) -> Self {
        Self {
            passes: regions.iter().map(|r| vec![0; r.blocks as usize]).collect(),
            outstanding: Blocks::new(),
            floor: 0,
        }
    }

    /// Whether a version of a block from `pass` is newer than what is in place, and so is to be
    /// applied. Changes nothing: tell [`Self::applied`] or [`Self::rejected`] what came of it,
    /// before the lock is let go.
    pub fn admit(&self, region: RegionId, block: u32, pass: u32) -> Result<bool, LedgerError> {
        if pass == 0 || pass == REMOVED {
            return Err(LedgerError::Pass(pass));
        }
        Ok(self.pass(region, block)? < pass && pass >= self.floor)
    }

    /// The version of `pass` is in place. True if the block had been rejected before and is
    /// current again (see [`AppliedBatch::repaired`](super::io::AppliedBatch::repaired)).
    pub fn applied(&mut self, region: RegionId, block: u32, pass: u32) -> bool {
        if let Some(entry) = self.slot(region, block) {
            *entry = pass.max(*entry);
        }
        self.outstanding.remove(region, block)
    }

    /// The version of `pass` was newer but could not be decoded: it must come again in full. An
    /// older version that is still on its way does not make up for it.
    pub fn rejected(&mut self, region: RegionId, block: u32, pass: u32) {
        if let Some(entry) = self.slot(region, block) {
            *entry = (*entry).max(pass.saturating_sub(1));
            self.outstanding.insert(region, block);
        }
    }

    /// The guest gave blocks back: they are zero from now on, whatever still travels. Returns those
    /// that had been rejected and need not come any more.
    pub fn removed(&mut self, region: RegionId, first: u32, count: u32) -> Vec<(RegionId, u32)> {
        let mut repaired = Vec::new();
        for block in first..first.saturating_add(count) {
            let Some(entry) = self.slot(region, block) else {
                break;
            };
            *entry = REMOVED;
            if self.outstanding.remove(region, block) {
                repaired.push((region, block));
            }
        }
        repaired
    }

    /// Every block of which some version has been put in place.
    pub fn written(&self) -> Blocks {
        self.passes
            .iter()
            .enumerate()
            .map(|(region, passes)| {
                let set = passes
                    .iter()
                    .enumerate()
                    .filter(|(_, pass)| **pass != 0)
                    .map(|(block, _)| block as u32);
                let set = BlockSet::from_sorted_iter(set)
                    .expect("block numbers of a region are enumerated in ascending order");
                (RegionId(region as u16), set)
            })
            .collect()
    }

    /// Which blocks of `behind` have not come with `postcopy_pass` or later. From here on nothing
    /// older is admitted: everything else of the handover is in place, and the guest may change it.
    pub fn missing_at_handover(&mut self, behind: &Blocks, postcopy_pass: u32) -> Blocks {
        self.floor = postcopy_pass;
        behind
            .iter()
            .map(|(region, set)| {
                let passes = self
                    .passes
                    .get(usize::from(region.0))
                    .map_or(&[][..], Vec::as_slice);
                let missing = set
                    .iter()
                    .filter(|block| {
                        passes
                            .get(*block as usize)
                            .is_some_and(|p| *p < postcopy_pass)
                    })
                    .collect();
                (region, missing)
            })
            .collect()
    }

    /// Rejected blocks of which no newer version has come.
    pub fn outstanding(&self) -> &Blocks {
        &self.outstanding
    }

    fn pass(&self, region: RegionId, block: u32) -> Result<u32, LedgerError> {
        let passes = self
            .passes
            .get(usize::from(region.0))
            .ok_or(LedgerError::Region(region))?;
        passes
            .get(block as usize)
            .copied()
            .ok_or(LedgerError::Block {
                region,
                block,
                blocks: passes.len() as u32,
            })
    }

    fn slot(&mut self, region: RegionId, block: u32) -> Option<&mut u32> {
        self.passes
            .get_mut(usize::from(region.0))?
            .get_mut(block as usize)
    }
}

#[cfg(test)]
mod tests {
    use hybridmig_transport::message::RegionKind;

    use super::*;

    const RAM: RegionId = RegionId(0);

    fn ledger() -> Ledger {
        Ledger::new(&[RegionInfo {
            id: RAM,
            kind: RegionKind::Memory,
            name: "ram".into(),
            blocks: 8,
            block_size: 4096,
        }])
    }

    #[test]
    fn an_older_version_never_follows_a_newer_one() {
        let mut ledger = ledger();
        assert_eq!(ledger.admit(RAM, 3, 2), Ok(true));
        ledger.applied(RAM, 3, 2);
        assert_eq!(ledger.admit(RAM, 3, 1), Ok(false));
        assert_eq!(ledger.admit(RAM, 3, 2), Ok(false));
        assert_eq!(ledger.admit(RAM, 3, 3), Ok(true));
    }

    #[test]
    fn names_what_does_not_exist() {
        let ledger = ledger();
        let stranger = RegionId(1);
        assert_eq!(
            ledger.admit(stranger, 0, 1),
            Err(LedgerError::Region(stranger))
        );
        assert!(matches!(
            ledger.admit(RAM, 8, 1),
            Err(LedgerError::Block { blocks: 8, .. })
        ));
        assert_eq!(ledger.admit(RAM, 0, 0), Err(LedgerError::Pass(0)));
    }

    #[test]
    fn a_rejection_stands_until_the_block_has_come() {
        let mut ledger = ledger();
        ledger.rejected(RAM, 5, 1);
        assert!(ledger.outstanding().contains(RAM, 5));
        assert!(!ledger.written().contains(RAM, 5));
        assert!(ledger.applied(RAM, 5, 1));
        assert!(ledger.outstanding().is_empty());
        assert!(!ledger.applied(RAM, 5, 2));
    }

    #[test]
    fn an_older_version_does_not_make_up_for_a_rejected_one() {
        let mut ledger = ledger();
        ledger.rejected(RAM, 5, 4);
        assert_eq!(ledger.admit(RAM, 5, 3), Ok(false));
        assert_eq!(ledger.admit(RAM, 5, 4), Ok(true), "the same version again");
        assert!(ledger.applied(RAM, 5, 4));
    }

    #[test]
    fn a_removed_block_is_never_filled_again() {
        let mut ledger = ledger();
        ledger.rejected(RAM, 2, 1);
        assert_eq!(ledger.removed(RAM, 1, 100), vec![(RAM, 2)]);
        assert_eq!(ledger.admit(RAM, 7, 1000), Ok(false));
        assert_eq!(ledger.admit(RAM, 0, 1), Ok(true));
    }

    #[test]
    fn missing_is_what_has_not_come_since_the_freeze() {
        let mut ledger = ledger();
        ledger.applied(RAM, 0, 3);
        ledger.applied(RAM, 1, 4);
        let mut behind = Blocks::new();
        behind.entry(RAM).extend([0, 1, 2]);
        let missing = ledger.missing_at_handover(&behind, 4);
        assert_eq!(
            missing.iter_blocks().collect::<Vec<_>>(),
            [(RAM, 0), (RAM, 2)]
        );
    }
}
