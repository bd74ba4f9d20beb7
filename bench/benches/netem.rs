//! What the emulated link costs for each packet, in virtual time: the model alone, without any I/O. The goal
//! is 200 ns at most. How exact a running link is, `hybridmig netem check` measures.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hybridmig_bench::micro::group;
use hybridmig_netem::LinkSpec;
use hybridmig_netem::model::Link;

/// Packets of a round: two seconds of 60 Mbit/s.
const PACKETS: u64 = 10_000;

/// Bytes of a packet.
const BYTES: usize = 1500;

/// Time between two packets.
const INTERVAL: Duration = Duration::from_micros(200);

fn model(criterion: &mut Criterion) {
    let mut group = group(criterion, "netem");
    group.throughput(Throughput::Elements(PACKETS));
    for (name, text) in [
        ("delay", "delay 50ms"),
        ("wan", "delay 50ms rate 200mbit loss 1% limit 50ms"),
        (
            "bursty",
            "delay 50ms rate 200mbit loss gemodel 0.2525% 25% limit 50ms",
        ),
        ("full queue", "delay 50ms rate 50mbit loss 1% limit 50ms"),
        (
            "jitter that reorders",
            "delay 50ms 5ms 10% distribution normal loss 1%",
        ),
        (
            "everything",
            "delay 50ms 5ms 10% distribution paretonormal loss state 1% 30% 20% 50% 0.5% corrupt 0.1% \
             duplicate 0.5% reorder 1% rate 200mbit slot 1ms 2ms limit 50ms",
        ),
    ] {
        let spec: LinkSpec = text.parse().expect("a link");
        let mut link = Link::new(&spec.forward, 1);
        let mut now = Duration::ZERO;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                for number in 0..PACKETS {
                    now += INTERVAL;
                    let fate = link.push(now, BYTES, number);
                    let _: Result<Duration, _> = black_box(fate);
                    while let Some(arrival) = link.pop_due(now) {
                        black_box(arrival);
                    }
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, model);
criterion_main!(benches);
