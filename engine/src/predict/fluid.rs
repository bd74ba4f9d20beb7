//! From the freeze to the last block, in expectation: a fluid model. `docs/model.md` derives the equations; the names
//! here are those there.
//!
//! Missing pages m_i of class i flow away by pushing, the hottest first, and by demand. The guest touches missing
//! pages at v·Φ per second, Φ = Σ a_i·m_i. One of c threads that touches one waits S_i: a round trip, or less if the
//! page is to arrive by itself before. A fault brings g pages with it that would have been touched as well, so the
//! guest runs at `v = κ / (Φ + κ)` with `κ = c·g/S̄`; one that walks is also fed by what is pushed after its faults.
//! What it loses is ∫ (1 − v) dt.

use hybridmig_transport::message::RegionKind;

use super::{Class, KindState, Outcome, Situation};
use crate::plan::heat::index;

/// A fault's latency over the round trip: what waits before it at the bottleneck and in both hosts, in seconds.
const SERVICE: f64 = 0.003;
/// Bytes that the answer to a fault takes, over those of the same page when it is pushed: parity, and no batch around
/// it.
const ANSWER: f64 = 1.6;
/// Steps of the integration: at least so many while everything would be pushed, at most in all.
const STEPS: (f64, u32) = (160.0, 4000);
/// From this share of speed on the guest counts as restored.
const RESTORED: f64 = crate::agility::RESTORED;
/// Of what the link carries, what a guest that walks gets in its own order: its threads walk in different places, and
/// pushing follows the last fault. From simulations of the embedded guest.
const WALKED: f64 = 0.6;
/// How much of the order of pushing is mistaken: pages that were taken for cold and are asked for all the same do not
/// come when their class should, but at any time. From simulations of the embedded guest.
const MISTAKEN: f64 = 0.5;
/// Pages of a batch: what a walking guest gets at a time when it is pushed to.
const BATCH: f64 = 64.0;

/// Pages that move while the guest stands still, by class, of memory and of disks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Frozen(pub [Vec<f64>; 2]);

impl Frozen {
    /// Nothing moves.
    pub fn nothing(situation: &Situation) -> Self {
        Self(situation.kinds().map(|kind| vec![0.0; kind.classes.len()]))
    }

    /// All that is stale moves.
    pub fn everything(situation: &Situation) -> Self {
        let stale = |kind: &KindState| kind.classes.iter().map(|class| class.stale).collect();
        Self(situation.kinds().map(stale))
    }

    /// Pages of this kind.
    pub fn pages(&self, kind: RegionKind) -> f64 {
        self.0[index(kind)].iter().sum()
    }
}

/// What the time after the resume comes to.
#[derive(Clone, Copy, Debug, Default)]
struct PostCopy {
    seconds: f64,
    lost: f64,
    restored: f64,
    faults: f64,
    stall: f64,
    bytes: f64,
}

impl Situation {
    /// Bytes per second that move in a freeze, parity and all.
    fn freeze_rate(&self) -> f64 {
        self.link.bandwidth.max(1.0) / (1.0 + self.link.parity)
    }

    /// Memory, then disks.
    pub fn kinds(&self) -> [&KindState; 2] {
        [&self.memory, &self.disks]
    }

    /// Bytes of what moves while the guest stands still, without the state.
    fn frozen_bytes(&self, frozen: &Frozen) -> f64 {
        frozen.pages(RegionKind::Memory) * self.memory.bytes_stale
            + frozen.pages(RegionKind::Disk) * self.disks.bytes_stale
    }

    /// Downtime of a freeze that moves these. Blocks go out while the state is saved.
    pub fn downtime(&self, frozen: &Frozen) -> f64 {
        let costs = &self.costs;
        let saving = costs.save.mean + costs.scan.mean / 2.0;
        let blocks = self.frozen_bytes(frozen) / self.freeze_rate();
        costs.stop.mean
            + costs.scan.mean / 2.0
            + saving.max(blocks)
            + self.state_bytes / self.freeze_rate()
            + self.link.rtt / 2.0
            + costs.overhead.mean
            + costs.load.mean
    }

    /// All from a freeze now on, `frozen` of what is stale moving in it and the rest staying behind.
    pub fn freeze_now(&self, frozen: &Frozen) -> Outcome {
        let downtime = self.downtime(frozen);
        let mut missing: [Vec<f64>; 2] = self
            .kinds()
            .map(|kind| kind.classes.iter().map(|c| c.stale + c.unsent).collect());
        for (missing, frozen) in missing.iter_mut().zip(&frozen.0) {
            for (missing, frozen) in missing.iter_mut().zip(frozen) {
                *missing = (*missing - frozen).max(0.0);
            }
        }
        let post = self.post_copy(missing);
        let before = self.elapsed;
        let end = self.link.rtt + self.costs.finish.mean;
        let all = post.seconds.max(self.link.rtt / 2.0);
        Outcome {
            total: before + downtime + all + end,
            downtime,
            remote_up: before + downtime,
            degradation: if all > 0.0 { post.lost / all } else { 0.0 },
            lost_work: downtime + post.lost,
            t95: downtime + post.restored,
            bytes: self.sent + self.frozen_bytes(frozen) + self.state_bytes + post.bytes,
            faults: post.faults,
            stall: if post.faults > 0.0 {
                post.stall / post.faults
            } else {
                0.0
            },
            before: self.precopied * self.watching_cost,
        }
    }

    /// The guest's speed while it lacks all that is stale, 0 to 1.
    pub fn speed_without_stale(&self) -> f64 {
        self.speed(&self.flows(&Frozen::everything(self).0, 1.0))
    }

    /// Distinct pages of memory that the guest uses within so many seconds.
    pub fn working_set(&self, seconds: f64) -> f64 {
        let used = |class: &Class| class.content * -(-class.accesses * seconds).exp_m1();
        self.memory.classes.iter().map(used).sum()
    }

    fn post_copy(&self, mut missing: [Vec<f64>; 2]) -> PostCopy {
        let bandwidth = self.link.bandwidth.max(1.0);
        let size = self.kinds().map(|kind| kind.bytes_per_page.max(1.0));
        let bytes_of = |missing: &[Vec<f64>; 2]| -> f64 {
            let own = missing.iter().zip(size);
            own.map(|(missing, size)| missing.iter().sum::<f64>() * size)
                .sum()
        };
        let bytes = bytes_of(&missing);
        let mut post = PostCopy {
            bytes,
            ..PostCopy::default()
        };
        // Pushing begins when the handover is sent; the guest runs when it is loaded.
        push(&mut missing, size, bandwidth * self.costs.load.mean);
        let pushing = bytes / bandwidth;
        let step = (pushing / STEPS.0).max(self.link.rtt / 64.0).max(1e-4);
        let least = 0.5 * size[0].min(size[1]);
        // Share of the link that pushing in order gets: answers and what comes with them go first.
        let mut share = 1.0;
        for _ in 0..STEPS.1 {
            let left = bytes_of(&missing);
            if left < least {
                break;
            }
            // The last step ends when the last page comes.
            let dt = step.min(left / bandwidth).max(1e-6);
            let flows = self.flows(&missing, share);
            let speed = self.speed(&flows);
            let mut demanded = 0.0;
            for (k, flow) in flows.into_iter().enumerate() {
                let kind = self.kinds()[k];
                post.faults += flow.faults * dt;
                post.stall += flow.faults * flow.stall * dt;
                let brought = flow.faults * flow.useless * dt;
                demanded += flow.faults * dt * (ANSWER - 1.0) * size[k];
                let all: f64 = missing[k].iter().sum();
                for (class, missing) in kind.classes.iter().zip(&mut missing[k]) {
                    let touched = (flow.speed * class.accesses * dt).min(1.0) * *missing;
                    let beside = if all > 0.0 {
                        brought * *missing / all
                    } else {
                        0.0
                    };
                    let gone = (touched + beside).min(*missing);
                    demanded += gone * size[k];
                    *missing -= gone;
                }
            }
            post.lost += (1.0 - speed) * dt;
            post.seconds += dt;
            if speed < RESTORED {
                post.restored = post.seconds;
            }
            let pushed = (bandwidth * dt - demanded).max(0.0);
            share = (pushed / (bandwidth * dt)).max(0.05);
            push(&mut missing, size, pushed);
        }
        post
    }

    /// The guest's speed, 0 to 1, by how it runs on each kind.
    fn speed(&self, flows: &[Flow; 2]) -> f64 {
        let slowed = |(kind, flow): (&KindState, &Flow)| 1.0 - kind.weight * (1.0 - flow.speed);
        self.kinds().into_iter().zip(flows).map(slowed).product()
    }

    /// How the guest runs now, by what it lacks of memory and of disks. The answers of both share the link.
    fn flows(&self, missing: &[Vec<f64>; 2], share: f64) -> [Flow; 2] {
        let mut ahead = 0.0;
        let mut flows = std::array::from_fn(|k| {
            let kind = self.kinds()[k];
            let flow = self.flow(k, kind, &missing[k], (ahead, share));
            let bytes = missing[k].iter().sum::<f64>() * kind.bytes_per_page.max(1.0);
            ahead += bytes / (self.link.bandwidth.max(1.0) * share);
            flow
        });
        let wanted: f64 = flows.iter().map(|flow| flow.load).sum();
        if wanted > 1.0 {
            for flow in &mut flows {
                flow.speed /= wanted;
                flow.faults /= wanted;
            }
        }
        flows
    }

    /// How the guest runs now, by what it lacks of one kind, `ahead` seconds of other pages being pushed before it.
    fn flow(
        &self,
        k: usize,
        kind: &KindState,
        missing: &[f64],
        (ahead, share): (f64, f64),
    ) -> Flow {
        let bandwidth = self.link.bandwidth.max(1.0);
        let size = kind.bytes_per_page.max(1.0);
        let latency = self.link.rtt + SERVICE + size / bandwidth;
        let (mut demand, mut waiting, mut used) = (0.0, 0.0, 0.0);
        let mut arrival = ahead;
        let seconds = |pages: f64| pages * size / (bandwidth * share);
        let middle = ahead + seconds(missing.iter().sum()) / 2.0;
        for (class, missing) in kind.classes.iter().zip(missing) {
            let own = seconds(*missing);
            let until = (1.0 - MISTAKEN) * (arrival + own / 2.0) + MISTAKEN * middle;
            arrival += own;
            demand += class.accesses * missing;
            waiting += class.accesses * missing * latency.min(until);
            used += class.accesses * class.content;
        }
        if demand <= 1e-9 {
            return Flow {
                speed: 1.0,
                ..Flow::default()
            };
        }
        let stall = (waiting / demand).max(1e-6);
        let all: f64 = missing.iter().sum();
        let density = (all / kind.content().max(1.0)).min(1.0);
        // Of what lies around a fault, what the guest uses as well and lacks, and what it only lacks.
        let window = if k == 0 { self.prefetch } else { BATCH };
        let lacked = (demand / used.max(1e-9)).min(1.0);
        let useful = if window > 0.0 {
            kind.spread.near * lacked
        } else {
            0.0
        };
        let useless = (window * density - useful).max(0.0);
        let brings = 1.0 + useful;
        let walk = kind.spread.walk;
        let served = kind.parallelism.max(1.0) * brings / stall;
        let pushed = WALKED * bandwidth / size;
        // Nor can more come than the link carries, as answers and with what comes along for nothing.
        let answers = brings / (brings * ANSWER + useless);
        let carried = bandwidth / size * (walk + (1.0 - walk) * answers);
        // Who walks needs what comes next in order, and loses nothing to chance.
        let in_order = ((served + pushed) / demand).min(1.0);
        let by_chance = served / (demand + served);
        let speed = walk * in_order + (1.0 - walk) * by_chance;
        let speed = speed.min(carried / demand);
        Flow {
            speed,
            load: speed * demand / carried,
            faults: speed * demand * ((1.0 - walk) / brings + walk / (brings + BATCH)),
            stall,
            useless,
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    speed: f64,
    /// Share of the link that its answers take.
    load: f64,
    /// Per second.
    faults: f64,
    stall: f64,
    /// Pages that a fault brings and nobody waits for.
    useless: f64,
}

/// Pushes so many bytes: memory before disks, the hottest first.
fn push(missing: &mut [Vec<f64>; 2], size: [f64; 2], bytes: f64) {
    let mut left = bytes;
    for (missing, size) in missing.iter_mut().zip(size) {
        for missing in missing.iter_mut() {
            let pushed = missing.min(left / size);
            *missing -= pushed;
            left -= pushed * size;
            if left <= 0.0 {
                return;
            }
        }
    }
}

/// What of the stale pages moves in the freeze, for every number of candidates: none, more and more of the most
/// accessed, all. What pays most per byte comes first, memory and disks alike.
pub fn candidates(situation: &Situation) -> Vec<Frozen> {
    let kinds = situation.kinds();
    let mut order: Vec<(usize, usize, f64)> = Vec::new();
    for (k, kind) in kinds.iter().enumerate() {
        for (i, class) in kind.classes.iter().enumerate() {
            if class.stale > 0.0 {
                let worth = class.accesses * kind.weight / kind.parallelism.max(1.0);
                order.push((k, i, worth / kind.bytes_stale.max(1.0)));
            }
        }
    }
    order.sort_by(|a, b| b.2.total_cmp(&a.2));
    let mut taken = Frozen::nothing(situation);
    let mut all = vec![taken.clone()];
    for (k, i, _) in order {
        let stale = kinds[k].classes[i].stale;
        // A class in halves: the first is as good as the second, and there may be room for one.
        for share in [0.5, 1.0] {
            taken.0[k][i] = stale * share;
            all.push(taken.clone());
        }
    }
    all
}

/// The same classes with other amounts stale.
pub fn with_stale(classes: &[Class], stale: impl Fn(&Class) -> f64) -> Vec<Class> {
    let of = |class: &Class| Class {
        stale: stale(class).clamp(0.0, (class.content - class.unsent).max(0.0)),
        ..*class
    };
    classes.iter().map(of).collect()
}
