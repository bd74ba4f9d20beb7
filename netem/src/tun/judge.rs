//! What becomes of a frame: the fate of each of its packets is drawn alone, and those that survive in a row
//! and arrive at nearly the same time form a run, which will be delivered as one frame. Pure: no I/O,
//! no clock.

use std::ops::Range;
use std::time::Duration;

use super::gso::Frame;
use crate::model::{Dropped, Fate, InFlight, MAX_IN_FLIGHT, Path};
use crate::runner::Counters;

/// The most link time between the first and the last packet of a run: by so much the first is late.
pub const RUN_TIME: Duration = Duration::from_micros(250);

/// Consecutive packets of a frame that arrive together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which.
    pub segments: Range<usize>,
    /// When the first one is due.
    first_due: Duration,
    /// When the last one is, and so the run.
    pub due: Duration,
    /// Of all of them on the wire.
    pub bytes: usize,
    /// Flip a bit of it, chosen by this number; the run is one packet.
    pub corrupt: Option<u64>,
}

/// Draws the fates of the packets of one direction.
#[derive(Debug)]
pub struct Judge {
    /// The model of the direction.
    pub path: Path,
    /// The runs of the frame judged last.
    runs: Vec<Run>,
}

impl Judge {
    /// Has judged nothing yet.
    pub fn new(path: Path) -> Self {
        Self {
            path,
            runs: Vec::new(),
        }
    }

    /// What arrives of the frame judged last, in any order of time.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Draws the fates of a frame's packets, all of which come at `now`, counts what is lost and leaves
    /// the rest as [`Self::runs`].
    pub fn judge<T>(
        &mut self,
        frame: &Frame<'_>,
        now: Duration,
        in_flight: &InFlight<T>,
        counters: &Counters,
    ) {
        self.runs.clear();
        let segments = frame.segments();
        let (mut held, mut held_bytes, mut total, mut doubled) = (in_flight.held(), 0, 0, 0);
        for index in 0..segments {
            let bytes = frame.segment_bytes(index);
            total += bytes;
            // Twice: it may be doubled.
            let room = held + 2 <= MAX_IN_FLIGHT && in_flight.has_room(held_bytes + 2 * bytes);
            if !room {
                counters.dropped(Dropped::Overflow);
                continue;
            }
            match self.path.admit(now, bytes, held) {
                Ok(fate) => {
                    let copies = self.add(index, bytes, &fate);
                    held += copies;
                    held_bytes += copies * bytes;
                    doubled += copies - 1;
                    if fate.corrupt.is_some() {
                        Counters::add(&counters.corrupted, 1);
                    }
                }
                Err(why) => counters.dropped(why),
            }
        }
        Counters::add(&counters.packets, segments as u64);
        Counters::add(&counters.bytes, total as u64);
        if doubled > 0 {
            Counters::add(&counters.duplicated, doubled as u64);
        }
    }

    /// Adds a packet that is not lost to the runs; with its copies.
    fn add(&mut self, index: usize, bytes: usize, fate: &Fate) -> usize {
        let alone = |due, corrupt| Run {
            segments: index..index + 1,
            first_due: due,
            due,
            bytes,
            corrupt,
        };
        match self.runs.last_mut() {
            Some(run)
                if fate.corrupt.is_none()
                    && run.corrupt.is_none()
                    && run.segments.end == index
                    && run.due <= fate.due
                    && fate.due <= run.first_due + RUN_TIME =>
            {
                run.segments.end += 1;
                run.due = fate.due;
                run.bytes += bytes;
            }
            _ => self.runs.push(alone(fate.due, fate.corrupt)),
        }
        // The copy ends the run: what follows begins another.
        match fate.duplicate {
            Some(due) => {
                self.runs.push(alone(due, None));
                2
            }
            None => 1,
        }
    }
}

#[cfg(test)]
mod tests;
