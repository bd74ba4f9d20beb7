//! The block codec against a model of two hosts: whatever is encoded, lost, acknowledged late or
//! applied out of order, no block at the destination ever has contents that it did not have at the
//! source in the pass that is in place.

use std::collections::BTreeMap;

use bytes::Bytes;
use hybridmig_transport::Lane;
use hybridmig_transport::codec::{
    BatchHeader, BatchTarget, BlockEncoder, EncodeError, EncoderConfig, Limits, MAX_BATCH,
    MAX_BATCH_CONTENTS, WireError, decode_batch, seed_name,
};
use hybridmig_transport::message::{Features, RegionId, RegionInfo, RegionKind};
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{RngCore as _, SeedableRng as _};

const SIZE: usize = 4096;
const BLOCKS: u32 = 24;
const RAM: RegionId = RegionId(0);

fn regions() -> Vec<RegionInfo> {
    let memory = |id, name: &str, blocks| RegionInfo {
        id: RegionId(id),
        kind: RegionKind::Memory,
        name: name.to_owned(),
        blocks,
        block_size: SIZE as u32,
    };
    vec![memory(0, "ram", BLOCKS), memory(1, "video", 5)]
}

fn header(id: u64, pass: u32) -> BatchHeader {
    BatchHeader {
        id,
        pass,
        lane: Lane::Bulk,
    }
}

/// A destination that admits a block when its pass is not older than what is in place.
#[derive(Clone, Default)]
struct Target {
    blocks: BTreeMap<(RegionId, u32), (u32, Vec<u8>)>,
    state: BTreeMap<u64, Vec<u8>>,
    rejected: Vec<(RegionId, u32)>,
    pass: u32,
    /// Contents in files of its own, by the names that the source was told.
    seeds: BTreeMap<u64, Vec<u8>>,
}

impl Target {
    fn contents(&self, region: RegionId, block: u32) -> Vec<u8> {
        self.blocks
            .get(&(region, block))
            .map_or_else(|| vec![0; SIZE], |(_, data)| data.clone())
    }
}

impl BatchTarget for Target {
    type Error = std::convert::Infallible;

    fn admit(&mut self, region: RegionId, block: u32, pass: u32) -> bool {
        self.pass = pass;
        self.blocks
            .get(&(region, block))
            .is_none_or(|(old, _)| pass >= *old)
    }

    fn read(&mut self, region: RegionId, block: u32, buf: &mut [u8]) -> Result<(), Self::Error> {
        buf.copy_from_slice(&self.contents(region, block));
        Ok(())
    }

    fn write(&mut self, region: RegionId, first: u32, data: &[u8]) -> Result<(), Self::Error> {
        for (block, contents) in (first..).zip(data.chunks_exact(SIZE)) {
            self.blocks
                .insert((region, block), (self.pass, contents.to_vec()));
        }
        Ok(())
    }

    fn zero(&mut self, region: RegionId, first: u32, count: u32) -> Result<(), Self::Error> {
        for block in first..first + count {
            self.blocks
                .insert((region, block), (self.pass, vec![0; SIZE]));
        }
        Ok(())
    }

    fn seed(&mut self, name: &[u8; 32], buf: &mut [u8]) -> bool {
        let seed = self.seeds.get(&seed_name(name));
        if let Some(data) = seed {
            buf.copy_from_slice(data);
        }
        seed.is_some()
    }

    fn state(&mut self, offset: u64, data: &[u8]) -> Result<(), Self::Error> {
        self.state.insert(offset, data.to_vec());
        Ok(())
    }

    fn reject(&mut self, region: RegionId, block: u32) {
        self.rejected.push((region, block));
    }
}

/// What a block holds.
#[derive(Clone, Debug)]
enum Contents {
    Zero,
    Noise(u64),
    /// One of a few, so that blocks repeat each other.
    Shared(u8),
    Text(u16),
    /// What it held before, with a few bytes changed.
    Touched(u16, u8),
    Same,
}

fn contents() -> impl Strategy<Value = Contents> {
    prop_oneof![
        Just(Contents::Zero),
        any::<u64>().prop_map(Contents::Noise),
        (0_u8..4).prop_map(Contents::Shared),
        any::<u16>().prop_map(Contents::Text),
        any::<(u16, u8)>().prop_map(|(at, byte)| Contents::Touched(at, byte)),
        Just(Contents::Same),
    ]
}

impl Contents {
    fn make(&self, before: &[u8]) -> Vec<u8> {
        let mut data = before.to_vec();
        match self {
            Self::Zero => data.fill(0),
            Self::Noise(seed) => SmallRng::seed_from_u64(*seed).fill_bytes(&mut data),
            Self::Shared(which) => {
                SmallRng::seed_from_u64(u64::from(*which)).fill_bytes(&mut data);
            }
            Self::Text(seed) => {
                for (i, byte) in data.iter_mut().enumerate() {
                    *byte = b"migration of guests "[(i * (1 + usize::from(*seed % 7))) % 20];
                }
                data[..2].copy_from_slice(&seed.to_le_bytes());
            }
            Self::Touched(at, byte) => data[usize::from(*at) % SIZE] ^= byte,
            Self::Same => {}
        }
        data
    }
}

/// What happens to a batch on its way.
#[derive(Clone, Debug)]
struct Fate {
    /// Applied only after this many other batches.
    delay: u8,
    /// Whether the source ever hears that it was applied.
    acknowledged: bool,
    may_refer: bool,
}

fn steps() -> impl Strategy<Value = Vec<(Vec<(u32, Contents)>, Fate)>> {
    let writes = proptest::collection::vec((0..BLOCKS, contents()), 1..12);
    let fate = (0_u8..4, any::<bool>(), prop::bool::weighted(0.8)).prop_map(
        |(delay, acknowledged, may_refer)| Fate {
            delay,
            acknowledged,
            may_refer,
        },
    );
    proptest::collection::vec((writes, fate), 1..25)
}

/// One of the contents that blocks share.
fn shared(which: u8) -> Vec<u8> {
    Contents::Shared(which).make(&[0; SIZE])
}

fn name_of(data: &[u8]) -> u64 {
    seed_name(blake3::hash(data).as_bytes())
}

/// Some of the shared contents as seeds; of those in `lies` the target has something else under the
/// name, or nothing, as if a file had been changed or the name were another content's.
fn with_seeds(encoder: &BlockEncoder, target: &mut Target, seeds: &[u8], lies: &[u8]) {
    let mut names = Vec::new();
    for which in seeds {
        let name = name_of(&shared(*which));
        names.push(name);
        match lies.iter().position(|lie| lie == which) {
            None => _ = target.seeds.insert(name, shared(*which)),
            Some(0) => _ = target.seeds.insert(name, shared(77)),
            Some(_) => {}
        }
    }
    names.sort_unstable();
    for name in names {
        encoder.seeds().learn(SIZE as u32, vec![name]).unwrap();
    }
}

fn encoder(config: EncoderConfig) -> BlockEncoder {
    BlockEncoder::new(config).unwrap()
}

fn small() -> EncoderConfig {
    EncoderConfig {
        delta_cache_bytes: 12 * SIZE,
        index_entries: 1024,
        ..EncoderConfig::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_byte_is_ever_wrong(
        steps in steps(),
        features in 0_u64..8,
        seeds in prop::sample::subsequence(vec![0_u8, 1, 2, 3], 0..=4),
        lies in prop::sample::subsequence(vec![0_u8, 1, 2, 3], 0..=2),
    ) {
        let regions = regions();
        let limits = Limits { regions: &regions };
        let mut encoder = encoder(EncoderConfig { features, ..small() });
        let mut source = vec![vec![0_u8; SIZE]; BLOCKS as usize];
        // Contents by pass and block, to hold what is at the destination against.
        let mut sent: BTreeMap<(u32, u32), Vec<u8>> = BTreeMap::new();
        let mut target = Target::default();
        if features & Features::SEEDS != 0 {
            with_seeds(&encoder, &mut target, &seeds, &lies);
        }
        let mut on_the_way: Vec<(u8, u64, Bytes, bool)> = Vec::new();
        let mut id = 0;
        let mut apply = |encoder: &mut BlockEncoder, id, bytes: &Bytes, acknowledged| {
            let batch = decode_batch(bytes, &limits).unwrap();
            assert_eq!(batch.header().id, id);
            target.rejected.clear();
            let stats = batch.apply(&mut target).unwrap();
            assert_eq!(stats.written + stats.skipped + stats.rejected, batch.blocks());
            for &(region, block) in &target.rejected {
                encoder.reject(region, block);
            }
            if acknowledged {
                encoder.acknowledge(id);
            }
            target.clone()
        };
        for (writes, fate) in steps {
            let pass = id as u32;
            let mut blocks = Vec::new();
            for (block, contents) in writes {
                let new = contents.make(&source[block as usize]);
                source[block as usize] = new;
                if !blocks.contains(&block) {
                    blocks.push(block);
                }
            }
            let plain: Vec<u8> = blocks.iter().flat_map(|b| source[*b as usize].clone()).collect();
            for block in &blocks {
                sent.insert((pass, *block), source[*block as usize].clone());
            }
            let batch = encoder
                .encode_blocks(header(id, pass), RAM, SIZE as u32, &blocks, &plain, fate.may_refer)
                .unwrap();
            prop_assert!(batch.bytes.len() <= MAX_BATCH);
            prop_assert_eq!(batch.stats.total().blocks, blocks.len() as u64);
            prop_assert_eq!(batch.stats.total().plain_bytes, plain.len() as u64);
            on_the_way.push((fate.delay, id, batch.bytes, fate.acknowledged));
            id += 1;
            on_the_way.sort_by_key(|(delay, id, ..)| (*delay, *id));
            while on_the_way.first().is_some_and(|(delay, ..)| *delay == 0) {
                let (_, id, bytes, acknowledged) = on_the_way.remove(0);
                let at = apply(&mut encoder, id, &bytes, acknowledged);
                for ((_, block), (pass, data)) in &at.blocks {
                    prop_assert_eq!(&sent[&(*pass, *block)], data, "block {} of pass {}", block, pass);
                }
            }
            for waiting in &mut on_the_way {
                waiting.0 -= 1;
            }
        }
        for (_, id, bytes, acknowledged) in on_the_way {
            apply(&mut encoder, id, &bytes, acknowledged);
        }
        // In the end, one more pass in full makes both sides equal.
        let all: Vec<u32> = (0..BLOCKS).collect();
        let plain = source.concat();
        let batch = encoder
            .encode_blocks(header(id, id as u32), RAM, SIZE as u32, &all, &plain, false)
            .unwrap();
        let mut at = apply(&mut encoder, id, &batch.bytes, true);
        id += 1;
        // A seed that is another than was told is found out once for each block.
        let told = features & Features::SEEDS != 0 && seeds.iter().any(|seed| lies.contains(seed));
        prop_assert!(at.rejected.is_empty() || told);
        if !at.rejected.is_empty() {
            let again: Vec<u32> = at.rejected.iter().map(|rejected| rejected.1).collect();
            let plain: Vec<u8> = again.iter().flat_map(|b| source[*b as usize].clone()).collect();
            let batch = encoder
                .encode_blocks(header(id, id as u32), RAM, SIZE as u32, &again, &plain, false)
                .unwrap();
            prop_assert_eq!(batch.stats.seeded.blocks, 0);
            at = apply(&mut encoder, id, &batch.bytes, true);
            id += 1;
            prop_assert!(at.rejected.is_empty());
        }
        for block in 0..BLOCKS {
            prop_assert_eq!(&at.contents(RAM, block), &source[block as usize]);
        }
        // And what was acknowledged is named or differs: nothing goes in full again.
        if features == Features::ALL {
            let batch = encoder
                .encode_blocks(header(id, id as u32), RAM, SIZE as u32, &all, &plain, true)
                .unwrap();
            let full = batch.stats.raw.blocks + batch.stats.zstd.blocks;
            // All but what the small index and cache of this test had to forget.
            prop_assert!(full <= 12, "{:?}", batch.stats);
            apply(&mut encoder, id, &batch.bytes, true);
        }
    }

    #[test]
    fn damaged_batches_are_errors(
        seed: u64,
        damage in proptest::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let regions = regions();
        let limits = Limits { regions: &regions };
        let whole = sample_batch(seed);
        prop_assert!(decode_batch(&whole, &limits).is_ok());
        let mut damaged = whole.to_vec();
        for (at, change) in damage {
            let at = at.index(damaged.len());
            damaged[at] ^= change;
        }
        if let Ok(batch) = decode_batch(&damaged, &limits) {
            // What still passes differs in its header, or in what the target checks itself.
            let _stats = batch.apply(&mut Target::default()).unwrap();
        }
        let cut = cut.index(whole.len());
        if let Ok(batch) = decode_batch(&whole[..cut], &limits) {
            // A cut between two records is a shorter batch.
            let _stats = batch.apply(&mut Target::default()).unwrap();
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let regions = regions();
        let limits = Limits { regions: &regions };
        let _result = decode_batch(&bytes, &limits);
        // Past the header, where it becomes interesting.
        bytes.splice(0..0, [1, 0, 0, 3]);
        let _result = decode_batch(&bytes, &limits);
    }

    #[test]
    fn a_flipped_bit_in_contents_is_found(seed: u64, at in any::<prop::sample::Index>(), bit in 0..8) {
        let regions = regions();
        let limits = Limits { regions: &regions };
        let mut noise = vec![0; 3 * SIZE];
        SmallRng::seed_from_u64(seed).fill_bytes(&mut noise);
        let batch = encoder(small())
            .encode_blocks(header(0, 0), RAM, SIZE as u32, &[4, 5, 9], &noise, false)
            .unwrap();
        let mut bytes = batch.bytes.to_vec();
        let start = bytes.len() - noise.len();
        bytes[start + at.index(noise.len())] ^= 1_u8 << bit;
        let place = "region 0, blocks 4-5 9".to_owned();
        prop_assert_eq!(decode_batch(&bytes, &limits), Err(WireError::Checksum { place }));
    }
}

/// A batch with a record of every codec for blocks.
fn sample_batch(seed: u64) -> Bytes {
    // Large enough that nothing is forgotten.
    let mut encoder = encoder(EncoderConfig {
        index_entries: 1 << 16,
        ..small()
    });
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut noise = vec![0; SIZE];
    rng.fill_bytes(&mut noise);
    let text = Contents::Text(seed as u16).make(&noise);
    let first = [&noise[..], &text].concat();
    encoder
        .encode_blocks(header(0, 0), RAM, SIZE as u32, &[0, 1], &first, true)
        .unwrap();
    encoder.acknowledge(0);
    let mut touched = text.clone();
    touched[77] ^= 1;
    let mut other = noise.clone();
    other[..SIZE / 2].reverse();
    let second = [&touched[..], &noise, &vec![0; SIZE], &text[..], &other].concat();
    let text_like = Contents::Text(!seed as u16).make(&noise);
    let seeded = shared(200);
    let name = name_of(&seeded);
    encoder.seeds().learn(SIZE as u32, vec![name]).unwrap();
    let second = [&second[..], &text_like, &seeded].concat();
    let batch = encoder
        .encode_blocks(
            header(1, 1),
            RAM,
            SIZE as u32,
            &[1, 2, 3, 4, 5, 6, 7],
            &second,
            true,
        )
        .unwrap();
    assert_eq!(batch.stats.xor_zstd.blocks, 1);
    assert_eq!(batch.stats.zero.blocks, 1);
    assert!(batch.stats.named.blocks >= 1);
    assert_eq!(batch.stats.raw.blocks, 1);
    assert!(batch.stats.zstd.blocks >= 1);
    assert_eq!(batch.stats.seeded.blocks, 1);
    batch.bytes
}

#[test]
fn each_kind_of_block_takes_its_form() {
    let mut encoder = encoder(EncoderConfig::default());
    let mut noise = vec![0; SIZE];
    SmallRng::seed_from_u64(1).fill_bytes(&mut noise);
    let zeroes = vec![0; 64 * SIZE];
    let blocks: Vec<u32> = (0..64).collect();
    let batch = encoder
        .encode_blocks(header(0, 0), RAM, SIZE as u32, &blocks, &zeroes, true)
        .unwrap();
    assert!(batch.bytes.len() < 32, "zero blocks cost bits");
    let batch = encoder
        .encode_blocks(header(1, 0), RAM, SIZE as u32, &[3], &noise, true)
        .unwrap();
    assert_eq!(batch.stats.raw.blocks, 1);
    // Not acknowledged: a repetition goes in full.
    let batch = encoder
        .encode_blocks(header(2, 0), RAM, SIZE as u32, &[8], &noise, true)
        .unwrap();
    assert_eq!(batch.stats.raw.blocks, 1);
    encoder.acknowledge(1);
    encoder.acknowledge(2);
    let batch = encoder
        .encode_blocks(header(3, 0), RAM, SIZE as u32, &[9], &noise, true)
        .unwrap();
    assert_eq!(batch.stats.named.blocks, 1);
    assert!(batch.bytes.len() < 64);
    noise[100] ^= 0xff;
    let batch = encoder
        .encode_blocks(header(4, 0), RAM, SIZE as u32, &[8], &noise, true)
        .unwrap();
    assert_eq!(batch.stats.xor_zstd.blocks, 1);
    assert!(batch.bytes.len() < 100, "{}", batch.bytes.len());
    // In full where references are not wanted, and after a rejection.
    noise[200] ^= 0xff;
    encoder.acknowledge(4);
    let batch = encoder
        .encode_blocks(header(5, 0), RAM, SIZE as u32, &[8], &noise, false)
        .unwrap();
    assert_eq!(batch.stats.raw.blocks, 1);
    encoder.acknowledge(5);
    encoder.reject(RAM, 8);
    let batch = encoder
        .encode_blocks(header(6, 0), RAM, SIZE as u32, &[8], &noise, true)
        .unwrap();
    assert_eq!(batch.stats.raw.blocks, 1);
}

#[test]
fn what_the_destination_has_in_a_file_is_named_whatever_else_may_be_referred_to() {
    let regions = regions();
    let limits = Limits { regions: &regions };
    let mut target = Target::default();
    let mut encoder = encoder(small());
    with_seeds(&encoder, &mut target, &[0, 1, 2], &[1, 2]);
    let contents = [shared(0), shared(3), shared(1), shared(2), vec![0; SIZE]].concat();
    let batch = encoder
        .encode_blocks(
            header(0, 0),
            RAM,
            SIZE as u32,
            &[4, 5, 6, 7, 8],
            &contents,
            false,
        )
        .unwrap();
    assert_eq!(batch.stats.seeded.blocks, 3);
    assert_eq!(batch.stats.seeded.plain_bytes, 3 * SIZE as u64);
    assert!(batch.stats.seeded.wire_bytes < 3 * 32 + 24);
    assert_eq!(batch.stats.raw.blocks, 1);
    let decoded = decode_batch(&batch.bytes, &limits).unwrap();
    let stats = decoded.apply(&mut target).unwrap();
    assert_eq!(stats.written, 3);
    // Another content under the name, and none.
    assert_eq!(target.rejected, [(RAM, 6), (RAM, 7)]);
    assert!(target.blocks[&(RAM, 4)].1 == shared(0));
    assert!(!target.blocks.contains_key(&(RAM, 6)));
    for (region, block) in std::mem::take(&mut target.rejected) {
        encoder.reject(region, block);
    }
    // They go in full from now on, as often as they are sent.
    for id in 1..3 {
        let batch = encoder
            .encode_blocks(
                header(id, id as u32),
                RAM,
                SIZE as u32,
                &[4, 5, 6, 7, 8],
                &contents,
                false,
            )
            .unwrap();
        assert_eq!(batch.stats.seeded.blocks, 1);
        assert_eq!(batch.stats.raw.blocks, 3);
        let decoded = decode_batch(&batch.bytes, &limits).unwrap();
        assert_eq!(decoded.apply(&mut target).unwrap().written, 5);
    }
    assert!(target.blocks[&(RAM, 7)].1 == shared(2));
    // Names of another length say nothing of these blocks.
    let mut other = BlockEncoder::new(small()).unwrap();
    let name = name_of(&shared(0));
    other.seeds().learn(512, vec![name]).unwrap();
    let batch = other
        .encode_blocks(header(0, 0), RAM, SIZE as u32, &[4], &shared(0), true)
        .unwrap();
    assert_eq!(batch.stats.raw.blocks, 1);
}

#[test]
fn a_base_or_origin_that_differs_is_rejected_and_nothing_written() {
    let regions = regions();
    let limits = Limits { regions: &regions };
    let bytes = sample_batch(3);
    let batch = decode_batch(&bytes, &limits).unwrap();
    let mut target = Target::default();
    let stats = batch.apply(&mut target).unwrap();
    // An empty destination has neither the base of block 1 nor what blocks 2, 4 and 7 name.
    assert_eq!(target.rejected.len() as u64, stats.rejected);
    for block in [1, 2, 7] {
        assert!(target.rejected.contains(&(RAM, block)));
        assert!(!target.blocks.contains_key(&(RAM, block)));
    }
}

#[test]
fn device_state_survives() {
    let regions = regions();
    let limits = Limits { regions: &regions };
    let mut state = vec![0; 200_000];
    SmallRng::seed_from_u64(9).fill_bytes(&mut state[..100_000]);
    let mut encoder = encoder(small());
    let mut target = Target::default();
    for (id, (offset, piece)) in [(0, &state[..150_000]), (150_000, &state[150_000..])]
        .into_iter()
        .enumerate()
    {
        let batch = encoder
            .encode_state(header(id as u64, 0), offset, piece)
            .unwrap();
        let decoded = decode_batch(&batch.bytes, &limits).unwrap();
        assert_eq!(
            decoded.apply(&mut target).unwrap().state_bytes,
            piece.len() as u64
        );
    }
    let joined: Vec<u8> = target.state.into_values().flatten().collect();
    assert_eq!(joined, state);
}

#[test]
fn the_largest_batches_fit_whatever_they_hold() {
    let regions = [RegionInfo {
        id: RAM,
        kind: RegionKind::Disk,
        name: "disk".to_owned(),
        blocks: u32::MAX,
        block_size: 512,
    }];
    let limits = Limits { regions: &regions };
    let count = MAX_BATCH_CONTENTS / 512;
    let blocks: Vec<u32> = (0..count as u32).map(|n| n * 5_000_000).collect();
    let mut contents = vec![0; MAX_BATCH_CONTENTS];
    SmallRng::seed_from_u64(4).fill_bytes(&mut contents);
    let mut encoder = encoder(EncoderConfig::default());
    for (id, change) in [(0, 0), (1, 0), (2, 1)] {
        for block in contents.chunks_exact_mut(512) {
            block[7] ^= change;
        }
        let batch = encoder
            .encode_blocks(header(id, 0), RAM, 512, &blocks, &contents, true)
            .unwrap();
        assert!(batch.bytes.len() <= MAX_BATCH);
        assert_eq!(
            decode_batch(&batch.bytes, &limits).unwrap().blocks(),
            count as u64
        );
        encoder.acknowledge(id);
    }
    contents.push(0);
    let too_long = encoder.encode_blocks(header(3, 0), RAM, 512, &blocks, &contents, true);
    assert!(matches!(too_long, Err(EncodeError::Length { .. })));
    let mut longer = blocks.clone();
    longer.push(u32::MAX - 1);
    contents.resize(longer.len() * 512, 1);
    let too_long = encoder.encode_blocks(header(3, 0), RAM, 512, &longer, &contents, true);
    assert!(matches!(too_long, Err(EncodeError::TooLarge(..))));
}

/// Batches written by hand, as a peer could that means harm.
mod by_hand {
    use super::*;

    fn decode(bytes: &[u8]) -> Result<(), WireError> {
        let regions = regions();
        decode_batch(bytes, &Limits { regions: &regions }).map(|_| ())
    }

    #[test]
    fn what_lies_outside_the_offer_is_refused() {
        assert_eq!(decode(&[]), Err(WireError::Truncated));
        assert_eq!(decode(&[9, 0, 0, 3]), Err(WireError::Format(9)));
        assert_eq!(decode(&[1, 0, 0, 0]), Err(WireError::Lane(0)));
        assert_eq!(decode(&[1, 0, 0, 3, 77]), Err(WireError::Codec(77)));
        assert_eq!(decode(&[1, 0, 0, 3, 0, 2]), Err(WireError::Region(2)));
        // Blocks 20 to 29 of 24.
        let outside = decode(&[1, 0, 0, 3, 0, 0, 1, 20, 10]);
        assert!(
            matches!(outside, Err(WireError::Bounds { .. })),
            "{outside:?}"
        );
        let empty_run = decode(&[1, 0, 0, 3, 0, 0, 1, 20, 0]);
        assert!(
            matches!(empty_run, Err(WireError::Bounds { .. })),
            "{empty_run:?}"
        );
        // A count of runs that would take gigabytes.
        let lie = decode(&[1, 0, 0, 3, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x0f, 1, 1]);
        assert_eq!(lie, Err(WireError::Truncated));
        let wrapping = [
            &[1, 0, 0, 3, 0, 0, 2, 1, 1][..],
            &[0xff; 9],
            &[1, 0xff, 0xff, 0xff],
        ]
        .concat();
        assert!(decode(&wrapping).is_err());
        assert_eq!(
            decode(&vec![1; MAX_BATCH + 1]),
            Err(WireError::TooLarge(MAX_BATCH + 1))
        );
    }

    #[test]
    fn a_frame_that_decodes_to_more_or_less_than_its_blocks_is_refused() {
        for (len, blocks) in [(50_000_000, 1_u8), (SIZE, 2), (3 * SIZE, 2)] {
            let frame = zstd::bulk::compress(&vec![0; len], 3).unwrap();
            let mut bytes = vec![1, 0, 0, 3, 2, 0, 1, 0, blocks];
            bytes.extend_from_slice(&[0; 8]);
            let mut rest = frame.len();
            while rest >= 0x80 {
                bytes.push(rest as u8 | 0x80);
                rest >>= 7;
            }
            bytes.push(rest as u8);
            bytes.extend_from_slice(&frame);
            let result = decode(&bytes);
            assert!(
                matches!(
                    result,
                    Err(WireError::Zstd { .. } | WireError::Length { .. })
                ),
                "{result:?}"
            );
        }
    }

    /// A record that names `blocks` blocks of region 0 by seeds, with this payload and its checksum.
    fn seeded(blocks: u8, payload: &[u8]) -> Vec<u8> {
        let place = [6, 0, 1, 0, blocks];
        let sum = xxhash_rust::xxh3::xxh3_64_with_seed(payload, xxhash_rust::xxh3::xxh3_64(&place));
        let mut bytes = [&[1, 0, 0, 3][..], &place, &sum.to_le_bytes()].concat();
        let mut rest = payload.len();
        while rest >= 0x80 {
            bytes.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        bytes.push(rest as u8);
        [&bytes[..], payload].concat()
    }

    #[test]
    fn names_of_seeds_that_nobody_told_are_rejected_and_bad_ones_refused() {
        let regions = regions();
        let limits = Limits { regions: &regions };
        let batch = decode_batch(&seeded(2, &[9; 64]), &limits).unwrap();
        assert_eq!(batch.blocks(), 2);
        let mut target = Target::default();
        let stats = batch.apply(&mut target).unwrap();
        assert_eq!((stats.written, stats.rejected), (0, 2));
        assert!(target.blocks.is_empty());
        for (blocks, len) in [(2, 63), (2, 65), (1, 0), (1, 64), (24, 32)] {
            let result = decode(&seeded(blocks, &vec![9; len]));
            assert!(
                matches!(result, Err(WireError::Length { .. })),
                "{blocks} {len}: {result:?}"
            );
        }
        let mut damaged = seeded(2, &[9; 64]);
        *damaged.last_mut().unwrap() ^= 1;
        assert!(matches!(decode(&damaged), Err(WireError::Checksum { .. })));
        // A batch of names alone must not make the receiver read gigabytes.
        let disk = [RegionInfo {
            id: RAM,
            kind: RegionKind::Disk,
            name: "disk".to_owned(),
            blocks: 1000,
            block_size: 65_536,
        }];
        let limits = Limits { regions: &disk };
        let most = (MAX_BATCH_CONTENTS / 65_536) as u8;
        let names = |blocks: u8| vec![9; usize::from(blocks) * 32];
        assert!(decode_batch(&seeded(most, &names(most)), &limits).is_ok());
        let more = decode_batch(&seeded(most + 1, &names(most + 1)), &limits);
        assert_eq!(more, Err(WireError::Contents));
    }

    #[test]
    fn the_same_block_twice_is_refused() {
        let regions = regions();
        let limits = Limits { regions: &regions };
        let zero = |blocks: &[u32]| {
            encoder(small())
                .encode_blocks(
                    header(0, 0),
                    RAM,
                    SIZE as u32,
                    blocks,
                    &vec![0; blocks.len() * SIZE],
                    false,
                )
                .unwrap()
                .bytes
        };
        let twice = [&zero(&[3, 4])[..], &zero(&[4, 5])[4..]].concat();
        assert_eq!(decode_batch(&twice, &limits), Err(WireError::Twice(RAM)));
        let apart = [&zero(&[3, 4])[..], &zero(&[5])[4..]].concat();
        assert_eq!(decode_batch(&apart, &limits).unwrap().blocks(), 3);
    }
}
