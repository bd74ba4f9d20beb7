//! Where the machine stands, as the predictor wants to know it, and what the planner makes of it. In hybrid mode the
//! planner decides, unless the operator has named shares or wants the simple rule (`observe`); in all modes it
//! predicts.

use std::time::Duration;

use hybridmig_transport::message::{Mode, RegionKind};
use serde::{Deserialize, Serialize};

use super::SourceMachine;
use crate::blocks::{Blocks, RegionId};
use crate::plan::Rest;
use crate::plan::heat::{Tally, index};
use crate::plan::planner::{Bounds, Choice, Planned, best_freeze, choose, everything, nothing};
use crate::predict::fluid::Frozen;
use crate::predict::{DISK_PARALLELISM, DISK_WEIGHT, KindState, LinkState, Situation};
use crate::profile::AccessSample;
use crate::profile::rates::LEVELS;

/// How sure the rate of the link is after long measuring, and before any, as relative standard deviations; and the
/// seconds of measuring that half of the way takes.
const BANDWIDTH_CV: (f64, f64) = (0.06, 0.35);
const HALF_SURE: f64 = 0.5;
/// The same of the round trip.
const RTT_CV: f64 = 0.05;
/// Time between two looks at the plan in post-copy.
const REPLAN: Duration = Duration::from_secs(1);
/// Rounds in a row that gained nothing, after which none is made any more, whatever is predicted of it; and what a
/// round must have gained, as a share.
const UNPAYING: u32 = 2;
const GAINED: f64 = 0.1;
/// What a freeze in the middle of a round must gain over one at its end, as a share.
const GAINED_MIDWAY: f64 = 0.2;
/// A round that is expected to leave so much of what is stale as stale as before does not count: the guest outruns the
/// link.
const USELESS: f64 = 0.9;
/// A freeze that costs no more than this times one without any block is as good as one can be.
const NEAR_LEAST: f64 = 1.3;
/// Scans that must have been made before the plan counts as the first one, unless the first pass is over.
const SCANS: u32 = 2;
/// Revisions kept.
const MAX_REVISIONS: usize = 256;

/// How a guest waits for what it lacks, as far as the driver can tell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GuestUse {
    /// Threads that run guest code: vCPUs, workers.
    pub parallelism: u32,
    /// Operations under way on its disks at once.
    pub disk_parallelism: f64,
    /// Share of its speed that hangs on its disks, 0 to 1.
    pub disk_weight: f64,
    /// Share of its speed that tracking and scans cost it.
    pub watching_cost: f64,
}

impl Default for GuestUse {
    fn default() -> Self {
        Self {
            parallelism: 1,
            disk_parallelism: DISK_PARALLELISM,
            disk_weight: DISK_WEIGHT,
            watching_cost: 0.005,
        }
    }
}

/// A look at the plan.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Revision {
    /// Seconds since the session began.
    pub at: f64,
    /// Rounds that the plan has before the freeze; `None` after it.
    pub rounds: Option<u32>,
    /// Pages that are not current at the destination.
    pub missing: f64,
    /// Predicted, from the session's beginning.
    pub total: f64,
    /// Predicted lost work, from the freeze on; after the freeze: what is still to be lost.
    pub lost_work: f64,
}

/// What was planned, and how.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlanReport {
    /// Who decided: `planner`, `simple rule`, `shares` of the operator, or the mode itself (`pre-copy`, `post-copy`).
    pub decided_by: String,
    /// The plan when the first scan had shown what the guest writes.
    pub at_start: Option<Planned>,
    /// Other plans that were looked at then.
    pub alternatives: Vec<Planned>,
    /// What was then done at the freeze.
    pub at_freeze: Option<Planned>,
    /// Distinct pages that the guest was estimated to use within ten seconds.
    pub working_set: f64,
    /// Every look at the plan.
    pub revisions: Vec<Revision>,
}

/// The planner's state in the machine.
#[derive(Debug)]
pub(super) struct Planning {
    pub(super) report: PlanReport,
    /// See [`Situation::rewriting`].
    rewriting: f64,
    /// When the last round ended: what freezing then would have cost, and the pages that one more round was to leave
    /// stale.
    round: Option<(f64, f64)>,
    /// Rounds in a row that gained nothing.
    unpaying: u32,
    /// The freeze, to be predicted in full when nobody waits.
    frozen: Option<(Situation, Frozen)>,
    /// When the plan is looked at again, after the freeze.
    next: Duration,
    /// Blocks by level that were missing then, and those of them that the guest asked for since.
    exposed: [Vec<u64>; 2],
    asked: [Vec<u64>; 2],
}

impl Default for Planning {
    fn default() -> Self {
        Self {
            report: PlanReport::default(),
            rewriting: 1.0,
            round: None,
            unpaying: 0,
            frozen: None,
            next: Duration::ZERO,
            exposed: [Vec::new(), Vec::new()],
            asked: [Vec::new(), Vec::new()],
        }
    }
}

impl SourceMachine {
    /// Whether the planner decides.
    pub(super) fn planned(&self) -> bool {
        self.config.mode == Mode::Hybrid && !self.config.observe && !self.config.has_share()
    }

    /// Which of a sample of blocks the guest has accessed.
    pub(super) fn sampled(&mut self, samples: &[AccessSample]) {
        for sample in samples {
            self.heat.sampled(sample);
        }
    }

    /// Bytes per second that move in a freeze, parity and all.
    pub fn freeze_rate(&self) -> f64 {
        self.pace().freeze_rate() * self.estimator.bytes_per_page(false)
    }

    /// What has been planned, for the report.
    pub fn plan_report(&self) -> &PlanReport {
        &self.planning.report
    }

    /// Where things stand, with these blocks stale and these meant to stay behind.
    fn situation(&self, at: Duration, stale: &Tally, unsent: &Tally) -> Situation {
        let all = self.heat.content(&self.populated);
        let guest = self.config.guest;
        let kind = |kind: RegionKind| {
            let classes = self.heat.classes(kind, &all);
            let own = index(kind);
            let disk = kind == RegionKind::Disk;
            let (full, again) = (
                self.estimator.full_page(disk),
                self.estimator.page_again(disk),
            );
            let fresh = self.fresh(kind) / stale.pages(kind).max(1.0);
            let fresh = fresh.clamp(0.0, 1.0);
            // What was written is often heavier than what was not.
            let stale_full = fresh * full + (1.0 - fresh) * again.max(full);
            let unsent_share =
                unsent.pages(kind) / (stale.pages(kind) + unsent.pages(kind)).max(1.0);
            KindState {
                bytes_per_page: unsent_share * full + (1.0 - unsent_share) * stale_full,
                bytes_stale: fresh * full + (1.0 - fresh) * again,
                bytes_again: again,
                spread: self.heat.spread(kind),
                ..KindState::new(&classes, &stale.0[own], &unsent.0[own])
            }
        };
        let link = self.link_figures();
        let tracked = self.figures.milestones.tracking.unwrap_or(at);
        Situation {
            memory: KindState {
                parallelism: f64::from(guest.parallelism.max(1)),
                weight: 1.0,
                ..kind(RegionKind::Memory)
            },
            disks: KindState {
                parallelism: guest.disk_parallelism,
                weight: guest.disk_weight,
                ..kind(RegionKind::Disk)
            },
            link: LinkState {
                bandwidth: self.estimator.steady(),
                bandwidth_cv: bandwidth_cv(self.estimator.measured_for()),
                rtt: link.rtt.as_secs_f64(),
                rtt_cv: RTT_CV,
                parity: self.estimator.parity(),
            },
            costs: self.config.costs,
            prefetch: f64::from(self.config.prefetch),
            elapsed: at.as_secs_f64(),
            precopied: at.saturating_sub(tracked).as_secs_f64(),
            sent: self.figures.bytes() as f64,
            state_bytes: self.config.costs.state_bytes,
            scan_interval: self.config.scan_interval.as_secs_f64(),
            min_round: self.config.min_round.as_secs_f64(),
            watching_cost: guest.watching_cost,
            rewriting: self.planning.rewriting,
        }
    }

    /// Pages that are to move before the freeze or at it, and that the destination has never had.
    fn fresh(&self, kind: RegionKind) -> f64 {
        if self.figures.rounds.is_empty() {
            let pages = |set| self.shapes.pages_of_kind(set, kind);
            (pages(&self.pending) + pages(&self.hot)) as f64
        } else {
            0.0
        }
    }

    fn bounds(&self) -> Bounds {
        let done = self.figures.rounds.len() as u32;
        Bounds {
            max_downtime: self.config.max_downtime.map(|limit| limit.as_secs_f64()),
            max_total: self.config.max_total.map(|limit| limit.as_secs_f64()),
            rounds: self.config.max_rounds.saturating_sub(done),
        }
    }

    /// Everything that is to be sent before the freeze or to be divided at it.
    fn stale(&self) -> Tally {
        [&self.pending, &self.hot, &self.again, &self.resend]
            .into_iter()
            .fold(Tally::default(), |sum, set| sum.plus(&self.heat.tally(set)))
    }

    /// Where things stand before the freeze.
    fn here(&self, now: Duration) -> Situation {
        self.situation(now, &self.stale(), &self.heat.tally(&self.unsent))
    }

    /// The plan in the middle of a round: whether to freeze now. What is left of it would move while the guest runs
    /// and loses nothing, so not to wait for that must gain more than predictions err.
    pub(super) fn look_midway(&mut self, now: Duration) -> bool {
        let mut situation = self.here(now);
        let choice = self.look_at(now, &mut situation);
        if choice.rounds > 0 || self.heat.rates(RegionKind::Memory).scans() <= SCANS {
            return false;
        }
        let after = situation.after_round();
        let useless = after.memory.stale() > USELESS * situation.memory.stale();
        let lost_after = || best_freeze(&after, &self.bounds()).1.lost_work;
        useless || choice.outcome.lost_work < (1.0 - GAINED_MIDWAY) * lost_after()
    }

    /// The plan as things stand while the guest runs here. Keeps the first one. The situation changes if more of the
    /// disks is to move.
    fn look_at(&mut self, now: Duration, situation: &mut Situation) -> Choice {
        let bounds = self.bounds();
        let mut choice = match self.config.mode {
            Mode::Hybrid => choose(situation, &bounds),
            Mode::Precopy => everything(situation, &bounds),
            Mode::Postcopy => nothing(situation),
        };
        if self.planned() && all_of_the_disks(situation, &choice, &bounds) {
            let unsent = std::mem::take(&mut self.unsent);
            self.pending.union_with(&unsent);
            *situation = self.here(now);
            choice = choose(situation, &bounds);
            // The round that moves them gains nothing for memory, and says nothing of the rounds after it.
            self.planning.unpaying = 0;
            self.planning.round = None;
        }
        let known =
            self.heat.rates(RegionKind::Memory).scans() >= SCANS || !self.figures.rounds.is_empty();
        if known && self.planning.report.at_start.is_none() {
            self.first_plan(situation, &choice, &bounds);
        }
        let missing = situation.kinds().map(|kind| kind.stale() + kind.unsent());
        self.revise(Revision {
            at: now.as_secs_f64(),
            rounds: Some(choice.rounds),
            missing: missing.iter().sum(),
            total: choice.outcome.total,
            lost_work: choice.outcome.lost_work,
        });
        choice
    }

    /// The same where somebody else decides: for the record.
    pub(super) fn first_look(&mut self, now: Duration) {
        if self.planning.report.at_start.is_none() {
            let mut situation = self.here(now);
            self.look_at(now, &mut situation);
        }
    }

    /// A round has ended: whether to freeze. What it came to is held against what was expected of it.
    pub(super) fn look_after_round(&mut self, now: Duration) -> bool {
        let mut situation = self.here(now);
        let bounds = self.bounds();
        let cost = best_freeze(&situation, &bounds).1.lost_work;
        if let Some((before, expected)) = self.planning.round.take() {
            let off = (situation.memory.stale() / expected.max(1.0)).clamp(0.25, 4.0);
            self.planning.rewriting = (self.planning.rewriting * off.sqrt()).clamp(0.25, 4.0);
            situation.rewriting = self.planning.rewriting;
            let gained = cost < (1.0 - GAINED) * before;
            self.planning.unpaying = if gained {
                0
            } else {
                self.planning.unpaying + 1
            };
        }
        // As long as rounds gain, one more is made, whatever is predicted of it: what was seen counts for more.
        let least = situation.downtime(&Frozen::nothing(&situation));
        let gains = self.planning.unpaying == 0 && bounds.rounds > 0 && bounds.max_total.is_none();
        let may_freeze = !gains || cost <= NEAR_LEAST * least;
        self.planning.round = Some((cost, situation.after_round().memory.stale()));
        let freeze = self.look_at(now, &mut situation).rounds == 0;
        (freeze && may_freeze) || self.planning.unpaying >= UNPAYING
    }

    fn first_plan(&mut self, situation: &Situation, choice: &Choice, bounds: &Bounds) {
        let report = &mut self.planning.report;
        report.decided_by = match self.config.mode {
            Mode::Precopy => "pre-copy",
            Mode::Postcopy => "post-copy",
            Mode::Hybrid if self.config.has_share() => "shares",
            Mode::Hybrid if self.config.observe => "simple rule",
            Mode::Hybrid => "planner",
        }
        .into();
        report.working_set = situation.working_set(10.0);
        report.at_start = Some(choice.planned(situation, choice.words()));
        if self.config.mode == Mode::Hybrid {
            let all = everything(situation, bounds);
            let none = nothing(situation);
            report.alternatives = vec![
                all.planned(situation, format!("pre-copy: {}", all.words())),
                none.planned(situation, "post-copy: freeze now, nothing in the freeze"),
            ];
        }
    }

    fn revise(&mut self, revision: Revision) {
        let revisions = &mut self.planning.report.revisions;
        if revisions.len() == MAX_REVISIONS {
            // Every second one goes, the newest stay dense.
            let mut index = 0;
            revisions.retain(|_| {
                index += 1;
                index % 2 == 0
            });
        }
        revisions.push(revision);
    }

    /// The guest stands still: how many pages of memory and of disks are to move in the freeze. Remembers it for
    /// [`Self::predict_freeze`].
    pub(super) fn divide(&mut self, rest: &Rest) -> (u64, u64) {
        let at = self.figures.milestones.freeze.unwrap_or_default();
        let (stale, unsent) = (self.heat.tally(&rest.stale), self.heat.tally(&rest.unsent));
        let situation = self.situation(at, &stale, &unsent);
        let (frozen, _) = best_freeze(&situation, &self.bounds());
        let pages = |kind| frozen.pages(kind).round() as u64;
        let amounts = (pages(RegionKind::Memory), pages(RegionKind::Disk));
        self.planning.frozen = Some((situation, frozen));
        amounts
    }

    /// The same where somebody else has divided.
    pub(super) fn divided(&mut self, freeze: &Blocks, behind: &Blocks) {
        let at = self.figures.milestones.freeze.unwrap_or_default();
        let moved = self.heat.tally(freeze);
        let stale = self.heat.tally(behind).plus(&moved);
        let situation = self.situation(at, &stale, &Tally::default());
        let by_class = std::array::from_fn(|kind| situation.kinds()[kind].by_class(&moved.0[kind]));
        self.planning.frozen = Some((situation, Frozen(by_class)));
    }

    /// The distribution of what the freeze comes to, from what was known at it. Costs some milliseconds, so not while
    /// the guest stands still.
    pub(super) fn predict_freeze(&mut self, now: Duration) {
        let Some((mut situation, frozen)) = self.planning.frozen.take() else {
            return;
        };
        if self.figures.rounds.is_empty() {
            // Nothing had been sent before the freeze: what the link carries and what pages take is known by now.
            situation.link.bandwidth = self.estimator.steady();
            situation.memory.bytes_per_page = self.estimator.full_page(false);
            situation.disks.bytes_per_page = self.estimator.full_page(true);
        }
        let choice = Choice {
            rounds: 0,
            outcome: situation.freeze_now(&frozen),
            reached: situation.clone(),
            frozen,
        };
        self.planning.report.at_freeze = Some(choice.planned(&situation, choice.words()));
        if self.planning.report.decided_by.is_empty() {
            self.first_plan(&situation, &choice, &self.bounds());
        }
        self.expose();
        self.planning.next = now + REPLAN;
    }

    /// A look at the plan after the freeze: what the guest asked for shows which levels it uses, and the order of
    /// pushing follows.
    pub(super) fn look_again(&mut self, now: Duration) {
        if now < self.planning.next || !self.planned() {
            return;
        }
        self.planning.next = now + REPLAN;
        let left = self.heat.tally(&self.remaining);
        let situation = self.situation(now, &left, &Tally::default());
        let choice = nothing(&situation);
        self.revise(Revision {
            at: now.as_secs_f64(),
            rounds: None,
            missing: situation.kinds().iter().map(|kind| kind.stale()).sum(),
            total: choice.outcome.total - choice.outcome.downtime,
            lost_work: choice.outcome.lost_work - choice.outcome.downtime,
        });
        let running = REPLAN.as_secs_f64() * situation.speed_without_stale();
        for kind in [RegionKind::Memory, RegionKind::Disk] {
            let own = index(kind);
            let (exposed, asked) = (&self.planning.exposed[own], &self.planning.asked[own]);
            if running > 0.0 && asked.iter().any(|count| *count > 0) {
                self.heat.asked_for(kind, exposed, asked, running);
            }
        }
        self.order.again(&self.remaining, &self.heat);
        self.expose();
    }

    fn expose(&mut self) {
        self.planning.exposed = self.heat.count(&self.remaining);
        self.planning.asked = [vec![0; LEVELS], vec![0; LEVELS]];
    }

    /// The guest waits for a block that has not been sent.
    pub(super) fn asked(&mut self, region: RegionId, block: u32) {
        let kind = index(self.shapes.kind(region));
        let level = usize::from(self.heat.of(region, block));
        if let Some(count) = self.planning.asked[kind].get_mut(level) {
            *count += 1;
        }
    }
}

fn bandwidth_cv(measured_for: f64) -> f64 {
    let (least, most) = BANDWIDTH_CV;
    least + (most - least) * HALF_SURE / (HALF_SURE + measured_for)
}

/// Whether the guest loses less if what was not used of its disks goes before the freeze, too.
fn all_of_the_disks(situation: &Situation, choice: &Choice, bounds: &Bounds) -> bool {
    if situation.disks.unsent() < 1.0 {
        return false;
    }
    let mut all = situation.clone();
    for class in &mut all.disks.classes {
        class.stale += std::mem::take(&mut class.unsent);
    }
    let other = choose(&all, bounds);
    other.is_better_than(choice, bounds)
}
