//! What the benchmarks share: contents of blocks, batches of them, a destination in plain memory,
//! how long is measured. No measurement stands here: those are in `benches/`, one file per piece.
//! The figures of a run are in `docs/bench/micro.md`.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode};
use hybridmig_pager::{FaultAnswer, FaultSink, PagerError};
use hybridmig_transport::Lane;
use hybridmig_transport::codec::{BatchHeader, BatchTarget, BlockEncoder};
use hybridmig_transport::message::{RegionId, RegionInfo, RegionKind};
use rand::rngs::SmallRng;
use rand::{RngCore as _, SeedableRng as _};
use rustix::time::{ClockId, clock_gettime};

/// Size of a block of memory, in bytes.
pub const BLOCK: usize = 4096;
/// Blocks of a full batch as the benchmarks make them: 256 KiB of contents.
pub const BATCH_BLOCKS: usize = 64;
/// The one region of the benchmarks.
pub const RAM: RegionId = RegionId(0);

/// A group whose benchmarks take about three seconds each, or ten rounds if that is longer.
pub fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group
        .sample_size(10)
        .sampling_mode(SamplingMode::Flat)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    group
}

/// Time that this thread has spent on a core, in the kernel too: what "on one core" means on a
/// machine that has other work.
pub fn thread_time() -> Duration {
    cpu_time(ClockId::ThreadCPUTime)
}

/// Time that the threads of this process have spent on cores, in the kernel too.
pub fn process_time() -> Duration {
    cpu_time(ClockId::ProcessCPUTime)
}

fn cpu_time(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Bytes without any pattern: no codec makes them smaller.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut noise = vec![0; len];
    SmallRng::seed_from_u64(seed).fill_bytes(&mut noise);
    noise
}

/// Bytes that zstd makes several times smaller: words in random order.
pub fn text(seed: u64, len: usize) -> Vec<u8> {
    let words = [
        "guest ",
        "memory ",
        "page ",
        "migrates ",
        "slowly ",
        "0x7fff ",
        "\n",
    ];
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut text = Vec::with_capacity(len + 16);
    while text.len() < len {
        text.extend_from_slice(words[rng.next_u32() as usize % words.len()].as_bytes());
    }
    text.truncate(len);
    text
}

/// The same blocks after a small write to each: 32 bytes have changed.
pub fn touched(contents: &[u8]) -> Vec<u8> {
    let mut touched = contents.to_vec();
    for block in touched.chunks_exact_mut(BLOCK) {
        block[1000..1032].fill(7);
    }
    touched
}

/// What a source offers whose guest has that many blocks.
pub fn ram(blocks: u32) -> RegionInfo {
    RegionInfo {
        id: RAM,
        kind: RegionKind::Memory,
        name: "ram".to_owned(),
        blocks,
        block_size: BLOCK as u32,
    }
}

/// Encodes `blocks` of [`RAM`] as bulk batch `id`, with references where the encoder finds any.
///
/// # Panics
/// If `contents` is not as long as the blocks, or more than a batch can hold.
pub fn encode(encoder: &mut BlockEncoder, id: u64, blocks: &[u32], contents: &[u8]) -> Bytes {
    let header = BatchHeader {
        id,
        pass: id as u32,
        lane: Lane::Bulk,
    };
    encoder
        .encode_blocks(header, RAM, BLOCK as u32, blocks, contents, true)
        .expect("the batch is within its bounds")
        .bytes
}

/// A destination in plain memory that wants everything.
pub struct Memory(pub Vec<u8>);

impl BatchTarget for Memory {
    type Error = Infallible;

    fn admit(&mut self, _: RegionId, _: u32, _: u32) -> bool {
        true
    }

    fn read(&mut self, _: RegionId, block: u32, buf: &mut [u8]) -> Result<(), Infallible> {
        buf.copy_from_slice(&self.0[block as usize * BLOCK..][..BLOCK]);
        Ok(())
    }

    fn write(&mut self, _: RegionId, first: u32, data: &[u8]) -> Result<(), Infallible> {
        self.0[first as usize * BLOCK..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero(&mut self, _: RegionId, first: u32, count: u32) -> Result<(), Infallible> {
        self.0[first as usize * BLOCK..][..count as usize * BLOCK].fill(0);
        Ok(())
    }

    fn state(&mut self, _: u64, _: &[u8]) -> Result<(), Infallible> {
        Ok(())
    }

    fn reject(&mut self, _: RegionId, block: u32) {
        panic!("block {block} was rejected");
    }
}

/// Takes faults and does nothing about them.
pub struct Nobody;

impl FaultSink for Nobody {
    fn fault(&self, _region: u16, _block: u32) -> FaultAnswer {
        FaultAnswer::Requested
    }

    fn removed(&self, _region: u16, _first: u32, _count: u32) {}

    fn failed(&self, error: PagerError) {
        panic!("{error}");
    }
}
