//! Runs of consecutive blocks of a set. System calls take ranges, sets name blocks: this is the
//! one place where one becomes the other.

use roaring::RoaringBitmap;

/// Iterates over the runs of a set as `(first, count)`, ascending. Runs whose distance is at most
/// `gap` blocks are joined, the blocks between them included.
pub struct Ranges<'a> {
    blocks: roaring::bitmap::Iter<'a>,
    next: Option<u32>,
    gap: u32,
}

impl<'a> Ranges<'a> {
    /// The exact runs of `set`.
    pub fn exact(set: &'a RoaringBitmap) -> Self {
        Self::coalesced(set, 0)
    }

    /// The runs of `set`, joined over gaps of up to `gap` blocks.
    pub fn coalesced(set: &'a RoaringBitmap, gap: u32) -> Self {
        let mut blocks = set.iter();
        let next = blocks.next();
        Self { blocks, next, gap }
    }
}

impl Iterator for Ranges<'_> {
    type Item = (u32, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let first = self.next.take()?;
        let mut last = first;
        for block in self.blocks.by_ref() {
            if block - last - 1 > self.gap {
                self.next = Some(block);
                break;
            }
            last = block;
        }
        Some((first, u64::from(last) - u64::from(first) + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs_at_the_ends_of_the_number_space() {
        let set: RoaringBitmap = [0, 1, u32::MAX - 1, u32::MAX].into_iter().collect();
        let runs: Vec<_> = Ranges::exact(&set).collect();
        assert_eq!(runs, [(0, 2), (u32::MAX - 1, 2)]);
        assert_eq!(Ranges::exact(&RoaringBitmap::new()).count(), 0);
    }

    proptest! {
        #[test]
        fn exact_runs_are_the_set(blocks in proptest::collection::btree_set(0_u32..2000, 0..300)) {
            let set: RoaringBitmap = blocks.iter().copied().collect();
            let mut rebuilt = RoaringBitmap::new();
            let mut end = None;
            for (first, count) in Ranges::exact(&set) {
                // Neighbouring runs would have been one run.
                prop_assert!(end.is_none_or(|end| u64::from(first) > end));
                end = Some(u64::from(first) + count);
                rebuilt.insert_range(first..first + count as u32);
            }
            prop_assert_eq!(rebuilt, set);
        }

        #[test]
        fn coalesced_runs_cover_the_set_and_bridge_small_gaps_only(
            blocks in proptest::collection::btree_set(0_u32..5000, 1..300),
            gap in 0_u32..40,
        ) {
            let set: RoaringBitmap = blocks.iter().copied().collect();
            let runs: Vec<_> = Ranges::coalesced(&set, gap).collect();
            let mut covered = RoaringBitmap::new();
            for &(first, count) in &runs {
                prop_assert!(set.contains(first));
                prop_assert!(set.contains(first + count as u32 - 1));
                covered.insert_range(first..first + count as u32);
            }
            prop_assert!(set.is_subset(&covered));
            for pair in runs.windows(2) {
                let end = pair[0].0 + pair[0].1 as u32;
                prop_assert!(pair[1].0 - end > gap);
            }
            // No hole wider than the gap has been bridged.
            let bridged = &covered - &set;
            for (_, count) in Ranges::exact(&bridged) {
                prop_assert!(count <= u64::from(gap));
            }
        }
    }
}
