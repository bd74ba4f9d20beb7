//! What a plan will come to: the distribution of downtime, lost work, total time and the rest, from the guest's
//! classes of hotness, the link and what the steps cost. Pure arithmetic; `docs/model.md` derives it and names every
//! assumption.
//!
//! It deals in classes and curves, never in single blocks: a prediction takes the same time for a guest of a GiB and
//! of a TiB.

pub mod costs;
pub mod draws;
pub mod fluid;
pub mod rounds;

use serde::{Deserialize, Serialize};

use crate::profile::HotnessClass;
use crate::profile::rates::LEVELS;
use crate::profile::spread::Spread;

pub use costs::{Cost, Costs};

/// Classes that a prediction tells apart, at the most, of each kind.
pub const MAX_CLASSES: usize = 24;

/// Share of the guest's speed that hangs on its disks, where nothing better is known: assumed.
pub const DISK_WEIGHT: f64 = 0.2;
/// Operations that a guest has under way on its disks at once, where nothing better is known: assumed.
pub const DISK_PARALLELISM: f64 = 4.0;

/// Pages that behave alike and where they stand.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Class {
    /// All pages with content of this class.
    pub content: f64,
    /// Of these: to be sent before the freeze, or to be divided at it.
    pub stale: f64,
    /// Of these: meant to stay behind, whatever else.
    pub unsent: f64,
    /// Writes of one page per second.
    pub writes: f64,
    /// Accesses of one page per second.
    pub accesses: f64,
}

/// What is known of one kind of region (memory, or disks).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KindState {
    /// By hotness, the most accessed first; at most [`MAX_CLASSES`].
    pub classes: Vec<Class>,
    /// Bytes on the wire of a page that goes in full: the first time, and after the freeze, when there is nothing to
    /// refer to.
    pub bytes_per_page: f64,
    /// Bytes of one that is stale now, on average of those that were sent before and those that were not.
    pub bytes_stale: f64,
    /// Bytes of one that was sent before: a difference.
    pub bytes_again: f64,
    /// How what is used lies.
    pub spread: Spread,
    /// Accesses that can wait for blocks at once: vCPUs, or operations under way on a disk.
    pub parallelism: f64,
    /// Share of the guest's speed that is lost when all of them wait, 0 to 1.
    pub weight: f64,
    /// Class of each level; meaningless for levels without content.
    pub class_of: Vec<u8>,
}

/// The link as it is now, and how sure that is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkState {
    /// Bytes per second that arrive, of batches.
    pub bandwidth: f64,
    /// Relative standard deviation of that.
    pub bandwidth_cv: f64,
    /// Round trip in seconds, queues included.
    pub rtt: f64,
    /// Relative standard deviation of that.
    pub rtt_cv: f64,
    /// What parity adds to the bytes of a freeze, as a share.
    pub parity: f64,
}

/// Everything that a prediction is made of.
#[derive(Clone, Debug)]
pub struct Situation {
    /// The memory.
    pub memory: KindState,
    /// The disks.
    pub disks: KindState,
    /// The link.
    pub link: LinkState,
    /// What the steps cost.
    pub costs: Costs,
    /// Pages around a fault that are sent with it (memory); 0 turns it off.
    pub prefetch: f64,
    /// Seconds since the session began.
    pub elapsed: f64,
    /// Seconds of them since tracking began.
    pub precopied: f64,
    /// Bytes sent so far.
    pub sent: f64,
    /// Length of the device state in bytes.
    pub state_bytes: f64,
    /// Time between two scans within a round, in seconds.
    pub scan_interval: f64,
    /// Shortest round in seconds.
    pub min_round: f64,
    /// Share of the guest's speed that pre-copy costs it.
    pub watching_cost: f64,
    /// What rounds have left stale, over what they were expected to: a guest that writes in order, say, is no Poisson
    /// process.
    pub rewriting: f64,
}

/// A quantity that is not known exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Mean.
    pub mean: f64,
    /// One in ten is less.
    pub p10: f64,
    /// Half are less.
    pub p50: f64,
    /// One in ten is more.
    pub p90: f64,
}

/// What a plan is predicted to come to. Seconds unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Session begun → last block in place and released.
    pub total: Interval,
    /// Guest stopped → guest runs.
    pub downtime: Interval,
    /// Session begun → guest runs at the destination.
    pub remote_up: Interval,
    /// Mean share of speed that the guest lacks between its resume and the last block, 0 to 1.
    pub degradation: Interval,
    /// Lost work L: from the freeze to the last block.
    pub lost_work: Interval,
    /// Freeze → speed is 95 % and stays so.
    pub t95: Interval,
    /// Bytes on the wire, of batches, in all.
    pub bytes: Interval,
    /// Blocks that the guest will have to ask for over the network.
    pub faults: Interval,
    /// Time that one of those waits.
    pub stall: Interval,
}

/// One outcome, of known parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    /// See [`Prediction::total`].
    pub total: f64,
    /// See [`Prediction::downtime`].
    pub downtime: f64,
    /// See [`Prediction::remote_up`].
    pub remote_up: f64,
    /// See [`Prediction::degradation`].
    pub degradation: f64,
    /// See [`Prediction::lost_work`].
    pub lost_work: f64,
    /// See [`Prediction::t95`].
    pub t95: f64,
    /// See [`Prediction::bytes`].
    pub bytes: f64,
    /// See [`Prediction::faults`].
    pub faults: f64,
    /// See [`Prediction::stall`].
    pub stall: f64,
    /// Lost work before the freeze: what pre-copy costs the guest.
    pub before: f64,
}

impl KindState {
    /// From classes of all content, with those of what is stale and unsent (each by level, all in the same order of
    /// levels). Neighbours in hotness are put together until [`MAX_CLASSES`] are left.
    pub fn new(classes: &[HotnessClass], stale: &[f64], unsent: &[f64]) -> Self {
        let mut merged: Vec<Class> = Vec::new();
        let mut class_of = vec![0; LEVELS];
        let total: f64 = classes.iter().map(|c| c.pages * c.accesses.sqrt()).sum();
        let portion = total / MAX_CLASSES as f64;
        let mut weight = 0.0;
        for class in classes {
            let level = usize::from(class.level);
            let one = Class {
                content: class.pages,
                stale: stale[level].min(class.pages),
                unsent: unsent[level].min(class.pages),
                writes: class.writes,
                accesses: class.accesses,
            };
            let own = class.pages * class.accesses.sqrt();
            let full = merged.len() == MAX_CLASSES;
            let joins = |last: &Class| {
                // What is hardly used must not be mixed up with what is.
                full || (weight + own <= portion && last.accesses < 8.0 * one.accesses.max(1e-9))
            };
            match merged.last_mut() {
                Some(last) if joins(last) => {
                    last.add(&one);
                    weight += own;
                }
                _ => {
                    merged.push(one);
                    weight = own;
                }
            }
            class_of[level] = (merged.len() - 1) as u8;
        }
        Self {
            classes: merged,
            class_of,
            ..Self::default()
        }
    }

    /// Pages by class, from pages by level.
    pub fn by_class(&self, levels: &[f64]) -> Vec<f64> {
        let mut pages = vec![0.0; self.classes.len()];
        for (level, count) in levels.iter().enumerate() {
            let class = self
                .class_of
                .get(level)
                .map_or(0, |class| usize::from(*class));
            if let Some(pages) = pages.get_mut(class) {
                *pages += count;
            }
        }
        pages
    }

    /// Pages that are to move before the freeze or at it.
    pub fn stale(&self) -> f64 {
        self.classes.iter().map(|class| class.stale).sum()
    }

    /// Pages that stay behind whatever else.
    pub fn unsent(&self) -> f64 {
        self.classes.iter().map(|class| class.unsent).sum()
    }

    /// Pages with content.
    pub fn content(&self) -> f64 {
        self.classes.iter().map(|class| class.content).sum()
    }
}

impl Class {
    fn add(&mut self, other: &Self) {
        let all = (self.content + other.content).max(1e-9);
        let mean = |a: f64, b: f64| (a * self.content + b * other.content) / all;
        self.writes = mean(self.writes, other.writes);
        self.accesses = mean(self.accesses, other.accesses);
        self.content += other.content;
        self.stale += other.stale;
        self.unsent += other.unsent;
    }
}

#[cfg(test)]
mod tests;
