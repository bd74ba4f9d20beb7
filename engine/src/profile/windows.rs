//! How many distinct pages are written in intervals of several lengths, from one series of scans: the re-dirty
//! curve and the working set.

use super::Distinct;
use crate::blocks::BlockSet;

/// Lengths in seconds.
pub const LENGTHS: [f64; 8] = [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0];

/// Of one region.
#[derive(Clone, Debug, Default)]
pub struct Windows {
    open: Vec<Window>,
}

#[derive(Clone, Debug, Default)]
struct Window {
    length: f64,
    written: BlockSet,
    elapsed: f64,
    /// Of the windows that are over: how many, how long and how many blocks in all.
    over: u32,
    seconds: f64,
    blocks: u64,
}

impl Windows {
    /// Nothing was scanned yet.
    pub fn new() -> Self {
        let open = |length: &f64| Window {
            length: *length,
            ..Window::default()
        };
        Self {
            open: LENGTHS.iter().map(open).collect(),
        }
    }

    /// A scan found these, `seconds` after the one before.
    pub fn scanned(&mut self, written: &BlockSet, seconds: f64) {
        for window in &mut self.open {
            window.written |= written;
            window.elapsed += seconds;
            // Scans come late; a tenth too early is near enough.
            if window.elapsed >= 0.9 * window.length {
                window.over += 1;
                window.seconds += window.elapsed;
                window.blocks += window.written.len();
                window.elapsed = 0.0;
                window.written.clear();
            }
        }
    }

    /// The curve, in pages. Windows that were never over are left out, and those that the scans were too
    /// rare for.
    pub fn curve(&self, pages_per_block: u64) -> Vec<Distinct> {
        let mut curve: Vec<Distinct> = Vec::new();
        for window in self.open.iter().filter(|window| window.over > 0) {
            let times = f64::from(window.over);
            let point = Distinct {
                seconds: window.seconds / times,
                written: window.blocks as f64 * pages_per_block as f64 / times,
                accessed: None,
            };
            // Longer by a tenth at least than the one before.
            if curve
                .last()
                .is_none_or(|last| point.seconds > 1.1 * last.seconds)
            {
                curve.push(point);
            }
        }
        curve
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_again_counts_once() {
        let mut windows = Windows::new();
        // Twelve seconds: 100 blocks in every scan, ten others each time.
        for scan in 0..24_u32 {
            let written: BlockSet = (0..100).chain(1000 + scan * 10..1010 + scan * 10).collect();
            windows.scanned(&written, 0.5);
        }
        let curve = windows.curve(2);
        let seen: Vec<(f64, f64)> = curve.iter().map(|d| (d.seconds, d.written)).collect();
        let expected = [
            (0.5, 220.0),
            (1.0, 240.0),
            (2.0, 280.0),
            (5.0, 400.0),
            (10.0, 600.0),
        ];
        // A tenth too early is near enough: 4.5 s and 9 s are over first.
        assert_eq!(seen.len(), expected.len(), "{seen:?}");
        for ((seconds, written), (length, most)) in seen.iter().zip(expected) {
            assert!((0.9 * length..=length).contains(seconds), "{seen:?}");
            assert!((0.9 * most..=most).contains(written), "{seen:?}");
        }
    }

    #[test]
    fn rare_scans_make_one_point_of_several() {
        let mut windows = Windows::new();
        for _ in 0..3 {
            windows.scanned(&(0..7).collect(), 3.0);
        }
        let curve = windows.curve(1);
        // 0.5, 1 and 2 s are 3 s in truth; 5 s and 10 s are 6 s and 9 s.
        let seconds: Vec<f64> = curve.iter().map(|point| point.seconds).collect();
        assert_eq!(seconds, [3.0, 6.0, 9.0]);
    }
}
