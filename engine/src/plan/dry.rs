//! A plan before anything moves: from a profile of the guest and what is said of the link.

use hybridmig_transport::message::{Mode, RegionKind, SessionId};
use serde::{Deserialize, Serialize};

use super::planner::{Bounds, Choice, Planned, choose, everything, nothing};
use crate::predict::{Costs, KindState, LinkState, Situation};
use crate::profile::rates::LEVELS;
use crate::profile::spread::Spread;
use crate::profile::{HotnessClass, Profile};
use crate::session::source::{GuestUse, SourceConfig};

/// Round trips from dialling to the first block: the handshake, offer and answer.
const NEGOTIATION: f64 = 3.0;
/// Shares that a plot shows.
pub const SHARES: [f64; 11] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
/// Bytes on the wire of a page where nobody has looked at the contents: it is taken not to shrink.
const PAGE_BYTES: f64 = 4112.0;

/// A guest, a link and limits: what a dry run is made of.
#[derive(Clone, Debug)]
pub struct DryRun {
    /// The guest.
    pub profile: Profile,
    /// How it waits for what it lacks.
    pub guest: GuestUse,
    /// The link.
    pub link: LinkState,
    /// What the steps cost.
    pub costs: Costs,
    /// The operator's limits.
    pub bounds: Bounds,
    /// Pages around a fault that are sent with it.
    pub prefetch: u32,
}

/// Lost work by what moves before the guest resumes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Share of the memory.
    pub mem_frac: f64,
    /// Share of the disks.
    pub disk_frac: f64,
    /// Lost work in seconds.
    pub lost_work: f64,
    /// Total time in seconds.
    pub total: f64,
    /// Downtime in seconds.
    pub downtime: f64,
}

/// What a dry run says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Advice {
    /// The plan.
    pub chosen: Planned,
    /// Two others.
    pub alternatives: Vec<Planned>,
    /// Why the first.
    pub why: Vec<String>,
    /// Lost work over the fractions.
    pub points: Vec<Point>,
}

impl DryRun {
    /// Where things stand when the first block is to be sent, with these shares of memory and of disks to move before
    /// the freeze, the most accessed first.
    pub fn situation(&self, mem_frac: f64, disk_frac: f64) -> Situation {
        let timing = SourceConfig::new(SessionId([0; 8]), Mode::Hybrid);
        let elapsed = self.costs.start.mean + NEGOTIATION * self.link.rtt;
        Situation {
            memory: KindState {
                parallelism: f64::from(self.guest.parallelism.max(1)),
                weight: 1.0,
                ..self.kind(RegionKind::Memory, mem_frac)
            },
            disks: KindState {
                parallelism: self.guest.disk_parallelism,
                weight: self.guest.disk_weight,
                ..self.kind(RegionKind::Disk, disk_frac)
            },
            link: self.link,
            costs: self.costs,
            prefetch: f64::from(self.prefetch),
            elapsed,
            precopied: 0.0,
            sent: 0.0,
            state_bytes: self.costs.state_bytes,
            scan_interval: timing.scan_interval.as_secs_f64(),
            min_round: timing.min_round.as_secs_f64(),
            watching_cost: self.guest.watching_cost,
            rewriting: 1.0,
        }
    }

    fn kind(&self, kind: RegionKind, share: f64) -> KindState {
        let regions = || {
            self.profile
                .regions
                .iter()
                .filter(move |region| region.kind == kind)
        };
        let mut levels: Vec<Option<HotnessClass>> = vec![None; LEVELS];
        for class in regions().flat_map(|region| &region.classes) {
            let known = &mut levels[usize::from(class.level)];
            let merged = known.map_or(*class, |known| {
                let pages = known.pages + class.pages;
                let mean = |a: f64, b: f64| (a * known.pages + b * class.pages) / pages.max(1e-9);
                HotnessClass {
                    level: class.level,
                    pages,
                    writes: mean(known.writes, class.writes),
                    accesses: mean(known.accesses, class.accesses),
                }
            });
            *known = Some(merged);
        }
        let mut classes: Vec<HotnessClass> = levels.into_iter().flatten().collect();
        classes.sort_by(|a, b| b.accesses.total_cmp(&a.accesses));
        let content: f64 = classes.iter().map(|class| class.pages).sum();
        let (mut stale, mut unsent) = (vec![0.0; LEVELS], vec![0.0; LEVELS]);
        let mut room = share.clamp(0.0, 1.0) * content;
        for class in &classes {
            let level = usize::from(class.level);
            stale[level] = class.pages.min(room);
            unsent[level] = class.pages - stale[level];
            room -= stale[level];
        }
        let (mut bytes, mut spread, mut pages) = (0.0, Spread::default(), 0.0);
        for region in regions() {
            let weight = region.content_pages as f64;
            bytes += weight * region.contents.mean_bytes().unwrap_or(PAGE_BYTES);
            spread.near += weight * region.spread.near;
            spread.walk += weight * region.spread.walk;
            pages += weight;
        }
        let pages = pages.max(1.0);
        KindState {
            bytes_per_page: (bytes / pages).max(1.0),
            bytes_stale: (bytes / pages).max(1.0),
            bytes_again: (bytes / pages).max(1.0),
            spread: Spread {
                near: spread.near / pages,
                walk: spread.walk / pages,
            },
            ..KindState::new(&classes, &stale, &unsent)
        }
    }

    /// The plan, two others, why, and the lost work over the fractions.
    pub fn advise(&self) -> Advice {
        let has_disks = self
            .profile
            .regions
            .iter()
            .any(|region| region.kind == RegionKind::Disk);
        let disk_shares: &[f64] = if has_disks { &SHARES } else { &[1.0] };
        let mut points = Vec::new();
        let mut best: Option<(Choice, Situation)> = None;
        for disk_frac in disk_shares.iter().rev() {
            for mem_frac in SHARES.iter().rev() {
                let situation = self.situation(*mem_frac, *disk_frac);
                let choice = choose(&situation, &self.bounds);
                points.push(Point {
                    mem_frac: *mem_frac,
                    disk_frac: *disk_frac,
                    lost_work: choice.outcome.lost_work,
                    total: choice.outcome.total,
                    downtime: choice.outcome.downtime,
                });
                let better = best
                    .as_ref()
                    .is_none_or(|(best, _)| choice.is_better_than(best, &self.bounds));
                if better {
                    best = Some((choice, situation));
                }
            }
        }
        let (choice, situation) = best.expect("there are shares");
        let chosen = choice.planned(&situation, choice.words());
        let all = self.situation(1.0, 1.0);
        let none = self.situation(0.0, 0.0);
        let (copy, post) = (everything(&all, &self.bounds), nothing(&none));
        let alternatives = vec![
            copy.planned(&all, format!("pre-copy of everything: {}", copy.words())),
            post.planned(&none, "post-copy of everything: freeze at once"),
        ];
        let why = self.why(&choice, &chosen, &alternatives);
        Advice {
            chosen,
            alternatives,
            why,
            points,
        }
    }

    fn why(&self, choice: &Choice, chosen: &Planned, others: &[Planned]) -> Vec<String> {
        let mut why = Vec::new();
        let lost = |plan: &Planned| plan.prediction.lost_work.p50;
        for other in others {
            let times = lost(other) / lost(chosen).max(1e-6);
            let (name, _) = other.what.split_once(':').unwrap_or((&other.what, ""));
            why.push(format!(
                "{name} would lose {:.2} s of work, {times:.1} times as much as the {:.2} s of this plan",
                lost(other),
                lost(chosen)
            ));
        }
        let memory = &choice.reached.memory;
        let pages = memory.content().max(1.0);
        let rewritten = choice.reached.after_round().memory.stale();
        why.push(format!(
            "in one more round of {:.1} s the guest would write {:.1} % of its memory again",
            choice.reached.round_seconds(),
            100.0 * rewritten / pages
        ));
        let hot: f64 = memory.classes.iter().map(|c| c.content * c.writes).sum();
        why.push(format!(
            "it writes {hot:.0} pages/s of memory; the link carries {:.0}",
            self.link.bandwidth / memory.bytes_per_page.max(1.0)
        ));
        let excess = self.bounds.excess(&choice.outcome);
        if excess > 0.0 {
            why.push(format!(
                "NO plan keeps to the limits: this one is {excess:.2} s beyond them, with a tenth kept as margin"
            ));
        }
        why
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::{Contents, PROFILE_VERSION, RegionProfile};

    fn dry(classes: Vec<HotnessClass>) -> DryRun {
        let content_pages = classes.iter().map(|class| class.pages).sum::<f64>() as u64;
        DryRun {
            profile: Profile {
                profile_version: PROFILE_VERSION,
                guest: "test".into(),
                guest_kind: "workload".into(),
                taken_unix: 0.0,
                seconds: 10.0,
                parallelism: 2,
                work_per_second: None,
                watching_cost: None,
                reads_seen: true,
                regions: vec![RegionProfile {
                    name: "ram".into(),
                    kind: RegionKind::Memory,
                    block_size: 4096,
                    blocks: 100_000,
                    content_pages,
                    contents: Contents {
                        sampled: 100,
                        zero: 0.5,
                        duplicate: 0.0,
                        bytes_per_page: 2000.0,
                    },
                    classes,
                    distinct: Vec::new(),
                    spread: Spread::default(),
                    heat: Vec::new(),
                }],
                notes: Vec::new(),
            },
            guest: GuestUse {
                parallelism: 2,
                ..GuestUse::default()
            },
            link: LinkState {
                bandwidth: 10e6,
                bandwidth_cv: 0.1,
                rtt: 0.1,
                rtt_cv: 0.05,
                parity: 0.03,
            },
            costs: Costs::assumed("workload"),
            bounds: Bounds {
                rounds: 30,
                ..Bounds::default()
            },
            prefetch: 24,
        }
    }

    fn class(level: u8, pages: f64, writes: f64, accesses: f64) -> HotnessClass {
        HotnessClass {
            level,
            pages,
            writes,
            accesses,
        }
    }

    #[test]
    fn the_hottest_share_moves_first_at_the_size_that_contents_have() {
        let dry = dry(vec![
            class(255, 100.0, 1.0, 5.0),
            class(0, 900.0, 0.0, 0.01),
        ]);
        let at = dry.situation(0.5, 1.0);
        assert!((at.memory.stale() - 500.0).abs() < 1e-6);
        assert!(
            (at.memory.classes[0].stale - 100.0).abs() < 1e-6,
            "{:?}",
            at.memory.classes
        );
        assert!((at.memory.bytes_per_page - 1010.0).abs() < 1.0);
    }

    #[test]
    fn advice_is_the_least_of_its_points_and_says_why() {
        let dry = dry(vec![
            class(255, 500.0, 1.0, 5.0),
            class(0, 50_000.0, 0.0, 0.01),
        ]);
        let advice = dry.advise();
        let least = advice
            .points
            .iter()
            .map(|p| p.lost_work)
            .fold(f64::INFINITY, f64::min);
        let chosen = advice.chosen.prediction.lost_work.p50;
        assert!(chosen < 1.15 * least + 0.02, "{chosen} {least}");
        assert_eq!(advice.alternatives.len(), 2);
        assert!(advice.alternatives[1].prediction.lost_work.p50 > 2.0 * chosen);
        assert!(
            advice.why.iter().any(|why| why.contains("post-copy")),
            "{:?}",
            advice.why
        );
        assert!(advice.chosen.mem_frac > 0.9, "{:?}", advice.chosen);
    }

    #[test]
    fn limits_that_cannot_be_kept_are_said() {
        let mut dry = dry(vec![class(0, 50_000.0, 0.0, 0.01)]);
        dry.bounds.max_total = Some(0.5);
        assert!(
            dry.advise()
                .why
                .iter()
                .any(|why| why.starts_with("NO plan"))
        );
    }
}
