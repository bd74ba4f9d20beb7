//! The decision rules, in figures.

use hybridmig_transport::message::RegionKind;

use super::*;
use crate::blocks::RegionId;
use hybridmig_transport::message::RegionInfo;

const RAM: RegionId = RegionId(0);

fn regions(blocks: u32) -> Vec<RegionInfo> {
    vec![RegionInfo {
        id: RAM,
        kind: RegionKind::Memory,
        name: "ram".into(),
        blocks,
        block_size: 4096,
    }]
}

fn set(blocks: impl IntoIterator<Item = u32>) -> Blocks {
    std::iter::once((RAM, blocks.into_iter().collect())).collect()
}

fn limits(mode: Mode) -> Limits {
    Limits {
        mode,
        target: Duration::from_millis(300),
        max_downtime: None,
        max_rounds: 30,
    }
}

/// 1000 blocks/s over 50 ms, with parity of 3 %: (300 − 25 − 40 − 2 · 5) ms carry 218 blocks.
const PACE: Pace = Pace {
    send_rate: 1000.0,
    rtt: Duration::from_millis(50),
    parity: 0.03,
    scan: Duration::from_millis(5),
};

fn figures(rest: u64, rest_before: u64, dirty_rate: f64) -> RoundFigures {
    RoundFigures {
        round: 2,
        rest,
        rest_before,
        dirty_rate,
        pace: PACE,
    }
}

#[test]
fn heat_is_recency_first_then_frequency() {
    let mut heat = Heat::new(&regions(4));
    heat.scanned(&set([0, 1]), &Blocks::new(), 1.0);
    heat.scanned(&set([0, 1, 2]), &Blocks::new(), 1.0);
    heat.scanned(&set([1, 3]), &Blocks::new(), 1.0);
    let order = |block| heat.of(RAM, block);
    assert!(order(1) > order(3) && order(3) > order(0) && order(0) > order(2));
    assert_eq!(heat.hottest(&set(0..4), 2), set([1, 3]));
    assert_eq!(heat.hottest(&set(0..4), 9), set(0..4));
    assert_eq!(heat.hottest(&set(0..4), 0), Blocks::new());
    for _ in 0..8 {
        heat.scanned(&Blocks::new(), &Blocks::new(), 1.0);
    }
    assert_eq!(heat.of(RAM, 1), 0);
}

/// Pushes everything of 2000 pages, of which two are hot and the guest has faulted on one: how many go before the hot
/// ones.
fn pushed_near_a_fault(heat: &mut Heat) -> usize {
    heat.scanned(&set([1500, 1501]), &Blocks::new(), 1.0);
    let mut remaining = set(0..2000);
    let mut order = PushOrder::new(&remaining, heat);
    order.faulted(RAM, 700);
    assert_eq!(order.next(&mut remaining, 2), Some((RAM, vec![700, 701])));
    let mut before = 2;
    while order.memory.recent.last().is_some() {
        let (_, near) = order.next(&mut remaining, 64).expect("blocks remain");
        if near[0] == 1500 {
            assert_eq!(near, [1500, 1501]);
            break;
        }
        before += near.len();
        assert!(near.iter().all(|block| (700..=1212).contains(block)));
    }
    let mut left = 0;
    while let Some((_, blocks)) = order.next(&mut remaining, 64) {
        left += blocks.len();
    }
    assert!(remaining.is_empty());
    assert!(left <= 2000 - before);
    before
}

#[test]
fn push_goes_near_faults_then_by_heat_and_farther_where_the_guest_walks() {
    assert_eq!(pushed_near_a_fault(&mut Heat::new(&regions(2000))), 65);
    let mut walked = Heat::new(&regions(2000));
    for from in [0, 300, 600] {
        walked.scanned(&set(from..from + 300), &Blocks::new(), 1.0);
    }
    for _ in 0..8 {
        walked.scanned(&Blocks::new(), &Blocks::new(), 1.0);
    }
    assert_eq!(pushed_near_a_fault(&mut walked), 513);
}

#[test]
fn what_fits_leaves_room_for_delay_and_fixed_costs() {
    let target = Duration::from_millis(300);
    assert_eq!(fits(target, &PACE), 218);
    // Loss costs its parity, not a round trip.
    assert_eq!(
        fits(
            target,
            &Pace {
                parity: 0.11,
                ..PACE
            }
        ),
        203
    );
    // Whoever scans slowly has less time for blocks.
    let scan = Duration::from_millis(50);
    assert_eq!(fits(target, &Pace { scan, ..PACE }), 131);
    // The delay alone exceeds the target: the floor is a tenth of it.
    let rtt = Duration::from_secs(1);
    assert_eq!(fits(target, &Pace { rtt, ..PACE }), 29);
}

#[test]
fn hybrid_freezes_when_the_rest_fits_or_rounds_stop_paying() {
    let decide = |figures| Decider::new(limits(Mode::Hybrid)).after_round(figures);
    assert_eq!(decide(figures(200, 5000, 100.0)), Verdict::Freeze);
    assert_eq!(decide(figures(2000, 5000, 100.0)), Verdict::Round);
    assert_eq!(decide(figures(2000, 5000, 800.0)), Verdict::Freeze);
    assert_eq!(decide(figures(4500, 5000, 100.0)), Verdict::Freeze);
    let last = RoundFigures {
        round: 30,
        ..figures(2000, 5000, 100.0)
    };
    assert_eq!(decide(last), Verdict::Freeze);
}

#[test]
fn a_round_goes_on_while_most_of_it_stays_as_it_was_sent() {
    let pays = |undone_rate, calm| {
        let midway = Midway {
            send_rate: 1000.0,
            undone_rate,
            calm,
        };
        midway.pays()
    };
    assert!(pays(0.0, 0) && pays(400.0, 0));
    assert!(!pays(600.0, 0));
    // A busy corner does not keep the rest from being sent.
    assert!(pays(5000.0, 1));
}

#[test]
fn precopy_gives_up_only_after_several_rounds_that_did_not_pay() {
    let mut decider = Decider::new(limits(Mode::Precopy));
    assert_eq!(
        decider.after_round(figures(5000, 5000, 900.0)),
        Verdict::Round
    );
    assert_eq!(
        decider.after_round(figures(5000, 5000, 900.0)),
        Verdict::Round
    );
    let end = decider.after_round(figures(5000, 5000, 900.0));
    assert!(matches!(end, Verdict::NotConverged { .. }), "{end:?}");
}

#[test]
fn precopy_takes_what_the_operator_allows() {
    let mut allowed = limits(Mode::Precopy);
    allowed.max_downtime = Some(Duration::from_secs(6));
    let mut decider = Decider::new(allowed);
    for _ in 0..2 {
        assert_eq!(
            decider.after_round(figures(5000, 5000, 900.0)),
            Verdict::Round
        );
    }
    assert_eq!(
        decider.after_round(figures(5000, 5000, 900.0)),
        Verdict::Freeze
    );

    // A limit below what delay and fixed costs take alone is never reached.
    let mut impossible = limits(Mode::Precopy);
    impossible.max_downtime = Some(Duration::from_millis(60));
    impossible.max_rounds = 2;
    let end = Decider::new(impossible).after_round(figures(0, 5000, 0.0));
    assert!(matches!(end, Verdict::NotConverged { .. }), "{end:?}");
}

#[test]
fn postcopy_freezes_at_once() {
    let mut decider = Decider::new(limits(Mode::Postcopy));
    assert_eq!(
        decider.after_round(figures(9000, 9000, 0.0)),
        Verdict::Freeze
    );
}

fn split(
    mode: Mode,
    share: Option<f64>,
    max: Option<u64>,
    rest: Blocks,
    heat: &Heat,
) -> FreezeSplit {
    let limits = Limits {
        max_downtime: max.map(Duration::from_millis),
        ..limits(mode)
    };
    let shares = Shares {
        memory: share.map(|fraction| Share {
            fraction,
            populated: 1000,
        }),
        disks: BTreeMap::new(),
    };
    let rest = Rest {
        stale: rest,
        unsent: Blocks::new(),
    };
    split_at_freeze(&limits, &shares, rest, heat, &PACE)
}

#[test]
fn the_split_follows_mode_share_and_limits() {
    let mut heat = Heat::new(&regions(1000));
    heat.scanned(&set(300..400), &Blocks::new(), 1.0);
    let rest = set(0..400);
    let moved = |mode, share, max| split(mode, share, max, rest.clone(), &heat).freeze.len();
    assert_eq!(moved(Mode::Precopy, None, None), 400);
    assert_eq!(moved(Mode::Postcopy, None, None), 0);
    assert_eq!(moved(Mode::Hybrid, None, None), 218);
    assert_eq!(moved(Mode::Hybrid, Some(1.0), None), 400);
    assert_eq!(moved(Mode::Hybrid, Some(0.7), None), 100);
    assert_eq!(moved(Mode::Hybrid, Some(0.5), None), 0);
    assert_eq!(moved(Mode::Hybrid, Some(1.0), Some(178)), 100);

    let split = split(Mode::Hybrid, Some(0.7), None, rest.clone(), &heat);
    assert_eq!(split.freeze, set(300..400), "the hottest move");
    assert_eq!(split.behind, set(0..300));
}

const DISK: RegionId = RegionId(1);

/// Memory of 1000 pages and a disk of 100 blocks, which are as long as 1600.
fn with_disk() -> Vec<RegionInfo> {
    let mut regions = regions(1000);
    regions.push(RegionInfo {
        id: DISK,
        kind: RegionKind::Disk,
        name: "disk".into(),
        blocks: 100,
        block_size: 65_536,
    });
    regions
}

fn on_disk(blocks: impl IntoIterator<Item = u32>) -> Blocks {
    std::iter::once((DISK, blocks.into_iter().collect())).collect()
}

fn both(memory: Blocks, disk: &Blocks) -> Blocks {
    let mut both = memory;
    both.union_with(disk);
    both
}

#[test]
fn of_a_disk_what_was_accessed_moves_first() {
    let mut heat = Heat::new(&with_disk());
    heat.accessed(&on_disk([50, 60]), &Blocks::new(), 0.0);
    heat.scanned(&on_disk([70]), &Blocks::new(), 1.0);
    let content = both(set(0..1000), &on_disk(40..80));
    let default = disk_share(&Shares::default(), &content, &heat);
    assert_eq!(default, on_disk([50, 60, 70]));
    let share = |fraction| {
        let share = Share {
            fraction,
            populated: 40 * 16,
        };
        let shares = Shares {
            memory: None,
            disks: BTreeMap::from([(DISK, share)]),
        };
        disk_share(&shares, &content, &heat)
    };
    assert_eq!(share(0.0), Blocks::new());
    assert_eq!(share(0.05), on_disk([50, 70]), "written before read");
    assert_eq!(share(0.1), on_disk([40, 50, 60, 70]));
    assert_eq!(share(1.0), on_disk(40..80));
}

#[test]
fn at_the_freeze_memory_goes_before_disks_and_what_was_left_out_stays() {
    let heat = Heat::new(&with_disk());
    let rest = |memory: u32| Rest {
        stale: both(set(0..memory), &on_disk(0..10)),
        unsent: on_disk(20..90),
    };
    let split =
        |mode, shares, memory| split_at_freeze(&limits(mode), &shares, rest(memory), &heat, &PACE);
    // 218 pages fit: 100 of memory, and 7 blocks of the disk.
    let hybrid = split(Mode::Hybrid, Shares::default(), 100);
    assert_eq!(hybrid.freeze, both(set(0..100), &on_disk(0..7)));
    assert_eq!(hybrid.behind, both(on_disk(7..10), &on_disk(20..90)));
    let full = split(Mode::Hybrid, Shares::default(), 400);
    assert_eq!(full.freeze, set(0..218));
    // All of the disk is to be there, whatever memory takes.
    let share = Share {
        fraction: 1.0,
        populated: 1600,
    };
    let disks = BTreeMap::from([(DISK, share)]);
    let shares = Shares {
        memory: None,
        disks,
    };
    let all = split(Mode::Hybrid, shares.clone(), 400);
    assert_eq!(
        all.freeze,
        both(set(0..218), &both(on_disk(0..10), &on_disk(20..90)))
    );
    assert!(split(Mode::Postcopy, shares.clone(), 400).freeze.is_empty());
    assert!(split(Mode::Precopy, shares, 400).behind.is_empty());
}

#[test]
fn memory_is_pushed_before_disks_in_batches_of_the_same_length() {
    let heat = Heat::new(&with_disk());
    let mut remaining = both(set(0..100), &on_disk(0..100));
    let mut order = PushOrder::new(&remaining, &heat);
    order.faulted(DISK, 90);
    let mut next = || order.next(&mut remaining, 64);
    assert_eq!(next(), Some((RAM, (0..64).collect())));
    assert_eq!(next(), Some((RAM, (64..100).collect())));
    assert_eq!(next(), Some((DISK, vec![90, 91, 92, 93])));
}
