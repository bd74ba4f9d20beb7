//! The second report of a dirty page. A device may write to a page by DMA (O_DIRECT I/O) after the
//! page's mark was taken: the page is marked when the I/O is submitted, the bytes land up to the
//! I/O's latency later, unseen. So every page found dirty at a time is reported once more when
//! the grace time has passed. Pure bookkeeping: time comes in as arguments.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use roaring::RoaringBitmap;

/// Rounds remembered one by one; more are merged, and so reported later than they must be.
const MAX_ROUNDS: usize = 64;

/// Pages that are owed a second report.
#[derive(Debug)]
pub(crate) struct Grace {
    period: Duration,
    rounds: VecDeque<Round>,
}

#[derive(Debug)]
struct Round {
    /// When the marks had been taken: I/O that this scan may have unmarked began before.
    taken: Instant,
    dirty: Vec<RoaringBitmap>,
}

impl Grace {
    pub(crate) fn new(period: Duration) -> Self {
        Self {
            period,
            rounds: VecDeque::new(),
        }
    }

    /// Remembers what a scan found that ended at `taken`.
    pub(crate) fn found(&mut self, taken: Instant, dirty: &[RoaringBitmap]) {
        if dirty.iter().all(RoaringBitmap::is_empty) {
            return;
        }
        let full = self.rounds.len() >= MAX_ROUNDS;
        match self.rounds.back_mut() {
            Some(last) if full => {
                // The later time serves both.
                last.taken = taken;
                merge(&mut last.dirty, dirty);
            }
            _ => self.rounds.push_back(Round {
                taken,
                dirty: dirty.to_vec(),
            }),
        }
    }

    /// Adds to `report` what is due at `now`, which must lie before the pages will be read.
    pub(crate) fn due(&mut self, now: Instant, report: &mut [RoaringBitmap]) {
        while self
            .rounds
            .front()
            .is_some_and(|round| now.saturating_duration_since(round.taken) >= self.period)
        {
            if let Some(round) = self.rounds.pop_front() {
                merge(report, &round.dirty);
            }
        }
    }

    /// Adds everything that is still owed: the guest is frozen and its I/O drained.
    pub(crate) fn settle(&mut self, report: &mut [RoaringBitmap]) {
        for round in self.rounds.drain(..) {
            merge(report, &round.dirty);
        }
    }
}

fn merge(into: &mut [RoaringBitmap], from: &[RoaringBitmap]) {
    for (into, from) in into.iter_mut().zip(from) {
        *into |= from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(blocks: &[u32]) -> Vec<RoaringBitmap> {
        vec![blocks.iter().copied().collect()]
    }

    /// A device that writes to memory up to `latency` after the page was marked.
    struct Disk {
        in_flight: Vec<(Instant, u32)>,
    }

    #[test]
    fn every_page_is_reported_again_once_and_not_early() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut grace = Grace::new(Duration::from_millis(600));
        grace.found(at(0), &set(&[1, 2]));
        grace.found(at(500), &set(&[3]));
        let mut report = set(&[]);
        grace.due(at(599), &mut report);
        assert_eq!(report, set(&[]));
        grace.due(at(600), &mut report);
        assert_eq!(report, set(&[1, 2]));
        let mut report = set(&[]);
        grace.due(at(1099), &mut report);
        assert_eq!(report, set(&[]));
        grace.settle(&mut report);
        assert_eq!(report, set(&[3]));
        let mut report = set(&[]);
        grace.settle(&mut report);
        grace.due(at(9999), &mut report);
        assert_eq!(report, set(&[]));
    }

    #[test]
    fn late_dma_is_never_lost() {
        // Rounds every 100 ms, an I/O per round on a page of its own that lands 400 ms after its
        // page was marked. What was read last of each page must be what the disk wrote.
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let run = |period: Duration| {
            let mut grace = Grace::new(period);
            let mut disk = Disk {
                in_flight: Vec::new(),
            };
            let mut memory = [false; 40];
            let mut copied = [false; 40];
            let land = |disk: &mut Disk, memory: &mut [bool], now| {
                disk.in_flight.retain(|(lands, page)| {
                    let landed = *lands <= now;
                    memory[*page as usize] |= landed;
                    !landed
                });
            };
            for round in 0..30_u64 {
                let now = at(round * 100);
                land(&mut disk, &mut memory, now);
                let page = round as u32;
                disk.in_flight
                    .push((now + Duration::from_millis(400), page));
                let fresh = set(&[page]);
                let mut report = fresh.clone();
                grace.due(now, &mut report);
                grace.found(now, &fresh);
                for page in &report[0] {
                    copied[page as usize] = memory[page as usize];
                }
            }
            // The freeze drains I/O.
            land(&mut disk, &mut memory, at(60_000));
            let mut report = set(&[]);
            grace.settle(&mut report);
            for page in &report[0] {
                copied[page as usize] = memory[page as usize];
            }
            memory == copied
        };
        assert!(run(Duration::from_millis(600)));
        // A grace shorter than the latency must fail, or this test would prove nothing.
        assert!(!run(Duration::from_millis(100)));
    }

    #[test]
    fn many_rounds_are_merged_towards_later() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut grace = Grace::new(Duration::from_secs(1));
        for round in 0..200 {
            grace.found(at(round), &set(&[round as u32]));
        }
        assert_eq!(grace.rounds.len(), MAX_ROUNDS);
        let mut report = set(&[]);
        grace.due(at(1198), &mut report);
        assert_eq!(report, vec![(0..63).collect()]);
        grace.due(at(1199), &mut report);
        assert_eq!(report, vec![(0..200).collect()]);
    }
}
