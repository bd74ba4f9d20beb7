//! The guest, the network and a reader at once, on real threads: what only a race can break.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use super::options;
use crate::disk::image::DiskImage;
use crate::disk::pending::Resume;
use crate::{FaultAnswer, FaultSink, PagerError};

const GRANULE: usize = 4096;
const BLOCK: usize = 4 * GRANULE;
const BLOCKS: u32 = 300; // more than there are locks
const SOURCE: u8 = 1;
const ROUNDS: u8 = 3;

/// Sends what is asked for to the network.
struct Ask(Mutex<mpsc::Sender<u32>>);

impl FaultSink for Ask {
    fn fault(&self, _region: u16, block: u32) -> FaultAnswer {
        // Nobody listens once everything has been placed.
        let _ = self.0.lock().unwrap().send(block);
        FaultAnswer::Requested
    }

    fn removed(&self, _region: u16, _first: u32, _count: u32) {}

    fn failed(&self, error: PagerError) {
        panic!("the disk failed: {error}");
    }
}

/// A thread that waits for blocks.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Resume for Gate {
    fn resume(self: Arc<Self>) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn abandoned(&self) -> bool {
        false
    }
}

fn wait(disk: &DiskImage, bytes: std::ops::Range<u64>) {
    let gate = Arc::new(Gate::default());
    disk.wait_for(&[bytes], gate.clone());
    let open = gate.open.lock().unwrap();
    let (_open, timeout) = gate
        .opened
        .wait_timeout_while(open, Duration::from_secs(60), |open| !*open)
        .unwrap();
    assert!(!timeout.timed_out(), "a wait that nobody ends");
}

/// A writer owns every third granule and counts it up; a writer of parts owns the first half of the
/// next; a reader looks at all. Nothing goes back, and no granule is ever half of one and half of
/// the other, but for the halves.
#[test]
fn nothing_goes_back_while_blocks_arrive() {
    for seed in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let bytes = u64::from(BLOCKS) * BLOCK as u64;
        let disk = DiskImage::create(&options(dir.path(), bytes, BLOCK as u32)).unwrap();
        let (ask, asked) = mpsc::channel();
        disk.arm(&(0..BLOCKS).collect(), Arc::new(Ask(Mutex::new(ask))))
            .unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let disk = &*disk;
            let done = &done;
            let writers = [
                scope.spawn(move || whole_granules(disk, seed)),
                scope.spawn(move || parts_of_granules(disk, seed)),
            ];
            let reader = scope.spawn(move || read_all_the_time(disk, done));
            let network = scope.spawn(move || push_and_answer(disk, seed, &asked, done));
            let writers = writers.map(|writer| writer.join());
            // In any case, or the others would never end.
            done.store(true, Ordering::SeqCst);
            for ended in writers.into_iter().chain([reader.join(), network.join()]) {
                ended.unwrap();
            }
        });
        assert!(disk.missing().is_empty());
        let mut granule = [0; GRANULE];
        for index in 0..u64::from(BLOCKS) * 4 {
            disk.guest_read(index * GRANULE as u64, &mut granule)
                .unwrap();
            let (head, tail) = granule.split_at(GRANULE / 2);
            let (expected_head, expected_tail) = match index % 3 {
                0 => (10 + ROUNDS, 10 + ROUNDS),
                1 => (10 + ROUNDS, SOURCE),
                _ => (SOURCE, SOURCE),
            };
            assert!(head.iter().all(|byte| *byte == expected_head), "{index}");
            assert!(tail.iter().all(|byte| *byte == expected_tail), "{index}");
        }
        disk.finish().unwrap();
    }
}

fn whole_granules(disk: &DiskImage, seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    for round in 1..=ROUNDS {
        for _ in 0..2 {
            for index in (0..u64::from(BLOCKS) * 4).step_by(3) {
                if random.random_bool(0.5) {
                    write_whole(disk, index, 10 + round);
                }
            }
        }
        for index in (0..u64::from(BLOCKS) * 4).step_by(3) {
            write_whole(disk, index, 10 + round);
        }
    }
}

fn write_whole(disk: &DiskImage, index: u64, value: u8) {
    let mut edges = Vec::new();
    let offset = index * GRANULE as u64;
    disk.guest_write(offset, &[value; GRANULE], &mut edges)
        .unwrap();
    assert!(edges.is_empty(), "whole granules never wait");
    let mut now = [0; GRANULE];
    disk.guest_read(offset, &mut now).unwrap();
    assert!(
        now == [value; GRANULE],
        "a write that was answered is not there"
    );
}

fn parts_of_granules(disk: &DiskImage, seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed + 100);
    for round in 1..=ROUNDS {
        let mut granules: Vec<u64> = (1..u64::from(BLOCKS) * 4).step_by(3).collect();
        granules.shuffle(&mut random);
        for index in granules {
            let mut edges = Vec::new();
            let offset = index * GRANULE as u64;
            disk.guest_write(offset, &[10 + round; GRANULE / 2], &mut edges)
                .unwrap();
            for edge in edges {
                wait(disk, edge.bytes());
                disk.guest_merge(&edge).unwrap();
            }
        }
    }
}

fn read_all_the_time(disk: &DiskImage, done: &AtomicBool) {
    let mut random = SmallRng::seed_from_u64(7);
    let mut seen = vec![0; BLOCKS as usize * 4];
    let mut buffer = vec![0; 2 * BLOCK];
    while !done.load(Ordering::SeqCst) {
        let first = random.random_range(0..u64::from(BLOCKS) * 4 - 8);
        let bytes = first * GRANULE as u64..first * GRANULE as u64 + buffer.len() as u64;
        if !disk.is_here(&bytes) {
            wait(disk, bytes.clone());
        }
        disk.guest_read(bytes.start, &mut buffer).unwrap();
        for (index, granule) in (first..).zip(buffer.chunks(GRANULE)) {
            // The ends of a granule: the guest may be writing it just now, in this order.
            let (first, last) = (granule[0], granule[GRANULE - 1]);
            assert!(first != 0 && last != 0, "{index}: never written");
            let seen: &mut u8 = &mut seen[index as usize];
            match index % 3 {
                0 | 1 => assert!(first >= *seen, "{index}: {first} after {seen}"),
                _ => assert!(first == SOURCE && last == SOURCE, "{index}"),
            }
            *seen = first;
        }
    }
}

/// Pushes everything in some order, twice, and answers what is asked for in between.
fn push_and_answer(disk: &DiskImage, seed: u64, asked: &mpsc::Receiver<u32>, done: &AtomicBool) {
    let mut random = SmallRng::seed_from_u64(seed + 200);
    let data = vec![SOURCE; 3 * BLOCK];
    let mut pushes: Vec<u32> = (0..BLOCKS).chain(0..BLOCKS).collect();
    pushes.shuffle(&mut random);
    while !pushes.is_empty() || !done.load(Ordering::SeqCst) {
        while let Ok(block) = asked.recv_timeout(Duration::from_micros(200)) {
            disk.place(block, &data[..BLOCK]).unwrap();
        }
        if let Some(first) = pushes.pop() {
            let count = random.random_range(1..=3).min(BLOCKS - first) as usize;
            disk.place(first, &data[..count * BLOCK]).unwrap();
        }
    }
}
