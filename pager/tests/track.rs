//! Dirty tracking of another process: what it wrote is reported, and a copy kept by the reports is
//! the guest's memory to the byte.

mod common;

use std::time::Duration;

use common::{Guest, PAGE, pattern};
use hybridmig_pager::{Features, PagerError, Settle, Tracker, TrackerConfig, attach, process};
use roaring::RoaringBitmap;

const PAGES: u32 = 4096;

fn start(guest: &Guest, config: TrackerConfig) -> (Tracker, RoaringBitmap) {
    let attached = attach::attach(guest.pid(), attach::Method::Syscall).unwrap();
    attached.uffd.handshake(Features::TRACKING).unwrap();
    attach::close_in_target(guest.pid(), attached.target_fd).unwrap();
    let (tracker, present) =
        Tracker::start(attached.uffd, guest.pid(), vec![guest.region()], config).unwrap();
    (tracker, only_region(present))
}

fn only_region(mut sets: Vec<(u16, RoaringBitmap)>) -> RoaringBitmap {
    assert!(sets.len() <= 1);
    sets.pop().map_or_else(RoaringBitmap::new, |(region, set)| {
        assert_eq!(region, 0);
        set
    })
}

/// The pages that the guest's `write SEED COUNT` touches.
fn written(seed: u64, count: u64) -> RoaringBitmap {
    (0..count)
        .map(|index| (pattern::mix(seed + index) % u64::from(PAGES)) as u32)
        .collect()
}

fn copy_blocks(guest: &Guest, blocks: &RoaringBitmap, copy: &mut [u8]) {
    for block in blocks {
        let page = &mut copy[block as usize * PAGE..][..PAGE];
        guest.memory.read(block, page).unwrap();
    }
}

#[test]
fn exactly_the_written_pages_are_reported() {
    let mut guest = Guest::new(PAGES);
    let before = written(1, 700);
    guest.ask("write 1 700");
    let (tracker, present) = start(&guest, TrackerConfig::default());
    assert_eq!(present, before);
    assert!(process::find_userfaultfds(guest.pid()).unwrap().is_empty());
    assert!(tracker.take_dirty(Settle::Running).unwrap().is_empty());
    // Sparse, dense, sparse; pages that were present and pages that were not.
    for (seed, count) in [(10, 5), (20, 3000), (30, 40), (40, 1)] {
        guest.ask(&format!("write {seed} {count}"));
        let dirty = only_region(tracker.take_dirty(Settle::Running).unwrap());
        assert_eq!(dirty, written(seed, count));
    }
    assert!(tracker.take_dirty(Settle::Running).unwrap().is_empty());
    // Pages that were populated meanwhile have been reported, and are not reported again.
    assert!(tracker.take_dirty(Settle::Final).unwrap().is_empty());
}

#[test]
fn a_copy_kept_by_the_reports_is_the_memory() {
    let mut guest = Guest::new(PAGES);
    guest.ask("write 5 2000");
    let (tracker, present) = start(&guest, TrackerConfig::default());
    let mut copy = vec![0; PAGES as usize * PAGE];
    copy_blocks(&guest, &present, &mut copy);
    guest.process.send("churn 9 700");
    let mut rounds = 0;
    while guest.process.silent_for(Duration::from_millis(1)) {
        let dirty = only_region(tracker.take_dirty(Settle::Running).unwrap());
        copy_blocks(&guest, &dirty, &mut copy);
        rounds += 1;
    }
    assert!(rounds > 3, "{rounds} rounds prove nothing");
    let dirty = only_region(tracker.take_dirty(Settle::Final).unwrap());
    copy_blocks(&guest, &dirty, &mut copy);
    assert!(tracker.take_dirty(Settle::Final).unwrap().is_empty());
    assert!(copy == guest.bytes(), "the copy differs");
}

#[test]
fn punched_pages_are_noticed_at_the_freeze() {
    let mut guest = Guest::new(PAGES);
    guest.ask("fill 3");
    let (tracker, present) = start(&guest, TrackerConfig::default());
    assert_eq!(present.len(), u64::from(PAGES));
    guest.ask("remove 100 50");
    // From outside of the guest, too.
    guest.memory.zero(1000, 3).unwrap();
    let dirty = only_region(tracker.take_dirty(Settle::Final).unwrap());
    let punched: RoaringBitmap = (100..150).chain(1000..1003).collect();
    assert!(punched.is_subset(&dirty));
    // Filled by a way that leaves no mark.
    guest.memory.write(1001, &[1; PAGE]).unwrap();
    let dirty = only_region(tracker.take_dirty(Settle::Final).unwrap());
    assert!(dirty.contains(1001));
}

#[test]
fn a_grace_time_reports_twice() {
    let mut guest = Guest::new(PAGES);
    let grace = Some(Duration::from_millis(50));
    let (tracker, _) = start(&guest, TrackerConfig { grace });
    guest.ask("write 1 100");
    let mut reports = 0;
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while reports < 2 && std::time::Instant::now() < deadline {
        let dirty = only_region(tracker.take_dirty(Settle::Running).unwrap());
        if !dirty.is_empty() {
            assert_eq!(dirty, written(1, 100));
            reports += 1;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(reports, 2);
    guest.ask("write 2 100");
    assert_eq!(
        only_region(tracker.take_dirty(Settle::Running).unwrap()),
        written(2, 100)
    );
    // Frozen at once: still owed.
    let last = only_region(tracker.take_dirty(Settle::Final).unwrap());
    assert!(written(2, 100).is_subset(&last));
}

#[test]
fn a_guest_is_left_as_it_was_and_can_be_tracked_again() {
    let mut guest = Guest::new(PAGES);
    for round in 0..3 {
        let (tracker, _) = start(&guest, TrackerConfig::default());
        // A second tracker at the same time is refused, and does not harm the first.
        let uffd = guest.attach(Features::TRACKING);
        let second = Tracker::start(
            uffd,
            guest.pid(),
            vec![guest.region()],
            TrackerConfig::default(),
        );
        assert!(
            matches!(second, Err(PagerError::UnsuitableMemory { .. })),
            "{second:?}"
        );
        guest.ask(&format!("write {round} 10"));
        assert_eq!(
            only_region(tracker.take_dirty(Settle::Running).unwrap()),
            written(round, 10)
        );
        if round == 1 {
            tracker.stop().unwrap();
            guest.ask("write 77 10");
        }
    }
}

#[test]
fn a_guest_that_died_is_an_error_and_not_a_clean_round() {
    let mut guest = Guest::new(PAGES);
    let (tracker, _) = start(&guest, TrackerConfig::default());
    guest.process.kill();
    assert!(matches!(
        tracker.take_dirty(Settle::Running),
        Err(PagerError::GuestGone { .. })
    ));
}

#[test]
fn memory_mapped_anew_is_refused_at_the_freeze() {
    let mut guest = Guest::new(PAGES);
    let (tracker, _) = start(&guest, TrackerConfig::default());
    guest.ask("unmap 10 10");
    assert!(tracker.take_dirty(Settle::Final).is_err());
}
