//! The grammar: what is read, what is refused, and that what is printed is read back.

// Probabilities are whole parts of one: they are read and printed exactly.
#![expect(clippy::float_cmp)]

use proptest::prelude::*;

use super::*;
use crate::spec::{Chance, Loss, Reorder, Slot};

const MS: Duration = Duration::from_millis(1);

fn read(text: &str) -> LinkSpec {
    text.parse().unwrap()
}

fn refusal(text: &str) -> String {
    text.parse::<LinkSpec>().unwrap_err().to_string()
}

#[test]
fn reads_the_words_of_tc() {
    let link = read("delay 25ms rate 200mbit loss 0.5% limit 40ms");
    let direction = DirectionSpec {
        delay: 25 * MS,
        rate: Some(200_000_000),
        loss: Loss::Random(Chance {
            probability: 0.005,
            correlation: 0.0,
        }),
        limit: Limit::Time(40 * MS),
        ..DirectionSpec::default()
    };
    assert_eq!(link, LinkSpec::symmetric(direction));
    assert_eq!(
        link.to_string(),
        "delay 25ms rate 200mbit loss 0.5% limit 40ms"
    );
    assert_eq!(read(""), LinkSpec::default());
    assert_eq!(read("").to_string(), "delay 0ms limit 50ms");
    let fraction = read("rate 1.5gbit delay 0.25ms").forward;
    assert_eq!(fraction.rate, Some(1_500_000_000));
    assert_eq!(fraction.delay, Duration::from_micros(250));
}

#[test]
fn reads_all_of_netem() {
    let direction = read(
        "delay 100ms 10ms 25% distribution normal loss gemodel 1% 25% 90% 0.1% corrupt 0.1% \
         duplicate 1% 5% reorder 25% 50% gap 5 slot 5ms 7ms limit 1000",
    )
    .forward;
    assert_eq!(direction.jitter, 10 * MS);
    assert_eq!(direction.delay_correlation, 0.25);
    assert_eq!(direction.distribution, Distribution::Normal);
    let gemodel = Loss::Gemodel {
        p: 0.01,
        r: 0.25,
        bad: 0.9,
        good: 0.001,
    };
    assert_eq!(direction.loss, gemodel);
    assert_eq!(direction.corrupt.probability, 0.001);
    assert_eq!(direction.duplicate.correlation, 0.05);
    let reorder = Reorder {
        chance: Chance {
            probability: 0.25,
            correlation: 0.5,
        },
        gap: 5,
    };
    assert_eq!(direction.reorder, Some(reorder));
    let slot = Slot {
        min: 5 * MS,
        max: 7 * MS,
    };
    assert_eq!(direction.slot, Some(slot));
    assert_eq!(direction.limit, Limit::Packets(1000));
    assert_eq!(
        read("rate 1mbit limit 64kb").back.limit,
        Limit::Bytes(65536)
    );
    assert_eq!(read("loss random 1%"), read("loss 1%"));
}

#[test]
fn what_is_left_out_has_the_default_of_tc() {
    let state = Loss::State {
        p13: 0.01,
        p31: 0.99,
        p32: 0.0,
        p23: 1.0,
        p14: 0.0,
    };
    assert_eq!(read("loss state 1%").forward.loss, state);
    let gemodel = Loss::Gemodel {
        p: 0.01,
        r: 0.99,
        bad: 1.0,
        good: 0.0,
    };
    assert_eq!(read("loss gemodel 1%").forward.loss, gemodel);
}

#[test]
fn mean_loss_of_the_chains() {
    let mean = |text: &str| read(text).forward.loss.mean();
    assert!((mean("loss gemodel 0.25% 25%") - 0.00990).abs() < 1e-5);
    // Bursts of mean length 4 as four states: the same chain in other words.
    assert!((mean("loss state 0.25% 25%") - 0.00990).abs() < 1e-5);
    assert!((mean("loss state 0% 100% 0% 100% 2%") - 0.02 / 1.02).abs() < 1e-9);
    assert!((mean("loss 3%") - 0.03).abs() < 1e-9);
    assert!((mean("loss state 1% 0%") - 1.0).abs() < 1e-9);
    assert_eq!(mean("loss gemodel 0% 0%"), 0.0);
}

#[test]
fn directions_differ() {
    let link = read("delay 20ms loss 1%; forward rate 10mbit; back rate 50mbit loss 0%");
    assert_eq!(link.forward.rate, Some(10_000_000));
    assert_eq!(link.back.rate, Some(50_000_000));
    assert_eq!(link.back.loss, Loss::None);
    assert_eq!(link.rtt(), 40 * MS);
    assert_eq!(
        link.to_string(),
        "forward delay 20ms rate 10mbit loss 1% limit 50ms; back delay 20ms rate 50mbit limit 50ms"
    );
}

#[test]
fn changes_come_in_stages() {
    let link = read(
        "delay 5ms rate 100mbit; at 20s down; at 10s rate 50mbit; at 25s up; \
         at 25s back delay 9ms; at 30s rate unlimited",
    );
    let seen = |back| -> Vec<_> {
        let stages = link.stages(back).into_iter();
        stages
            .map(|stage| {
                (
                    stage.from.as_secs(),
                    stage.spec.rate,
                    stage.spec.delay,
                    stage.down,
                )
            })
            .collect()
    };
    let (hundred, fifty) = (Some(100_000_000), Some(50_000_000));
    let forward = [
        (0, hundred, 5 * MS, false),
        (10, fifty, 5 * MS, false),
        (20, fifty, 5 * MS, true),
        (25, fifty, 5 * MS, false),
        (30, None, 5 * MS, false),
    ];
    assert_eq!(seen(false), forward);
    assert_eq!(seen(true)[3], (25, fifty, 9 * MS, false));
    // From the start on.
    assert!(read("at 0s down").stages(true)[0].down);
}

#[test]
fn a_name_of_the_ladder_may_come_first() {
    let named = read("transatlantic");
    assert_eq!(named, ladder::find("transatlantic").unwrap().spec());
    let changed = read("transatlantic loss 2%; at 3s down");
    assert_eq!(changed.forward.delay, named.forward.delay);
    assert_eq!(changed.forward.loss.mean(), 0.02);
    assert_eq!(changed.changes.len(), 1);
    assert!(refusal("loss 2% transatlantic").contains("'transatlantic' is not known"));
}

#[test]
fn refuses_what_it_cannot_mean() {
    assert!(refusal("dealy 5ms").contains("'dealy' is not known"));
    assert!(refusal("delay").contains("needs a value"));
    assert!(refusal("delay 5ms delay 6ms").contains("given twice"));
    assert!(refusal("delay 5ms distribution normal").contains("jitter"));
    assert!(refusal("limit 64kb").contains("rate"));
    assert!(refusal("delay 5ms; back").contains("nothing stands behind"));
    assert!(refusal("at 5s").contains("nothing stands behind"));
    assert!(refusal("at down").contains("is no value for 'at'"));
    assert!(refusal("at 5s down loss 1%").contains("'loss' is not known"));
    assert!(refusal("loss state 60% 50% 0% 0% 50%").contains("must not exceed"));
    for text in [
        "delay 5",
        "delay -5ms",
        "delay 5min",
        "delay 1e3ms",
        "delay 1.2.3ms",
        "delay 2000s",
        "delay 5ms 25%",
        "rate 0bit",
        "rate 10mbps",
        "rate 99999999999999999999gbit",
        "loss 101%",
        "loss 0.5",
        "loss nan%",
        "limit 0",
        "limit 4294967296",
        "limit 5pb",
        "slot 0ms",
        "slot 5ms 4ms",
        "reorder 5% gap 0",
        "distribution poisson",
    ] {
        assert!(refusal(text).contains("is no value for"), "{text}");
    }
}

fn direction() -> impl Strategy<Value = DirectionSpec> {
    let share = || (0..=100_000_000u32).prop_map(|parts| f64::from(parts) / 1e8);
    let half = || (0..=50_000_000u32).prop_map(|parts| f64::from(parts) / 1e8);
    let chance = move || {
        (share(), share()).prop_map(|(probability, correlation)| Chance {
            probability,
            correlation,
        })
    };
    let time = || (0..=1_000_000_000_000u64).prop_map(Duration::from_nanos);
    let loss = prop_oneof![
        Just(Loss::None),
        chance()
            .prop_filter("not the same as none", |chance| *chance != Chance::NEVER)
            .prop_map(Loss::Random),
        (half(), half(), half(), share(), half()).prop_map(|(p13, p31, p32, p23, p14)| {
            Loss::State {
                p13,
                p31,
                p32,
                p23,
                p14,
            }
        }),
        (share(), share(), share(), share()).prop_map(|(p, r, bad, good)| Loss::Gemodel {
            p,
            r,
            bad,
            good
        }),
    ];
    let distribution = prop_oneof![
        Just(Distribution::Uniform),
        Just(Distribution::Normal),
        Just(Distribution::Pareto),
        Just(Distribution::ParetoNormal)
    ];
    let reorder = (chance(), 1..1_000_000u32).prop_map(|(chance, gap)| Reorder { chance, gap });
    let slot = (1..1_000_000u64, 0..1_000_000u64).prop_map(|(min, more)| Slot {
        min: Duration::from_nanos(min),
        max: Duration::from_nanos(min + more),
    });
    let limit = prop_oneof![
        (1..=u32::MAX).prop_map(Limit::Packets),
        (0..=1u64 << 40).prop_map(Limit::Bytes),
        time().prop_map(Limit::Time),
    ];
    let delay = (
        time(),
        (1..=1_000_000_000_000u64).prop_map(Duration::from_nanos),
        share(),
        distribution,
    );
    (
        delay,
        loss,
        chance(),
        chance(),
        prop::option::of(reorder),
        1..=1_000_000_000_000u64,
        prop::option::of(slot),
        limit,
    )
        .prop_map(
            |(delay, loss, corrupt, duplicate, reorder, rate, slot, limit)| DirectionSpec {
                delay: delay.0,
                jitter: delay.1,
                delay_correlation: delay.2,
                distribution: delay.3,
                loss,
                corrupt,
                duplicate,
                reorder,
                rate: Some(rate),
                slot,
                limit,
            },
        )
}

fn link() -> impl Strategy<Value = LinkSpec> {
    let change =
        (0..1_000_000_000u64, 0..3usize, 0..3, direction()).prop_map(|(at, where_, what, spec)| {
            Change {
                at: Duration::from_nanos(at),
                directions: [Directions::Both, Directions::Forward, Directions::Back][where_],
                what: match what {
                    0 => What::Down,
                    1 => What::Up,
                    _ => What::Set(spec.settings()),
                },
            }
        });
    let changes = prop::collection::vec(change, 0..4);
    (direction(), direction(), any::<bool>(), changes).prop_map(
        |(forward, back, same, mut changes)| {
            changes.sort_by_key(|change| change.at);
            LinkSpec {
                forward,
                back: if same { forward } else { back },
                changes,
            }
        },
    )
}

proptest! {
    #[test]
    fn text_form_is_exact(link in link()) {
        prop_assert_eq!(&read(&link.to_string()), &link);
    }

    #[test]
    fn never_panics(
        text in "((delay|rate|loss|limit|at|back|state|down|;|[a-z]{1,4}|[0-9.]{1,25}[a-z%]{0,4}) ?){0,10}"
    ) {
        if let Ok(link) = text.parse::<LinkSpec>() {
            prop_assert!((0.0..=1.0).contains(&link.forward.loss.mean()));
            prop_assert!(link.back.rate != Some(0));
            prop_assert_eq!(&read(&link.to_string()), &link);
        }
    }
}
