//! The main job on real input: a Linux guest in an unmodified QEMU moves between two `hybridmig`
//! processes over a relayed link of 50 ms RTT, while it dirties its memory faster than the link can
//! carry. It must stay alive, live one life, and never find a wrong byte.

use std::time::Duration;

use anyhow::{Result, ensure};
use hybridmig_tests::migration::{Host, PATIENCE, TEST_LINK, relay};
use hybridmig_tests::{Vm, VmConfig, console};
use nix::sys::signal::Signal;

/// A migration of 256 MiB takes a few seconds; a starved machine takes its time.
const MOVE: Duration = Duration::from_secs(150);

fn busy_guest() -> VmConfig {
    VmConfig {
        memory_mib: 256,
        checked_mib: 96,
        // 200 Mbit/s carry 25 MB/s.
        dirty_rate: 40.0,
        hot_percent: 25,
        ..VmConfig::default()
    }
}

/// Moves the guest from `source` to `destination` and prints what it cost.
fn migrate(
    (from, source): (&Host, &Vm),
    (to, destination): (&Host, &Vm),
    arguments: &[&str],
) -> Result<()> {
    let qmp = destination.qmp_socket().display().to_string();
    let mut recv = to.recv(from, ["--qmp", &qmp])?;
    let relay = relay(recv.address, TEST_LINK, 7)?;
    let qmp = source.qmp_socket().display().to_string();
    let mut words = vec!["--qmp", &qmp];
    words.extend(arguments);
    let mut send = from.send(to, relay.local_addr(), words)?;
    send.ends_with(0, MOVE)?;
    recv.process.succeed(PATIENCE)?;
    let report = send.report()?;
    let down = report.downtime.unwrap_or_default();
    println!(
        "{arguments:?}: total {:.2} s, downtime {:.3} s, rounds {}, network faults {}, L {:?}",
        report.times.total,
        down.total,
        report.rounds.len(),
        report.faults.as_ref().map_or(0, |faults| faults.network),
        report.agility.as_ref().map(|agility| agility.lost_work),
    );
    println!("{}", send.process.stderr().tail(20));
    println!("{}", send.process.stdout().tail(40));
    relay.stop();
    Ok(())
}

/// The guest ticks at its new place, has lived one life, and finds all of its pages right.
fn alive_and_right(source: &Vm, destination: &Vm) -> Result<()> {
    destination.console().wait_ticks(20, PATIENCE)?;
    let consoles = [source.console(), destination.console()];
    println!(
        "longest gap on the console {:?}",
        console::longest_gap(&consoles)
    );
    console::one_life(&consoles)?;
    let verified = destination.verify()?;
    ensure!(
        verified.bad == 0,
        "{} of {} pages are wrong",
        verified.bad,
        verified.pages
    );
    ensure!(
        console::bad_pages(&consoles) == 0,
        "the checker saw a wrong page on the way"
    );
    Ok(())
}

fn one_way(arguments: &[&str]) -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let config = busy_guest();
    let source = Vm::boot(&config)?;
    let destination = Vm::start(&config.incoming("destination"))?;
    migrate((&a, &source), (&b, &destination), arguments)?;
    alive_and_right(&source, &destination)
}

#[test]
fn vm_moves_in_hybrid_mode() -> Result<()> {
    one_way(&["--mode", "hybrid"])
}

#[test]
fn vm_moves_in_postcopy_mode() -> Result<()> {
    one_way(&["--mode", "postcopy"])
}

#[test]
fn vm_moves_with_half_of_its_memory_before_the_resume() -> Result<()> {
    one_way(&["--mode", "hybrid", "--mem-frac", "0.5"])
}

/// The guest writes faster than the link carries: pre-copy does not reach a downtime of 100 ms, and
/// says so with the guest running on; with a longer one it moves.
#[test]
fn vm_moves_in_precopy_mode_when_it_may_stop_for_long_enough() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let config = busy_guest();
    let source = Vm::boot(&config)?;
    let destination = Vm::start(&config.incoming("destination"))?;
    let qmp = destination.qmp_socket().display().to_string();
    let recv = b.recv(&a, ["--qmp", &qmp])?;
    let relay = relay(recv.address, TEST_LINK, 7)?;
    let qmp = source.qmp_socket().display().to_string();
    let words = [
        "--qmp",
        &qmp,
        "--mode",
        "precopy",
        "--max-rounds",
        "4",
        "--max-downtime",
        "100ms",
    ];
    let mut send = a.send(&b, relay.local_addr(), words)?;
    send.ends_with(5, MOVE)?;
    source.console().wait_ticks(20, PATIENCE)?;
    drop(recv);
    relay.stop();
    drop(destination);

    let destination = Vm::start(&config.incoming("destination"))?;
    let words = [
        "--mode",
        "precopy",
        "--max-rounds",
        "4",
        "--max-downtime",
        "20s",
    ];
    migrate((&a, &source), (&b, &destination), &words)?;
    alive_and_right(&source, &destination)
}

#[test]
fn vm_moves_there_and_back() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let config = busy_guest();
    let first = Vm::boot(&config)?;
    let second = Vm::start(&config.incoming("second"))?;
    migrate((&a, &first), (&b, &second), &[])?;
    alive_and_right(&first, &second)?;
    let third = Vm::start(&config.incoming("third"))?;
    migrate((&b, &second), (&a, &third), &[])?;
    alive_and_right(&second, &third)
}

/// What was set in QEMU for a migration that did not happen is undone: the next one works.
#[test]
fn vm_goes_on_when_its_send_is_ended_and_moves_at_the_second_try() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let config = busy_guest();
    let source = Vm::boot(&config)?;
    let destination = Vm::start(&config.incoming("first try"))?;
    let qmp = destination.qmp_socket().display().to_string();
    let mut recv = b.recv(&a, ["--qmp", &qmp])?;
    let relay = relay(recv.address, "delay 25ms rate 20mbit limit 50ms", 7)?;
    let qmp = source.qmp_socket().display().to_string();
    let mut send = a.send(&b, relay.local_addr(), ["--qmp", &qmp])?;
    send.process.wait_for_stderr("pre-copy", PATIENCE)?;
    send.process.signal(Signal::SIGTERM)?;
    send.ends_with(4, PATIENCE)?;
    let status = recv.process.wait(PATIENCE)?;
    ensure!(status.code() == Some(4), "recv ended with {status}");
    source.console().wait_ticks(20, PATIENCE)?;
    relay.stop();
    drop(destination);

    let destination = Vm::start(&config.incoming("second try"))?;
    migrate((&a, &source), (&b, &destination), &[])?;
    alive_and_right(&source, &destination)
}
