//! The model under virtual time: every word of a description does what it says, exactly.

use super::*;

const MS: Duration = Duration::from_millis(1);

fn spec(text: &str) -> DirectionSpec {
    text.parse::<crate::LinkSpec>().unwrap().forward
}

fn link(text: &str) -> Link<u32> {
    Link::new(&spec(text), 7)
}

/// What arrives by `now`, in order.
fn arrivals(link: &mut Link<u32>, now: Duration) -> Vec<(Duration, u32)> {
    std::iter::from_fn(|| link.pop_due(now))
        .map(|arrival| (arrival.due, arrival.packet))
        .collect()
}

#[test]
fn delay_is_exact_and_order_is_kept() {
    let mut link = link("delay 25ms");
    for i in 0..10 {
        assert_eq!(link.push(MS * i, 1500, i), Ok(MS * (25 + i)));
    }
    assert_eq!(link.pop_due(Duration::from_nanos(24_999_999)), None);
    for i in 0..10 {
        assert_eq!(link.next_due(), Some(MS * (25 + i)));
        let arrival = link.pop_due(MS * 40).unwrap();
        assert_eq!((arrival.due, arrival.packet), (MS * (25 + i), i));
    }
    assert_eq!(link.pop_due(MS * 1000), None);
}

#[test]
fn rate_spaces_packets() {
    // 1250 bytes at 10 Mbit/s: 1 ms each.
    let mut link = link("delay 5ms rate 10mbit limit 100ms");
    for i in 0..20 {
        assert_eq!(link.push(Duration::ZERO, 1250, i), Ok(MS * (1 + i + 5)));
    }
    assert_eq!(link.backlog_bytes(Duration::ZERO), 20 * 1250);
    assert_eq!(link.backlog_bytes(MS * 5), 15 * 1250);
    // Idle again: the next one waits for nobody.
    assert_eq!(link.push(MS * 50, 1250, 99), Ok(MS * 56));
}

#[test]
fn queue_drops_at_its_tail() {
    let mut link = link("rate 10mbit limit 10ms");
    for i in 0..10 {
        assert!(link.push(Duration::ZERO, 1250, i).is_ok());
    }
    assert_eq!(link.push(Duration::ZERO, 1250, 10), Err(Dropped::Queue));
    assert_eq!(link.push(MS / 2, 1250, 11), Err(Dropped::Queue));
    // A smaller packet still fits where half a packet has drained.
    assert!(link.push(MS / 2, 625, 12).is_ok());
    assert_eq!(link.push(MS / 2, 1, 13), Err(Dropped::Queue));
}

#[test]
fn overload_passes_exactly_the_rate() {
    // Offered 4 × the rate for one second: 10 Mbit/s of 1250 bytes are 1000 packets, and the
    // queue holds 50 more.
    let mut link = link("rate 10mbit limit 50ms");
    let taken = (0..4000u32)
        .filter(|i| link.push(MS * *i / 4, 1250, *i).is_ok())
        .count();
    assert!((1049..=1051).contains(&taken), "{taken}");
}

#[test]
fn idle_bottleneck_takes_a_packet_longer_than_its_queue() {
    let mut link = link("rate 1mbit limit 1ms");
    assert_eq!(link.push(MS, 1250, 0), Ok(MS * 11));
    assert_eq!(link.push(MS, 1250, 1), Err(Dropped::Queue));
    assert!(link.push(MS * 11, 1250, 2).is_ok());
}

#[test]
fn loss_has_the_share_asked_for_and_follows_the_seed() {
    let fates = |seed| -> Vec<bool> {
        let mut link = Link::new(&spec("loss 2%"), seed);
        (0..50_000u64)
            .map(|i| {
                let fate = link.push(MS * i as u32, 1500, ()).is_err();
                link.pop_due(MS * i as u32);
                fate
            })
            .collect()
    };
    let lost = fates(1).iter().filter(|lost| **lost).count() as f64;
    // Binomial: mean 1000, σ = √(50 000 · 0.02 · 0.98) = 31.3.
    assert!((lost - 1000.0).abs() < 4.0 * 31.3, "{lost}");
    assert_eq!(fates(1), fates(1));
    assert_ne!(fates(1), fates(2));
}

#[test]
fn lost_packets_take_no_share_of_the_rate() {
    let mut link = link("rate 10mbit loss 100%");
    for i in 0..1000 {
        assert_eq!(link.push(Duration::ZERO, 1250, i), Err(Dropped::Loss));
    }
    assert_eq!(link.backlog_bytes(Duration::ZERO), 0);
}

#[test]
fn cut_loses_what_is_under_way() {
    let mut link = link("delay 10ms rate 10mbit");
    for i in 0..5 {
        link.push(Duration::ZERO, 1250, i).unwrap();
    }
    assert_eq!(link.set_down(true), 5);
    assert_eq!(link.push(MS, 1250, 5), Err(Dropped::Down));
    assert_eq!(link.pop_due(MS * 100), None);
    assert_eq!(link.set_down(false), 0);
    // The queue is empty after the cut.
    assert_eq!(link.push(MS * 2, 1250, 6), Ok(MS * 13));
}

#[test]
fn shorter_delay_does_not_reorder() {
    let mut link = link("delay 50ms");
    link.push(Duration::ZERO, 100, 0).unwrap();
    link.set_spec(MS, &spec("delay 1ms"));
    assert_eq!(link.push(MS, 100, 1), Ok(MS * 50));
}

#[test]
fn memory_is_bounded_without_a_rate() {
    let mut link = link("delay 1s");
    let fates = (0..=MAX_IN_FLIGHT as u32).map(|i| link.push(Duration::ZERO, 100, i));
    assert_eq!(fates.last(), Some(Err(Dropped::Overflow)));
    assert_eq!(link.in_flight(), MAX_IN_FLIGHT);
}

#[test]
fn jitter_without_a_rate_reorders_and_keeps_the_mean() {
    let mut link = link("delay 20ms 5ms");
    for i in 0..10_000 {
        link.push(MS * i / 10, 100, i).unwrap();
    }
    let arrivals = arrivals(&mut link, MS * 2000);
    assert_eq!(arrivals.len(), 10_000);
    assert!(arrivals.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    assert!(arrivals.windows(2).any(|pair| pair[0].1 > pair[1].1));
    let took = |(due, i): &(Duration, u32)| due.saturating_sub(MS * *i / 10).as_secs_f64();
    let mean = arrivals.iter().map(took).sum::<f64>() / 1e4;
    assert!((mean - 0.020).abs() < 0.0002, "{mean}");
    let strays = |arrival: &(Duration, u32)| (took(arrival) - 0.020).abs() <= 0.005;
    assert!(arrivals.iter().all(strays));
}

#[test]
fn jitter_behind_a_bottleneck_keeps_order_and_rate() {
    let mut link = link("delay 20ms 5ms rate 10mbit limit 1s");
    for i in 0..1000 {
        link.push(MS * i, 1250, i).unwrap();
    }
    let arrivals = arrivals(&mut link, MS * 5000);
    assert!(arrivals.windows(2).all(|pair| pair[0].1 < pair[1].1));
    let last = arrivals.last().unwrap().0;
    assert!(
        last >= MS * (1000 + 15) && last <= MS * (1000 + 25),
        "{last:?}"
    );
}

#[test]
fn reordered_packets_skip_the_delay() {
    let mut every_fifth = link("delay 10ms reorder 100% gap 5");
    let dues: Vec<_> = (0..20)
        .map(|i| {
            every_fifth
                .push(MS * i, 100, i)
                .unwrap()
                .saturating_sub(MS * i)
        })
        .collect();
    let skipped = dues.iter().filter(|due| due.is_zero()).count();
    assert_eq!(skipped, 4);
    assert!(dues[4].is_zero() && dues[9].is_zero());
    assert_eq!(arrivals(&mut every_fifth, MS * 4)[0].1, 4);
    let mut some = link("delay 10ms reorder 25%");
    let skipped = (0..4000)
        .filter(|i| some.push(MS * *i, 100, *i).unwrap() == MS * *i)
        .count();
    // Binomial: mean 1000, σ = 27.4.
    assert!((890..1110).contains(&skipped), "{skipped}");
}

#[test]
fn duplicates_arrive_twice_and_take_their_share_of_the_rate() {
    let mut link = link("delay 5ms duplicate 100% rate 10mbit limit 1s");
    for i in 0..10 {
        link.push(Duration::ZERO, 1250, i).unwrap();
    }
    let arrivals = arrivals(&mut link, MS * 100);
    assert_eq!(arrivals.len(), 20);
    assert!(arrivals.chunks(2).all(|pair| pair[0].1 == pair[1].1));
    assert_eq!(arrivals[19].0, MS * 25);
}

#[test]
fn corruption_has_the_share_asked_for() {
    let mut link = link("corrupt 5%");
    for i in 0..20_000 {
        link.push(MS * i, 100, i).unwrap();
    }
    let mut bits = std::collections::BTreeSet::new();
    while let Some(arrival) = link.pop_due(MS * 20_000) {
        bits.extend(arrival.corrupt);
    }
    // Binomial: mean 1000, σ = 30.8.
    assert!((875..1125).contains(&bits.len()), "{}", bits.len());
}

#[test]
fn limits_count_what_they_say() {
    // tc's: queued or under way.
    let mut packets = link("delay 10ms limit 5");
    let taken =
        |link: &mut Link<u32>, now| (0..20).filter(|i| link.push(now, 1000, *i).is_ok()).count();
    assert_eq!(taken(&mut packets, Duration::ZERO), 5);
    assert_eq!(arrivals(&mut packets, MS * 10).len(), 5);
    assert_eq!(taken(&mut packets, MS * 10), 5);
    // Bytes of the bottleneck's queue: what is under way behind it does not count.
    let mut bytes = link("delay 1s rate 8mbit limit 10kb");
    assert_eq!(taken(&mut bytes, Duration::ZERO), 10);
    assert_eq!(taken(&mut bytes, MS * 5), 5);
}

#[test]
fn slots_make_bursts() {
    let mut link = link("delay 1ms slot 10ms");
    for i in 0..1000 {
        link.push(MS * i / 4, 100, i).unwrap();
    }
    let arrivals = arrivals(&mut link, MS * 1000);
    let mut times: Vec<_> = arrivals.iter().map(|(due, _)| *due).collect();
    times.dedup();
    // 250 ms of packets in slots of 10.
    assert!((25..=27).contains(&times.len()), "{}", times.len());
    assert!(times.windows(2).all(|pair| pair[1] == pair[0] + MS * 10));
    assert!(arrivals.windows(2).all(|pair| pair[0].1 < pair[1].1));
    let waits = |(due, i): &(Duration, u32)| *due <= MS * *i / 4 + MS * 11;
    assert!(arrivals.iter().all(waits));
}

#[test]
fn what_waits_is_sent_at_the_new_rate() {
    let mut link = link("rate 10mbit limit 1s");
    for i in 0..20 {
        link.push(Duration::ZERO, 1250, i).unwrap();
    }
    // 10 packets of 1 ms wait: at a quarter of the rate 40 ms.
    link.set_spec(MS * 10, &spec("rate 2.5mbit limit 1s"));
    assert_eq!(link.backlog_bytes(MS * 10), 12_500);
    assert_eq!(link.push(MS * 10, 1250, 20), Ok(MS * 54));
    link.set_spec(MS * 10, &spec("delay 1ms"));
    assert_eq!(link.backlog_bytes(MS * 10), 0);
}

#[test]
fn the_same_seed_gives_the_same_fates() {
    let text = "delay 20ms 5ms 10% distribution pareto loss gemodel 1% 25% corrupt 1% \
                duplicate 1% reorder 5% rate 50mbit slot 1ms 3ms limit 100";
    let run = |seed| {
        let mut link = Link::new(&spec(text), seed);
        let mut seen = Vec::new();
        for i in 0..5000u32 {
            let now = MS * i / 5;
            let fate = link.push(now, 1000, i);
            while let Some(arrival) = link.pop_due(now) {
                seen.push((arrival.due, arrival.packet, arrival.corrupt));
            }
            seen.push((fate.unwrap_or_default(), i, None));
        }
        seen
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
