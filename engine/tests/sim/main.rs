//! Whole sessions under a virtual clock, with everything that can go wrong, by seed: both machines, a
//! link that delays, reorders and dies, guests whose every read is checked, commands that fail,
//! processes that crash around any step.
//!
//! A failing seed is printed; `HYBRIDMIG_SIM_SEED=<seed>` runs that one alone (with the name of its
//! test), and `HYBRIDMIG_SIM_TRACE=1` prints every step. `HYBRIDMIG_SIM_SEEDS=<n>` runs more.

mod guest;
mod jobs;
mod net;
mod scenario;
mod verdict;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use hybridmig_transport::message::Mode;

use scenario::Scenario;
use verdict::Tally;
use world::World;

/// Runs seeds and returns what became of them.
fn run(seeds: u64, scenario: impl Fn(u64) -> Scenario) -> Tally {
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let seeds = match variable("HYBRIDMIG_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..variable("HYBRIDMIG_SIM_SEEDS").unwrap_or(seeds),
    };
    let mut tally = Tally::default();
    for seed in seeds {
        let outcome = catch_unwind(AssertUnwindSafe(|| World::new(scenario(seed)).run()));
        match outcome {
            Ok(end) => tally.count(&end),
            Err(panic) => {
                eprintln!("the seed that failed: HYBRIDMIG_SIM_SEED={seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    eprintln!("{tally}");
    tally
}

/// Whether only one seed runs, so that nothing can be said of many.
fn single() -> bool {
    std::env::var_os("HYBRIDMIG_SIM_SEED").is_some()
}

#[test]
fn hybrid_moves_over_a_link_that_holds() {
    let tally = run(1000, |seed| Scenario::quiet(seed, Mode::Hybrid));
    assert_eq!(tally.moved, tally.total, "{tally}");
    let met = tally.rounds > 0 && tally.faults > 0 && tally.rejected > 0;
    assert!(single() || met, "{tally}");
}

#[test]
fn postcopy_moves_over_a_link_that_holds() {
    let tally = run(1000, |seed| Scenario::quiet(seed, Mode::Postcopy));
    assert_eq!(tally.moved, tally.total, "{tally}");
    // Some blocks are on their way when they are asked for, and not all of those are sent twice.
    let met = tally.on_the_way > 0 && tally.on_the_way < tally.faults;
    assert!(single() || met, "{tally}");
}

#[test]
fn a_guest_that_writes_more_than_the_link_carries_is_frozen_after_one_pass() {
    let writer = |access: u64, interval: u64| {
        move |seed| {
            let access = Duration::from_micros(access);
            Scenario::writer(seed, access, Duration::from_millis(interval))
        }
    };
    // 1500 blocks a second over one that carries 1000, and 30.
    let heavy = run(40, writer(200, 200));
    assert_eq!(heavy.moved, heavy.total, "{heavy}");
    assert!(single() || heavy.rounds == heavy.total, "{heavy}");
    let light = run(40, writer(10_000, 200));
    assert_eq!(light.moved, light.total, "{light}");
    assert!(single() || light.rounds >= 2 * light.total, "{light}");
    // What is written before it is sent is not sent twice: scans within the pass tell.
    let seen = run(40, writer(1000, 200)).sent_before as f64;
    let unseen = run(40, writer(1000, 100_000)).sent_before as f64;
    // The first pass, nine tenths of it all, is the same.
    assert!(single() || seen < 0.95 * unseen, "{seen} {unseen}");
}

#[test]
fn precopy_moves_or_says_why_not() {
    let tally = run(1000, |seed| Scenario::quiet(seed, Mode::Precopy));
    assert_eq!(tally.moved + tally.not_converged, tally.total, "{tally}");
    assert!(
        single() || tally.moved > 0 && tally.not_converged > 0,
        "{tally}"
    );
}

#[test]
fn a_link_that_comes_back_never_leaves_a_doubt() {
    let tally = run(4000, Scenario::cuts);
    assert_eq!(tally.in_doubt + tally.incomplete, 0, "{tally}");
    let met = tally.moved > 0 && tally.stayed > 0 && tally.resumed_links > 0;
    assert!(single() || met, "{tally}");
}

#[test]
fn a_link_cut_at_any_message_never_leaves_a_doubt() {
    let tally = run(4000, Scenario::cut_at_message);
    assert_eq!(tally.in_doubt + tally.incomplete, 0, "{tally}");
    assert!(single() || tally.resumed_links > 0, "{tally}");
}

#[test]
fn a_command_that_fails_at_any_step_loses_nothing() {
    let tally = run(4000, Scenario::failing_commands);
    assert!(single() || tally.moved > 0 && tally.stayed > 0, "{tally}");
}

#[test]
fn a_cancel_at_any_step_loses_nothing() {
    let tally = run(3000, Scenario::cancels);
    assert_eq!(tally.in_doubt + tally.incomplete, 0, "{tally}");
    assert!(single() || tally.moved > 0 && tally.stayed > 0, "{tally}");
}

#[test]
fn a_crash_at_any_step_never_runs_the_guest_twice() {
    let tally = run(4000, Scenario::crashes);
    assert!(single() || tally.crashed > 0, "{tally}");
}

#[test]
fn everything_at_once_never_runs_the_guest_twice() {
    let tally = run(5000, Scenario::chaos);
    let met = tally.moved > 0 && tally.stayed > 0 && tally.in_doubt > 0 && tally.incomplete > 0;
    assert!(single() || met, "{tally}");
}
