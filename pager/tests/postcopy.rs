//! Placing memory under a running guest: several of its threads fault while blocks are pushed, it
//! gives memory back meanwhile, the pager is killed; every byte is right in the end.

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use common::{Fixture, Guest, PAGE, pattern};
use hybridmig_pager::{
    FaultAnswer, FaultSink, Features, MissingMap, PagerError, Placer, PlacerConfig,
};
use roaring::RoaringBitmap;

const PAGES: u32 = 4096;
const SEED: u64 = 11;

#[derive(Default)]
struct Sink {
    queue: Option<mpsc::Sender<u32>>,
    zero: RoaringBitmap,
    removed: Mutex<RoaringBitmap>,
    failure: Mutex<Option<PagerError>>,
}

impl FaultSink for Sink {
    fn fault(&self, region: u16, block: u32) -> FaultAnswer {
        assert_eq!(region, 0);
        if self.zero.contains(block) {
            return FaultAnswer::Zero;
        }
        if let Some(queue) = &self.queue {
            queue.send(block).unwrap();
        }
        FaultAnswer::Requested
    }

    fn removed(&self, _region: u16, first: u32, count: u32) {
        self.removed
            .lock()
            .unwrap()
            .insert_range(first..first + count);
    }

    fn failed(&self, error: PagerError) {
        *self.failure.lock().unwrap() = Some(error);
    }
}

fn page(block: u32) -> Vec<u8> {
    pages(block, 1)
}

fn pages(first: u32, count: usize) -> Vec<u8> {
    let mut data = vec![0; count * PAGE];
    pattern::fill(SEED, first, &mut data);
    data
}

fn arm(guest: &Guest, missing: &RoaringBitmap, written: &RoaringBitmap, sink: Arc<Sink>) -> Placer {
    let map = MissingMap::in_memory(&[guest.memory.blocks()]).unwrap();
    map.insert(0, missing).unwrap();
    Placer::arm(
        guest.attach(Features::PLACING),
        guest.pid(),
        vec![guest.region()],
        Arc::new(map),
        &[(0, written.clone())],
        sink,
        PlacerConfig::default(),
    )
    .unwrap()
}

/// Everything is missing.
fn arm_empty(guest: &Guest, sink: Arc<Sink>) -> Placer {
    let missing = (0..guest.memory.blocks()).collect();
    arm(guest, &missing, &RoaringBitmap::new(), sink)
}

#[test]
fn threads_fault_while_blocks_are_pushed() {
    let mut guest = Guest::new(PAGES);
    // Before: stale contents everywhere, of which a quarter is overwritten with the truth.
    guest.ask("fill 999");
    let written: RoaringBitmap = (0..PAGES / 4).collect();
    guest
        .memory
        .write(0, &pages(0, PAGES as usize / 4))
        .unwrap();
    let missing: RoaringBitmap = (PAGES / 4..PAGES).collect();
    let (queue, faults) = mpsc::channel();
    let sink = Arc::new(Sink {
        queue: Some(queue),
        ..Sink::default()
    });
    let placer = arm(&guest, &missing, &written, Arc::clone(&sink));
    assert_eq!(guest.memory.populated().unwrap(), written);
    assert!(matches!(
        placer.disarm(),
        Err(PagerError::StillMissing { .. })
    ));
    guest.process.send(&format!("verify {SEED} 4"));
    // Nothing is pushed before somebody waits.
    let first = faults.recv_timeout(Duration::from_secs(60)).unwrap();
    let finished = AtomicBool::new(false);
    std::thread::scope(|scope| {
        placer.place(0, first, &page(first)).unwrap();
        for half in 0..2 {
            let placer = &placer;
            scope.spawn(move || {
                // Both push everything, from different ends, in pieces of odd sizes: most of it is
                // already there when the second comes.
                let starts: Vec<u32> = (PAGES / 4..PAGES).step_by(37).collect();
                let place = |first: u32| {
                    let count = 37.min(PAGES - first) as usize;
                    placer.place(0, first, &pages(first, count)).unwrap();
                };
                if half == 0 {
                    starts.into_iter().for_each(place);
                } else {
                    starts.into_iter().rev().for_each(place);
                }
            });
        }
        let (placer, finished) = (&placer, &finished);
        scope.spawn(move || {
            while !finished.load(Ordering::SeqCst) {
                if let Ok(block) = faults.recv_timeout(Duration::from_millis(5)) {
                    placer.place(0, block, &page(block)).unwrap();
                }
            }
        });
        assert_eq!(guest.process.line(), "ok");
        finished.store(true, Ordering::SeqCst);
    });
    assert!(placer.missing().is_empty());
    let stats = placer.disarm().unwrap();
    assert!(stats.faults > 0);
    assert!(stats.threads.iter().any(|t| t.name.starts_with("reader-")));
    assert!(stats.blocked > Duration::ZERO);
    assert!(sink.failure.lock().unwrap().is_none());
    assert_eq!(guest.ask(&format!("verify {SEED} 2")), "ok");
    assert!(guest.bytes() == pages(0, PAGES as usize));
}

#[test]
fn by_faults_alone_with_zero_blocks_answered_at_once() {
    let mut guest = Guest::new(1024);
    guest.ask("remove 0 256"); // so that the guest expects zeroes there
    let (queue, faults) = mpsc::channel();
    let sink = Arc::new(Sink {
        queue: Some(queue),
        zero: (0..128).collect(),
        ..Sink::default()
    });
    // 128..256 are not missing and not written: holes that read as zero.
    let missing: RoaringBitmap = (0..128).chain(256..1024).collect();
    let placer = arm(&guest, &missing, &RoaringBitmap::new(), sink);
    guest.process.send(&format!("verify {SEED} 3"));
    let server = std::thread::spawn(move || {
        while !placer.missing().is_empty() {
            if let Ok(block) = faults.recv_timeout(Duration::from_millis(5)) {
                placer.place(0, block, &page(block)).unwrap();
            }
        }
        placer
    });
    assert_eq!(guest.process.line(), "ok");
    let placer = server.join().unwrap();
    let stats = placer.disarm().unwrap();
    assert!(stats.zero >= 256, "{}", stats.zero);
    assert!(stats.faults >= 1024, "{}", stats.faults);
    assert!(stats.latency_us.len() >= 1024);
}

#[test]
fn zero_runs_wake_who_waits_and_take_no_memory() {
    let mut guest = Guest::new(1024);
    guest.ask("remove 0 1024");
    let (queue, faults) = mpsc::channel();
    let sink = Arc::new(Sink {
        queue: Some(queue),
        ..Sink::default()
    });
    let placer = arm_empty(&guest, sink);
    guest.process.send("verify 0 1");
    let waited = faults.recv_timeout(Duration::from_secs(20)).unwrap();
    placer.place_zero(0, 0, 1024).unwrap();
    assert_eq!(guest.process.line(), "ok");
    assert!(placer.missing().is_empty());
    assert!(!placer.missing().contains(0, waited));
    placer.disarm().unwrap();

    let second = Guest::new(1024);
    let placer = arm_empty(&second, Arc::default());
    placer.place_zero(0, 0, 1024).unwrap();
    placer.disarm().unwrap();
    assert!(second.memory.populated().unwrap().is_empty());
}

#[test]
fn memory_given_back_stays_zero_whatever_is_pushed() {
    let mut guest = Guest::new(PAGES);
    let (queue, faults) = mpsc::channel();
    let sink = Arc::new(Sink {
        queue: Some(queue),
        ..Sink::default()
    });
    let placer = arm(
        &guest,
        &(0..PAGES).collect(),
        &RoaringBitmap::new(),
        Arc::clone(&sink),
    );
    let placer = Arc::new(placer);
    let pushing = Arc::new(AtomicBool::new(true));
    // Pushes everything over and over while the guest gives memory back: stale blocks all the time.
    let pushers: Vec<_> = (0..2)
        .map(|_| {
            let (placer, pushing) = (Arc::clone(&placer), Arc::clone(&pushing));
            std::thread::spawn(move || {
                let all: Vec<Vec<u8>> = (0..PAGES / 16).map(|i| pages(i * 16, 16)).collect();
                let mut rounds = 0;
                while pushing.load(Ordering::SeqCst) {
                    for (index, data) in all.iter().enumerate().rev() {
                        placer.place(0, index as u32 * 16, data).unwrap();
                    }
                    rounds += 1;
                }
                rounds
            })
        })
        .collect();
    let mut given_back = RoaringBitmap::new();
    for index in 0..200 {
        let first = (pattern::mix(index) % u64::from(PAGES - 8)) as u32;
        assert_eq!(guest.ask(&format!("remove {first} 8")), "done");
        given_back.insert_range(first..first + 8);
    }
    guest.process.send(&format!("verify {SEED} 3"));
    assert_eq!(guest.process.line(), "ok");
    pushing.store(false, Ordering::SeqCst);
    for pusher in pushers {
        assert!(pusher.join().unwrap() > 0);
    }
    drop(faults);
    assert_eq!(*sink.removed.lock().unwrap(), given_back);
    placer.disarm().unwrap();
    assert_eq!(guest.ask(&format!("verify {SEED} 1")), "ok");
    assert!(sink.failure.lock().unwrap().is_none());
}

#[test]
fn blocks_that_were_unmapped_go_to_the_file() {
    let mut guest = Guest::new(1024);
    let sink = Arc::new(Sink::default());
    let placer = arm_empty(&guest, Arc::clone(&sink));
    assert_eq!(guest.ask("unmap 512 100"), "done");
    placer.place(0, 0, &pages(0, 1024)).unwrap();
    placer.disarm().unwrap();
    assert!(guest.bytes() == pages(0, 1024));
}

#[test]
fn a_guest_that_dies_is_told() {
    let mut guest = Guest::new(1024);
    let sink = Arc::new(Sink::default());
    let placer = arm_empty(&guest, Arc::clone(&sink));
    guest.process.send(&format!("verify {SEED} 2"));
    guest.process.kill();
    assert!(matches!(
        placer.place(0, 0, &page(0)),
        Err(PagerError::GuestGone { .. })
    ));
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while sink.failure.lock().unwrap().is_none() && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(matches!(
        *sink.failure.lock().unwrap(),
        Some(PagerError::GuestGone { .. })
    ));
}

#[test]
fn nonsense_is_refused() {
    let guest = Guest::new(64);
    let placer = arm(
        &guest,
        &(0..64).collect(),
        &RoaringBitmap::new(),
        Arc::default(),
    );
    assert!(matches!(
        placer.place(1, 0, &page(0)),
        Err(PagerError::NoSuchRegion { region: 1 })
    ));
    assert!(matches!(
        placer.place(0, 63, &pages(63, 2)),
        Err(PagerError::OutOfRange { .. })
    ));
    assert!(matches!(
        placer.place(0, 0, &[1; 100]),
        Err(PagerError::NotWholePages { len: 100 })
    ));
    assert!(placer.place_zero(0, 60, 5).is_err());
}

#[test]
fn faults_that_are_on_their_way_do_not_disturb_the_end() {
    let mut guest = Guest::new(64);
    for round in 0..150 {
        let sink = Arc::new(Sink::default());
        let placer = arm_empty(&guest, Arc::clone(&sink));
        guest.process.send(&format!("verify {SEED} 8"));
        // Somewhere among the first faults.
        while placer.stats().faults < round % 8 {
            std::hint::spin_loop();
        }
        placer.place(0, 0, &pages(0, 64)).unwrap();
        placer.disarm().unwrap();
        assert!(sink.failure.lock().unwrap().is_none());
        assert_eq!(guest.process.line(), "ok");
    }
}

#[test]
fn memory_given_back_at_the_end_holds_nobody_up() {
    let mut guest = Guest::new(64);
    for _ in 0..150 {
        let sink = Arc::new(Sink::default());
        let placer = arm_empty(&guest, Arc::clone(&sink));
        placer.place(0, 0, &pages(0, 64)).unwrap();
        guest.process.send("remove 0 64");
        placer.disarm().unwrap();
        assert!(sink.failure.lock().unwrap().is_none());
        assert_eq!(guest.process.line(), "done");
        assert!(guest.bytes().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_guest_that_was_never_armed_cannot_be_taken_over() {
    let guest = Guest::new(64);
    let map = MissingMap::in_memory(&[64]).unwrap();
    let result = Placer::take_over(
        guest.attach(Features::PLACING),
        guest.pid(),
        vec![guest.region()],
        Arc::new(map),
        Arc::new(Sink::default()),
        PlacerConfig::default(),
    );
    assert!(matches!(result, Err(PagerError::NeverArmed)));
}

#[test]
fn a_killed_pager_is_followed_by_another_with_nothing_lost() {
    let dir = tempfile::tempdir().unwrap();
    let map = dir.path().join("missing");
    let mut guest = Guest::new(PAGES);
    guest.ask("fill 999"); // stale: must never be seen
    let mut pager_process = pager(&guest, "arm", &map);
    assert_eq!(pager_process.line(), "serving");
    guest.process.send(&format!("verify {SEED} 4"));
    // Twice killed in the middle of serving faults.
    for _ in 0..2 {
        for _ in 0..10 {
            pager_process.wait_for("progress");
        }
        pager_process.kill();
        let left = MissingMap::open(&map).unwrap();
        assert!(!left.is_empty(), "killed too late to prove anything");
        // Without a pager the guest waits: it neither ends nor sees a wrong byte.
        assert!(guest.process.silent_for(Duration::from_millis(50)));
        pager_process = pager(&guest, "take-over", &map);
        pager_process.wait_for("serving");
    }
    assert_eq!(guest.process.line(), "ok");
    let disarmed = loop {
        let line = pager_process.line();
        if line != "progress" {
            break line;
        }
    };
    assert!(disarmed.starts_with("disarmed "), "{disarmed}");
    assert!(MissingMap::open(&map).unwrap().is_empty());
    assert_eq!(guest.ask(&format!("verify {SEED} 2")), "ok");
    assert!(guest.bytes() == pages(0, PAGES as usize));
}

#[test]
fn a_fault_that_the_killed_pager_had_read_is_told_to_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let map = dir.path().join("missing");
    let mut guest = Guest::new(1024);
    let mut first = pager(&guest, "stall", &map);
    assert_eq!(first.line(), "serving");
    guest.process.send(&format!("verify {SEED} 1"));
    // It has read the only thread's fault, and the kernel will not tell it again by itself.
    first.wait_for("stalled");
    first.kill();
    let second = pager(&guest, "take-over", &map);
    assert_eq!(guest.process.line(), "ok");
    drop(second);
}

/// A pager in a process of its own.
fn pager(guest: &Guest, how: &str, map: &Path) -> Fixture {
    Fixture::spawn(&[
        "pager",
        how,
        &guest.pid().to_string(),
        &guest.fd.to_string(),
        &guest.memory.blocks().to_string(),
        &SEED.to_string(),
        map.to_str().unwrap(),
    ])
}
