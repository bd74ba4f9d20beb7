//! Batch ids as half-open ranges, coalesced.

use std::collections::BTreeMap;

/// A set of numbers that mostly come in runs.
#[derive(Debug, Default)]
pub(crate) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds a number; true if it was not there.
    pub(crate) fn insert(&mut self, number: u64) -> bool {
        if number == u64::MAX {
            return false;
        }
        let before = self.0.range(..=number).next_back().map(|(s, e)| (*s, *e));
        let (start, end) = match before {
            Some((_, end)) if number < end => return false,
            Some((start, end)) if number == end => (start, number + 1),
            _ => (number, number + 1),
        };
        let end = self.0.remove(&end).unwrap_or(end);
        self.0.insert(start, end);
        true
    }

    /// Whether every number below `end` is there.
    pub(crate) fn covers_below(&self, end: u64) -> bool {
        end == 0 || self.0.get(&0).is_some_and(|covered| *covered >= end)
    }

    /// Number of separate ranges.
    pub(crate) fn fragments(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes up to `limit` ranges out, ascending.
    pub(crate) fn take(&mut self, limit: usize) -> Vec<(u64, u64)> {
        let mut taken = Vec::new();
        while taken.len() < limit
            && let Some(range) = self.0.pop_first()
        {
            taken.push(range);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(numbers in prop::collection::vec(0u64..60, 0..80)) {
            let mut ranges = Ranges::default();
            let mut plain = BTreeSet::new();
            for number in numbers {
                prop_assert_eq!(ranges.insert(number), plain.insert(number));
            }
            let covered = (0..100).find(|n| !plain.contains(n)).expect("the set is finite");
            prop_assert!(ranges.covers_below(covered));
            prop_assert!(!ranges.covers_below(covered + 1));
            let runs = ranges.take(usize::MAX);
            prop_assert!(runs.windows(2).all(|pair| pair[0].1 < pair[1].0), "coalesced");
            let flat: BTreeSet<u64> = runs.into_iter().flat_map(|(s, e)| s..e).collect();
            prop_assert_eq!(flat, plain);
            prop_assert!(ranges.is_empty());
        }
    }
}
