//! Which blocks move in which phase, and when to freeze. Pure rules over sets and figures: it
//! knows no message and no clock.
//!
//! Amounts are in pages of 4 KiB, memory and disks alike (see [`crate::regions`]).
//!
//! The rules, until a predictor replaces them. With R pages not current at the destination, b
//! bytes per page on the wire (measured), B bytes/s that arrive (measured), parity p at the loss of
//! the link, and a fixed cost C of stopping, scanning (measured), saving and loading:
//!
//! - predicted downtime of a freeze that moves all of R: `D(R) = R·b·(1 + p)/B + rtt/2 + C`. A lost
//!   packet costs no round trip: that is what the parity is for;
//! - what fits a downtime target T: `(T − rtt/2 − C) · B / b / (1 + p)` pages, and never less than what
//!   [`FLOOR_SHARE`] of T carries: on a link whose delay alone exceeds the target more rounds would
//!   gain nothing;
//! - a round does not pay when the guest dirties [`UNPAYING_DIRTY`] of what the link carries, or
//!   when the rest did not shrink by [`UNPAYING_SHRINK`]. The rate is that of the last scan's interval,
//!   a second or so: over a long pass a guest that writes the same blocks again and again would seem
//!   slow, and get a round that gains nothing;
//! - within a round, what the guest has written goes last. When nothing else is left, and the guest undoes
//!   [`UNDOING`] of what is sent, hybrid freezes at once: the same blocks cost the link less after it;
//! - of a disk moves before the freeze, in hybrid mode, what the guest has accessed lately: a disk is
//!   many times as large as what is used of it.

use std::collections::BTreeMap;
use std::time::Duration;

use hybridmig_transport::message::{Mode, RegionKind};

use crate::blocks::{Blocks, RegionId};

pub mod dry;
pub mod heat;
mod order;
pub mod planner;

pub use heat::Heat;
pub use order::{PushOrder, take_range};

/// Stopping the guest, saving and loading its device state, the journals: assumed, because none of it
/// happens before the freeze.
pub const FIXED_COST: Duration = Duration::from_millis(40);
/// Scans of a guest that stands still: one before its state is saved, one after.
const SCANS: u32 = 2;
/// Share of the downtime target that moving blocks may always use.
pub const FLOOR_SHARE: f64 = 0.1;
/// A round does not pay when the dirty rate reaches this share of the send rate.
pub const UNPAYING_DIRTY: f64 = 0.7;
/// A round pays when the rest shrank by this share at least.
pub const UNPAYING_SHRINK: f64 = 0.2;
/// Within a round, sending does not pay when the guest undoes this share of it at the same time.
pub const UNDOING: f64 = 0.5;
/// Pre-copy, which has no other way, goes on until so many rounds in a row did not pay; hybrid
/// freezes after the first.
pub const UNPAYING_ROUNDS: u32 = 3;
/// What pre-copy accepts as downtime in the end when the operator names no limit.
pub const DEFAULT_MAX_DOWNTIME: Duration = Duration::from_secs(1);

/// What is known when a scan has ended a round.
#[derive(Clone, Copy, Debug)]
pub struct RoundFigures {
    /// Rounds done, the first pass included.
    pub round: u32,
    /// Pages that are not current at the destination now (without those meant to stay behind).
    pub rest: u64,
    /// The same when the round began.
    pub rest_before: u64,
    /// Distinct pages that the guest dirties per second.
    pub dirty_rate: f64,
    /// The link and the guest's scans.
    pub pace: Pace,
}

/// What a freeze takes, beside the number of its pages.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Pages per second that arrive.
    pub send_rate: f64,
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// What parity adds to the bytes of a freeze, as a share.
    pub parity: f64,
    /// What a scan takes.
    pub scan: Duration,
}

impl Pace {
    /// Blocks per second that move in a freeze, parity and all.
    pub(crate) fn freeze_rate(&self) -> f64 {
        self.send_rate.max(1e-3) / (1.0 + self.parity)
    }

    /// The downtime of a freeze without blocks.
    fn fixed(&self) -> Duration {
        (self.rtt / 2)
            .saturating_add(FIXED_COST)
            .saturating_add(self.scan.saturating_mul(SCANS))
    }
}

impl RoundFigures {
    /// D(R): predicted downtime of a freeze now that moves the whole rest.
    pub fn predicted_downtime(&self) -> Duration {
        let transfer = self.rest as f64 / self.pace.freeze_rate();
        Duration::try_from_secs_f64(transfer)
            .unwrap_or(Duration::MAX)
            .saturating_add(self.pace.fixed())
    }

    /// Whether this round was worth its bytes.
    pub fn paid(&self) -> bool {
        self.dirty_rate < UNPAYING_DIRTY * self.pace.send_rate
            && (self.rest as f64) <= (1.0 - UNPAYING_SHRINK) * self.rest_before as f64
    }
}

/// What a scan within a round has shown.
#[derive(Clone, Copy, Debug)]
pub struct Midway {
    /// Blocks per second that arrive.
    pub send_rate: f64,
    /// Blocks per second that the guest wrote after they had been sent in this round, each counted once.
    pub undone_rate: f64,
    /// Blocks to send that the guest has not written since the round began.
    pub calm: u64,
}

impl Midway {
    /// Whether it pays to go on: calm blocks stay as they are sent; of the others, most must.
    pub fn pays(&self) -> bool {
        self.calm > 0 || self.undone_rate < UNDOING * self.send_rate
    }
}

/// Pages that fit a downtime of `target`.
pub fn fits(target: Duration, pace: &Pace) -> u64 {
    let transfer = target.saturating_sub(pace.fixed());
    let transfer = transfer.max(target.mul_f64(FLOOR_SHARE));
    (transfer.as_secs_f64() * pace.freeze_rate()).round() as u64
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
        let fits_target = figures.rest <= fits(self.target(), &figures.pace);
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
                "after {} rounds {} pages are left, which the guest dirties at {:.0} pages/s while \
                 {:.0} pages/s arrive: stopping it now would cost about {:.2} s, more than the {:.2} s \
                 allowed; raise --max-downtime or use --mode hybrid",
                figures.round,
                figures.rest,
                figures.dirty_rate,
                figures.pace.send_rate,
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

/// The operator's share of one kind, and how much of the guest's has content.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Share of what has content to move before the guest resumes, 0 to 1.
    pub fraction: f64,
    /// Pages with content.
    pub populated: u64,
}

impl Share {
    /// Number of pages that the share stands for.
    pub fn pages(&self) -> u64 {
        (self.fraction.clamp(0.0, 1.0) * self.populated as f64).ceil() as u64
    }
}

/// The operator's shares, where any was given.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    /// Of memory.
    pub memory: Option<Share>,
    /// Of each disk.
    pub disks: BTreeMap<RegionId, Share>,
}

/// What is not current at the freeze.
#[derive(Clone, Debug, Default)]
pub struct Rest {
    /// Was sent and has changed since.
    pub stale: Blocks,
    /// Was never sent.
    pub unsent: Blocks,
}

/// Which of the blocks that are not current (`rest`) move in the freeze: in pre-copy all, in
/// post-copy none, in hybrid the hottest that fit the target, memory before what has changed on the
/// disks. With a share given, as many of that kind as reach it (all, when it is 1), but no more than
/// fit `max_downtime`.
pub fn split_at_freeze(
    limits: &Limits,
    shares: &Shares,
    rest: Rest,
    heat: &Heat,
    pace: &Pace,
) -> FreezeSplit {
    let Rest { stale, unsent } = rest;
    let mut behind = stale.clone();
    behind.union_with(&unsent);
    let freeze = match limits.mode {
        Mode::Precopy => behind.clone(),
        Mode::Postcopy => Blocks::new(),
        Mode::Hybrid => {
            let within = |limit: Duration| fits(limit, pace);
            let target = limits
                .target
                .min(limits.max_downtime.unwrap_or(Duration::MAX));
            let most = limits.max_downtime.map_or(u64::MAX, within);
            let mut freeze = Blocks::new();
            let mut taken = 0;
            let mut take = |all: Blocks, free: &Blocks, share: Option<Share>| {
                let chosen = match share {
                    Some(share) => {
                        let moved = share.populated.saturating_sub(heat.shapes.pages(&all));
                        let needed = share.pages().saturating_sub(moved);
                        heat.hottest(&all, needed.min(most.saturating_sub(taken)))
                    }
                    None => heat.hottest(free, within(target).saturating_sub(taken)),
                };
                taken += heat.shapes.pages(&chosen);
                freeze.union_with(&chosen);
            };
            let memory = heat.shapes.of_kind(&behind, RegionKind::Memory);
            take(memory.clone(), &memory, shares.memory);
            for disk in heat.shapes.disks() {
                let of = |blocks: &Blocks| -> Blocks {
                    blocks
                        .get(disk)
                        .map(|set| (disk, set.clone()))
                        .into_iter()
                        .collect()
                };
                // What was left out of a disk is to stay behind, unless a share is asked for.
                take(of(&behind), &of(&stale), shares.disks.get(&disk).copied());
            }
            freeze
        }
    };
    behind.subtract(&freeze);
    FreezeSplit { freeze, behind }
}

/// The hottest stale pages of memory and of disks, as many as the planner says; the rest stays behind.
pub fn split_as_planned(rest: Rest, heat: &Heat, memory: u64, disks: u64) -> FreezeSplit {
    let Rest {
        stale: mut behind,
        unsent,
    } = rest;
    let of = |kind| heat.shapes.of_kind(&behind, kind);
    let mut freeze = heat.hottest(&of(RegionKind::Memory), memory);
    freeze.union_with(&heat.hottest(&of(RegionKind::Disk), disks));
    behind.union_with(&unsent);
    behind.subtract(&freeze);
    FreezeSplit { freeze, behind }
}

/// What of a disk's content moves in pre-copy, in hybrid mode: the operator's share, what was accessed
/// lately first; without one, what was accessed lately.
pub fn disk_share(shares: &Shares, content: &Blocks, heat: &Heat) -> Blocks {
    let mut chosen = Blocks::new();
    for disk in heat.shapes.disks() {
        let Some(set) = content.get(disk) else {
            continue;
        };
        if let Some(share) = shares.disks.get(&disk) {
            let all = std::iter::once((disk, set.clone())).collect();
            chosen.union_with(&heat.hottest(&all, share.pages()));
        } else {
            let warm = set.iter().filter(|block| heat.of(disk, *block) > 0);
            chosen.entry(disk).extend(warm);
        }
    }
    chosen
}

#[cfg(test)]
mod tests;
