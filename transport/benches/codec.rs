//! How fast one core encodes, decodes and applies batches, per kind of block. Throughput counts the
//! plain contents of the blocks.

use std::convert::Infallible;
use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hybridmig_transport::Lane;
use hybridmig_transport::codec::{
    BatchHeader, BatchTarget, BlockEncoder, EncoderConfig, Limits, decode_batch,
};
use hybridmig_transport::frame::{decode_message, encode_message, split_set};
use hybridmig_transport::message::{BlockSet, Message, RegionId, RegionInfo, RegionKind};
use rand::rngs::SmallRng;
use rand::{RngCore as _, SeedableRng as _};

const SIZE: usize = 4096;
const COUNT: usize = 64;
const BYTES: usize = SIZE * COUNT;
const RAM: RegionId = RegionId(0);

/// A destination in plain memory that wants everything.
struct Memory(Vec<u8>);

impl BatchTarget for Memory {
    type Error = Infallible;

    fn admit(&mut self, _: RegionId, _: u32, _: u32) -> bool {
        true
    }

    fn read(&mut self, _: RegionId, block: u32, buf: &mut [u8]) -> Result<(), Infallible> {
        buf.copy_from_slice(&self.0[block as usize * SIZE..][..SIZE]);
        Ok(())
    }

    fn write(&mut self, _: RegionId, first: u32, data: &[u8]) -> Result<(), Infallible> {
        self.0[first as usize * SIZE..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero(&mut self, _: RegionId, first: u32, count: u32) -> Result<(), Infallible> {
        self.0[first as usize * SIZE..][..count as usize * SIZE].fill(0);
        Ok(())
    }

    fn state(&mut self, _: u64, _: &[u8]) -> Result<(), Infallible> {
        Ok(())
    }

    fn reject(&mut self, _: RegionId, block: u32) {
        panic!("block {block} was rejected");
    }
}

/// One kind of batch: what the destination must have before, and what is sent then.
struct Kind {
    name: &'static str,
    before: Option<Vec<u8>>,
    /// First block of what is sent; `before` lies at block 0.
    first: u32,
    contents: Vec<u8>,
}

fn kinds() -> Vec<Kind> {
    let mut noise = vec![0; BYTES];
    SmallRng::seed_from_u64(1).fill_bytes(&mut noise);
    let words = [
        "guest ",
        "memory ",
        "page ",
        "migrates ",
        "slowly ",
        "0x7fff ",
        "\n",
    ];
    let mut rng = SmallRng::seed_from_u64(2);
    let mut text = Vec::with_capacity(BYTES + 16);
    while text.len() < BYTES {
        text.extend_from_slice(words[rng.next_u32() as usize % words.len()].as_bytes());
    }
    text.truncate(BYTES);
    let mut touched = noise.clone();
    for block in touched.chunks_exact_mut(SIZE) {
        block[1000..1032].fill(7);
    }
    let kind = |name, before, first, contents| Kind {
        name,
        before,
        first,
        contents,
    };
    vec![
        kind("zero", None, 0, vec![0; BYTES]),
        kind("random", None, 0, noise.clone()),
        kind("text", None, 0, text),
        kind(
            "duplicate",
            Some(noise.clone()),
            COUNT as u32,
            noise.clone(),
        ),
        kind("small-change", Some(noise), 0, touched),
    ]
}

fn header(id: u64) -> BatchHeader {
    BatchHeader {
        id,
        pass: id as u32,
        lane: Lane::Bulk,
    }
}

/// An encoder for which what the kind needs has been sent and acknowledged.
fn encoder(kind: &Kind) -> BlockEncoder {
    let config = EncoderConfig {
        index_entries: 1 << 12,
        delta_cache_bytes: 4 << 20,
        ..EncoderConfig::default()
    };
    let mut encoder = BlockEncoder::new(config).expect("the level is valid");
    if let Some(before) = &kind.before {
        encode(&mut encoder, 0, 0, before);
        encoder.acknowledge(0);
    }
    encoder
}

fn encode(encoder: &mut BlockEncoder, id: u64, first: u32, contents: &[u8]) -> bytes::Bytes {
    let blocks: Vec<u32> = (first..first + COUNT as u32).collect();
    encoder
        .encode_blocks(header(id), RAM, SIZE as u32, &blocks, contents, true)
        .expect("the batch is within its bounds")
        .bytes
}

fn codec(c: &mut Criterion) {
    let regions = [RegionInfo {
        id: RAM,
        kind: RegionKind::Memory,
        name: "ram".to_owned(),
        blocks: 2 * COUNT as u32,
        block_size: SIZE as u32,
    }];
    let limits = Limits { regions: &regions };
    for kind in kinds() {
        let mut group = c.benchmark_group("codec");
        group
            .throughput(Throughput::Bytes(BYTES as u64))
            .warm_up_time(Duration::from_millis(300))
            .measurement_time(Duration::from_millis(1200))
            .sample_size(20);
        group.bench_function(BenchmarkId::new("encode", kind.name), |b| {
            b.iter_batched_ref(
                || encoder(&kind),
                |encoder| encode(encoder, 1, kind.first, &kind.contents),
                BatchSize::LargeInput,
            );
        });
        let wire = encode(&mut encoder(&kind), 1, kind.first, &kind.contents);
        group.bench_function(BenchmarkId::new("wire-decode", kind.name), |b| {
            b.iter(|| decode_batch(black_box(&wire), &limits).expect("it was just encoded"));
        });
        let batch = decode_batch(&wire, &limits).expect("it was just encoded");
        let mut memory = vec![0; 2 * BYTES];
        if let Some(before) = &kind.before {
            memory[..BYTES].copy_from_slice(before);
        }
        let fresh = memory.clone();
        group.bench_function(BenchmarkId::new("apply", kind.name), |b| {
            b.iter_batched_ref(
                || Memory(fresh.clone()),
                |memory| batch.apply(memory),
                BatchSize::LargeInput,
            );
        });
        group.finish();
    }
}

fn messages(c: &mut Criterion) {
    let mut rng = SmallRng::seed_from_u64(3);
    let set: BlockSet = (0..200_000).map(|_| rng.next_u32() % 2_000_000).collect();
    let piece = split_set(&set).swap_remove(0);
    let message = Message::Missing {
        region: RAM,
        blocks: piece,
    };
    let bytes = encode_message(&message).expect("pieces of a set fit");
    let mut group = c.benchmark_group("message");
    group
        .throughput(Throughput::Bytes(bytes.len() as u64))
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1200))
        .sample_size(20);
    group.bench_function("decode a set of 200,000 blocks", |b| {
        b.iter(|| decode_message(black_box(&bytes)).expect("it was just encoded"));
    });
    group.finish();
}

criterion_group!(benches, codec, messages);
criterion_main!(benches);
