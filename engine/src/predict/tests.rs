//! The model, in figures that can be worked out by hand, and against a simulation of single events.

use hybridmig_transport::message::RegionKind;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::draws::predict;
use super::fluid::{Frozen, candidates};
use super::*;
use crate::plan::planner::{Bounds, best_freeze, choose, everything, nothing};

/// 16 GiB/s would be too easy: 1000 pages a second, 100 ms.
pub(crate) fn situation(classes: &[(f64, f64, f64, f64)]) -> Situation {
    let class = |(content, stale, writes, accesses): &(f64, f64, f64, f64)| Class {
        content: *content,
        stale: *stale,
        unsent: 0.0,
        writes: *writes,
        accesses: *accesses,
    };
    Situation {
        memory: KindState {
            classes: classes.iter().map(class).collect(),
            bytes_per_page: 4096.0,
            bytes_stale: 4096.0,
            bytes_again: 4096.0,
            parallelism: 2.0,
            weight: 1.0,
            ..KindState::default()
        },
        disks: KindState {
            bytes_per_page: 4096.0,
            bytes_stale: 4096.0,
            bytes_again: 4096.0,
            parallelism: DISK_PARALLELISM,
            weight: DISK_WEIGHT,
            ..KindState::default()
        },
        link: LinkState {
            bandwidth: 4_096_000.0,
            bandwidth_cv: 0.05,
            rtt: 0.1,
            rtt_cv: 0.02,
            parity: 0.03,
        },
        costs: Costs::assumed("workload"),
        prefetch: 0.0,
        elapsed: 0.0,
        precopied: 0.0,
        sent: 0.0,
        state_bytes: 0.0,
        scan_interval: 1.0,
        min_round: 0.1,
        watching_cost: 0.005,
        rewriting: 1.0,
    }
}

const FREE: Bounds = Bounds {
    max_downtime: None,
    max_total: None,
    rounds: 30,
};

fn frozen(situation: &Situation, pages: &[f64]) -> Frozen {
    Frozen([pages.to_vec(), vec![0.0; situation.disks.classes.len()]])
}

#[test]
fn a_freeze_of_everything_costs_its_downtime_and_no_more() {
    let at = situation(&[(1000.0, 500.0, 1.0, 10.0)]);
    let outcome = at.freeze_now(&frozen(&at, &[500.0]));
    // 500 pages and 3 % of parity at 1000 pages a second, half a round trip, and the steps.
    let costs = at.costs;
    let steps = costs.stop.mean + costs.scan.mean / 2.0 + costs.overhead.mean + costs.load.mean;
    let expected = 0.515 + 0.05 + steps;
    assert!((outcome.downtime - expected).abs() < 1e-6, "{outcome:?}");
    assert!((outcome.lost_work - outcome.downtime).abs() < 1e-9);
    assert!(outcome.faults.abs() < 1e-9);
}

/// 1000 pages a second cannot keep up with 4000 that are written once a second each: the hot ones that go last take
/// nearly all of the round themselves.
#[test]
fn a_round_gains_nothing_on_a_guest_that_outruns_the_link() {
    let after = situation(&[(4000.0, 4000.0, 1.0, 3.0)]).after_round();
    assert!(
        after.memory.stale() > 0.7 * 4000.0,
        "{}",
        after.memory.stale()
    );
    let calm = situation(&[(4000.0, 4000.0, 0.01, 0.1)]).after_round();
    assert!(
        calm.memory.stale() < 0.1 * 4000.0,
        "{}",
        calm.memory.stale()
    );
}

/// A guest that walks is fed in its order; one that touches pages all over waits for nearly all of them.
#[test]
fn a_walk_loses_less_than_the_same_by_chance() {
    let by_chance = situation(&[(4000.0, 4000.0, 1.0, 2.0)]);
    let mut walks = by_chance.clone();
    walks.memory.spread.walk = 1.0;
    let lost = |at: &Situation| nothing(at).outcome.lost_work;
    assert!(
        lost(&walks) < 0.8 * lost(&by_chance),
        "{} {}",
        lost(&walks),
        lost(&by_chance)
    );
}

/// A guest that waits for its memory and for its disks at once gets no more than the link carries: each could take all
/// of it.
#[test]
fn memory_and_disks_share_the_link() {
    let mut at = situation(&[(2000.0, 2000.0, 20.0, 60.0)]);
    at.memory.parallelism = 64.0;
    at.disks = KindState {
        parallelism: 64.0,
        weight: 0.5,
        ..at.memory.clone()
    };
    let outcome = nothing(&at).outcome;
    // What is pushed while the guest is being loaded comes before it runs.
    let pages = 4000.0 - 1000.0 * at.costs.load.mean;
    let took = outcome.total - outcome.remote_up;
    assert!(took > 0.95 * pages / 1000.0, "{pages} pages in {took} s");
}

#[test]
fn what_nobody_uses_is_pushed_for_nothing() {
    let at = situation(&[(5000.0, 5000.0, 0.0, 0.0)]);
    let outcome = at.freeze_now(&frozen(&at, &[0.0]));
    assert!((outcome.lost_work - outcome.downtime).abs() < 1e-6);
    let pushed = outcome.total - outcome.remote_up;
    assert!((5.0..5.3).contains(&pushed), "{outcome:?}");
}

/// Single events: threads that touch pages at random, one fault at a time each, pages pushed in order of class.
fn simulated(at: &Situation, missing: &[f64], seed: u64) -> (f64, f64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let rate = at.link.bandwidth / at.memory.bytes_per_page;
    let classes = &at.memory.classes;
    let mut left: Vec<f64> = missing.to_vec();
    let threads = at.memory.parallelism as usize;
    let mut until = vec![0.0; threads];
    let (mut t, mut lost, mut faults) = (-at.costs.load.mean, 0.0, 0.0);
    let dt = 0.0005;
    let mut credit = 0.0;
    while left.iter().sum::<f64>() >= 1.0 {
        t += dt;
        credit += rate * dt;
        for left in &mut left {
            let pushed = left.min(credit).floor();
            *left -= pushed;
            credit -= pushed;
        }
        if t < 0.0 {
            continue;
        }
        for until in &mut until {
            if *until > t {
                lost += dt / threads as f64;
                continue;
            }
            let per_thread: f64 = classes
                .iter()
                .zip(&left)
                .map(|(c, m)| c.accesses * m)
                .sum::<f64>()
                / threads as f64;
            if rng.random_bool((per_thread * dt).min(1.0)) {
                let mut draw = rng.random_range(0.0..per_thread * threads as f64);
                let mut ahead = 0.0;
                for (class, left) in classes.iter().zip(&mut left) {
                    draw -= class.accesses * *left;
                    if draw <= 0.0 && *left >= 1.0 {
                        let arrival = (ahead + *left * rng.random_range(0.0..1.0)) / rate;
                        *left -= 1.0;
                        credit -= 1.0;
                        *until = t + arrival.min(at.link.rtt + 0.004);
                        faults += 1.0;
                        break;
                    }
                    ahead += *left;
                }
            }
        }
    }
    (lost, faults)
}

#[test]
fn the_fluid_model_agrees_with_single_events() {
    let cases: [&[(f64, f64, f64, f64)]; 4] = [
        &[(500.0, 500.0, 0.0, 0.05), (3000.0, 3000.0, 0.0, 0.001)],
        &[(200.0, 200.0, 0.0, 5.0), (2000.0, 2000.0, 0.0, 0.01)],
        &[(2000.0, 2000.0, 0.0, 10.0)],
        &[(4000.0, 4000.0, 0.0, 0.004)],
    ];
    for case in cases {
        let at = situation(case);
        let none = vec![0.0; case.len()];
        let outcome = at.freeze_now(&frozen(&at, &none));
        let runs = 12;
        let missing: Vec<f64> = case.iter().map(|c| c.1).collect();
        let (mut lost, mut faults) = (0.0, 0.0);
        for seed in 0..runs {
            let (l, f) = simulated(&at, &missing, seed);
            lost += l / runs as f64;
            faults += f / runs as f64;
        }
        let model = outcome.lost_work - outcome.downtime;
        eprintln!(
            "{case:?}: lost {model:.3} {lost:.3}, faults {:.1} {faults:.1}",
            outcome.faults
        );
        assert!(
            (model - lost).abs() < 0.12 * lost + 0.03,
            "{case:?}: {model} {lost}"
        );
        let off = (outcome.faults - faults).abs();
        assert!(
            off < 0.2 * faults + 3.0,
            "{case:?}: {} {faults}",
            outcome.faults
        );
    }
}

#[test]
fn rounds_converge_where_the_guest_writes_little_and_not_where_it_writes_much() {
    let light = situation(&[(200.0, 200.0, 2.0, 5.0), (8000.0, 8000.0, 0.0, 0.01)]);
    let after = light.after_round().after_round();
    assert!(after.memory.stale() < 150.0, "{:?}", after.memory);
    let heavy = situation(&[(8000.0, 8000.0, 2.0, 5.0)]);
    let after = heavy.after_round().after_round();
    assert!(after.memory.stale() > 6000.0, "{:?}", after.memory);
}

#[test]
fn the_planner_waits_for_rounds_that_pay_and_freezes_what_is_used() {
    let light = situation(&[(200.0, 200.0, 2.0, 5.0), (8000.0, 8000.0, 0.0, 0.01)]);
    let choice = choose(&light, &FREE);
    assert!(choice.rounds >= 1, "{choice:?}");
    assert!(choice.outcome.lost_work <= everything(&light, &FREE).outcome.lost_work + 0.02);
    assert!(choice.outcome.lost_work < 0.2 * nothing(&light).outcome.lost_work);
    // Written everywhere all the time, used in one place: that place moves in the freeze, the rest does not.
    let split = situation(&[(100.0, 100.0, 0.0, 50.0), (4000.0, 4000.0, 0.0, 1e-5)]);
    let (frozen, outcome) = best_freeze(&split, &FREE);
    assert!(
        (frozen.pages(RegionKind::Memory) - 100.0).abs() < 1.0,
        "{frozen:?}"
    );
    assert!(outcome.lost_work < 0.4, "{outcome:?}");
}

#[test]
fn limits_are_kept() {
    let at = situation(&[(100.0, 100.0, 0.0, 50.0), (4000.0, 4000.0, 0.0, 1e-5)]);
    let (free_set, free) = best_freeze(&at, &FREE);
    let bounds = Bounds {
        max_downtime: Some(0.95 * free.downtime),
        ..FREE
    };
    let (set, bounded) = best_freeze(&at, &bounds);
    assert!(
        bounded.downtime <= 0.95 * free.downtime,
        "{free:?} {bounded:?}"
    );
    assert!(set.pages(RegionKind::Memory) < free_set.pages(RegionKind::Memory));
    let soon = Bounds {
        max_total: Some(0.5 * choose(&at, &FREE).outcome.total),
        ..FREE
    };
    assert_eq!(choose(&at, &soon).rounds, 0);
}

#[test]
fn a_distribution_surrounds_its_expectation() {
    let at = situation(&[(100.0, 100.0, 1.0, 5.0), (5000.0, 5000.0, 0.001, 0.02)]);
    let choice = choose(&at, &FREE);
    let prediction = predict(&at, choice.rounds, &choice.reached, &choice.frozen);
    for (interval, expected) in [
        (prediction.total, choice.outcome.total),
        (prediction.downtime, choice.outcome.downtime),
        (prediction.lost_work, choice.outcome.lost_work),
    ] {
        assert!(interval.p10 <= interval.p50 && interval.p50 <= interval.p90);
        assert!(
            (interval.p50 / expected - 1.0).abs() < 0.15,
            "{interval:?} {expected}"
        );
        assert!(interval.p90 > interval.p10, "{interval:?}");
    }
}

#[test]
fn candidates_go_from_nothing_to_everything() {
    let at = situation(&[(100.0, 60.0, 1.0, 5.0), (5000.0, 500.0, 0.0, 0.02)]);
    let all = candidates(&at);
    let pages: Vec<f64> = all.iter().map(|f| f.pages(RegionKind::Memory)).collect();
    assert!(pages[0].abs() < 1e-9 && (pages[pages.len() - 1] - 560.0).abs() < 1e-9);
    assert!(pages.is_sorted());
}

#[test]
fn a_tebibyte_is_planned_in_no_time() {
    let mut at = situation(&[(4e5, 4e5, 0.5, 2.0), (3.8e6, 3.8e6, 0.0, 1e-4)]);
    at.disks.classes = vec![
        Class {
            content: 2.6e6,
            stale: 2.6e6,
            unsent: 0.0,
            writes: 1e-4,
            accesses: 0.01,
        },
        Class {
            content: 2.6e8,
            stale: 0.0,
            unsent: 2.6e8,
            writes: 0.0,
            accesses: 1e-9,
        },
    ];
    let began = std::time::Instant::now();
    let choice = choose(&at, &FREE);
    let planned = choice.planned(&at, "test");
    // Not a promise of speed, which a benchmark holds: a guard against work that grows with the blocks.
    assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
    assert!(planned.prediction.total.p50 > 3600.0, "{planned:?}");
}
