//! Random operations against a model that knows every byte, over kills and losses of power.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use roaring::RoaringBitmap;

use super::{Notes, options};
use crate::disk::guest::{Edge, Zero};
use crate::disk::header::{BootId, boot_id};
use crate::disk::image::DiskImage;
use crate::disk::pending::Resume;

const GRANULE: usize = 4096;
const BLOCK: usize = 4 * GRANULE;
/// Blocks enough to cross a word of the map, and an end that is nobody's multiple.
const BYTES: usize = 20 * BLOCK + GRANULE + 700;
const BLOCKS: usize = BYTES.div_ceil(BLOCK);

#[derive(Clone, Debug)]
enum Step {
    Write { at: usize, len: usize },
    Zero { at: usize, len: usize, how: Zero },
    Read { at: usize, len: usize },
    Place { first: usize, count: usize },
    Status { at: usize, len: usize },
    Flush,
    Kill,
    PowerLoss { seed: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Lengths around a granule and of several blocks.
    let range = || {
        (0..BYTES, prop_oneof![1..2 * GRANULE, 1..6 * BLOCK], 0..4_u8).prop_map(
            |(at, len, round)| {
                // Half of the ranges begin and end where granules do.
                let (at, len) = if round < 2 {
                    (at / GRANULE * GRANULE, len.next_multiple_of(GRANULE))
                } else {
                    (at, len)
                };
                (at, len.min(BYTES - at))
            },
        )
    };
    let how = prop_oneof![
        Just(Zero::Trim),
        Just(Zero::Hole),
        Just(Zero::Allocated),
        Just(Zero::AllocatedFast)
    ];
    let step = prop_oneof![
        6 => range().prop_map(|(at, len)| Step::Write { at, len }),
        2 => (range(), how).prop_map(|((at, len), how)| Step::Zero { at, len, how }),
        4 => range().prop_map(|(at, len)| Step::Read { at, len }),
        4 => (0..BLOCKS, 1..4_usize).prop_map(|(first, count)| Step::Place {
            first,
            count: count.min(BLOCKS - first),
        }),
        1 => range().prop_map(|(at, len)| Step::Status { at, len }),
        2 => Just(Step::Flush),
        1 => Just(Step::Kill),
        1 => any::<u64>().prop_map(|seed| Step::PowerLoss { seed }),
    ];
    proptest::collection::vec(step, 1..40)
}

/// What goes on when missing blocks are here.
enum Then {
    Merge(Edge),
    Read { at: usize, len: usize },
}

struct Later {
    then: Then,
    ready: Arc<Mutex<Vec<Arc<Later>>>>,
    dead: AtomicBool,
}

impl Resume for Later {
    fn resume(self: Arc<Self>) {
        let ready = Arc::clone(&self.ready);
        ready.lock().unwrap().push(self);
    }

    fn abandoned(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }
}

/// The contents of a disk and what of it is here.
#[derive(Clone)]
struct State {
    bytes: Vec<u8>,
    here: Vec<bool>,
}

struct Model {
    source: Vec<u8>,
    now: State,
    /// At the last flush.
    durable: State,
    asked: BTreeSet<u32>,
    waits: usize,
}

struct Run {
    disk: Arc<DiskImage>,
    map: PathBuf,
    image: PathBuf,
    model: Model,
    notes: Arc<Notes>,
    ready: Arc<Mutex<Vec<Arc<Later>>>>,
    boot: BootId,
    stamp: u8,
    /// Blocks that this step asks for.
    expected: Vec<u32>,
}

fn granules(at: usize, len: usize) -> std::ops::Range<usize> {
    at / GRANULE..(at + len).div_ceil(GRANULE)
}

fn granules_of(block: usize) -> std::ops::Range<usize> {
    block * 4..(block * 4 + 4).min(BYTES.div_ceil(GRANULE))
}

fn bytes_of(granule: usize) -> std::ops::Range<usize> {
    granule * GRANULE..((granule + 1) * GRANULE).min(BYTES)
}

impl Run {
    fn new(dir: &std::path::Path, missing: &BTreeSet<u32>) -> Self {
        let options = options(dir, BYTES as u64, BLOCK as u32);
        let disk = DiskImage::create(&options).unwrap();
        // Blocks with a number of their own in every byte; every fifth is zero.
        let source: Vec<u8> = (0..BYTES)
            .map(|at| {
                let block = at / BLOCK;
                if block.is_multiple_of(5) {
                    0
                } else {
                    100 + block as u8
                }
            })
            .collect();
        for block in 0..BLOCKS {
            // What is missing was written with something older.
            let mut data = vec![0; BLOCK];
            let len = BLOCK.min(BYTES - block * BLOCK);
            if missing.contains(&(block as u32)) {
                data.fill(99);
            } else {
                data[..len].copy_from_slice(&source[block * BLOCK..][..len]);
            }
            disk.write(block as u32, &data).unwrap();
        }
        let notes = Arc::new(Notes {
            zero: [10].into(),
            ..Notes::default()
        });
        let set: RoaringBitmap = missing.iter().copied().collect();
        disk.arm(&set, notes.clone()).unwrap();
        // From the first flush on a loss of power is survived.
        disk.flush().unwrap();
        let mut here = vec![true; BYTES.div_ceil(GRANULE)];
        for block in missing {
            here[granules_of(*block as usize)].fill(false);
        }
        let now = State {
            bytes: source.clone(),
            here,
        };
        Self {
            disk,
            map: options.map,
            image: options.image,
            model: Model {
                source,
                durable: now.clone(),
                now,
                asked: BTreeSet::new(),
                waits: 0,
            },
            notes,
            ready: Arc::default(),
            boot: boot_id().unwrap(),
            stamp: 0,
            expected: Vec::new(),
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write { at, len } => {
                self.stamp = self.stamp % 98 + 1;
                let data = vec![self.stamp; len];
                let mut edges = Vec::new();
                self.disk.guest_write(at as u64, &data, &mut edges).unwrap();
                self.changed(at, len, self.stamp, &edges, true);
                self.wait(edges);
            }
            Step::Zero { at, len, how } => {
                let mut edges = Vec::new();
                let range = at as u64..(at + len) as u64;
                match self.disk.guest_zero(&range, how, &mut edges) {
                    Err(error)
                        if how == Zero::AllocatedFast
                            && error.kind() == std::io::ErrorKind::Unsupported =>
                    {
                        // Nothing was done where the file system is slow at it.
                        return;
                    }
                    other => other.unwrap(),
                }
                self.changed(at, len, 0, &edges, how != Zero::Trim);
                self.wait(edges);
            }
            Step::Read { at, len } => {
                let range = at as u64..(at + len) as u64;
                let here = granules(at, len).all(|granule| self.model.now.here[granule]);
                assert_eq!(self.disk.is_here(&range), here);
                if here {
                    self.check(at, len);
                } else {
                    self.expect_asked(at, len);
                    self.disk
                        .wait_for(&[range], self.later(Then::Read { at, len }));
                    self.model.waits += 1;
                }
            }
            Step::Place { first, count } => self.place(first, count),
            Step::Status { at, len } => self.status(at, len),
            Step::Flush => {
                self.disk.flush().unwrap();
                self.model.durable = self.model.now.clone();
            }
            Step::Kill => self.adopt(),
            Step::PowerLoss { seed } => self.lose_power(seed),
        }
        self.settle();
    }

    /// The guest has put `value` into a range, except for edges that wait.
    fn changed(&mut self, at: usize, len: usize, value: u8, edges: &[Edge], all: bool) {
        let before = self.model.now.here.clone();
        let now = &mut self.model.now;
        for granule in granules(at, len) {
            let bytes = bytes_of(granule);
            let part = bytes.start.max(at)..bytes.end.min(at + len);
            let whole = part == bytes;
            if whole || now.here[granule] {
                now.bytes[part].fill(value);
                now.here[granule] = true;
            } else if all {
                let edge = Edge {
                    offset: part.start as u64,
                    data: vec![value; part.len()],
                };
                assert!(edges.contains(&edge), "{edge:?} does not wait: {edges:?}");
            }
        }
        if !all {
            assert!(edges.is_empty(), "a trim never waits");
        }
        let complete = |here: &[bool], block| granules_of(block).all(|granule| here[granule]);
        let removed: Vec<u32> = (0..BLOCKS)
            .filter(|&block| !complete(&before, block) && complete(&now.here, block))
            .map(|block| block as u32)
            .collect();
        for block in &removed {
            self.model.asked.remove(block);
        }
        let told = std::mem::take(&mut *self.notes.removed.lock().unwrap());
        assert_eq!(told, removed, "blocks that the guest has overwritten");
    }

    fn wait(&mut self, edges: Vec<Edge>) {
        for edge in edges {
            let bytes = edge.bytes();
            self.expect_asked(bytes.start as usize, edge.data.len());
            self.disk.wait_for(&[bytes], self.later(Then::Merge(edge)));
            self.model.waits += 1;
        }
    }

    fn later(&self, then: Then) -> Arc<Later> {
        Arc::new(Later {
            then,
            ready: Arc::clone(&self.ready),
            dead: AtomicBool::new(false),
        })
    }

    /// These blocks are about to be asked for, those that have been are not.
    fn expect_asked(&mut self, at: usize, len: usize) {
        for granule in granules(at, len) {
            let block = (granule / 4) as u32;
            if !self.model.now.here[granule] && self.model.asked.insert(block) {
                self.expected.push(block);
            }
        }
    }

    fn place(&mut self, first: usize, count: usize) {
        let mut data = vec![0; count * BLOCK];
        let start = first * BLOCK;
        let len = data.len().min(BYTES - start);
        data[..len].copy_from_slice(&self.model.source[start..start + len]);
        // What lies beyond the end of the disk must not get anywhere.
        data[len..].fill(77);
        if data[..len].iter().all(|byte| *byte == 0) {
            self.disk.place_zero(first as u32, count as u32).unwrap();
        } else {
            self.disk.place(first as u32, &data).unwrap();
        }
        self.arrived(first, count);
    }

    fn arrived(&mut self, first: usize, count: usize) {
        for block in first..first + count {
            for granule in granules_of(block) {
                self.model.now.here[granule] = true;
            }
            self.model.asked.remove(&(block as u32));
        }
    }

    fn status(&self, at: usize, len: usize) {
        let range = at as u64..(at + len) as u64;
        let extents = self.disk.extents(&range, 1000).unwrap();
        let mut at = at;
        for extent in &extents {
            let end = at + extent.bytes as usize;
            if extent.hole {
                assert!(self.model.now.bytes[at..end].iter().all(|byte| *byte == 0));
                assert!(granules(at, end - at).all(|granule| self.model.now.here[granule]));
            }
            at = end;
        }
        assert_eq!(at as u64, range.end);
    }

    /// Another process takes over from the files.
    fn adopt(&mut self) {
        // Waits die with the process: their requests were never answered.
        self.model.asked.clear();
        self.model.waits = 0;
        self.ready = Arc::default();
        let map = self.map.clone();
        let empty = tempfile::tempdir().unwrap();
        // The locks go with the process, and so before its files are taken over.
        let spare = options(empty.path(), 4096, 4096);
        self.disk = DiskImage::create(&spare).unwrap();
        self.disk = DiskImage::adopt_after(&map, self.notes.clone(), self.boot).unwrap();
    }

    /// The worst that a loss of power can do: of what was not flushed, any granule may have got to
    /// the medium or not; the file of the map has everything, but belongs to another boot.
    fn lose_power(&mut self, mut seed: u64) {
        self.boot[0] = self.boot[0].wrapping_add(1);
        let image = File::options().write(true).open(&self.image).unwrap();
        let mut now = self.model.durable.clone();
        for granule in 0..now.here.len() {
            let bytes = bytes_of(granule);
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            if seed >> 63 == 1 {
                if now.here[granule] {
                    now.bytes[bytes.clone()].copy_from_slice(&self.model.now.bytes[bytes]);
                }
            } else {
                image
                    .write_all_at(&now.bytes[bytes.clone()], bytes.start as u64)
                    .unwrap();
            }
            if !now.here[granule] {
                let bytes = bytes_of(granule);
                now.bytes[bytes.clone()].copy_from_slice(&self.model.source[bytes]);
            }
        }
        self.model.now = now;
        self.adopt();
        // What a half-written medium holds now is what the next loss starts from.
        self.model.durable = self.model.now.clone();
    }

    /// Does what can go on, and compares.
    fn settle(&mut self) {
        let told = std::mem::take(&mut *self.notes.asked.lock().unwrap());
        assert_eq!(told, std::mem::take(&mut self.expected), "blocks asked for");
        for block in &told {
            if self.notes.zero.contains(block) {
                self.arrived(*block as usize, 1);
            }
        }
        let ready = std::mem::take(&mut *self.ready.lock().unwrap());
        for later in ready {
            self.model.waits -= 1;
            match &later.then {
                Then::Merge(edge) => {
                    self.disk.guest_merge(edge).unwrap();
                    let at = edge.offset as usize;
                    self.model.now.bytes[at..at + edge.data.len()].copy_from_slice(&edge.data);
                }
                Then::Read { at, len } => self.check(*at, *len),
            }
        }
        assert_eq!(self.disk.stats().waiting, self.model.waits as u64);
        let missing: RoaringBitmap = (0..BLOCKS)
            .filter(|&block| granules_of(block).any(|granule| !self.model.now.here[granule]))
            .map(|block| block as u32)
            .collect();
        assert_eq!(self.disk.missing(), missing);
        let here = &self.model.now.here;
        let granules = here.iter().filter(|here| !**here).count() as u64;
        assert_eq!(self.disk.missing_granules(), granules);
    }

    fn check(&self, at: usize, len: usize) {
        let mut buffer = vec![55; len];
        self.disk.guest_read(at as u64, &mut buffer).unwrap();
        assert!(
            buffer == self.model.now.bytes[at..at + len],
            "bytes {at}+{len}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn the_disk_is_what_the_model_says(
        missing in proptest::collection::btree_set(0..BLOCKS as u32, 0..BLOCKS),
        steps in steps(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut run = Run::new(dir.path(), &missing);
        for step in &steps {
            run.step(step);
        }
        run.place(0, BLOCKS);
        run.settle();
        assert_eq!(run.model.waits, 0, "everything has come, nobody waits");
        run.disk.finish().unwrap();
        let image = std::fs::read(&run.image).unwrap();
        prop_assert!(image == run.model.now.bytes);
    }
}
