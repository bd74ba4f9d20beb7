//! Sampling which pages of another process are accessed, while it is tracked: what is read shows, what is
//! left alone does not, and no write is ever missed for it.

mod common;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use common::{Guest, PAGE};
use hybridmig_pager::{Accesses, Features, MAX_PAGES, Settle, Tracker, TrackerConfig, attach};
use roaring::RoaringBitmap;

const PAGES: u32 = 4096;

fn start(guest: &Guest) -> (Tracker, RoaringBitmap) {
    let attached = attach::attach(guest.pid(), attach::Method::Syscall).unwrap();
    attached.uffd.handshake(Features::TRACKING).unwrap();
    attach::close_in_target(guest.pid(), attached.target_fd).unwrap();
    let regions = vec![guest.region()];
    let (tracker, present) = Tracker::start(
        attached.uffd,
        guest.pid(),
        regions,
        TrackerConfig::default(),
    )
    .unwrap();
    (tracker, only_region(present))
}

fn only_region(mut sets: Vec<(u16, RoaringBitmap)>) -> RoaringBitmap {
    assert!(sets.len() <= 1);
    sets.pop().map_or_else(RoaringBitmap::new, |(_, set)| set)
}

fn dirty(tracker: &Tracker, settle: Settle) -> RoaringBitmap {
    only_region(tracker.take_dirty(settle).unwrap())
}

/// The next sample; what is due depends on the time since the last.
fn sample(tracker: &Tracker) -> Accesses {
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        if let Some(sample) = tracker.sample_accesses().pop() {
            return sample;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("no sample: {:?}", tracker.sampling());
}

#[test]
fn what_is_read_shows_and_what_is_left_alone_does_not() {
    let mut guest = Guest::new(PAGES);
    guest.ask("fill 3");
    let (tracker, _) = start(&guest);
    assert!(dirty(&tracker, Settle::Running).is_empty());
    assert!(tracker.sample_accesses().is_empty());
    guest.ask("read 0 2048");
    // The sample's pages are known when it ends only, so everything is judged by where it lies.
    let seen = sample(&tracker);
    assert!(
        seen.watched.len() > 500 && seen.watched.len() <= MAX_PAGES,
        "{}",
        seen.watched.len()
    );
    let expected = &seen.watched & &(0..2048).collect::<RoaringBitmap>();
    assert!(!expected.is_empty() && expected.len() < seen.watched.len());
    assert_eq!(seen.accessed, expected);
    assert!(seen.seconds > 0.0);
    // Neither the reads nor the sampling look like writes.
    assert!(dirty(&tracker, Settle::Running).is_empty());
    assert!(dirty(&tracker, Settle::Final).is_empty());
    assert_eq!(guest.ask("verify 3 2"), "ok");
}

#[test]
fn what_was_written_lately_is_watched_first() {
    let mut guest = Guest::new(PAGES);
    guest.ask("fill 3");
    let (tracker, _) = start(&guest);
    // Some hundred pages among four thousand.
    guest.ask("write 7 100");
    let hot = dirty(&tracker, Settle::Running);
    assert!(tracker.sample_accesses().is_empty());
    let seen = sample(&tracker);
    // Half of the runs lie there: with a quarter of all memory in the other half, chance would give 30.
    let watched = (&seen.watched & &hot).len();
    assert!(watched > 45, "{watched} of {}", hot.len());
}

#[test]
fn a_write_that_a_sample_hides_is_reported() {
    let mut guest = Guest::new(256);
    guest.ask("fill 3");
    let (tracker, _) = start(&guest);
    assert!(tracker.sample_accesses().is_empty());
    for round in 0..40 {
        guest.ask(&format!("write {round} 60"));
        // Not scanned in between: all that is written and sampled loses its mark.
        sample(&tracker);
        let mut copy = guest.bytes();
        guest.ask(&format!("write {} 60", round + 1000));
        let named = dirty(
            &tracker,
            if round % 2 == 0 {
                Settle::Running
            } else {
                Settle::Final
            },
        );
        let now = guest.bytes();
        for block in named {
            let at = block as usize * PAGE;
            copy[at..at + PAGE].copy_from_slice(&now[at..at + PAGE]);
        }
        assert!(copy == now, "round {round}");
    }
    let stats = tracker.sampling();
    assert!(stats.owed > 100, "nothing was put to the test: {stats:?}");
    assert!(stats.off.is_none());
}

/// A copy that is kept by the reports, while a thread writes at full speed and samples are taken all
/// the time, between the scans and right after them.
#[test]
fn no_write_is_missed_while_sampling_goes_on() {
    let mut guest = Guest::new(1024);
    guest.ask("fill 5");
    let (tracker, present) = start(&guest);
    let mut copy = vec![0; 1024 * PAGE];
    let mut take = |blocks: &RoaringBitmap| {
        for block in blocks {
            let page = &mut copy[block as usize * PAGE..][..PAGE];
            guest.memory.read(block, page).unwrap();
        }
    };
    take(&present);
    let mut samples = HashMap::from([(true, 0), (false, 0)]);
    guest.process.send("churn 9 4000");
    let mut after_scan = false;
    while guest.process.silent_for(Duration::from_micros(200)) {
        after_scan = !after_scan;
        if after_scan {
            take(&dirty(&tracker, Settle::Running));
        }
        *samples.get_mut(&after_scan).unwrap() += tracker.sample_accesses().len();
    }
    take(&dirty(&tracker, Settle::Final));
    assert!(dirty(&tracker, Settle::Final).is_empty());
    let stats = tracker.sampling();
    println!("{stats:?} {samples:?}");
    assert!(stats.off.is_none(), "{stats:?}");
    assert!(
        stats.owed > 100 && samples.values().sum::<usize>() > 10,
        "{stats:?} {samples:?}"
    );
    assert!(copy == guest.bytes(), "the copy differs");
}

#[test]
fn memory_that_cannot_be_unmapped_ends_sampling_and_nothing_else() {
    let mut guest = Guest::new(64);
    guest.ask("fill 3");
    let locked = guest.ask("lock");
    assert_eq!(locked, "done", "the test has to lock 256 KiB");
    let (tracker, _) = start(&guest);
    let deadline = Instant::now() + Duration::from_secs(30);
    while tracker.sampling().off.is_none() {
        assert!(tracker.sample_accesses().is_empty());
        assert!(Instant::now() < deadline, "{:?}", tracker.sampling());
    }
    let why = tracker.sampling().off.unwrap();
    assert!(why.contains("mlock"), "{why}");
    guest.ask("write 1 5");
    assert!(!dirty(&tracker, Settle::Final).is_empty());
}
