//! The embedded guest as real processes: moved by pre-copy rounds and post-copy, found to be wrong
//! when it is, taken over by a second pager when the first is killed, and ended by itself when
//! nobody will come for it.

mod embedded;

use std::fs::Permissions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use hybridmig_engine::blocks::Blocks;
use hybridmig_engine::guest::workload::control::{Control, ControlError, Purpose, Standing};
use hybridmig_engine::guest::workload::{
    GuestOptions, Launch, Profile, WorkloadDestination, WorkloadSource,
};
use hybridmig_engine::guest::{DestinationGuest, SourceGuest};
use hybridmig_pager::PlacerConfig;
use hybridmig_transport::message::{Offer, RefusalCode};

use embedded::{
    BYTES, FIXTURE_VARIABLE, Guest, PAGES, REGION, copy, faults, fixture, half_page, no_note,
    offer, push, start_at, work_goes_on,
};

fn move_a_running_guest(change: impl FnOnce(&mut GuestOptions)) {
    let directory = tempfile::tempdir().unwrap();
    let mut threads = 0;
    let mut guest = Guest::start(directory.path(), "source", |options| {
        change(options);
        threads = options.threads;
    });
    let source = WorkloadSource::attach(&guest.control).unwrap();
    let destination = WorkloadDestination::new(
        start_at(directory.path().join("destination")),
        PlacerConfig::default(),
    );
    destination.check(&offer(&source)).unwrap();
    destination.prepare(&offer(&source)).unwrap();

    let mut written = source.start_tracking().unwrap();
    copy(&source, &destination, &written);
    for _ in 0..3 {
        work_goes_on(|| source.work_done());
        let dirty = source.take_dirty().unwrap();
        assert!(!dirty.is_empty());
        copy(&source, &destination, &dirty);
        written.union_with(&dirty);
    }
    work_goes_on(|| source.work_done());
    source.freeze().unwrap();
    let last = source.take_dirty().unwrap();
    assert!(source.take_dirty().unwrap().is_empty());
    let done = source.work_done();

    // What was written last stays behind by half, and so does every fifth block of the rest.
    let (mut missing, mut current) = (Blocks::new(), Blocks::new());
    for (region, block) in written.iter_blocks() {
        if block % 5 == 0 {
            missing.insert(region, block);
        }
    }
    for (region, block) in last.iter_blocks() {
        if block % 2 == 0 {
            missing.insert(region, block);
        } else if !missing.contains(region, block) {
            current.insert(region, block);
        }
    }
    copy(&source, &destination, &current);
    written.union_with(&current);
    written.subtract(&missing);

    let (sink, faults) = faults();
    destination.arm(&missing, &written, sink).unwrap();
    destination
        .load_state(&source.save_state().unwrap())
        .unwrap();
    assert_eq!(destination.work_done(), done);
    destination.resume().unwrap();
    // The guest cannot go far before a block that is missing.
    let (_, first) = faults.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(missing.contains(REGION, first));
    assert!(destination.disarm().is_err(), "let go with blocks missing");
    let mut page = [0; 4096];
    source.read(REGION, first, &mut page).unwrap();
    destination.place(REGION, first, &page).unwrap();
    missing.remove(REGION, first);
    push(&source, &destination, missing, &faults);
    let blocked = destination.disarm().unwrap();
    assert_eq!(blocked.parallelism, threads);
    assert!(blocked.total > Duration::ZERO);
    let named = |(name, _): &(String, Duration)| name.starts_with("worker ");
    assert!(blocked.threads.iter().all(named), "{blocked:?}");

    work_goes_on(|| destination.work_done());
    assert_eq!(destination.verify(), Some(Ok(u64::from(PAGES))));
    assert_eq!(source.work_done(), done, "the guest ran on both sides");
    assert_eq!(source.verify().unwrap(), u64::from(PAGES));
    source.release().unwrap();
    assert!(guest.ended());

    // And on to a third place: the guest that came is like any other.
    let onward = WorkloadSource::attach(&directory.path().join("destination")).unwrap();
    assert!(!onward.start_tracking().unwrap().is_empty());
    work_goes_on(|| onward.work_done());
    assert!(!onward.take_dirty().unwrap().is_empty());
    onward.thaw().unwrap();
    destination.end_guest().unwrap();
}

#[test]
fn a_running_guest_is_moved() {
    move_a_running_guest(|_| {});
}

#[test]
fn a_guest_that_writes_as_fast_as_it_can_is_moved() {
    move_a_running_guest(|options| {
        options.profile = Profile::Scan;
        options.threads = 8;
        options.rate_factor = 0.0;
    });
}

/// The same by an unprivileged user, whose guests have a userfaultfd for user-mode faults only.
#[test]
fn no_privileges_are_needed() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        return move_a_running_guest(|_| {});
    }
    // Where the build lies may be closed to others.
    let directory = tempfile::Builder::new()
        .permissions(Permissions::from_mode(0o755))
        .tempdir()
        .unwrap();
    let test = directory.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &test).unwrap();
    let guest = directory.path().join("guest");
    std::fs::copy(fixture(), &guest).unwrap();
    let status = Command::new(test)
        .args(["--exact", "a_running_guest_is_moved"])
        .current_dir("/")
        .env(FIXTURE_VARIABLE, guest)
        .uid(NOBODY)
        .gid(NOBODY)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn a_thawed_guest_goes_on_where_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let guest = Guest::start(directory.path(), "source", |_| {});
    let source = WorkloadSource::attach(&guest.control).unwrap();
    for _ in 0..3 {
        source.start_tracking().unwrap();
        work_goes_on(|| source.work_done());
        source.freeze().unwrap();
        let state = source.save_state().unwrap();
        assert_eq!(source.save_state().unwrap(), state);
        source.thaw().unwrap();
        assert!(source.take_dirty().is_err(), "tracking has ended");
        work_goes_on(|| source.work_done());
    }
    source.thaw().unwrap();
    assert_eq!(source.verify().unwrap(), u64::from(PAGES));
    source.release().unwrap();
}

/// Freezes a guest, copies it all but for what `change` does to the copy, and lets it go on.
fn move_with_damage(
    profile: Profile,
    change: impl FnOnce(&WorkloadSource, &WorkloadDestination, &Blocks),
) -> (WorkloadDestination, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let guest = Guest::start(directory.path(), "source", |options| {
        options.profile = profile;
    });
    let source = WorkloadSource::attach(&guest.control).unwrap();
    let control = directory.path().join("destination");
    let destination = WorkloadDestination::new(start_at(control), PlacerConfig::default());
    destination.prepare(&offer(&source)).unwrap();
    let mut written = source.start_tracking().unwrap();
    copy(&source, &destination, &written);
    work_goes_on(|| source.work_done());
    source.freeze().unwrap();
    let dirty = source.take_dirty().unwrap();
    change(&source, &destination, &dirty);
    written.union_with(&dirty);
    let (sink, _faults) = faults();
    destination.arm(&Blocks::new(), &written, sink).unwrap();
    destination
        .load_state(&source.save_state().unwrap())
        .unwrap();
    destination.resume().unwrap();
    destination.disarm().unwrap();
    (destination, directory)
}

#[test]
fn one_stale_page_is_found() {
    /// Pages at the beginning of each worker's half that hold its generation table.
    const TABLE: u32 = 4;
    let mut stale = None;
    let (destination, _directory) =
        move_with_damage(Profile::Idle, |source, destination, dirty| {
            // A page whose old contents are there and differ.
            let (mut new, mut old) = ([0; 4096], [0; 4096]);
            let mut send = dirty.clone();
            for (region, block) in dirty.iter_blocks() {
                source.read(region, block, &mut new).unwrap();
                destination.read(region, block, &mut old).unwrap();
                let data = block % (PAGES / 2) >= TABLE;
                if data && stale.is_none() && new != old {
                    stale = Some(block);
                    send.remove(region, block);
                }
            }
            copy(source, destination, &send);
        });
    let stale = stale.expect("an idle guest wrote something");
    let damage = destination.verify().unwrap().unwrap_err();
    assert!(
        damage.contains(&format!("page {stale} ")),
        "page {stale} was stale, the guest says: {damage}"
    );
    destination.end_guest().unwrap();
}

#[test]
fn one_wrong_byte_is_found() {
    let (destination, directory) = move_with_damage(Profile::Idle, |source, destination, dirty| {
        copy(source, destination, dirty);
    });
    assert_eq!(destination.verify(), Some(Ok(u64::from(PAGES))));
    destination.end_guest().unwrap();

    // The workers come across it by themselves.
    let guest = Guest::start(directory.path(), "scanned", |options| {
        options.profile = Profile::Scan;
        options.rate_factor = 0.0;
    });
    let handover = guest.control().memory(Purpose::Track).unwrap();
    let memory = std::fs::File::from(handover.memory);
    let page = 5000;
    memory.write_all_at(&[1, 2, 3], page * 4096 + 77).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let found = loop {
        let description = guest.control().describe().unwrap();
        if description.stats.wrong > 0 {
            break description;
        }
        assert!(Instant::now() < deadline, "no worker read the page");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(found.wrong[0].contains("page 5000 "), "{:?}", found.wrong);
    assert!(guest.control().verify().is_err());
}

#[test]
fn a_killed_pager_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let guest = Guest::start(directory.path(), "source", |_| {});
    let arrived = Guest::start(directory.path(), "destination", |options| {
        options.incoming = true;
    });
    let source = WorkloadSource::attach(&guest.control).unwrap();
    work_goes_on(|| source.work_done());
    source.freeze().unwrap();

    half_page(&guest, &arrived);

    let description = arrived.control().describe().unwrap();
    assert_eq!(description.standing, Standing::Running);
    assert!(description.paged);
    // Nobody may track a guest whose pages are missing.
    assert!(matches!(
        arrived.control().memory(Purpose::Track),
        Err(ControlError::Refused(..))
    ));

    // A freeze cannot come through to workers that wait for pages; it says so and changes nothing.
    let refused = arrived.control().freeze(Duration::from_millis(100));
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("missing pages"), "{text}");

    let (sink, faults) = faults();
    let (destination, missing) =
        WorkloadDestination::adopt(&arrived.control, PlacerConfig::default(), sink, &no_note)
            .unwrap();
    assert!(!missing.is_empty());
    // Who waits since the first pager's time is told again.
    let (_, waiting) = faults.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(missing.contains(REGION, waiting));
    push(&source, &destination, missing, &faults);
    // The block of the first fault was pushed with the rest.
    destination.disarm().unwrap();
    work_goes_on(|| destination.work_done());
    assert!(!destination.describe_guest().unwrap().paged);

    // Killed as well, before it could tell anybody: the next one finds that nothing is missing, and is done.
    drop(destination);
    let (sink, _faults) = self::faults();
    let (destination, missing) =
        WorkloadDestination::adopt(&arrived.control, PlacerConfig::default(), sink, &no_note)
            .unwrap();
    assert!(missing.is_empty());
    destination.resume().unwrap();
    destination.place(REGION, 7, &[9; 4096]).unwrap(); // late, of no effect
    destination.disarm().unwrap();
    work_goes_on(|| destination.work_done());
    assert_eq!(destination.verify(), Some(Ok(u64::from(PAGES))));
    source.release().unwrap();
    destination.end_guest().unwrap();
}

#[test]
fn a_guest_without_a_state_cannot_be_adopted() {
    let directory = tempfile::tempdir().unwrap();
    let waiting = Guest::start(directory.path(), "waiting", |options| {
        options.incoming = true;
    });
    let (sink, _faults) = faults();
    let adopted =
        WorkloadDestination::adopt(&waiting.control, PlacerConfig::default(), sink, &no_note);
    let text = adopted.err().unwrap().chain();
    assert!(text.contains("never given its state"), "{text}");
    assert!(WorkloadSource::attach(&waiting.control).is_err());
}

#[test]
fn what_does_not_fit_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let guest = Guest::start(directory.path(), "source", |_| {});
    let source = WorkloadSource::attach(&guest.control).unwrap();
    let refused = |launch: Launch, change: &dyn Fn(&mut Offer), why: &str| {
        let mut offer = offer(&source);
        change(&mut offer);
        let destination = WorkloadDestination::new(launch, PlacerConfig::default());
        let refusal = destination.check(&offer).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::Guest);
        assert!(refusal.to_string().contains(why), "{refusal}");
    };
    let start = || start_at(directory.path().join("never"));
    refused(start(), &|offer| offer.guest.kind = "qemu".into(), "'qemu'");
    refused(start(), &|offer| offer.regions.clear(), "region of memory");
    refused(start(), &|offer| offer.regions[0].blocks = 1 << 24, "8 GiB");
    refused(
        start(),
        &|offer| _ = offer.guest.facts.insert("format".into(), "9".into()),
        "format is 9",
    );
    let running = Launch::Waiting {
        control: guest.control.clone(),
    };
    refused(running, &|_| {}, "--incoming");
    let smaller = Guest::start(directory.path(), "smaller", |options| {
        options.incoming = true;
        options.bytes = BYTES / 2;
    });
    let smaller = Launch::Waiting {
        control: smaller.control.clone(),
    };
    refused(smaller, &|_| {}, "same size");
}

#[test]
fn a_guest_that_does_not_start_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let guest = Guest::start(directory.path(), "source", |_| {});
    let source = WorkloadSource::attach(&guest.control).unwrap();
    let prepare = |control: PathBuf| {
        let destination = WorkloadDestination::new(start_at(control), PlacerConfig::default());
        destination.prepare(&offer(&source)).unwrap_err().chain()
    };
    let text = prepare(directory.path().join("no/such/directory"));
    assert!(text.contains("cannot listen"), "{text}");
    // A path where another guest listens must not be taken for the new one's.
    let text = prepare(guest.control.clone());
    assert!(text.contains("another guest"), "{text}");
    work_goes_on(|| source.work_done());
}

#[test]
fn an_abandoned_guest_ends_by_itself() {
    let directory = tempfile::tempdir().unwrap();
    let mut waiting = Guest::start(directory.path(), "waiting", |options| {
        options.incoming = true;
        options.end_when_abandoned = true;
    });
    assert!(waiting.ended(), "its only connection has gone");
    assert!(!waiting.control.exists());

    let mut life = Command::new("sleep").arg("600").spawn().unwrap();
    let mut bound = Guest::start(directory.path(), "bound", |options| {
        options.die_with = Some(life.id());
    });
    assert!(bound.control().describe().is_ok());
    life.kill().unwrap();
    life.wait().unwrap();
    assert!(bound.ended(), "what it was to die with has ended");
}

#[test]
fn a_guest_with_a_state_does_not_end_by_itself() {
    let directory = tempfile::tempdir().unwrap();
    let source = Guest::start(directory.path(), "source", |_| {});
    let mut control = source.control();
    control.freeze(Duration::from_secs(10)).unwrap();
    let state = control.save().unwrap();
    let options = GuestOptions {
        incoming: true,
        end_when_abandoned: true,
        die_with: Some(std::process::id()),
        ..GuestOptions::new(directory.path().join("loaded"), BYTES)
    };
    let child = Command::new(fixture())
        .args(options.to_args())
        .spawn()
        .unwrap();
    let mut loaded = Guest {
        child,
        control: options.control,
    };
    let mut client = Control::wait(&loaded.control, Duration::from_secs(30), || true).unwrap();
    client.load(&state).unwrap();
    drop(client);
    // The connection has gone; the next one still finds the guest and its state.
    let mut client = loaded.control();
    assert_eq!(client.describe().unwrap().standing, Standing::Frozen);
    assert_eq!(client.save().unwrap(), state);
    client.stop().unwrap();
    assert!(loaded.ended());
}

#[test]
fn the_control_socket_bears_nonsense() {
    let directory = tempfile::tempdir().unwrap();
    let guest = Guest::start(directory.path(), "guest", |_| {});
    let mut raw = UnixStream::connect(&guest.control).unwrap();
    raw.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    raw.write_all(b"GET / HTTP/1.1\n{\"do\":\"dance\"}\n{\"do\":\"describe\"}\n")
        .unwrap();
    let lines: Vec<String> = BufReader::new(&raw)
        .lines()
        .take(3)
        .collect::<Result<_, _>>()
        .unwrap();
    assert!(lines[0].contains("not a request"), "{}", lines[0]);
    assert!(lines[1].contains("not a request"), "{}", lines[1]);
    assert!(lines[2].contains("description"), "{}", lines[2]);

    let refused = |result: Result<(), ControlError>| {
        assert!(
            matches!(result, Err(ControlError::Refused(..))),
            "{result:?}"
        );
    };
    let mut control = guest.control();
    refused(control.save().map(|_| ())); // it runs
    refused(control.load(b"nonsense"));
    refused(control.memory(Purpose::Page).map(|_| ())); // nothing is missing

    let waiting = Guest::start(directory.path(), "waiting", |options| {
        options.incoming = true;
    });
    let mut control = waiting.control();
    refused(control.freeze(Duration::from_secs(1)));
    refused(control.verify().map(|_| ()));
    refused(control.load(&[0xff; 3000]));
    refused(control.memory(Purpose::Track).map(|_| ()));
    // The state of another guest, with bytes to spare, cut short, of another size.
    let mut running = guest.control();
    running.freeze(Duration::from_secs(10)).unwrap();
    let state = running.save().unwrap();
    refused(control.load(&state[..state.len() - 1]));
    refused(control.load(&[&state[..], &[0]].concat()));
    let small = Guest::start(directory.path(), "small", |options| {
        options.incoming = true;
        options.bytes = BYTES / 2;
    });
    refused(small.control().load(&state));
    control.load(&state).unwrap();
    refused(control.load(&state));
}

#[test]
fn connections_are_served_side_by_side() {
    let directory = tempfile::tempdir().unwrap();
    let guest = Guest::start(directory.path(), "guest", |_| {});
    let mut clients: Vec<_> = (0..10).map(|_| guest.control()).collect();
    std::thread::scope(|scope| {
        for (number, client) in clients.iter_mut().enumerate() {
            scope.spawn(move || {
                for _ in 0..20 {
                    client.describe().unwrap();
                    // One at a time; the others are told to come again.
                    match if number % 2 == 0 {
                        client.freeze(Duration::from_secs(10))
                    } else {
                        client
                            .verify()
                            .map(|pages| assert_eq!(pages, u64::from(PAGES)))
                    } {
                        Ok(()) => client.thaw().or_else(busy).unwrap(),
                        result => result.or_else(busy).unwrap(),
                    }
                }
            });
        }
    });
    clients[0].thaw().unwrap();
    assert_eq!(clients[0].verify().unwrap(), u64::from(PAGES));
}

fn busy(error: ControlError) -> Result<(), ControlError> {
    match error {
        ControlError::Refused(_, why) if why.contains("busy") => Ok(()),
        error => Err(error),
    }
}
