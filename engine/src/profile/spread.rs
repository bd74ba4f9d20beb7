//! How what a guest uses lies in its regions: whether the neighbours of a used block are used too, and
//! whether it walks through them in order. The first says what a prefetch brings, the second what pushing
//! after a fault brings.

use serde::{Deserialize, Serialize};

use crate::blocks::BlockSet;

/// Blocks before and after one that a prefetch brings with it, as the source asks for them by default.
pub const WINDOW: (u32, u32) = (8, 24);
/// Distance at which blocks that are still written together were written by a walk, not by chance of lying
/// in one structure, in blocks.
const FAR: u32 = 64;
/// Blocks looked at.
const SAMPLE: u64 = 1024;

/// How used blocks lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Of the blocks in the prefetch window around a used one, how many are used: 0 to the window's length.
    pub near: f64,
    /// How much likelier than any other block the one [`FAR`] behind a used one is to be used, as a share of certainty:
    /// 0 is chance, 1 a walk.
    pub walk: f64,
}

/// How the blocks of one interval lie in a region of so many blocks. `None` where there are too few.
pub fn spread(used: &BlockSet, blocks: u32) -> Option<Spread> {
    let len = used.len();
    if len < 16 || blocks < 4 * FAR {
        return None;
    }
    let step = (len / SAMPLE).max(1) as usize;
    let (mut looked, mut near, mut far, mut far_looked) = (0u64, 0u64, 0u64, 0u64);
    for block in used.iter().step_by(step) {
        looked += 1;
        let first = block.saturating_sub(WINDOW.0);
        let last = block.saturating_add(WINDOW.1);
        near += used.range_cardinality(first..=last) - 1;
        if block + FAR < blocks {
            far_looked += 1;
            far += u64::from(used.contains(block + FAR));
        }
    }
    let by_chance = len as f64 / f64::from(blocks);
    let seen = far as f64 / far_looked.max(1) as f64;
    Some(Spread {
        near: near as f64 / looked as f64,
        walk: ((seen - by_chance) / (1.0 - by_chance).max(1e-3)).clamp(0.0, 1.0),
    })
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn a_walk_is_told_from_a_scattered_set() {
        let walk: BlockSet = (1000..3000).collect();
        let walked = spread(&walk, 16_384).unwrap();
        assert!(walked.walk > 0.9 && walked.near > 28.0, "{walked:?}");
        // Runs of four, scattered.
        let mut rng = SmallRng::seed_from_u64(1);
        let runs: BlockSet = (0..500)
            .flat_map(|_| {
                let at = rng.random_range(0..4096u32) * 4;
                at..at + 4
            })
            .collect();
        let scattered = spread(&runs, 16_384).unwrap();
        assert!(scattered.walk < 0.1, "{scattered:?}");
        assert!((2.0..9.0).contains(&scattered.near), "{scattered:?}");
        assert!(spread(&BlockSet::new(), 16_384).is_none());
    }
}
