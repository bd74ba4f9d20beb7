//! How fast one core encodes, decodes and applies batches, per kind of block. Throughput counts the
//! plain contents of the blocks.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hybridmig_bench::micro::{
    BATCH_BLOCKS, BLOCK, Memory, RAM, encode, group, noise, ram, text, touched,
};
use hybridmig_transport::codec::{BlockEncoder, EncoderConfig, Limits, decode_batch};
use hybridmig_transport::frame::{decode_message, encode_message, split_set};
use hybridmig_transport::message::{BlockSet, Message};
use rand::rngs::SmallRng;
use rand::{RngCore as _, SeedableRng as _};

const BYTES: usize = BATCH_BLOCKS * BLOCK;

/// One kind of batch: what the destination must have before, and what is sent then.
struct Kind {
    name: &'static str,
    before: Option<Vec<u8>>,
    /// First block of what is sent; `before` lies at block 0.
    first: u32,
    contents: Vec<u8>,
}

fn kinds() -> Vec<Kind> {
    let noise = noise(1, BYTES);
    let kind = |name, before, first, contents| Kind {
        name,
        before,
        first,
        contents,
    };
    vec![
        kind("zero", None, 0, vec![0; BYTES]),
        kind("random", None, 0, noise.clone()),
        kind("text", None, 0, text(2, BYTES)),
        kind(
            "duplicate",
            Some(noise.clone()),
            BATCH_BLOCKS as u32,
            noise.clone(),
        ),
        kind("small-change", Some(noise.clone()), 0, touched(&noise)),
    ]
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
        encode(&mut encoder, 0, &blocks_from(0), before);
        encoder.acknowledge(0);
    }
    encoder
}

fn blocks_from(first: u32) -> Vec<u32> {
    (first..first + BATCH_BLOCKS as u32).collect()
}

fn codec(c: &mut Criterion) {
    let regions = [ram(2 * BATCH_BLOCKS as u32)];
    let limits = Limits { regions: &regions };
    let mut group = group(c, "codec");
    group.throughput(Throughput::Bytes(BYTES as u64));
    for kind in kinds() {
        let blocks = blocks_from(kind.first);
        group.bench_function(BenchmarkId::new("encode", kind.name), |b| {
            b.iter_batched_ref(
                || encoder(&kind),
                |encoder| encode(encoder, 1, &blocks, &kind.contents),
                BatchSize::LargeInput,
            );
        });
        let wire = encode(&mut encoder(&kind), 1, &blocks, &kind.contents);
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
    }
    group.finish();
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
    let mut group = group(c, "message");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("decode-set-of-200000-blocks", |b| {
        b.iter(|| decode_message(black_box(&bytes)).expect("it was just encoded"));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().without_plots();
    targets = codec, messages
}
criterion_main!(benches);
