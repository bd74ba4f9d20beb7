//! Large sets of blocks, cut into pieces that fit a message, and the checks on sets that a peer
//! sent.

use hybridmig_transport::message::RegionInfo;

use crate::blocks::{BlockSet, Blocks, RegionId};

/// Blocks that one piece spans. The portable format needs at most 8 KiB (and 16 bytes of header)
/// per 65,536 blocks, so 48 such containers stay below 512 KiB.
const SPAN: u64 = 48 * 65_536;

/// Most pieces that a peer may announce: what the largest guest (65,536 regions) could need is far
/// more than any real one has.
pub(crate) const MAX_PIECES: u32 = 65_536;

/// The set in pieces of at most 512 KiB each when serialised; no piece is empty.
pub fn split(blocks: &Blocks) -> Vec<(RegionId, BlockSet)> {
    let mut pieces = Vec::new();
    for (region, set) in blocks.iter() {
        let end = set.max().map_or(0, |max| u64::from(max) + 1);
        for first in (0..end).step_by(SPAN as usize) {
            let last = (first + SPAN - 1).min(u64::from(u32::MAX));
            let range = first as u32..=last as u32;
            let piece = BlockSet::from_sorted_iter(set.range(range))
                .expect("a set is iterated in ascending order");
            if !piece.is_empty() {
                pieces.push((region, piece));
            }
        }
    }
    pieces
}

/// Checks a set of one region that a peer sent.
pub(crate) fn check(
    regions: &[RegionInfo],
    region: RegionId,
    highest: Option<u32>,
) -> Result<(), String> {
    let Some(info) = regions.get(usize::from(region.0)) else {
        return Err(format!("{region} was never offered"));
    };
    match highest {
        Some(block) if block >= info.blocks => Err(format!(
            "block {block} lies beyond the {} blocks of {region}",
            info.blocks
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_small_and_add_up() {
        let mut blocks = Blocks::new();
        // Every second block over 48 GiB of pages: the densest form, 8 KiB per container.
        blocks
            .entry(RegionId(0))
            .extend((0..12 * 1024 * 1024).step_by(2));
        blocks.entry(RegionId(3)).insert(u32::MAX);
        let pieces = split(&blocks);
        assert_eq!(pieces.len(), 5);
        let mut sum = Blocks::new();
        for (region, piece) in pieces {
            assert!(piece.serialized_size() <= 512 * 1024);
            assert!(!piece.is_empty());
            *sum.entry(region) |= piece;
        }
        assert_eq!(sum, blocks);
    }
}
