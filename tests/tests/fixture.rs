//! The fixtures themselves: a guest that boots and ticks, a checker that sees a wrong byte.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use hybridmig_tests::vm::PAGE;
use hybridmig_tests::{Ram, Vm, VmConfig, console};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn vm_guest_boots_ticks_and_verifies() {
    let config = VmConfig {
        ram: Ram::File,
        ..VmConfig::default()
    };
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
