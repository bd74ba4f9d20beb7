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

fn copy_blocks(guest: &Guest, blocks: &RoaringBitmap, copy: &mut [u8]) {
    for block in blocks {
        let page = &mut copy[block as usize * PAGE..][..PAGE];
        guest.memory.read(block, page).unwrap();
    }
}

/// The next sample; what is due depends on the time since the last, and on how loaded the machine is. `use_it` is
/// called before every look, so that it comes after the beginning of every sample.
fn sample(tracker: &Tracker, mut use_it: impl FnMut()) -> Accesses {
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        use_it();
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
    let read: RoaringBitmap = (0..2048).collect();
    let mut counts = [0, 0];
    while counts.iter().any(|count| *count < 200) {
        let seen = sample(&tracker, || {
            guest.ask("read 0 2048");
        });
        assert!((1..=MAX_PAGES).contains(&seen.watched.len()) && seen.seconds > 0.0);
        assert_eq!(seen.accessed, &seen.watched & &read);
        counts[0] += seen.accessed.len();
        counts[1] += seen.watched.len() - seen.accessed.len();
    }
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
    // One page in forty.
    guest.ask("write 7 100");
    let hot = dirty(&tracker, Settle::Running);
    assert!(tracker.sample_accesses().is_empty());
    let (mut of_hot, mut all) = (0, 0);
    while all < 1000 {
        let seen = sample(&tracker, || ());
        of_hot += (&seen.watched & &hot).len();
        all += seen.watched.len();
    }
    // Half of the runs lie there, and of those only what was written is watched: about one page in ten.
    assert!(of_hot * 20 > all, "{of_hot} of {all}");
}

#[test]
fn a_write_that_a_sample_hides_is_reported() {
    let mut guest = Guest::new(256);
    guest.ask("rest");
    guest.ask("fill 3");
    let (tracker, _) = start(&guest);
    assert!(tracker.sample_accesses().is_empty());
    let mut copy = guest.bytes();
    let mut round = 0;
    while tracker.sampling().owed < 200 && round < 400 {
        round += 1;
        guest.ask(&format!("write {round} 60"));
        // Not scanned in between: all that is written and sampled loses its mark.
        sample(&tracker, || ());
        guest.ask(&format!("write {} 60", round + 1000));
        let last = round % 2 == 0;
        let settle = if last { Settle::Final } else { Settle::Running };
        copy_blocks(&guest, &dirty(&tracker, settle), &mut copy);
        assert!(copy == guest.bytes(), "round {round}");
    }
    let stats = tracker.sampling();
    assert!(stats.owed > 100, "nothing was put to the test: {stats:?}");
    assert!(stats.off.is_none());
}

/// A copy that is kept by the reports, while the guest writes in bursts and samples are taken all the time, between the
/// scans and right after them. After each burst it is the memory.
fn keeps_a_copy(pages: u32, burst: &str) {
    let mut guest = Guest::new(pages);
    guest.ask("rest");
    guest.ask("fill 5");
    let (tracker, present) = start(&guest);
    let mut copy = vec![0; pages as usize * PAGE];
    copy_blocks(&guest, &present, &mut copy);
    let mut samples = HashMap::from([(true, 0), (false, 0)]);
    let deadline = Instant::now() + Duration::from_secs(60);
    let (mut after_scan, mut bursts) = (false, 0);
    // How many samples there are depends on how loaded the machine is.
    while tracker.sampling().owed < 100 || samples.values().any(|count| *count < 5) {
        assert!(
            Instant::now() < deadline,
            "{:?} {samples:?}",
            tracker.sampling()
        );
        bursts += 1;
        guest.process.send(&format!("{burst} {bursts} 100"));
        while guest.process.silent_for(Duration::from_micros(200)) {
            after_scan = !after_scan;
            if after_scan {
                copy_blocks(&guest, &dirty(&tracker, Settle::Running), &mut copy);
            }
            *samples.get_mut(&after_scan).unwrap() += tracker.sample_accesses().len();
        }
        copy_blocks(&guest, &dirty(&tracker, Settle::Running), &mut copy);
        assert!(
            copy == guest.bytes(),
            "the copy differs after {bursts} bursts"
        );
    }
    assert!(dirty(&tracker, Settle::Final).is_empty());
    assert!(tracker.sampling().off.is_none(), "{:?}", tracker.sampling());
}

#[test]
fn no_write_at_full_speed_is_missed_while_sampling_goes_on() {
    keeps_a_copy(1024, "churn");
}

/// Most pages are written once in a burst, so that no later write makes up for one that is missed.
#[test]
fn no_single_write_is_missed_while_sampling_goes_on() {
    keeps_a_copy(16_384, "trickle");
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
