//! Tests of the workers: a guest that is frozen, saved and loaded equals one that never was.

use super::*;

const PAGES: usize = 4096;

fn plan(profile: Profile, max_accesses: u64) -> Plan {
    Plan {
        profile,
        contents: profile.spec().contents,
        seed: 99,
        threads: 3,
        rate_factor: 0.0,
        max_accesses: Some(max_accesses),
    }
}

fn memory() -> Arc<SharedMemory> {
    Arc::new(SharedMemory::create(c"workers-test", PAGES * PAGE).unwrap())
}

fn new_guest(plan: Plan) -> (Arc<SharedMemory>, Arc<StatsPage>, Workers) {
    let (memory, stats) = (memory(), Arc::new(StatsPage::create().unwrap()));
    let workers = Workers::fill(Arc::clone(&memory), None, Arc::clone(&stats), plan).unwrap();
    (memory, stats, workers)
}

fn wait_for(what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !what() {
        assert!(Instant::now() < deadline, "not reached in a minute");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn freeze(workers: &Workers) {
    workers.freeze(Duration::from_secs(60)).unwrap();
}

fn same_contents(one: &SharedMemory, two: &SharedMemory) -> bool {
    let (mut a, mut b) = ([0; PAGE], [0; PAGE]);
    (0..one.pages()).all(|page| {
        one.read_page(page, &mut a);
        two.read_page(page, &mut b);
        a == b
    })
}

#[test]
fn a_guest_that_was_moved_equals_one_that_was_not() {
    const ACCESSES: u64 = 30_000;
    for profile in [Profile::Db, Profile::Build] {
        let plan = plan(profile, ACCESSES);
        let (stayed, stayed_stats, workers) = new_guest(plan);
        workers.run();
        let end = 3 * ACCESSES;
        wait_for(|| stayed_stats.sample().operations == end);
        freeze(&workers);
        let expected = workers.states();

        let (left, stats, workers) = new_guest(plan);
        workers.run();
        wait_for(|| stats.sample().operations > end / 10);
        freeze(&workers);
        let saved = postcard::to_stdvec(&workers.states()).unwrap();
        let done = stats.sample();
        let (came, stats) = (memory(), Arc::new(StatsPage::create().unwrap()));
        let mut page = [0; PAGE];
        for number in 0..left.pages() {
            left.read_page(number, &mut page);
            came.write(number as usize * PAGE, &page);
        }
        let states = postcard::from_bytes(&saved).unwrap();
        let moved =
            Workers::load(Arc::clone(&came), None, Arc::clone(&stats), plan, states).unwrap();
        assert_eq!(stats.sample(), done);
        assert_eq!(moved.verify(), Ok(PAGES as u64));
        moved.run();
        wait_for(|| stats.sample().operations == end);
        freeze(&moved);
        assert_eq!(moved.states(), expected);
        assert_eq!(moved.verify(), Ok(PAGES as u64));
        assert!(same_contents(&stayed, &came));
        // The one that left has not gone on.
        assert_eq!(workers.verify(), Ok(PAGES as u64));
        assert!(!same_contents(&left, &came));
    }
}

/// The same of the disk: its threads go on where they were, on a copy of memory and disk.
#[test]
fn a_disk_that_was_moved_equals_one_that_was_not() {
    const ACCESSES: u64 = 600;
    let directory = tempfile::tempdir().unwrap();
    let disk = |name: &str| {
        let path = directory.path().join(name);
        Arc::new(Disk::create(&path, 16 << 20, false).unwrap())
    };
    let contents = |disk: &Disk| std::fs::read(disk.path()).unwrap();
    for profile in [Profile::Db, Profile::Build] {
        let plan = plan(profile, ACCESSES);
        let new_guest = |disk: &Arc<Disk>| {
            let (memory, stats) = (memory(), Arc::new(StatsPage::create().unwrap()));
            let disk = Some(Arc::clone(disk));
            let workers = Workers::fill(Arc::clone(&memory), disk, Arc::clone(&stats), plan);
            (memory, stats, workers.unwrap())
        };
        let end = 3 * ACCESSES;
        let verified = Ok(PAGES as u64 + (16 << 20) / 4096);
        let stayed = disk("stayed");
        let (stayed_memory, stats, workers) = new_guest(&stayed);
        workers.run();
        wait_for(|| stats.sample().disk_operations == end);
        wait_for(|| {
            workers
                .states()
                .memory
                .iter()
                .all(|state| state.pattern.accesses() == ACCESSES)
        });
        freeze(&workers);
        let expected = workers.states();
        assert_eq!(workers.verify(), verified);

        let left = disk("left");
        let (left_memory, stats, workers) = new_guest(&left);
        workers.run();
        wait_for(|| stats.sample().disk_operations > end / 10);
        freeze(&workers);
        let saved = postcard::to_stdvec(&workers.states()).unwrap();
        let (came, came_memory) = (disk("came"), memory());
        std::fs::copy(left.path(), came.path()).unwrap();
        let mut page = [0; PAGE];
        for number in 0..left_memory.pages() {
            left_memory.read_page(number, &mut page);
            came_memory.write(number as usize * PAGE, &page);
        }
        let stats = Arc::new(StatsPage::create().unwrap());
        let moved = Workers::load(
            Arc::clone(&came_memory),
            Some(Arc::clone(&came)),
            Arc::clone(&stats),
            plan,
            postcard::from_bytes(&saved).unwrap(),
        )
        .unwrap();
        assert_eq!(moved.verify(), verified);
        moved.run();
        wait_for(|| stats.sample().disk_operations == end);
        wait_for(|| {
            moved
                .states()
                .memory
                .iter()
                .all(|state| state.pattern.accesses() == ACCESSES)
        });
        freeze(&moved);
        assert_eq!(moved.states(), expected);
        assert_eq!(moved.verify(), verified);
        assert!(contents(&stayed) == contents(&came));
        assert!(contents(&left) != contents(&came));
        assert!(same_contents(&stayed_memory, &came_memory));
        // A disk that is older than its memory is found.
        std::fs::copy(left.path(), came.path()).unwrap();
        let damage = moved.verify().unwrap_err();
        assert!(damage.examples[0].contains("disk sector"), "{damage:?}");
        for disk in [stayed, left, came] {
            std::fs::remove_file(disk.path()).unwrap();
        }
    }
}

#[test]
fn nothing_is_touched_while_frozen() {
    let mut plan = plan(Profile::Scan, u64::MAX);
    plan.max_accesses = None;
    let (memory, stats, workers) = new_guest(plan);
    for _ in 0..20 {
        let before = stats.sample().operations;
        workers.run();
        wait_for(|| stats.sample().operations > before);
        freeze(&workers);
        let states = workers.states();
        let copy: Vec<Page> = (0..memory.pages())
            .map(|number| {
                let mut page = [0; PAGE];
                memory.read_page(number, &mut page);
                page
            })
            .collect();
        assert_eq!(workers.verify(), Ok(PAGES as u64));
        let mut page = [0; PAGE];
        for (number, copy) in (0..).zip(&copy) {
            memory.read_page(number, &mut page);
            assert!(page == *copy, "page {number} changed");
        }
        assert_eq!(workers.states(), states);
    }
}

#[test]
fn a_worker_comes_across_a_wrong_page() {
    let (memory, stats, workers) = new_guest(plan(Profile::Scan, 5000));
    let page = 1000;
    memory.write(page * PAGE + 2000, &[0x5a, 0x5a]);
    workers.run();
    wait_for(|| stats.sample().operations == 15_000);
    assert!(stats.sample().wrong > 0);
    let damage = workers.damage();
    assert!(damage.examples[0].contains("page 1000 "), "{damage:?}");
    freeze(&workers);
    assert!(workers.verify().is_err());
}

#[test]
fn the_documented_share_of_accesses_writes() {
    // One cycle of the phases of `build`; in accesses, since time depends on the machine.
    const CYCLE: u64 = 150_000;
    for profile in Profile::ALL {
        let (_, stats, workers) = new_guest(plan(profile, CYCLE / 3));
        workers.run();
        wait_for(|| stats.sample().operations == CYCLE);
        let phases = profile.spec().phases;
        let cycle: u64 = phases.iter().map(|phase| phase.operations).sum();
        let expected: f64 = if phases.len() == 1 {
            CYCLE as f64 * f64::from(phases[0].writes) / 100.0
        } else {
            assert_eq!(cycle, CYCLE);
            let writes = |phase: &super::super::profile::PhaseSpec| {
                phase.operations as f64 * f64::from(phase.writes) / 100.0
            };
            phases.iter().map(writes).sum()
        };
        let found = stats.sample().writes as f64;
        assert!(
            (found - expected).abs() < 0.03 * expected,
            "{profile} {found}"
        );
        assert_eq!(stats.sample().wrong, 0);
    }
}

#[test]
fn a_state_for_another_guest_is_refused() {
    let plan = plan(Profile::Web, 10);
    let (memory, stats, workers) = new_guest(plan);
    let states = workers.states();
    let load = |memory: &Arc<SharedMemory>, states| {
        Workers::load(Arc::clone(memory), None, Arc::clone(&stats), plan, states).is_ok()
    };
    assert!(load(&memory, states.clone()));
    let fewer = States {
        memory: states.memory[1..].to_vec(),
        ..states
    };
    assert!(!load(&memory, fewer));
}
