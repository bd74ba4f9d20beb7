//! What the whole data path costs, on contents that no codec makes smaller: the source's look for
//! dirty blocks with reading and encoding them (needs root, as tracking does), and the way of batches
//! from the encoder over a link on loopback, mutual TLS as always, into memory.
//!
//! `core` counts the time of threads on a core (the source's, the destination's, or all), so it says
//! what the path costs whatever else the machine does; `wall` is the throughput that came out of it here.

#[path = "../../pager/tests/common/mod.rs"]
mod common;

use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::Guest;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hybridmig_bench::micro::{BATCH_BLOCKS, BLOCK, Memory, encode, group, noise, ram, thread_time};
use hybridmig_pager::{Features, Settle, Tracker, TrackerConfig};
use hybridmig_transport::codec::{BlockEncoder, EncoderConfig, Limits, decode_batch};
use hybridmig_transport::{Endpoint, Identity, Incoming, Lane, Link, TransportConfig, Trust};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

/// Sizes in blocks: what is scanned, 256 MiB, and what goes over the link, 64 MiB.
const SCANNED: u32 = 64 << 10;
const SENT: u32 = 16 << 10;
/// Batches that may wait between two stages, as in the engine.
const QUEUE: usize = 4;
/// How many batches after it was made one is taken for acknowledged.
const ACKNOWLEDGED: u64 = 64;

fn encoder() -> BlockEncoder {
    let config = EncoderConfig {
        index_entries: SCANNED as usize,
        delta_cache_bytes: 64 << 20,
        ..EncoderConfig::default()
    };
    BlockEncoder::new(config).expect("the level is valid")
}

/// Encodes one batch as the source does, which also hears that earlier ones have arrived.
fn next_batch(encoder: &mut BlockEncoder, id: u64, blocks: &[u32], contents: &[u8]) -> Bytes {
    if let Some(arrived) = id.checked_sub(ACKNOWLEDGED) {
        encoder.acknowledge(arrived);
    }
    encode(encoder, id, blocks, contents)
}

fn source(criterion: &mut Criterion) {
    let mut guest = Guest::new(SCANNED);
    let uffd = guest.attach(Features::TRACKING);
    let regions = vec![guest.region()];
    let (tracker, _) =
        Tracker::start(uffd, guest.pid(), regions, TrackerConfig::default()).unwrap();
    let mut group = group(criterion, "source_256MiB");
    group.throughput(Throughput::Bytes(guest.memory.len()));
    let mut seed = 0;
    group.bench_function("scan+read+encode/core", |bencher| {
        bencher.iter_custom(|rounds| {
            (0..rounds)
                .map(|_| {
                    seed += 1;
                    guest.ask(&format!("fill {seed}"));
                    let mut encoder = encoder();
                    let begun = thread_time();
                    take_all(&guest, &tracker, &mut encoder);
                    thread_time().saturating_sub(begun)
                })
                .sum()
        });
    });
    group.finish();
}

/// One look at a guest that has written everywhere.
fn take_all(guest: &Guest, tracker: &Tracker, encoder: &mut BlockEncoder) {
    let dirty = tracker.take_dirty(Settle::Running).unwrap();
    let blocks: Vec<u32> = dirty[0].1.iter().collect();
    assert_eq!(blocks.len(), SCANNED as usize);
    let mut contents = vec![0; BATCH_BLOCKS * BLOCK];
    for (id, blocks) in blocks.chunks_exact(BATCH_BLOCKS).enumerate() {
        guest.memory.read(blocks[0], &mut contents).unwrap();
        std::hint::black_box(next_batch(encoder, id as u64, blocks, &contents));
    }
}

/// The two ends' async runtimes, by the names of their threads.
const SOURCE: &str = "path-source";
const DESTINATION: &str = "path-dest";

/// A link over loopback between two hosts, each with a network thread of its own. Dropping the
/// endpoints would end it.
struct Loopback {
    near: Runtime,
    far: Runtime,
    source: Link,
    destination: Link,
    _endpoints: [Endpoint; 2],
}

/// Time on cores, by host.
#[derive(Clone, Copy, Default)]
struct Spent {
    source: Duration,
    destination: Duration,
}

/// Time on cores of the threads of this process with that name.
fn time_of(name: &str) -> Duration {
    let mut sum = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        let read = |file: &str| std::fs::read_to_string(task.join(file)).unwrap_or_default();
        if read("comm").trim_end() == name {
            let spent = read("schedstat");
            sum += spent.split(' ').next().unwrap().parse::<u64>().unwrap();
        }
    }
    Duration::from_nanos(sum)
}

fn host(name: &str) -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name(name)
        .enable_all()
        .build()
        .unwrap()
}

impl Loopback {
    fn new() -> Self {
        let (near, far) = (host(SOURCE), host(DESTINATION));
        let (alice, bob) = (Identity::generate().unwrap(), Identity::generate().unwrap());
        let trust = |identity: &Identity| Trust::new().with_peer(identity.fingerprint());
        let (of_server, of_client) = (trust(&alice), trust(&bob));
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        // Endpoints live on the runtime whose thread makes them.
        let config = TransportConfig::default;
        let server = far.spawn(async move { Endpoint::server(any, &bob, of_server, &config()) });
        let server = far.block_on(server).unwrap().unwrap();
        let addr = server.local_addr().unwrap();
        let accepting = far.spawn(async move {
            let destination = server.accept().await.unwrap();
            (destination, server)
        });
        let connecting = near.spawn(async move {
            let client = Endpoint::client(&alice, of_client, &config()).unwrap();
            (client.connect(addr).await.unwrap(), client)
        });
        let (source, client) = near.block_on(connecting).unwrap();
        let (destination, server) = far.block_on(accepting).unwrap();
        Self {
            near,
            far,
            source,
            destination,
            _endpoints: [client, server],
        }
    }

    /// Moves `contents` into `memory`: one thread encodes, one decodes and applies, the runtimes'
    /// carry.
    fn carry(&self, contents: &[u8], encoder: &mut BlockEncoder, memory: &mut Memory) -> Spent {
        let began = [SOURCE, DESTINATION].map(time_of);
        let (encoded, mut to_send) = mpsc::channel::<Bytes>(QUEUE);
        let (received, mut to_apply) = mpsc::channel::<Bytes>(QUEUE);
        let source = self.source.clone();
        let sending = self.near.spawn(async move {
            while let Some(batch) = to_send.recv().await {
                source.send_batch(Lane::Bulk, batch).await.unwrap();
            }
        });
        let destination = self.destination.clone();
        let batches = contents.len() / (BATCH_BLOCKS * BLOCK);
        let receiving = self.far.spawn(async move {
            for _ in 0..batches {
                match destination.next_incoming().await.unwrap() {
                    Incoming::Batch { bytes, .. } => received.send(bytes).await.unwrap(),
                    Incoming::Message(message) => panic!("{message:?}"),
                }
            }
        });
        let (encoding, applying) = thread::scope(|scope| {
            let applying = scope.spawn(move || {
                let regions = [ram(SENT)];
                let limits = Limits { regions: &regions };
                while let Some(bytes) = to_apply.blocking_recv() {
                    decode_batch(&bytes, &limits)
                        .unwrap()
                        .apply(memory)
                        .unwrap();
                }
                thread_time()
            });
            let encoding = scope.spawn(move || {
                for (id, contents) in contents.chunks_exact(BATCH_BLOCKS * BLOCK).enumerate() {
                    let first = (id * BATCH_BLOCKS) as u32;
                    let blocks: Vec<u32> = (first..first + BATCH_BLOCKS as u32).collect();
                    let batch = next_batch(encoder, id as u64, &blocks, contents);
                    encoded.blocking_send(batch).unwrap();
                }
                drop(encoded);
                thread_time()
            });
            (encoding.join().unwrap(), applying.join().unwrap())
        });
        self.near.block_on(sending).unwrap();
        self.far.block_on(receiving).unwrap();
        let [source, destination] = [SOURCE, DESTINATION].map(time_of);
        Spent {
            source: source.saturating_sub(began[0]) + encoding,
            destination: destination.saturating_sub(began[1]) + applying,
        }
    }
}

/// A figure of a run, from the times on cores and that on the wall.
type Figure = fn(Spent, Duration) -> Duration;

fn link(criterion: &mut Criterion) {
    let loopback = Loopback::new();
    let contents = noise(4, SENT as usize * BLOCK);
    let mut memory = Memory(vec![0; contents.len()]);
    let figures: [(&str, Figure); 4] = [
        ("encode+link/source core", |spent, _| spent.source),
        ("link+apply/destination core", |spent, _| spent.destination),
        ("encode+link+apply/core", |spent, _| {
            spent.source + spent.destination
        }),
        ("encode+link+apply/wall", |_, wall| wall),
    ];
    let mut group = group(criterion, "path_64MiB");
    group.throughput(Throughput::Bits(contents.len() as u64 * 8));
    for (name, figure) in figures {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|rounds| {
                (0..rounds)
                    .map(|_| {
                        let mut encoder = encoder();
                        let begun = Instant::now();
                        let spent = loopback.carry(&contents, &mut encoder, &mut memory);
                        figure(spent, begun.elapsed())
                    })
                    .sum()
            });
        });
    }
    assert!(memory.0 == contents, "what arrived is not what was sent");
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().without_plots();
    targets = source, link
}
criterion_main!(benches);
