//! Which sectors a disk thread touches next, and how. A function of the profile, the seed and the
//! [`DiskPatternState`] alone, like the pattern of memory.

use serde::{Deserialize, Serialize};

use super::{BLOCK_SECTORS, DiskSpec};
use crate::guest::workload::pattern::{Rng, WorkingSet, mix};

/// Neighbouring blocks of similar popularity.
const RUN: u32 = 4;

/// One operation on sectors of the thread's own share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// First sector, counted from the start of the share.
    pub first: u32,
    /// Number of sectors; they never cross a block's bounds.
    pub count: u32,
    /// What is done with them.
    pub kind: Kind,
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read and check.
    Read,
    /// Read, check, and write the next generation.
    Update,
    /// Write the next generation without a look.
    Replace,
}

/// What of a pattern changes as it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPatternState {
    rng: Rng,
    /// Next sector of the sweep.
    cursor: u32,
    /// Operations made so far.
    operations: u64,
}

impl DiskPatternState {
    /// The beginning of thread `worker`'s pattern.
    pub fn new(seed: u64, worker: u32) -> Self {
        Self {
            rng: Rng::new(mix(seed ^ mix(u64::from(worker) + 1).rotate_left(32))),
            cursor: 0,
            operations: 0,
        }
    }

    /// Operations made so far.
    pub fn operations(&self) -> u64 {
        self.operations
    }
}

/// The fixed part of one thread's pattern.
pub struct DiskPattern {
    spec: &'static DiskSpec,
    sectors: u32,
    set: WorkingSet,
}

impl DiskPattern {
    /// The pattern over a share of so many blocks, at least one.
    pub fn new(spec: &'static DiskSpec, blocks: u32) -> Self {
        Self {
            spec,
            sectors: blocks * BLOCK_SECTORS,
            set: WorkingSet::new(0, spec.set_share, spec.zipf, RUN, blocks),
        }
    }

    /// Draws the next operation.
    pub fn next(&self, state: &mut DiskPatternState) -> Operation {
        let rng = &mut state.rng;
        state.operations = state.operations.wrapping_add(1);
        let write = rng.below(u64::from(self.spec.rate())) < u64::from(self.spec.writes);
        let blind = rng.below(100) < u64::from(self.spec.blind);
        let (small, large) = self.spec.sizes;
        let sizes = u64::from(large.ilog2() - small.ilog2() + 1);
        let size = small << rng.below(sizes);
        let (first, count) = if rng.below(100) < u64::from(self.spec.sequential) {
            let first = state.cursor;
            // Up to the end of the block.
            let count = size.min(BLOCK_SECTORS - first % BLOCK_SECTORS);
            state.cursor = (first + count) % self.sectors;
            (first, count)
        } else {
            let block = self.set.draw(rng) * BLOCK_SECTORS;
            let places = u64::from(BLOCK_SECTORS / size);
            (block + rng.below(places) as u32 * size, size)
        };
        let kind = match (write, blind) {
            (false, _) => Kind::Read,
            (true, false) => Kind::Update,
            (true, true) => Kind::Replace,
        };
        Operation { first, count, kind }
    }

    /// Whether a state from elsewhere belongs to this pattern.
    pub fn accepts(&self, state: &DiskPatternState) -> bool {
        state.cursor < self.sectors
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::workload::Profile;

    #[test]
    fn a_seed_decides_everything_and_a_saved_state_goes_on() {
        for profile in Profile::ALL {
            let pattern = DiskPattern::new(DiskSpec::of(profile), 500);
            let mut state = DiskPatternState::new(7, 0);
            let all: Vec<_> = (0..2000).map(|_| pattern.next(&mut state)).collect();
            let mut again = DiskPatternState::new(7, 0);
            assert!(all[..1000].iter().all(|op| *op == pattern.next(&mut again)));
            let saved = postcard::to_stdvec(&again).unwrap();
            let mut loaded: DiskPatternState = postcard::from_bytes(&saved).unwrap();
            assert!(
                all[1000..]
                    .iter()
                    .all(|op| *op == pattern.next(&mut loaded))
            );
            assert_eq!(loaded, state);
        }
    }

    #[test]
    fn operations_follow_the_table() {
        for profile in Profile::ALL {
            let spec = DiskSpec::of(profile);
            let pattern = DiskPattern::new(spec, 500);
            let mut state = DiskPatternState::new(3, 1);
            let mut writes = 0;
            for _ in 0..20_000 {
                let Operation { first, count, kind } = pattern.next(&mut state);
                assert!(count >= 1 && count <= spec.sizes.1);
                assert!(first + count <= 500 * BLOCK_SECTORS);
                assert_eq!(first / BLOCK_SECTORS, (first + count - 1) / BLOCK_SECTORS);
                writes += u32::from(kind != Kind::Read);
            }
            let expected = 20_000.0 * f64::from(spec.writes) / f64::from(spec.rate());
            assert!((f64::from(writes) - expected).abs() < 600.0, "{profile}");
        }
    }
}
