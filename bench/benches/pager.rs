//! What tracking, placing and fault service cost, on another process's memory. Needs root.
//!
//! `accesses` is what sampling which pages are accessed costs: one sample by itself, a touch of a page that
//! it has unmapped, and how much more processor time a guest needs for an access with a sample a second than
//! with dirty tracking alone. It accesses 512 MiB at full speed and evenly: the worst case, every page that
//! is unmapped is touched again.
//!
//! `fault_x1000/kernel` is a first touch that the kernel serves alone. `fault_x1000/raw` is the
//! floor of what userfaultfd allows: a handler that reads the fault and copies a constant page.
//! `fault_x1000/local_socket` is a [`Placer`] whose pages come from another thread over a Unix
//! socket: the goal is a median of at most 25 µs above the floor. Placement is to reach 1 GB/s.

#[path = "../../pager/tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Guest, PAGE};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use hybridmig_bench::micro::{Nobody, group, thread_time};
use hybridmig_pager::uffd::{Event, RawEvent, RegisterMode, Uffd};
use hybridmig_pager::{
    FaultAnswer, FaultSink, Features, MissingMap, PagerError, Placer, PlacerConfig, Settle,
    Tracker, TrackerConfig, attach,
};
use roaring::RoaringBitmap;

const MIB: u32 = 256;
const TRACKED: u32 = 512 * MIB;
const PLACED: u32 = 64 * MIB;
/// So that milliseconds of a round are microseconds of a fault.
const FAULTS: u32 = 1000;
/// Pages of a guest of which a sample unmaps more than half.
const SMALL: u32 = 512;
/// Times that a guest with and without sampling are compared.
const PAIRS: usize = 15;

/// A userfaultfd of which the guest keeps no copy, so that the next round can have one too.
fn transient(guest: &Guest, features: Features) -> Uffd {
    let attached = attach::attach(guest.pid(), attach::Method::Syscall).unwrap();
    attach::close_in_target(guest.pid(), attached.target_fd).unwrap();
    attached.uffd.handshake(features).unwrap();
    attached.uffd
}

fn track(guest: &Guest, uffd: Uffd) -> Tracker {
    let regions = vec![guest.region()];
    Tracker::start(uffd, guest.pid(), regions, TrackerConfig::default())
        .unwrap()
        .0
}

fn tracking(criterion: &mut Criterion) {
    let mut guest = Guest::new(TRACKED);
    guest.ask("fill 1");
    let mut group = group(criterion, "track_512MiB");
    group.bench_function("start", |bencher| {
        bencher.iter_batched(
            || transient(&guest, Features::TRACKING),
            |uffd| track(&guest, uffd),
            BatchSize::PerIteration,
        );
    });
    let tracker = track(&guest, guest.attach(Features::TRACKING));
    group.bench_function("scan_clean", |bencher| {
        bencher.iter(|| black_box(tracker.take_dirty(Settle::Running).unwrap()));
    });
    let mut seed = 0;
    group.bench_function("scan_1000_dirty", |bencher| {
        bencher.iter_batched(
            || {
                seed += 10_000;
                guest.ask(&format!("write {seed} 1000"));
            },
            |()| black_box(tracker.take_dirty(Settle::Running).unwrap()),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

/// The guest's processor time, in ns, for an access of which three in ten write, while it is scanned every second.
fn used(guest: &mut Guest, tracker: &Tracker, sampled: bool) -> f64 {
    const MS: u64 = 2000;
    guest.process.send(&format!("use 30 {MS}"));
    for _ in 0..MS / 1000 {
        black_box(tracker.take_dirty(Settle::Running).unwrap());
        if sampled {
            black_box(tracker.sample_accesses());
        }
        std::thread::sleep(Duration::from_millis(990));
    }
    let answer = guest.process.line();
    let (count, took) = answer.split_once(' ').unwrap();
    let (count, took): (f64, f64) = (count.parse().unwrap(), took.parse().unwrap());
    took / count
}

fn accesses(criterion: &mut Criterion) {
    let mut guest = Guest::new(TRACKED);
    guest.ask("rest");
    guest.ask("fill 1");
    let tracker = track(&guest, guest.attach(Features::TRACKING));
    let mut group = group(criterion, "accesses_512MiB");
    group.bench_function("sample", |bencher| {
        bencher.iter_custom(|rounds| {
            let sampled = || {
                // As much as a sample may be is due again after a second.
                std::thread::sleep(Duration::from_secs(1));
                let begun = Instant::now();
                black_box(tracker.sample_accesses());
                begun.elapsed()
            };
            (0..rounds).map(|_| sampled()).sum()
        });
    });
    assert!(tracker.sampling().off.is_none(), "{:?}", tracker.sampling());
    // So small that a sample unmaps more than half of it: the median touch is that of an unmapped page.
    let mut small = Guest::new(SMALL);
    small.ask("fill 1");
    let watched = track(&small, small.attach(Features::TRACKING));
    group.bench_function("touch_x1000", |bencher| {
        bencher.iter_custom(|rounds| {
            let touched = || {
                watched.take_dirty(Settle::Running).unwrap();
                std::thread::sleep(Duration::from_secs(1));
                watched.sample_accesses();
                touch_median(&mut small, SMALL) * 1000
            };
            std::iter::repeat_with(touched).take(rounds as usize).sum()
        });
    });
    group.finish();
    if wanted("accesses_512MiB/cost") {
        compare(&mut guest, &tracker);
    }
}

/// Whether the command line asks for this figure, which criterion knows nothing of.
fn wanted(name: &str) -> bool {
    let mut words = std::env::args().skip(1);
    let test = std::env::args().any(|word| word == "--test");
    let filter = words.find(|word| !word.starts_with('-'));
    !test && filter.is_none_or(|filter| name.contains(&filter))
}

/// By turns: on a machine with other work only neighbours can be compared.
fn compare(guest: &mut Guest, tracker: &Tracker) {
    let mut costs: Vec<f64> = Vec::new();
    for _ in 0..PAIRS {
        let alone = used(guest, tracker, false);
        let sampled = used(guest, tracker, true);
        costs.push(100.0 * (sampled / alone - 1.0));
    }
    costs.sort_by(f64::total_cmp);
    println!(
        "accesses_512MiB/cost   {:.2} % of the guest's speed (median of {PAIRS} pairs; quartiles {:.2} and {:.2})",
        costs[PAIRS / 2],
        costs[PAIRS / 4],
        costs[PAIRS * 3 / 4]
    );
    println!("accesses_512MiB/cost   {:?}", tracker.sampling());
}

/// Everything is missing.
fn arm(guest: &Guest, sink: Arc<dyn FaultSink>) -> Placer {
    let map = MissingMap::in_memory(&[guest.memory.blocks()]).unwrap();
    map.insert(0, &(0..guest.memory.blocks()).collect())
        .unwrap();
    Placer::arm(
        transient(guest, Features::PLACING),
        guest.pid(),
        vec![guest.region()],
        Arc::new(map),
        &[(0, RoaringBitmap::new())],
        sink,
        PlacerConfig::default(),
    )
    .unwrap()
}

fn placing(criterion: &mut Criterion) {
    let guest = Guest::new(PLACED);
    let data = vec![7; 64 * PAGE];
    let mut group = group(criterion, "place");
    group.throughput(Throughput::Bytes(guest.memory.len()));
    for pages in [1, 64] {
        group.bench_function(format!("{}KiB", pages * PAGE / 1024), |bencher| {
            bencher.iter_custom(|rounds| {
                (0..rounds)
                    .map(|_| {
                        let placer = arm(&guest, Arc::new(Nobody));
                        let begun = thread_time();
                        for first in (0..PLACED).step_by(pages) {
                            placer.place(0, first, &data[..pages * PAGE]).unwrap();
                        }
                        let took = thread_time().saturating_sub(begun);
                        placer.disarm().unwrap();
                        took
                    })
                    .sum()
            });
        });
    }
    group.bench_function("before_arming_256KiB", |bencher| {
        bencher.iter_custom(|rounds| {
            (0..rounds)
                .map(|_| {
                    guest.memory.zero(0, PLACED).unwrap();
                    let begun = thread_time();
                    for first in (0..PLACED).step_by(64) {
                        guest.memory.write(first, &data).unwrap();
                    }
                    thread_time().saturating_sub(begun)
                })
                .sum()
        });
    });
    group.finish();
}

/// The guest's own median time per touch of a missing page.
fn touch(guest: &mut Guest) -> Duration {
    touch_median(guest, FAULTS)
}

fn touch_median(guest: &mut Guest, pages: u32) -> Duration {
    let answer = guest.ask(&format!("touch {pages}"));
    let (median, _p99) = answer.split_once(' ').unwrap();
    Duration::from_nanos(median.parse().unwrap())
}

fn kernel_alone(guest: &mut Guest) -> Duration {
    guest.memory.zero(0, FAULTS).unwrap();
    touch(guest)
}

fn raw_handler(guest: &mut Guest) -> Duration {
    guest.memory.zero(0, FAULTS).unwrap();
    let uffd = transient(guest, Features::PLACING);
    for map in guest.region().mappings {
        uffd.register(map.address, map.len(), RegisterMode::Missing)
            .unwrap();
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let data = [7; PAGE];
            let mut events = [RawEvent::default(); 8];
            let timeout = rustix::time::Timespec {
                tv_sec: 0,
                tv_nsec: 20_000_000,
            };
            while !stop.load(Ordering::Relaxed) {
                let mut fds = [rustix::event::PollFd::new(
                    &uffd,
                    rustix::event::PollFlags::IN,
                )];
                rustix::event::poll(&mut fds, Some(&timeout)).unwrap();
                let count = uffd.read(&mut events).unwrap();
                for event in &events[..count] {
                    if let Event::Fault { address, .. } = event.decode() {
                        uffd.copy(address, &data);
                    }
                }
            }
        });
        let median = touch(guest);
        stop.store(true, Ordering::Relaxed);
        median
    })
}

struct OverSocket(Mutex<UnixStream>);

impl FaultSink for OverSocket {
    fn fault(&self, _region: u16, block: u32) -> FaultAnswer {
        self.0
            .lock()
            .unwrap()
            .write_all(&block.to_ne_bytes())
            .unwrap();
        FaultAnswer::Requested
    }

    fn removed(&self, _region: u16, _first: u32, _count: u32) {}

    fn failed(&self, error: PagerError) {
        panic!("{error}");
    }
}

fn over_socket(guest: &mut Guest) -> Duration {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let replies = ours.try_clone().unwrap();
    let placer = arm(guest, Arc::new(OverSocket(Mutex::new(ours))));
    std::thread::scope(|scope| {
        // The page source: a request is a block number, a reply the number and the page.
        scope.spawn(move || {
            let mut message = vec![7; 4 + PAGE];
            while theirs.read_exact(&mut message[..4]).is_ok() {
                if theirs.write_all(&message).is_err() {
                    break;
                }
            }
        });
        scope.spawn({
            let placer = &placer;
            let mut replies = replies.try_clone().unwrap();
            move || {
                let mut message = vec![0; 4 + PAGE];
                while replies.read_exact(&mut message).is_ok() {
                    let block = u32::from_ne_bytes(message[..4].try_into().unwrap());
                    placer.place(0, block, &message[4..]).unwrap();
                }
            }
        });
        let median = touch(guest);
        replies.shutdown(std::net::Shutdown::Both).unwrap();
        median
    })
}

fn faults(criterion: &mut Criterion) {
    let mut guest = Guest::new(FAULTS);
    let mut group = group(criterion, "fault_x1000");
    // Criterion is given the median as the time of every fault of a round.
    for (name, serve) in [
        ("kernel", kernel_alone as fn(&mut Guest) -> Duration),
        ("raw", raw_handler),
        ("local_socket", over_socket),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|rounds| (0..rounds).map(|_| serve(&mut guest) * FAULTS).sum());
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().without_plots();
    targets = tracking, accesses, placing, faults
}
criterion_main!(benches);
