//! What a peer sends must not make a decoder allocate out of proportion. A test binary of its own,
//! because it counts every allocation of the process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use hybridmig_transport::Lane;
use hybridmig_transport::codec::{BatchHeader, BlockEncoder, EncoderConfig, Limits, decode_batch};
use hybridmig_transport::frame::{decode_message, encode_message};
use hybridmig_transport::message::{BlockSet, Message, RegionId, RegionInfo, RegionKind};
use rand::rngs::SmallRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting does not touch the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes live at once beyond what was before, while `work` ran.
fn peak_of(work: impl FnOnce()) -> usize {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    work();
    PEAK.load(Ordering::Relaxed) - before
}

/// A few bytes changed, often to what makes numbers large.
fn mutate(rng: &mut SmallRng, bytes: &mut [u8]) {
    for _ in 0..rng.random_range(1..5) {
        // Most often near the start, where the lengths are.
        let reach = if rng.random_bool(0.7) {
            48
        } else {
            bytes.len()
        };
        let at = rng.random_range(0..reach.min(bytes.len()));
        bytes[at] = *[0xff, 0x7f, 0x80, rng.random()]
            .get(rng.random_range(0..4))
            .unwrap();
    }
}

// One test, so that nothing else allocates beside it.
#[test]
fn decoders_allocate_in_proportion() {
    let mut rng = SmallRng::seed_from_u64(1);
    let set: BlockSet = (0..300_000).filter(|n| n % 7 < 3).collect();
    let messages = [
        Message::Fetch {
            region: RegionId(1),
            blocks: (0..500).collect(),
        },
        Message::Missing {
            region: RegionId(0),
            blocks: set,
        },
        Message::Applied {
            batches: vec![(0, 10), (12, 400)],
            rejected: vec![(RegionId(0), 5); 20],
        },
        Message::Cancel {
            reason: "because".repeat(20),
        },
        Message::Seeds {
            block_size: 65_536,
            names: (0..4096).map(|n| n << 48).collect(),
        },
    ];
    for message in &messages {
        let whole = encode_message(message).unwrap();
        for _ in 0..5000 {
            let mut bytes = whole.clone();
            mutate(&mut rng, &mut bytes);
            let len = bytes.len();
            let peak = peak_of(|| drop(decode_message(&bytes)));
            // A sequence reserves up to a MiB before its elements come; a set's directory up to
            // 65536 containers.
            assert!(
                peak < (8 << 20) + 8 * len,
                "{peak} bytes for {len} of {message:?}"
            );
        }
    }

    let regions = [RegionInfo {
        id: RegionId(0),
        kind: RegionKind::Memory,
        name: "ram".to_owned(),
        blocks: u32::MAX,
        block_size: 4096,
    }];
    let limits = Limits { regions: &regions };
    let mut contents = vec![0; 40 * 4096];
    rng.fill_bytes(&mut contents[..10 * 4096]);
    for (i, byte) in contents[20 * 4096..].iter_mut().enumerate() {
        *byte = (i % 11) as u8;
    }
    let header = BatchHeader {
        id: 1,
        pass: 1,
        lane: Lane::Bulk,
    };
    let blocks: Vec<u32> = (0..40).map(|n| n * 3).collect();
    let config = EncoderConfig {
        index_entries: 64,
        ..EncoderConfig::default()
    };
    let whole = BlockEncoder::new(config)
        .unwrap()
        .encode_blocks(header, RegionId(0), 4096, &blocks, &contents, true)
        .unwrap()
        .bytes;
    for _ in 0..20_000 {
        let mut bytes = whole.to_vec();
        mutate(&mut rng, &mut bytes);
        let peak = peak_of(|| drop(decode_batch(&bytes, &limits)));
        assert!(peak < 4 << 20, "{peak} bytes for {}", bytes.len());
    }
}
