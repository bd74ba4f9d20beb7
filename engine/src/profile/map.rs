//! Where the heat of a region lies: levels of runs of blocks, in bounded space, and the picture made of them.

/// Runs that a profile keeps of a region.
pub const MAX_RUNS: usize = 1 << 16;
/// Cells of a region's picture.
pub const MAX_CELLS: usize = 1024;

/// First block, number of blocks, level.
pub type Run = (u32, u32, u8);

/// The runs of blocks of a region of `blocks` blocks that are not cold, ascending. Where there would be more than
/// [`MAX_RUNS`], blocks are taken together in cells of 2, 4, 8, … that are as hot as their hottest.
pub fn runs(levels: impl Iterator<Item = (u32, u8)> + Clone, blocks: u32) -> Vec<Run> {
    let mut shift = 0;
    loop {
        let runs = runs_of(levels.clone(), blocks, shift);
        if let Some(runs) = runs {
            return runs;
        }
        shift += 1;
    }
}

/// The same in cells of 2^`shift` blocks, if they are few enough.
fn runs_of(levels: impl Iterator<Item = (u32, u8)>, blocks: u32, shift: u32) -> Option<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    for (block, level) in levels.filter(|(_, level)| *level > 0) {
        let first = block >> shift << shift;
        let count = (1_u32 << shift).min(blocks - first);
        match runs.last_mut() {
            // The cell is there already: it is as hot as its hottest.
            Some((at, length, hottest)) if first == *at && count == *length => {
                *hottest = level.max(*hottest);
            }
            Some((at, length, hottest)) if first < *at + *length => {
                if level > *hottest {
                    // The run's last cell is hotter than the others.
                    *length -= count;
                    runs.push((first, count, level));
                }
            }
            Some((at, length, hottest)) if first == *at + *length && level == *hottest => {
                *length += count;
            }
            _ => runs.push((first, count, level)),
        }
        if runs.len() > MAX_RUNS {
            return None;
        }
    }
    Some(runs)
}

/// The mean level in each of at most [`MAX_CELLS`] equal cells of a region, 0 to 255.
pub fn cells(runs: &[Run], blocks: u32, most: usize) -> Vec<f64> {
    let count = (blocks as usize).min(most.min(MAX_CELLS)).max(1);
    let length = f64::from(blocks) / count as f64;
    let mut cells = vec![0.0; count];
    for (first, blocks, level) in runs {
        let (from, to) = (f64::from(*first), f64::from(*first) + f64::from(*blocks));
        let begin = ((from / length) as usize).min(count - 1);
        let end = ((to / length).ceil() as usize).clamp(begin + 1, count);
        for (cell, heat) in cells[begin..end].iter_mut().enumerate() {
            let at = (begin + cell) as f64 * length;
            let covered = to.min(at + length) - from.max(at);
            *heat += covered.max(0.0) / length * f64::from(*level);
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn too_many_runs_are_taken_together() {
        // Every second block of a million.
        let levels = (0..500_000_u32).map(|number| (number * 2, 1 + (number % 3) as u8));
        let runs = runs(levels.clone(), 1_000_000);
        assert!(
            runs.len() <= MAX_RUNS && runs.len() > 1000,
            "{}",
            runs.len()
        );
        for (block, level) in levels.step_by(997) {
            let run = runs
                .iter()
                .find(|(first, count, _)| (*first..first + count).contains(&block));
            assert!(run.is_some_and(|run| run.2 >= level), "{block}: {run:?}");
        }
    }

    #[test]
    fn cells_are_means() {
        let runs = [(0, 50, 255), (100, 100, 100)];
        assert_eq!(cells(&runs, 400, 4), [127.5, 100.0, 0.0, 0.0]);
        assert_eq!(cells(&runs, 3, 100).len(), 3);
        assert_eq!(cells(&[], 1 << 30, 5000).len(), MAX_CELLS);
    }

    proptest! {
        #[test]
        fn runs_name_every_hot_block_in_order(
            levels in proptest::collection::btree_map(0_u32..3000, 0_u8..5, 0..400),
            shift in 0_u32..6,
        ) {
            let made = runs_of(levels.iter().map(|(b, l)| (*b, *l)), 3000, shift).unwrap();
            let mut end = 0;
            for (first, count, level) in &made {
                prop_assert!(*first >= end && *count > 0 && *level > 0);
                end = first + count;
            }
            prop_assert!(end <= 3000);
            for (block, level) in levels.iter().filter(|(_, level)| **level > 0) {
                let run = made.iter().find(|(f, c, _)| (*f..f + c).contains(block));
                prop_assert!(run.is_some_and(|run| run.2 >= *level));
                if shift == 0 {
                    prop_assert_eq!(run.unwrap().2, *level);
                }
            }
        }
    }
}
