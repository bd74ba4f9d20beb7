//! Bytes, granules and blocks of a disk.

use std::ops::Range;

use super::{DiskError, Result};

/// Bytes of a granule, the unit in which the map tells what is here: 4 KiB.
pub const GRANULE: u32 = 4096;
/// Granules of one word of the map. A block never has more, so that its granules lie in one word.
const WORD: u32 = u64::BITS;

/// The sizes of a disk. Only the last block and the last granule may be shorter than the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Size of the disk.
    pub(crate) bytes: u64,
    /// Bytes of a block: a power of two, 1 to 64 granules.
    pub(crate) block_size: u32,
}

impl Geometry {
    pub(crate) fn new(bytes: u64, block_size: u32) -> Result<Self> {
        let bad = |reason: String| Err(DiskError::BadOptions { reason });
        if !block_size.is_power_of_two() || !(GRANULE..=GRANULE * WORD).contains(&block_size) {
            return bad(format!(
                "blocks of {block_size} bytes: a power of two from {GRANULE} to {} is needed",
                GRANULE * WORD
            ));
        }
        if bytes == 0 || bytes.div_ceil(u64::from(block_size)) > u64::from(u32::MAX) {
            return bad(format!(
                "a disk of {bytes} bytes: 1 to 2^32 - 1 blocks of {block_size} bytes are needed"
            ));
        }
        Ok(Self { bytes, block_size })
    }

    pub(crate) fn blocks(self) -> u32 {
        self.bytes.div_ceil(u64::from(self.block_size)) as u32
    }

    pub(crate) fn granules(self) -> u64 {
        self.bytes.div_ceil(u64::from(GRANULE))
    }

    pub(crate) fn granules_per_block(self) -> u32 {
        self.block_size / GRANULE
    }

    /// The block of a granule.
    pub(crate) fn block_of(self, granule: u64) -> u32 {
        (granule / u64::from(self.granules_per_block())) as u32
    }

    /// The granules of `count` blocks from `first` on, which must exist.
    pub(crate) fn granules_of(self, first: u32, count: u32) -> Range<u64> {
        let per = u64::from(self.granules_per_block());
        let start = u64::from(first) * per;
        start..(start + u64::from(count) * per).min(self.granules())
    }

    /// The bytes of granules, which must exist.
    pub(crate) fn bytes_of(self, granules: &Range<u64>) -> Range<u64> {
        let granule = u64::from(GRANULE);
        (granules.start * granule).min(self.bytes)..(granules.end * granule).min(self.bytes)
    }

    /// Every granule that `bytes` touches.
    pub(crate) fn touched(self, bytes: &Range<u64>) -> Range<u64> {
        let granule = u64::from(GRANULE);
        bytes.start / granule..bytes.end.div_ceil(granule).min(self.granules())
    }

    /// The granules that `bytes` covers completely; empty if there is none.
    pub(crate) fn covered(self, bytes: &Range<u64>) -> Range<u64> {
        let granule = u64::from(GRANULE);
        let start = bytes.start.div_ceil(granule);
        let end = if bytes.end == self.bytes {
            self.granules()
        } else {
            bytes.end / granule
        };
        start..end.max(start)
    }

    /// Checks that `count` blocks from `first` on exist.
    pub(crate) fn check(self, region: u16, first: u32, count: u64) -> Result<()> {
        if u64::from(first) + count > u64::from(self.blocks()) {
            return Err(DiskError::OutOfRange {
                region,
                first,
                count,
                blocks: self.blocks(),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_short_end_belongs_to_the_last_block() {
        let disk = Geometry::new(3 * 65536 + 4096 + 512, 65536).unwrap();
        assert_eq!((disk.blocks(), disk.granules()), (4, 50));
        assert_eq!(disk.granules_of(3, 1), 48..50);
        assert_eq!(disk.bytes_of(&(49..50)), 200_704..201_216);
        assert_eq!(disk.covered(&(200_704..201_216)), 49..50);
        assert_eq!(disk.covered(&(200_704..201_215)), 49..49);
        assert!(disk.check(0, 3, 1).is_ok() && disk.check(0, 3, 2).is_err());
        for (bytes, block_size) in [
            (0, 65536),
            (1, 2048),
            (1, 3 << 12),
            (1, 512 << 10),
            (u64::MAX, 65536),
        ] {
            assert!(Geometry::new(bytes, block_size).is_err());
        }
    }

    proptest! {
        #[test]
        fn covered_granules_are_within_and_touched_ones_around(
            size in 1_u64..100_000, a in 0_u64..100_000, b in 0_u64..100_000,
        ) {
            let disk = Geometry::new(size, 8192).unwrap();
            let (a, b) = (a.min(b).min(size), a.max(b).min(size));
            let touched = disk.touched(&(a..b));
            let covered = disk.covered(&(a..b));
            for granule in 0..disk.granules() {
                let bytes = disk.bytes_of(&(granule..granule + 1));
                prop_assert_eq!(
                    covered.contains(&granule),
                    bytes.start >= a && bytes.end <= b,
                    "granule {}", granule
                );
                if bytes.start < b && bytes.end > a {
                    prop_assert!(touched.contains(&granule));
                }
            }
        }
    }
}
