//! A real Linux guest under QEMU (TCG) through the QEMU guest of the engine alone: no session, no
//! network. What decides is the guest's own memory checker.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hybridmig_engine::blocks::{Blocks, RegionId};
use hybridmig_engine::guest::qemu::disk::DiskChoice;
use hybridmig_engine::guest::qemu::preflight::{Level, Side};
use hybridmig_engine::guest::qemu::{
    QemuDestination, QemuDestinationOptions, QemuOrigin, QemuSource, QemuSourceOptions, inspect,
};
use hybridmig_engine::guest::{
    BlockedTime, DestinationGuest, FaultAnswer, FaultSink, GuestError, SourceGuest,
};
use hybridmig_tests::keeper::Kept;
use hybridmig_tests::{Console, Vm, VmConfig, console};
use hybridmig_transport::message::{Mode, Offer};
use nix::sys::signal::Signal;

const PAGE: usize = 4096;
/// The user without any rights, on Debian.
const NOBODY: u32 = 65534;
const PATIENCE: Duration = Duration::from_secs(60);

/// A small guest, so that a test is over in seconds.
fn small() -> VmConfig {
    VmConfig {
        name: "source".to_owned(),
        memory_mib: 128,
        checked_mib: 24,
        dirty_rate: 6.0,
        ..VmConfig::default()
    }
}

/// The guest's own words about whether its memory is right, after it has come through a move.
fn ticks_on(vm: &Vm, consoles: &[&Console]) -> Result<()> {
    vm.console()
        .wait_ticks(vm.console().ticks().len() + 5, PATIENCE)?;
    let verified = vm.verify()?;
    ensure!(
        verified.bad == 0,
        "{} bad pages of {}",
        verified.bad,
        verified.pages
    );
    ensure!(verified.pages > 0, "nothing was verified");
    ensure!(console::bad_pages(consoles) == 0, "bad pages on the way");
    console::one_life(consoles)
}

fn offer_of(source: &QemuSource) -> Offer {
    Offer {
        guest: source.describe().clone(),
        regions: source.regions().to_vec(),
        mode: Mode::Hybrid,
        check_only: false,
    }
}

fn waiting(vm: &Vm, keep_in: Option<&Path>) -> QemuDestination {
    QemuDestination::new(QemuDestinationOptions {
        origin: QemuOrigin::Waiting(vm.qmp_socket().to_owned()),
        keep_in: keep_in.map(Path::to_owned),
        overwrite_disks: false,
    })
}

fn open(vm: &Vm) -> Result<QemuSource> {
    Ok(QemuSource::open(
        vm.qmp_socket(),
        &QemuSourceOptions::default(),
    )?)
}

/// Faults as they come, for a loop in the test to answer.
#[derive(Default)]
struct Faults {
    asked: Mutex<Vec<(RegionId, u32)>>,
    failed: Mutex<Option<String>>,
}

impl FaultSink for Faults {
    fn fault(&self, region: RegionId, block: u32) -> FaultAnswer {
        self.asked.lock().expect("no panics").push((region, block));
        FaultAnswer::Requested
    }

    fn removed(&self, _: RegionId, _: u32, _: u32) {}

    fn failed(&self, error: GuestError) {
        *self.failed.lock().expect("no panics") = Some(error.chain());
    }
}

/// Copies blocks before the pager is armed.
fn copy(source: &QemuSource, destination: &QemuDestination, blocks: &Blocks) -> Result<()> {
    let mut page = vec![0; PAGE];
    for (region, block) in blocks.iter_blocks() {
        source.read(region, block, &mut page)?;
        destination.write(region, block, &page)?;
    }
    Ok(())
}

/// Moves the guest; returns what stays behind, with the guest running at the destination. What
/// was dirtied last stays behind, and every tenth block.
fn move_guest(
    source: &QemuSource,
    destination: &QemuDestination,
    faults: &Arc<Faults>,
) -> Result<Blocks> {
    let offer = offer_of(source);
    destination
        .check(&offer)
        .map_err(|refusal| anyhow::anyhow!("{refusal}"))?;
    destination.prepare(&offer)?;
    let mut written = source.start_tracking()?;
    copy(source, destination, &written)?;
    let second = source.take_dirty()?;
    copy(source, destination, &second)?;
    written.union_with(&second);
    source.freeze()?;
    let dirty = source.take_dirty()?;
    let state = source.save_state()?;
    ensure!(
        source.take_dirty()?.is_empty(),
        "a frozen guest has written"
    );
    let mut behind = dirty;
    for (region, block) in written.iter_blocks() {
        if block % 10 == 0 {
            behind.insert(region, block);
        }
    }
    let mut kept = written.clone();
    kept.subtract(&behind);
    destination.arm(&behind, &kept, Arc::clone(faults) as Arc<dyn FaultSink>)?;
    load_and_resume(source, destination, faults, &mut behind, &state)?;
    Ok(behind)
}

/// Loads the state and runs the guest, while the faults of that are answered.
fn load_and_resume(
    source: &QemuSource,
    destination: &QemuDestination,
    faults: &Faults,
    behind: &mut Blocks,
    state: &[u8],
) -> Result<()> {
    std::thread::scope(|scope| {
        let loading = scope.spawn(|| {
            destination.load_state(state)?;
            destination.resume()
        });
        let mut served = Ok(0);
        while served.is_ok() && !loading.is_finished() {
            served = answer(source, destination, faults, behind);
            std::thread::yield_now();
        }
        // A load that ends QEMU fails the pager too, and either may be told first: the load says why.
        loading.join().expect("loading does not panic")?;
        served.map(drop)
    })
}

/// Places what was asked for. Returns how many blocks.
fn answer(
    source: &QemuSource,
    destination: &QemuDestination,
    faults: &Faults,
    behind: &mut Blocks,
) -> Result<usize> {
    if let Some(why) = faults.failed.lock().expect("no panics").take() {
        bail!("the pager failed: {why}");
    }
    let asked = std::mem::take(&mut *faults.asked.lock().expect("no panics"));
    for (region, block) in &asked {
        place(source, destination, behind, *region, *block)?;
    }
    Ok(asked.len())
}

fn place(
    source: &QemuSource,
    destination: &QemuDestination,
    behind: &mut Blocks,
    region: RegionId,
    block: u32,
) -> Result<()> {
    let mut page = vec![0; PAGE];
    source.read(region, block, &mut page)?;
    destination.place(region, block, &page)?;
    behind.remove(region, block);
    Ok(())
}

/// Brings everything that stayed behind, faults first.
fn bring_the_rest(
    source: &QemuSource,
    destination: &QemuDestination,
    faults: &Faults,
    behind: &mut Blocks,
) -> Result<usize> {
    let mut asked = 0;
    while let Some((region, blocks)) = behind.pop_front(8) {
        for block in blocks {
            place(source, destination, behind, region, block)?;
        }
        asked += answer(source, destination, faults, behind)?;
    }
    Ok(asked)
}

#[test]
fn inspection_says_what_is_there_and_changes_nothing() -> Result<()> {
    let mut vm = Vm::boot(&small())?;
    let inspection = inspect(vm.qmp_socket(), Side::Source, &DiskChoice::default())?;
    ensure!(
        inspection.texts(Level::Refuse).is_empty(),
        "{:?}",
        inspection.findings
    );
    ensure!(inspection.process.context("a process")?.pid as u32 == vm.pid());
    ensure!(inspection.regions()[0].bytes() == 128 << 20);
    ensure!(inspection.regions()[0].name == "ram");
    ensure!(!inspection.facts.kvm && inspection.facts.machine.starts_with("pc-q35-"));
    // It runs, so it is no destination.
    let error = inspect(vm.qmp_socket(), Side::Destination, &DiskChoice::default())?
        .require()
        .unwrap_err();
    ensure!(error.to_string().contains("-incoming defer"), "{error}");
    ensure!(vm.control().status()? == "running");
    ticks_on(&vm, &[vm.console()])
}

#[test]
fn private_ram_is_refused_by_name() -> Result<()> {
    for (options, expected) in [
        (&["-m", "64"][..], "memory-backend-ram"),
        (
            &[
                "-m",
                "64",
                "-machine",
                "memory-backend=slow",
                "-object",
                "memory-backend-file,id=slow,size=64M,mem-path=/dev/shm,share=off",
            ],
            "share=off",
        ),
        (
            &[
                "-m",
                "64",
                "-machine",
                "memory-backend=anon",
                "-object",
                "memory-backend-ram,id=anon,size=64M,share=on",
            ],
            "memory-backend-ram",
        ),
    ] {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("qmp");
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-display", "none", "-machine", "q35", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(options);
        let _qemu = Kept::start("private", command)?;
        console::connect(&socket, PATIENCE)?;
        let inspection = inspect(&socket, Side::Source, &DiskChoice::default())?;
        let refusals = inspection.texts(Level::Refuse).join("; ");
        ensure!(refusals.contains(expected), "{options:?}: {refusals}");
        ensure!(
            refusals.contains("share=on") && refusals.contains("-object"),
            "{refusals}"
        );
        ensure!(QemuSource::open(&socket, &QemuSourceOptions::default()).is_err());
    }
    Ok(())
}

#[test]
fn a_frozen_guest_thaws_after_its_state_was_saved_twice() -> Result<()> {
    let mut vm = Vm::boot(&small())?;
    let source = open(&vm)?;
    for _ in 0..2 {
        let content = source.start_tracking()?;
        ensure!(content.len() > 1000, "{} blocks of content", content.len());
        source.freeze()?;
        ensure!(vm.control().status()? == "paused");
        let _ = source.take_dirty()?;
        let state = source.save_state()?;
        ensure!(
            (50_000..8 << 20).contains(&state.len()),
            "{} bytes",
            state.len()
        );
        ensure!(vm.control().status()? == "postmigrate");
        source.thaw()?;
        ensure!(vm.control().status()? == "running");
        ticks_on(&vm, &[vm.console()])?;
    }
    // Nothing of ours stays in QEMU.
    let fds = hybridmig_pager::process::find_userfaultfds(vm.pid())?;
    ensure!(fds.is_empty(), "{fds:?}");
    let capabilities = vm
        .control()
        .execute("query-migrate-capabilities", serde_json::json!({}))?;
    let on: Vec<_> = capabilities
        .as_array()
        .context("a list")?
        .iter()
        .filter(|capability| capability["state"] == true)
        .collect();
    ensure!(on.is_empty(), "{on:?}");
    Ok(())
}

#[test]
fn a_guest_moves_there_and_back_again() -> Result<()> {
    let config = VmConfig {
        machine: "pc-q35-7.2".to_owned(),
        ..small()
    };
    let a = Vm::boot(&config)?;
    // Another version of QEMU may be named; otherwise it is the same.
    let other = VmConfig {
        qemu: std::env::var_os("HYBRIDMIG_TEST_OTHER_QEMU").map_or(config.qemu.clone(), Into::into),
        ..config.incoming("destination")
    };
    let b = Vm::start(&other)?;
    let faults = Arc::new(Faults::default());
    let source = open(&a)?;
    let destination = waiting(&b, None);
    let mut behind = move_guest(&source, &destination, &faults)?;
    ensure!(!behind.is_empty(), "nothing was left for post-copy");
    // By its faults alone, until the guest itself has waited for a page.
    let waited = |blocked: &BlockedTime| blocked.threads.iter().any(|(name, _)| name == "vcpu0");
    let deadline = Instant::now() + PATIENCE;
    while !waited(&destination.blocked_time()) {
        ensure!(Instant::now() < deadline, "the guest does not fault");
        answer(&source, &destination, &faults, &mut behind)?;
        std::thread::sleep(Duration::from_millis(1));
    }
    bring_the_rest(&source, &destination, &faults, &mut behind)?;
    let blocked = destination.disarm()?;
    ensure!(blocked.parallelism == 1);
    ensure!(waited(&blocked), "{blocked:?}");
    ensure!(hybridmig_pager::process::find_userfaultfds(b.pid())?.is_empty());
    source.release()?;
    drop(destination);
    ticks_on(&b, &[a.console(), b.console()])?;

    // The destination has become a source like any other.
    let c = Vm::start(&config.incoming("home again"))?;
    let faults = Arc::new(Faults::default());
    let source = open(&b)?;
    let destination = waiting(&c, None);
    let mut behind = move_guest(&source, &destination, &faults)?;
    bring_the_rest(&source, &destination, &faults, &mut behind)?;
    destination.disarm()?;
    source.release()?;
    ticks_on(&c, &[a.console(), b.console(), c.console()])
}

#[test]
fn exec_starts_a_destination_with_what_it_needs() -> Result<()> {
    let config = small();
    let a = Vm::boot(&config)?;
    let source = open(&a)?;
    let folder = tempfile::tempdir()?;
    // As the source was started, less RAM backend and -incoming: those are added.
    let words: Vec<String> = config
        .incoming("started")
        .command_line(folder.path(), Path::new("/dev/shm"))?
        .iter()
        .map(|word| word.to_string_lossy().replace(",memory-backend=ram", ""))
        .collect();
    let mut command = Vec::new();
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        match word.as_str() {
            "-object" | "-incoming" => {
                rest.next();
            }
            word => command.push(format!("'{word}'")),
        }
    }
    let destination = QemuDestination::new(QemuDestinationOptions {
        origin: QemuOrigin::Exec(command.join(" ")),
        keep_in: None,
        overwrite_disks: false,
    });
    let console_socket = folder.path().join("console");
    let faults = Arc::new(Faults::default());
    destination
        .check(&offer_of(&source))
        .map_err(|refusal| anyhow::anyhow!("{refusal}"))?;
    let console = Console::connect("started", &console_socket, PATIENCE)?;
    let mut behind = move_guest(&source, &destination, &faults)?;
    bring_the_rest(&source, &destination, &faults, &mut behind)?;
    destination.disarm()?;
    source.release()?;
    console.wait_ticks(5, PATIENCE)?;
    let verified = console.verify(PATIENCE)?;
    ensure!(verified.bad == 0, "{verified:?}");
    console::one_life(&[a.console(), &console])?;
    // It outlives the object; end it the way an operator would.
    let monitor = destination.monitor().context("a monitor")?;
    drop(destination);
    let mut qmp = hybridmig_tests::Qmp::connect(&monitor, PATIENCE)?;
    ensure!(qmp.status()? == "running");
    qmp.execute("quit", serde_json::json!({}))?;
    std::fs::remove_dir_all(monitor.parent().context("a folder")?)?;
    Ok(())
}

#[test]
fn a_state_that_is_refused_leaves_the_guest_at_the_source() -> Result<()> {
    // QEMU loads a state that lacks a device's part, but not one with a part too many.
    let config = small();
    let a = Vm::boot(&VmConfig {
        qemu_arguments: vec!["-device".to_owned(), "virtio-balloon".to_owned()],
        ..config.clone()
    })?;
    let b = Vm::start(&config.incoming("other"))?;
    let source = open(&a)?;
    let destination = waiting(&b, None);
    // The checks see it first.
    let refusal = destination.check(&offer_of(&source)).unwrap_err();
    ensure!(refusal.to_string().contains("devices"), "{refusal}");
    // An offer that hides it gets as far as QEMU.
    let mut offer = offer_of(&source);
    offer
        .guest
        .facts
        .insert("devices".to_owned(), String::new());
    destination.prepare(&offer)?;
    let content = source.start_tracking()?;
    copy(&source, &destination, &content)?;
    source.freeze()?;
    let behind = source.take_dirty()?;
    let state = source.save_state()?;
    let faults = Arc::new(Faults::default());
    let mut written = content;
    written.subtract(&behind);
    destination.arm(&behind, &written, Arc::clone(&faults) as Arc<dyn FaultSink>)?;
    let mut left = behind.clone();
    let error = load_and_resume(&source, &destination, &faults, &mut left, &state).unwrap_err();
    ensure!(format!("{error:#}").contains("refused"), "{error:#}");
    destination.abandon()?;
    source.thaw()?;
    ticks_on(&a, &[a.console()])
}

#[test]
fn another_machine_and_too_little_memory_are_refused_in_words() -> Result<()> {
    let a = Vm::boot(&small())?;
    let source = open(&a)?;
    let pc = VmConfig {
        machine: "pc".to_owned(),
        ..small().incoming("pc")
    };
    let small_one = VmConfig {
        memory_mib: 64,
        ..small().incoming("small")
    };
    for (config, expected) in [(pc, "-machine"), (small_one, "-m")] {
        let b = Vm::start(&config)?;
        let refusal = waiting(&b, None).check(&offer_of(&source)).unwrap_err();
        ensure!(
            refusal.reasons.iter().any(|r| r.contains(expected)),
            "{refusal}"
        );
    }
    Ok(())
}

/// Environment of the helper below: source's monitor, destination's monitor, folder.
const HELPER: &str = "HYBRIDMIG_TEST_PAGER";

/// The pager of the next test, in a process of its own that is killed: moves the guest, then brings
/// nothing more. Not a test by itself: it does nothing unless it was started by the next one.
#[test]
fn helper_pager() -> Result<()> {
    let Ok(arguments) = std::env::var(HELPER) else {
        return Ok(());
    };
    let [from, to, folder] = arguments.split(':').collect::<Vec<_>>()[..] else {
        bail!("{HELPER}={arguments}");
    };
    let source = QemuSource::open(Path::new(from), &QemuSourceOptions::default())?;
    let destination = QemuDestination::new(QemuDestinationOptions {
        origin: QemuOrigin::Waiting(to.into()),
        keep_in: Some(folder.into()),
        overwrite_disks: false,
    });
    let faults = Arc::new(Faults::default());
    move_guest(&source, &destination, &faults)?;
    std::fs::write(Path::new(folder).join("running"), "")?;
    // Faults are read and never answered.
    loop {
        std::thread::park();
    }
}

#[test]
fn a_killed_pager_is_taken_over_and_nothing_is_lost() -> Result<()> {
    let config = small();
    let a = Vm::boot(&config)?;
    let b = Vm::start(&config.incoming("destination"))?;
    let folder = tempfile::tempdir()?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--exact", "helper_pager", "--nocapture"])
        .env(
            HELPER,
            format!(
                "{}:{}:{}",
                a.qmp_socket().display(),
                b.qmp_socket().display(),
                folder.path().display()
            ),
        );
    let mut pager = Kept::start("pager", command)?;
    let deadline = Instant::now() + PATIENCE;
    while !folder.path().join("running").exists() {
        ensure!(
            Instant::now() < deadline,
            "the helper did not move the guest"
        );
        ensure!(pager.has_ended()?.is_none(), "the helper has ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    pager.signal(Signal::SIGKILL)?;
    pager.wait(PATIENCE)?;

    // The source's side of it is gone too; its frozen RAM is not.
    let source = a.ram();
    let faults = Arc::new(Faults::default());
    let (destination, missing) = QemuDestination::adopt(
        folder.path(),
        Arc::clone(&faults) as Arc<dyn FaultSink>,
        &|_| Ok(()),
    )?;
    ensure!(!missing.is_empty(), "nothing was missing");
    let mut page = vec![0; PAGE];
    let mut placed = BTreeSet::new();
    let mut bring = |region: RegionId, block: u32| -> Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(source, &mut page, u64::from(block) << 12)?;
        destination.place(region, block, &page)?;
        placed.insert(block);
        Ok(())
    };
    for (region, block) in missing.iter_blocks() {
        let asked = std::mem::take(&mut *faults.asked.lock().expect("no panics"));
        for (region, block) in asked {
            bring(region, block)?;
        }
        bring(region, block)?;
    }
    destination.disarm()?;

    // Ended as well, before it had told the source: who follows finds nothing missing and nothing to let go of.
    drop(destination);
    let (destination, missing) = QemuDestination::adopt(folder.path(), faults, &|_| Ok(()))?;
    ensure!(missing.is_empty(), "{missing:?}");
    destination.resume()?;
    destination.place(RegionId(0), 7, &[9; PAGE])?; // late, of no effect
    destination.disarm()?;
    ticks_on(&b, &[a.console(), b.console()])
}

#[test]
fn an_unprivileged_qemu_gets_its_userfaultfd_from_us() -> Result<()> {
    // Needs root to become someone else.
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("qmp");
    std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY))?;
    let mut command = Command::new("qemu-system-x86_64");
    command
        .uid(NOBODY)
        .gid(NOBODY)
        .args([
            "-nodefaults",
            "-display",
            "none",
            "-machine",
            "q35,memory-backend=ram",
        ])
        .args(["-m", "64", "-object"])
        .arg("memory-backend-file,id=ram,size=64M,mem-path=/dev/shm,share=on")
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()));
    let qemu = Kept::start("nobody", command)?;
    console::connect(&socket, PATIENCE)?;
    let deadline = Instant::now() + PATIENCE;
    let path = format!("/proc/{}/status", qemu.pid());
    while !std::fs::read_to_string(&path)?.contains("CapEff:\t0000000000000000") {
        ensure!(Instant::now() < deadline, "QEMU kept its privileges");
        std::thread::sleep(Duration::from_millis(10));
    }
    let source = QemuSource::open(&socket, &QemuSourceOptions::default())?;
    source.start_tracking()?;
    source.freeze()?;
    source.take_dirty()?;
    source.save_state()?;
    source.thaw()?;
    ensure!(hybridmig_pager::process::find_userfaultfds(qemu.pid())?.is_empty());
    for entry in std::fs::read_dir(format!("/proc/{}/fd", qemu.pid()))? {
        let target = std::fs::read_link(entry?.path())?;
        ensure!(
            target != Path::new("/dev/userfaultfd"),
            "a descriptor was left"
        );
    }
    Ok(())
}
