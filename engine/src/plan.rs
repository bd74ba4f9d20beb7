//! Which blocks move in which phase, and when to freeze. Pure rules over sets and figures: it
//! knows no message and no clock.
//!
//! The rules, until a predictor replaces them. With R blocks not current at the destination, b
//! bytes per block on the wire (measured), B bytes/s that arrive (measured) and a fixed cost C of
//! stopping, saving and loading:
//!
//! - predicted downtime of a freeze that moves all of R: `D(R) = R·b/B + rtt/2 + C`;
//! - what fits a downtime target T: `(T − rtt/2 − C) · B / b` blocks, and never less than what
//!   [`FLOOR_SHARE`] of T carries: on a link whose delay alone exceeds the target more rounds would
//!   gain nothing;
//! - a round does not pay when the guest dirties [`UNPAYING_DIRTY`] of what the link carries, or
//!   when the rest did not shrink by [`UNPAYING_SHRINK`].

use std::time::Duration;

use hybridmig_transport::message::{Mode, RegionInfo};

use crate::blocks::{BlockSet, Blocks, RegionId};

/// Stopping the guest, saving and loading its device state, the journals: assumed until measured.
pub const FIXED_COST: Duration = Duration::from_millis(50);
/// Share of the downtime target that moving blocks may always use.
pub const FLOOR_SHARE: f64 = 0.1;
/// A round does not pay when the dirty rate reaches this share of the send rate.
pub const UNPAYING_DIRTY: f64 = 0.7;
/// A round pays when the rest shrank by this share at least.
pub const UNPAYING_SHRINK: f64 = 0.2;
/// Pre-copy, which has no other way, goes on until so many rounds in a row did not pay; hybrid
/// freezes after the first.
pub const UNPAYING_ROUNDS: u32 = 3;
/// What pre-copy accepts as downtime in the end when the operator names no limit.
pub const DEFAULT_MAX_DOWNTIME: Duration = Duration::from_secs(1);

/// How recently and how often each block was written: one byte per block, one bit per scan, the
/// newest on top. Its numeric order is recency first, then frequency, and history older than eight
/// scans is forgotten.
#[derive(Debug, Default)]
pub struct Heat {
    regions: Vec<Vec<u8>>,
}

impl Heat {
    /// Nothing has been written yet.
    pub fn new(regions: &[RegionInfo]) -> Self {
        Self {
            regions: regions.iter().map(|r| vec![0; r.blocks as usize]).collect(),
        }
    }

    /// A scan has found `dirty`.
    pub fn scanned(&mut self, dirty: &Blocks) {
        for bytes in &mut self.regions {
            for byte in bytes {
                *byte >>= 1;
            }
        }
        for (region, set) in dirty.iter() {
            let Some(bytes) = self.regions.get_mut(usize::from(region.0)) else {
                continue;
            };
            for block in set {
                if let Some(byte) = bytes.get_mut(block as usize) {
                    *byte |= 0x80;
                }
            }
        }
    }

    /// The block's heat; 0 for one that was not written lately.
    pub fn of(&self, region: RegionId, block: u32) -> u8 {
        self.regions
            .get(usize::from(region.0))
            .and_then(|bytes| bytes.get(block as usize))
            .copied()
            .unwrap_or(0)
    }

    /// The `count` hottest blocks of `among`; of equally hot ones the lowest.
    pub fn hottest(&self, among: &Blocks, count: u64) -> Blocks {
        if count >= among.len() {
            return among.clone();
        }
        let mut histogram = [0u64; 256];
        for (region, block) in among.iter_blocks() {
            histogram[usize::from(self.of(region, block))] += 1;
        }
        let (mut threshold, mut above) = (255, 0);
        while threshold > 0 && above + histogram[threshold] < count {
            above += histogram[threshold];
            threshold -= 1;
        }
        let mut at_threshold = count - above;
        let mut chosen = Blocks::new();
        for (region, block) in among.iter_blocks() {
            let heat = usize::from(self.of(region, block));
            if heat > threshold {
                chosen.insert(region, block);
            } else if heat == threshold && at_threshold > 0 {
                at_threshold -= 1;
                chosen.insert(region, block);
            }
        }
        chosen
    }
}

/// The order in which blocks that stayed behind are pushed: after what the guest touched last,
/// then by heat, then ascending.
#[derive(Debug, Default)]
pub struct PushOrder {
    /// The blocks by heat, the hottest last.
    levels: Vec<Blocks>,
    /// Where the guest faulted, the newest last.
    recent: Vec<(RegionId, u32)>,
}

/// Faults whose neighbourhood is pushed first.
const RECENT_FAULTS: usize = 8;
/// Blocks after a fault that are pushed before others.
const NEIGHBOURHOOD: u32 = 512;

impl PushOrder {
    /// Orders `behind` by its heat.
    pub fn new(behind: &Blocks, heat: &Heat) -> Self {
        let mut levels = vec![Blocks::new(); 256];
        for (region, set) in behind.iter() {
            let mut by_heat: Vec<BlockSet> = vec![BlockSet::new(); 256];
            for block in set {
                by_heat[usize::from(heat.of(region, block))].insert(block);
            }
            for (level, set) in by_heat.into_iter().enumerate() {
                if !set.is_empty() {
                    *levels[level].entry(region) = set;
                }
            }
        }
        levels.retain(|level| !level.is_empty());
        Self {
            levels,
            recent: Vec::new(),
        }
    }

    /// The guest faulted here.
    pub fn faulted(&mut self, region: RegionId, block: u32) {
        if self.recent.len() == RECENT_FAULTS {
            self.recent.remove(0);
        }
        self.recent.push((region, block));
    }

    /// Takes up to `limit` blocks of one region out of `remaining`, the next in order.
    pub fn next(&mut self, remaining: &mut Blocks, limit: usize) -> Option<(RegionId, Vec<u32>)> {
        while let Some((region, block)) = self.recent.last().copied() {
            let near = take_range(
                remaining,
                region,
                block,
                block.saturating_add(NEIGHBOURHOOD),
                limit,
            );
            if near.is_empty() {
                self.recent.pop();
            } else {
                return Some((region, near));
            }
        }
        while let Some(level) = self.levels.last_mut() {
            let Some((region, blocks)) = level.pop_front(limit) else {
                self.levels.pop();
                continue;
            };
            let blocks: Vec<u32> = blocks
                .into_iter()
                .filter(|block| remaining.remove(region, *block))
                .collect();
            if !blocks.is_empty() {
                return Some((region, blocks));
            }
        }
        // Nothing is forgotten, whatever happened to the order.
        remaining.pop_front(limit)
    }
}

/// Takes up to `limit` lowest blocks of `first..=last` out of a set.
pub fn take_range(
    blocks: &mut Blocks,
    region: RegionId,
    first: u32,
    last: u32,
    limit: usize,
) -> Vec<u32> {
    let taken: Vec<u32> = blocks.get(region).map_or_else(Vec::new, |set| {
        set.range(first..=last).take(limit).collect()
    });
    for block in &taken {
        blocks.remove(region, *block);
    }
    taken
}

/// What is known when a scan has ended a round.
#[derive(Clone, Copy, Debug)]
pub struct RoundFigures {
    /// Rounds done, the first pass included.
    pub round: u32,
    /// Blocks that are not current at the destination now (without those meant to stay behind).
    pub rest: u64,
    /// The same when the round began.
    pub rest_before: u64,
    /// Distinct blocks that the guest dirties per second.
    pub dirty_rate: f64,
    /// Blocks per second that arrive.
    pub send_rate: f64,
    /// Smoothed round-trip time.
    pub rtt: Duration,
}

impl RoundFigures {
    /// D(R): predicted downtime of a freeze now that moves the whole rest.
    pub fn predicted_downtime(&self) -> Duration {
        let transfer = self.rest as f64 / self.send_rate.max(1e-3);
        Duration::try_from_secs_f64(transfer)
            .unwrap_or(Duration::MAX)
            .saturating_add(self.rtt / 2)
            .saturating_add(FIXED_COST)
    }

    /// Whether this round was worth its bytes.
    pub fn paid(&self) -> bool {
        self.dirty_rate < UNPAYING_DIRTY * self.send_rate
            && (self.rest as f64) <= (1.0 - UNPAYING_SHRINK) * self.rest_before as f64
    }
}

/// Blocks that fit a downtime of `target`.
pub fn fits(target: Duration, rtt: Duration, send_rate: f64) -> u64 {
    let target = target.as_secs_f64();
    let transfer = target - rtt.as_secs_f64() / 2.0 - FIXED_COST.as_secs_f64();
    (transfer.max(FLOOR_SHARE * target) * send_rate).round() as u64
}

/// What to do after a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// One more round.
    Round,
    /// Freeze now.
    Freeze,
    /// Pre-copy cannot reach what was asked for.
    NotConverged {
        /// Rounds done, the rest, and what it would have cost.
        reason: String,
    },
}

/// The limits that the operator set.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How the phases are used.
    pub mode: Mode,
    /// Downtime to aim at.
    pub target: Duration,
    /// Downtime never to exceed knowingly.
    pub max_downtime: Option<Duration>,
    /// Rounds at most.
    pub max_rounds: u32,
}

/// Decides after each round.
#[derive(Debug)]
pub struct Decider {
    limits: Limits,
    unpaying: u32,
}

impl Decider {
    /// Nothing decided yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            unpaying: 0,
        }
    }

    /// The downtime that rounds aim at.
    pub fn target(&self) -> Duration {
        let limits = self.limits;
        limits
            .target
            .min(limits.max_downtime.unwrap_or(Duration::MAX))
    }

    /// The decision, given what the round has come to.
    pub fn after_round(&mut self, figures: RoundFigures) -> Verdict {
        if self.limits.mode == Mode::Postcopy {
            return Verdict::Freeze;
        }
        if figures.paid() {
            self.unpaying = 0;
        } else {
            self.unpaying += 1;
        }
        let exhausted = figures.round >= self.limits.max_rounds;
        let fits_target = figures.rest <= fits(self.target(), figures.rtt, figures.send_rate);
        if self.limits.mode == Mode::Hybrid {
            let freeze = fits_target || exhausted || self.unpaying > 0;
            return if freeze {
                Verdict::Freeze
            } else {
                Verdict::Round
            };
        }
        let predicted = figures.predicted_downtime();
        let within_max = self.limits.max_downtime.is_none_or(|max| predicted <= max);
        if fits_target && within_max {
            return Verdict::Freeze;
        }
        if !exhausted && self.unpaying < UNPAYING_ROUNDS {
            return Verdict::Round;
        }
        let acceptable = self
            .limits
            .max_downtime
            .unwrap_or(DEFAULT_MAX_DOWNTIME.max(self.limits.target));
        if predicted <= acceptable {
            return Verdict::Freeze;
        }
        Verdict::NotConverged {
            reason: format!(
                "after {} rounds {} blocks are left, which the guest dirties at {:.0} blocks/s while \
                 {:.0} blocks/s arrive: stopping it now would cost about {:.2} s, more than the {:.2} s \
                 allowed; raise --max-downtime or use --mode hybrid",
                figures.round,
                figures.rest,
                figures.dirty_rate,
                figures.send_rate,
                predicted.as_secs_f64(),
                acceptable.as_secs_f64(),
            ),
        }
    }
}

/// Divides what is not current at the freeze.
#[derive(Debug)]
pub struct FreezeSplit {
    /// Moves while the guest stands still.
    pub freeze: Blocks,
    /// Stays behind.
    pub behind: Blocks,
}

/// The operator's share, and how much of the guest has content.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Share of the populated blocks to move before the guest resumes, 0 to 1.
    pub fraction: f64,
    /// Populated blocks.
    pub populated: u64,
}

impl Share {
    /// Number of blocks that the share stands for.
    pub fn blocks(&self) -> u64 {
        (self.fraction.clamp(0.0, 1.0) * self.populated as f64).ceil() as u64
    }
}

/// Which of the blocks that are not current (`rest`) move in the freeze: in pre-copy all, in
/// post-copy none, in hybrid the hottest that fit the target. With a share given, as many as reach
/// it (all, when it is 1), but no more than fit `max_downtime`.
pub fn split_at_freeze(
    limits: &Limits,
    share: Option<Share>,
    rest: Blocks,
    heat: &Heat,
    rtt: Duration,
    send_rate: f64,
) -> FreezeSplit {
    let count = match (limits.mode, share) {
        (Mode::Precopy, _) => rest.len(),
        (Mode::Postcopy, _) => 0,
        (Mode::Hybrid, Some(share)) => {
            let moved = share.populated.saturating_sub(rest.len());
            let needed = share.blocks().saturating_sub(moved);
            limits
                .max_downtime
                .map_or(needed, |max| needed.min(fits(max, rtt, send_rate)))
        }
        (Mode::Hybrid, None) => {
            let target = limits
                .target
                .min(limits.max_downtime.unwrap_or(Duration::MAX));
            fits(target, rtt, send_rate)
        }
    };
    let freeze = heat.hottest(&rest, count);
    let mut behind = rest;
    behind.subtract(&freeze);
    FreezeSplit { freeze, behind }
}

#[cfg(test)]
mod tests;
