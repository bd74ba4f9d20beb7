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
/// What neighbours must have beyond chance for walks to be told.
const TELLING: f64 = 0.05;
/// How much likelier than any other block one that was used is to be used in the next interval as well, as a share of
/// certainty, where the guest stays in place: its hot blocks lie together, which looks like a walk at first sight.
const STAYS: f64 = 0.3;
/// Blocks that tell something.
const LEAST: u64 = 16;
/// Blocks looked at.
const SAMPLE: u64 = 1024;

/// How used blocks lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Of the blocks in the prefetch window around a used one, how many are used: 0 to the window's length.
    pub near: f64,
    /// How much of the likelihood that the neighbours of a used block have beyond any other's the one [`FAR`] behind it
    /// still has, where what was used is not the same as before: 0 is chance or hot regions, 1 a walk. (A guest that
    /// walks and writes to every second block only walks all the same.)
    pub walk: f64,
}

/// The same of one interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// See [`Spread::near`].
    pub near: f64,
    /// See [`Spread::walk`]; `None` where neighbours are hardly likelier to be used than any other block, so that
    /// nothing can be told: a set all over the region, or all of it; and where nothing is known of the interval before.
    pub walk: Option<f64>,
}

impl Spread {
    /// The mean of what was seen in several intervals.
    pub fn mean(seen: &[Seen]) -> Self {
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len().max(1) as f64;
        Self {
            near: mean(seen.iter().map(|seen| seen.near).collect()),
            walk: mean(seen.iter().filter_map(|seen| seen.walk).collect()),
        }
    }
}

/// How the blocks of one interval lie in a region of so many blocks, `before` being those of the interval before.
/// `None` where there are too few.
pub fn spread(used: &BlockSet, before: Option<&BlockSet>, blocks: u32) -> Option<Seen> {
    let len = used.len();
    if len < LEAST || blocks < 4 * FAR {
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
    let far = far as f64 / far_looked.max(1) as f64;
    let near = near as f64 / looked as f64;
    let beyond_chance = near / f64::from(WINDOW.0 + WINDOW.1) - by_chance;
    let goes_on = ((far - by_chance) / beyond_chance.max(TELLING)).clamp(0.0, 1.0);
    let moves = before.filter(|before| before.len() >= LEAST).map(|before| {
        let again = used.intersection_len(before) as f64 / before.len() as f64;
        let beyond_chance = (again - by_chance) / (1.0 - by_chance).max(TELLING);
        1.0 - (beyond_chance / STAYS).clamp(0.0, 1.0)
    });
    let walk = moves.filter(|_| beyond_chance > TELLING);
    Some(Seen {
        near,
        walk: walk.map(|moves| moves * goes_on),
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
        let before: BlockSet = (15_000..16_000).collect();
        let walked = spread(&walk, Some(&before), 16_384).unwrap();
        assert_eq!(spread(&walk, None, 16_384).unwrap().walk, None);
        // One that stays where it is is none.
        let stays = spread(&walk, Some(&walk), 16_384).unwrap();
        assert!(stays.walk.unwrap() < 0.01, "{stays:?}");
        assert!(
            walked.walk.unwrap() > 0.9 && walked.near > 28.0,
            "{walked:?}"
        );
        // Every second one at random, and twice around half of it.
        let mut rng = SmallRng::seed_from_u64(2);
        let writes: BlockSet = (1000..9000).filter(|_| rng.random_bool(0.5)).collect();
        let walked = spread(&writes, Some(&before), 16_384).unwrap();
        assert!(walked.walk.unwrap() > 0.8, "{walked:?}");
        let all: BlockSet = (0..16_384).filter(|_| rng.random_bool(0.7)).collect();
        assert_eq!(spread(&all, Some(&before), 16_384).unwrap().walk, None);
        // Runs of four, scattered.
        let mut rng = SmallRng::seed_from_u64(1);
        let runs: BlockSet = (0..500)
            .flat_map(|_| {
                let at = rng.random_range(0..4096u32) * 4;
                at..at + 4
            })
            .collect();
        let scattered = spread(&runs, Some(&before), 16_384).unwrap();
        assert!(scattered.walk.unwrap() < 0.1, "{scattered:?}");
        assert!((2.0..9.0).contains(&scattered.near), "{scattered:?}");
        assert!(spread(&BlockSet::new(), None, 16_384).is_none());
    }
}
