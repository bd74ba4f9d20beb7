//! The fixtures themselves: a guest that boots and ticks, a checker that sees a wrong byte.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hybridmig_tests::keeper::Kept;
use hybridmig_tests::transcript::{Mark, Transcript};
use hybridmig_tests::vm::PAGE;
use hybridmig_tests::{HybridmigProcess, Vm, VmConfig, console, vm};
use nix::sys::signal::Signal;
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn vm_guest_boots_ticks_and_verifies() {
    let config = VmConfig::default();
    let vm = Vm::boot(&config).unwrap();
    vm.console().wait_ticks(5, PATIENCE).unwrap();
    let verified = vm.verify().unwrap();
    assert_eq!(verified.pages, (config.checked_mib << 20) / PAGE as u64);
    assert_eq!(verified.bad, 0);
    vm.console().set_rate(0.0, PATIENCE).unwrap();
    console::one_life(&[vm.console()]).unwrap();
    assert_eq!(console::bad_pages(&[vm.console()]), 0);
    assert!(console::longest_gap(&[vm.console()]) > Duration::ZERO);
    println!("longest gap {:?}", console::longest_gap(&[vm.console()]));
}

#[test]
fn vm_wrong_byte_is_reported() {
    let config = VmConfig {
        checked_mib: 16,
        dirty_rate: 0.0,
        ..VmConfig::default()
    };
    let vm = Vm::boot(&config).unwrap();
    assert_eq!(vm.verify().unwrap().bad, 0);
    let (offset, number) = a_checked_page(&vm);
    let mut byte = [0];
    let last = offset + PAGE as u64 - 1;
    vm.ram().read_exact_at(&mut byte, last).unwrap();
    vm.ram().write_all_at(&[byte[0] ^ 1], last).unwrap();
    let wrong = vm.console().wait_for("BAD page", PATIENCE).unwrap();
    let expected = format!("BAD page {number}: generation 1 expected");
    assert!(wrong.text.starts_with(&expected), "{}", wrong.text);
    assert!(
        wrong.text.contains("first wrong word 511"),
        "{}",
        wrong.text
    );
    assert_eq!(vm.verify().unwrap().bad, 1);
    vm.console().wait_ticks(1, PATIENCE).unwrap();
    assert_eq!(console::bad_pages(&[vm.console()]), 1);
}

#[test]
fn vm_that_waits_for_a_migration_says_nothing() {
    let source = VmConfig::default();
    let mut vm = Vm::start(&source.incoming("destination")).unwrap();
    assert_eq!(vm.control().status().unwrap(), "inmigrate");
    assert!(vm.console().transcript().lines().is_empty());
    assert!(console::one_life(&[vm.console()]).is_err());
    vm.kill().unwrap();
}

#[test]
fn vm_moved_by_qemu_itself_lives_one_life() {
    let config = VmConfig::default();
    let mut source = Vm::boot(&config).unwrap();
    let mut destination = Vm::start(&config.incoming("destination")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let uri = format!("unix:{}", directory.path().join("state").display());
    let command = json!({ "uri": uri });
    let incoming = destination.control();
    incoming
        .execute("migrate-incoming", command.clone())
        .unwrap();
    source.control().execute("stop", json!({})).unwrap();
    source.control().execute("migrate", command).unwrap();
    let paused = |vm: &mut Vm, wanted: &str| vm.control().status().unwrap() == wanted;
    until("the source is done", || paused(&mut source, "postmigrate"));
    until("the destination is ready", || {
        paused(&mut destination, "paused")
    });
    assert_eq!(vm::differing_pages(&source, &destination).unwrap(), [0; 0]);

    let before = source.console().ticks().len();
    destination.control().execute("cont", json!({})).unwrap();
    destination.console().wait_ticks(3, PATIENCE).unwrap();
    assert_eq!(destination.verify().unwrap().bad, 0);
    assert_eq!(source.console().ticks().len(), before);
    let both = [source.console(), destination.console()];
    console::one_life(&both).unwrap();
    println!("longest gap {:?}", console::longest_gap(&both));

    // A source that is let go as well is a second life, and must not pass.
    source.control().execute("cont", json!({})).unwrap();
    source.console().wait_ticks(3, PATIENCE).unwrap();
    let both = [source.console(), destination.console()];
    let error = console::one_life(&both).unwrap_err().to_string();
    assert!(error.contains("has run twice"), "{error}");
}

#[test]
fn process_is_heard_signalled_and_waited_for() {
    let shell = |script: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        HybridmigProcess::spawn_command("a shell", command).unwrap()
    };
    let mut process = shell("trap 'echo caught >&2; exit 3' TERM; echo ready; while :; do :; done");
    process.wait_for_stdout("ready", PATIENCE).unwrap();
    process.signal(Signal::SIGTERM).unwrap();
    process.wait_for_stderr("caught", PATIENCE).unwrap();
    assert_eq!(process.wait(PATIENCE).unwrap().code(), Some(3));

    let mut process = shell("echo out; echo err >&2; exit 7");
    let error = process.succeed(PATIENCE).unwrap_err().to_string();
    assert!(error.contains("exit status: 7"), "{error}");
    process.wait_for_stderr("err", PATIENCE).unwrap();
    let error = process.wait_for_stdout("never", PATIENCE).unwrap_err();
    assert!(format!("{error:#}").contains("it has ended"), "{error:#}");

    let mut process = shell("exec sleep 600");
    assert!(process.wait(Duration::from_millis(10)).is_err());
    process.kill().unwrap();
    assert!(process.signal(Signal::SIGTERM).is_err());
}

#[test]
fn children_die_with_a_test_that_is_killed() {
    let mut test = Command::new(std::env::current_exe().unwrap());
    test.args(["--exact", "leaves_a_child", "--ignored", "--nocapture"]);
    test.stdout(Stdio::piped());
    let mut test = Kept::start("a test", test).unwrap();
    let said = Transcript::new("a test");
    said.follow(test.child().stdout.take().unwrap()).unwrap();
    let line = said.wait(
        Mark::default(),
        "process id",
        |line| line.starts_with("child "),
        &[],
        PATIENCE,
    );
    let pid: u32 = line.unwrap().text["child ".len()..].parse().unwrap();
    assert_eq!(command_of(pid).as_deref(), Some("sleep\n"));
    test.kill().unwrap();
    // A zombie has no other state before somebody waits for it; it does not run either.
    until("the child is gone", || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.is_empty() || status.contains("State:\tZ")
    });
}

/// Not a test of its own: what [`children_die_with_a_test_that_is_killed`] kills.
#[test]
#[ignore = "waits to be killed"]
fn leaves_a_child() {
    let mut command = Command::new("sleep");
    command.arg("600");
    // Started by a thread that ends at once, which must not be the child's end.
    let start = std::thread::spawn(|| Kept::start("a child", command).unwrap());
    let mut child = start.join().unwrap();
    assert_eq!(child.has_ended().unwrap(), None);
    println!("\nchild {}", child.pid());
    child.wait(10 * PATIENCE).unwrap();
}

fn command_of(pid: u32) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/comm")).ok()
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Offset in RAM and number of one of the checker's pages: its number, its first generation, and
/// the part of it that repeats.
fn a_checked_page(vm: &Vm) -> (u64, u64) {
    let length = vm.ram().metadata().unwrap().len();
    let mut page = [0; PAGE];
    let mut found = (0..length).step_by(PAGE).filter_map(|offset| {
        vm.ram().read_exact_at(&mut page, offset).unwrap();
        let word = |i: usize| u64::from_ne_bytes(page[i * 8..i * 8 + 8].try_into().unwrap());
        let stamp = word(511);
        let repeats = (260..512).all(|i| word(i) == stamp) && stamp > u64::from(u32::MAX);
        (word(1) == 1 && repeats).then(|| (offset, word(0)))
    });
    found.nth(100).expect("the checker has more than 100 pages")
}
