//! The embedded guest's disk as real processes: moved with the guest, found to be wrong when it is,
//! served by a second pager when the first is killed, the guest's own at the end.

mod embedded;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hybridmig_engine::blocks::{Blocks, RegionId};
use hybridmig_engine::guest::workload::control::{Control, Standing};
use hybridmig_engine::guest::workload::{
    GuestOptions, Launch, Profile, WorkloadDestination, WorkloadSource,
};
use hybridmig_engine::guest::{DestinationGuest, SourceGuest};
use hybridmig_pager::PlacerConfig;

use embedded::{
    Guest, PAGES, REGION, copy, faults, fixture, half_page, no_note, offer, place, push, read,
    start_at, work_goes_on,
};

const DISK: RegionId = RegionId(1);
const DISK_BYTES: u64 = 32 << 20;
const BLOCK: u64 = 64 << 10;
const BLOCKS: u32 = (DISK_BYTES / BLOCK) as u32;
/// Pages and sectors.
const ALL: u64 = PAGES as u64 + DISK_BYTES / 4096;

fn with_disk(directory: &Path, name: &str, change: impl FnOnce(&mut GuestOptions)) -> Guest {
    Guest::start(directory, name, |options| {
        options.disk_bytes = DISK_BYTES;
        change(options);
    })
}

/// Waits until the guest has done so much more to its disk.
fn writes_go_on(control: &Path, count: u64) {
    let mut control = Control::connect(control).unwrap();
    let mut writes = || control.describe().unwrap().stats.disk_writes;
    let enough = writes() + count;
    let deadline = Instant::now() + Duration::from_secs(30);
    while writes() < enough {
        assert!(Instant::now() < deadline, "the guest does not write");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// How much of the migration comes before the guest resumes.
#[derive(Clone, Copy)]
enum Before {
    Everything,
    Half,
    Nothing,
}

fn move_it(profile: Profile, rate_factor: f64, before: Before) {
    let directory = tempfile::tempdir().unwrap();
    let mut guest = with_disk(directory.path(), "source", |options| {
        options.profile = profile;
        options.rate_factor = rate_factor;
    });
    let file = directory.path().join("source.disk");
    assert!(file.exists());
    let source = WorkloadSource::attach(&guest.control).unwrap();
    let control = directory.path().join("destination");
    let destination = WorkloadDestination::new(start_at(control.clone()), PlacerConfig::default());
    let notes = destination.check(&offer(&source)).unwrap();
    assert!(notes.iter().any(|note| note.contains("disk")), "{notes:?}");
    destination.prepare(&offer(&source)).unwrap();
    let image = directory.path().join("destination.disk");
    assert_eq!(destination.written_files(), [image.canonicalize().unwrap()]);

    let mut content = source.start_tracking().unwrap();
    let used = content.get(DISK).unwrap().len();
    // Holes cost nothing.
    assert!(used > 0 && used < u64::from(BLOCKS), "{used} of {BLOCKS}");
    let (mut written, mut missing) = (Blocks::new(), Blocks::new());
    for _ in 0..3 {
        if !matches!(before, Before::Nothing) {
            copy(&source, &destination, &content);
            written.union_with(&content);
        }
        missing.union_with(&content);
        writes_go_on(&guest.control, 30);
        content = source.take_dirty().unwrap();
        assert!(!content.get(DISK).unwrap().is_empty());
        let lately = source.accessed();
        let dirty = content.get(DISK).unwrap();
        assert!(dirty.is_subset(lately.get(DISK).unwrap()));
    }
    source.freeze().unwrap();
    content.union_with(&source.take_dirty().unwrap());
    assert!(source.take_dirty().unwrap().is_empty());
    missing.union_with(&content);
    match before {
        Before::Nothing => {}
        Before::Everything => {
            copy(&source, &destination, &content);
            missing = Blocks::new();
        }
        Before::Half => {
            let stale = content.clone();
            missing = missing
                .iter_blocks()
                .filter(|(region, block)| block % 3 == 0 || stale.contains(*region, *block))
                .fold(Blocks::new(), |mut missing, (region, block)| {
                    missing.insert(region, block);
                    missing
                });
        }
    }
    written.union_with(&content);
    written.subtract(&missing);

    let (sink, faults) = faults();
    destination.arm(&missing, &written, sink).unwrap();
    let state = source.save_state().unwrap();
    destination.load_state(&state).unwrap();
    destination.resume().unwrap();
    let served = destination.describe_guest().unwrap().served.unwrap();
    assert!(served.socket.exists());
    let mut asked_for_disk = false;
    // First what the guest cannot do without, for a while, then all.
    while matches!(before, Before::Nothing) && !asked_for_disk {
        let (region, block) = faults.recv_timeout(Duration::from_secs(30)).unwrap();
        asked_for_disk = region == DISK;
        if missing.remove(region, block) {
            place(&source, &destination, region, block);
        }
    }
    push(&source, &destination, missing, &faults);
    destination.disarm().unwrap();
    assert!(!served.map.exists() && !served.socket.exists());
    assert_eq!(destination.describe_guest().unwrap().served, None);

    writes_go_on(&control, 30);
    assert_eq!(destination.verify(), Some(Ok(ALL)));
    assert_eq!(source.verify().unwrap(), ALL);
    source.release().unwrap();
    assert!(guest.ended());
    assert!(!file.exists(), "the guest left its disk behind");

    // And on to a third place: nobody is needed any more, and the guest is like any other.
    drop(destination);
    writes_go_on(&control, 10);
    let onward = WorkloadSource::attach(&control).unwrap();
    assert!(!onward.start_tracking().unwrap().is_empty());
    writes_go_on(&control, 10);
    assert!(!onward.take_dirty().unwrap().get(DISK).unwrap().is_empty());
    onward.thaw().unwrap();
    assert_eq!(onward.verify().unwrap(), ALL);
    onward.release().unwrap();
    assert!(!image.exists());
}

#[test]
fn a_disk_is_moved_by_precopy() {
    move_it(Profile::Db, 1.0, Before::Everything);
}

#[test]
fn a_disk_is_moved_by_postcopy() {
    move_it(Profile::Build, 1.0, Before::Nothing);
}

#[test]
fn a_disk_that_is_written_as_fast_as_can_be_is_moved_by_both() {
    move_it(Profile::Build, 0.0, Before::Half);
}

/// Marks are set after the write and taken before the read: whatever a copy by rounds lacks is told
/// of by the last. Many short rounds against threads that never pause.
#[test]
fn no_write_is_missed_by_the_marks() {
    let directory = tempfile::tempdir().unwrap();
    let guest = with_disk(directory.path(), "guest", |options| {
        options.profile = Profile::Build;
        options.rate_factor = 0.0;
        options.threads = 4;
    });
    let source = WorkloadSource::attach(&guest.control).unwrap();
    let copied = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(directory.path().join("copy"))
        .unwrap();
    copied.set_len(DISK_BYTES).unwrap();
    let take = |blocks: &Blocks| {
        for block in blocks.get(DISK).into_iter().flatten() {
            let data = read(&source, DISK, block);
            copied
                .write_all_at(&data, u64::from(block) * BLOCK)
                .unwrap();
        }
    };
    take(&source.start_tracking().unwrap());
    let deadline = Instant::now() + Duration::from_secs(2);
    let mut rounds = 0;
    while Instant::now() < deadline {
        take(&source.take_dirty().unwrap());
        rounds += 1;
    }
    source.freeze().unwrap();
    take(&source.take_dirty().unwrap());
    assert!(rounds > 3, "{rounds} rounds");
    let mut other = vec![0; BLOCK as usize];
    for block in 0..BLOCKS {
        copied
            .read_exact_at(&mut other, u64::from(block) * BLOCK)
            .unwrap();
        assert!(
            read(&source, DISK, block) == other,
            "block {block} of the copy is stale"
        );
    }
    source.thaw().unwrap();
    source.release().unwrap();
}

#[test]
fn a_wrong_byte_and_a_lost_write_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let guest = with_disk(directory.path(), "guest", |options| {
        options.profile = Profile::Db;
    });
    let mut control = guest.control();
    let disk = File::options()
        .read(true)
        .write(true)
        .open(directory.path().join("guest.disk"))
        .unwrap();
    let look = |sector: u64| {
        let mut data = vec![0; 4096];
        disk.read_exact_at(&mut data, sector * 4096).unwrap();
        data
    };
    let put = |sector: u64, data: &[u8]| disk.write_all_at(data, sector * 4096).unwrap();
    control.freeze(Duration::from_secs(10)).unwrap();
    let before: Vec<_> = (0..DISK_BYTES / 4096).map(look).collect();
    control.thaw().unwrap();
    writes_go_on(&guest.control, 50);
    control.freeze(Duration::from_secs(10)).unwrap();
    assert_eq!(control.verify().unwrap(), ALL);
    let now: Vec<_> = (0..DISK_BYTES / 4096).map(look).collect();

    let mut wrong = |sector: usize, data: &[u8]| {
        put(sector as u64, data);
        let damage = control.verify().unwrap_err().to_string();
        assert!(
            damage.contains(&format!("disk sector {sector} ")),
            "sector {sector} was wrong, the guest says: {damage}"
        );
        put(sector as u64, &now[sector]);
        assert_eq!(control.verify().unwrap(), ALL);
    };
    // A write that was lost.
    let stale = (0..now.len())
        .find(|sector| now[*sector] != before[*sector])
        .unwrap();
    wrong(stale, &before[stale]);
    // One that was torn in its middle.
    let torn = [&now[stale][..2048], &before[stale][2048..]].concat();
    if torn != now[stale] {
        wrong(stale, &torn);
    }
    // One that went elsewhere: into a hole, over contents.
    let hole = (0..now.len())
        .find(|sector| now[*sector].iter().all(|byte| *byte == 0))
        .unwrap();
    wrong(hole, &now[stale]);
    let other = (stale + 1..now.len())
        .find(|sector| now[*sector] != now[stale] && now[*sector][0] != 0)
        .unwrap();
    wrong(other, &now[stale]);
    // One byte.
    let mut flipped = now[stale].clone();
    flipped[3000] ^= 1;
    wrong(stale, &flipped);
}

#[test]
fn threads_come_across_a_wrong_sector_by_themselves() {
    let directory = tempfile::tempdir().unwrap();
    let guest = with_disk(directory.path(), "guest", |options| {
        options.profile = Profile::Scan;
        options.rate_factor = 0.0;
    });
    let mut control = guest.control();
    let disk = File::options()
        .write(true)
        .open(directory.path().join("guest.disk"))
        .unwrap();
    // No operation is under way that could replace it unseen.
    control.freeze(Duration::from_secs(10)).unwrap();
    disk.write_all_at(&[0x5a; 4096], 300 * BLOCK).unwrap();
    control.thaw().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let found = loop {
        let description = control.describe().unwrap();
        if description.stats.wrong > 0 {
            break description;
        }
        assert!(Instant::now() < deadline, "nobody read the block");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(found.wrong[0].contains("disk sector"), "{:?}", found.wrong);
    assert!(control.verify().is_err());
    assert!(!found.latencies.reads.is_empty());
}

#[test]
fn a_failed_operation_fails_the_verification() {
    let directory = tempfile::tempdir().unwrap();
    let guest = with_disk(directory.path(), "guest", |options| {
        options.profile = Profile::Scan;
        options.rate_factor = 0.0;
    });
    let mut control = guest.control();
    control.freeze(Duration::from_secs(10)).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .open(directory.path().join("guest.disk"))
        .unwrap();
    // Reads behind the end fail, and this profile reads before it writes.
    let half = DISK_BYTES / 2;
    let mut rest = vec![0; half as usize];
    file.read_exact_at(&mut rest, half).unwrap();
    file.set_len(half).unwrap();
    control.thaw().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while control.describe().unwrap().stats.disk_errors == 0 {
        assert!(Instant::now() < deadline, "no operation has failed");
        std::thread::sleep(Duration::from_millis(5));
    }
    // All contents are right again, and yet something had failed.
    control.freeze(Duration::from_secs(10)).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    file.write_all_at(&rest, half).unwrap();
    let damage = control.verify().unwrap_err().to_string();
    assert!(damage.contains("could not be read"), "{damage}");
    assert!(!damage.contains("should have"), "{damage}");
}

#[test]
fn a_killed_pager_loses_nothing_of_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let change = |options: &mut GuestOptions| {
        options.profile = Profile::Build;
        options.threads = 4;
    };
    let guest = with_disk(directory.path(), "source", change);
    let arrived = with_disk(directory.path(), "destination", |options| {
        options.incoming = true;
    });
    let source = WorkloadSource::attach(&guest.control).unwrap();
    writes_go_on(&guest.control, 20);
    source.freeze().unwrap();

    half_page(&guest, &arrived);

    // The guest runs, and what it does to its disk waits; a server that is gone is no error.
    let description = arrived.control().describe().unwrap();
    assert_eq!(description.standing, Standing::Running);
    assert!(description.served.is_some());
    std::thread::sleep(Duration::from_millis(200)); // as long as nobody serves
    let description = arrived.control().describe().unwrap();
    assert_eq!(description.stats.disk_errors, 0);
    assert_eq!(description.wrong, Vec::<String>::new());

    let (sink, faults) = faults();
    let noted = AtomicBool::new(false);
    let note = |missing: &Blocks| {
        noted.fetch_or(missing.get(DISK).is_some(), Ordering::Relaxed);
        no_note(missing)
    };
    let config = PlacerConfig::default();
    let (destination, missing) =
        WorkloadDestination::adopt(&arrived.control, config, sink, &note).unwrap();
    assert!(noted.load(Ordering::Relaxed));
    for region in [REGION, DISK] {
        assert!(!missing.get(region).unwrap().is_empty());
    }
    push(&source, &destination, missing, &faults);
    destination.disarm().unwrap();
    work_goes_on(|| destination.work_done());
    writes_go_on(&arrived.control, 20);
    assert_eq!(destination.verify(), Some(Ok(ALL)));
    assert_eq!(destination.describe_guest().unwrap().served, None);
    source.release().unwrap();
    destination.end_guest().unwrap();
}

#[test]
fn what_does_not_fit_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let guest = with_disk(directory.path(), "source", |_| {});
    let source = WorkloadSource::attach(&guest.control).unwrap();
    let without = Guest::start(directory.path(), "without", |options| {
        options.incoming = true;
    });
    let launch = Launch::Waiting {
        control: without.control.clone(),
    };
    let destination = WorkloadDestination::new(launch, PlacerConfig::default());
    let refusal = destination.check(&offer(&source)).unwrap_err().to_string();
    assert!(refusal.contains("same sizes"), "{refusal}");
    assert!(destination.prepare(&offer(&source)).is_err());

    let mut large = offer(&source);
    large.regions[1].blocks = 1 << 22;
    let launch = start_at(directory.path().join("never"));
    let destination = WorkloadDestination::new(launch, PlacerConfig::default());
    let refusal = destination.check(&large).unwrap_err().to_string();
    assert!(refusal.contains("out of range"), "{refusal}");
}

#[test]
fn a_file_with_contents_is_never_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let precious = directory.path().join("precious");
    std::fs::write(&precious, "data").unwrap();
    let options = GuestOptions {
        disk_bytes: DISK_BYTES,
        disk: Some(precious.clone()),
        die_with: Some(std::process::id()),
        ..GuestOptions::new(directory.path().join("guest"), 32 << 20)
    };
    let output = Command::new(fixture())
        .args(options.to_args())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("has contents"),
        "{said}"
    );
    assert_eq!(std::fs::read(&precious).unwrap(), b"data");
    assert!(!options.control.exists());
}
