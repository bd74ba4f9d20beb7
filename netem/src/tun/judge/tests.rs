//! Tests of [`super`]: what is delivered together is compared with what the same path says of each
//! packet alone.

use proptest::prelude::*;

use super::*;
use crate::spec::LinkSpec;
use crate::tun::gso::HEADER;

/// A TCP super-packet of `segments` packets of 1500 bytes.
fn frame(segments: usize) -> Vec<u8> {
    let payload = segments * 1460;
    let mut frame = vec![1, 1];
    for value in [40u16, 1460, 20, 16] {
        frame.extend(value.to_ne_bytes());
    }
    let length = (payload + 40) as u16;
    frame.extend([0x45, 0]);
    frame.extend(length.to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.resize(HEADER + 32, 0);
    frame.extend([0x50, 0x10]);
    frame.resize(HEADER + 40 + payload, 7);
    frame
}

fn path(link: &str) -> Path {
    let link: LinkSpec = link.parse().unwrap();
    Path::new(&link.forward, 3)
}

fn judged(link: &str, segments: usize) -> Vec<Run> {
    let bytes = frame(segments);
    let mut judge = Judge::new(path(link));
    let frame = Frame::new(&bytes).unwrap();
    assert_eq!(frame.segments(), segments);
    let now = Duration::from_secs(1);
    judge.judge(&frame, now, &InFlight::<()>::new(), &Counters::default());
    judge.runs().to_vec()
}

#[test]
fn link_without_a_rate_keeps_a_frame_whole() {
    let runs = judged("delay 5ms", 44);
    assert_eq!(runs.len(), 1);
    assert_eq!(runs[0].segments, 0..44);
    assert_eq!(runs[0].due, Duration::from_millis(1005));
    assert_eq!(runs[0].bytes, 44 * 1500);
}

#[test]
fn rate_spreads_a_frame_over_its_time() {
    // 60 µs a packet: five of them are 240 µs from the first to the last.
    let runs = judged("rate 200mbit limit 1s", 44);
    let lengths: Vec<usize> = runs.iter().map(|run| run.segments.len()).collect();
    assert_eq!(lengths, [5, 5, 5, 5, 5, 5, 5, 5, 4]);
    let last = runs.last().unwrap().due;
    assert_eq!(
        last,
        Duration::from_secs(1) + 44 * Duration::from_micros(60)
    );
    // And a slow one carries packet by packet.
    assert_eq!(judged("rate 10mbit limit 1s", 44).len(), 44);
}

#[test]
fn damaged_packets_travel_alone() {
    let runs = judged("corrupt 100% duplicate 100%", 3);
    let seen: Vec<_> = runs
        .iter()
        .map(|run| (run.segments.clone(), run.corrupt.is_some()))
        .collect();
    assert_eq!(seen.len(), 6);
    for (i, pair) in seen.chunks(2).enumerate() {
        assert_eq!(pair[0], (i..i + 1, true));
        assert_eq!(pair[1], (i..i + 1, false));
    }
}

#[test]
fn bounds_of_the_emulator_hold_within_a_frame() {
    let bytes = frame(44);
    let frame = Frame::new(&bytes).unwrap();
    let mut in_flight = InFlight::new();
    in_flight.push(Duration::ZERO, 1, MAX_IN_FLIGHT - 10, ());
    let mut judge = Judge::new(path("delay 1ms"));
    let counters = Counters::default();
    judge.judge(&frame, Duration::ZERO, &in_flight, &counters);
    let taken: usize = judge.runs().iter().map(|run| run.segments.len()).sum();
    assert!(taken <= 10, "{taken}");
    assert_eq!(counters.snapshot().dropped_relay, 44 - taken as u64);
}

proptest! {
    #[test]
    fn runs_are_what_each_packet_alone_would_meet(
        link in prop::sample::select(vec![
            "delay 5ms",
            "delay 5ms loss 20% rate 500mbit limit 1ms",
            "delay 5ms 1ms loss 5% duplicate 5% corrupt 5%",
            "delay 5ms reorder 10% rate 1gbit limit 20",
            "rate 2gbit loss gemodel 5% 30% limit 10ms",
        ]),
        frames in prop::collection::vec((1..=44usize, 0..2000u32), 1..20),
    ) {
        let mut judge = Judge::new(path(link));
        let mut alone = path(link);
        let counters = Counters::default();
        let mut now = Duration::ZERO;
        let mut expected_loss = 0;
        for (segments, gap) in frames {
            now += Duration::from_micros(u64::from(gap));
            let bytes = frame(segments);
            let frame = Frame::new(&bytes).unwrap();
            judge.judge(&frame, now, &InFlight::<()>::new(), &counters);
            // Each copy that arrives: which packet, when, and with which damage.
            let mut arriving = Vec::new();
            let mut held = 0;
            for index in 0..segments {
                match alone.admit(now, 1500, held) {
                    Ok(fate) => {
                        held += 1 + usize::from(fate.duplicate.is_some());
                        arriving.push((index, fate.due, fate.corrupt));
                        arriving.extend(fate.duplicate.map(|due| (index, due, None)));
                    }
                    Err(_) => expected_loss += 1,
                }
            }
            let mut copies = arriving.iter();
            for run in judge.runs() {
                prop_assert_eq!(run.bytes, run.segments.len() * 1500);
                prop_assert!(run.corrupt.is_none() || run.segments.len() == 1);
                let mut last = Duration::ZERO;
                for index in run.segments.clone() {
                    let (of, due, corrupt) = *copies.next().unwrap();
                    prop_assert_eq!((of, corrupt), (index, run.corrupt));
                    // Never early, hardly late, and in order.
                    prop_assert!(due <= run.due && run.due <= due + RUN_TIME);
                    prop_assert!(last <= due);
                    last = due;
                }
                prop_assert_eq!(last, run.due);
            }
            prop_assert_eq!(copies.next(), None);
        }
        let stats = counters.snapshot();
        prop_assert_eq!(stats.dropped_loss + stats.dropped_queue, expected_loss);
    }
}
