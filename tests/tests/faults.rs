//! What breaks while a guest moves: the link, a process, the memory or the disk of a host. The guest
//! must run on exactly one side, or on none and wait for a person; and no byte of it may be wrong.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hybridmig_engine::guest::workload::control::Control;
use hybridmig_netem::RelayHandle;
use hybridmig_tests::migration::{Arrived, Guest, Host, PATIENCE, Recv, Send, relay};
use nix::sys::signal::Signal;

/// Slow enough that a migration of 64 MiB is still in pre-copy when the test acts.
const SLOW_LINK: &str = "delay 10ms rate 20mbit limit 50ms";

/// The rest of 16 MiB takes some seconds in post-copy.
const POSTCOPY_LINK: &str = "delay 10ms rate 20mbit limit 50ms";

/// The handover is under way for a third of a second.
const LONG_LINK: &str = "delay 150ms rate 100mbit limit 100ms";

/// How long a cut lasts where the link comes back.
const CUT: Duration = Duration::from_secs(2);

/// The patience of those who wait for somebody who will not come; a link counts as lost after a
/// quarter of it.
const SHORT: [&str; 2] = ["--patience", "6s"];

/// A guest on its way from one host to another.
struct Move {
    _source: Host,
    _destination: Host,
    guest: Guest,
    send: Send,
    recv: Recv,
    arrived: Arrived,
    relay: RelayHandle,
}

impl Move {
    fn start(mebibytes: u64, link: &str, send: &[&str], recv: &[&str]) -> Result<Self> {
        let (source, destination) = (Host::new()?, Host::new()?);
        let guest = Guest::start(&source, mebibytes)?;
        let (recv, arrived) = destination.recv_workload(&source, recv)?;
        let relay = relay(recv.address, link, 1)?;
        let send = source.send_workload(&guest, &destination, relay.local_addr(), send)?;
        Ok(Self {
            _source: source,
            _destination: destination,
            guest,
            send,
            recv,
            arrived,
            relay,
        })
    }

    /// Waits until the source says that it is in `phase`.
    fn reach(&self, phase: &str) -> Result<()> {
        self.send.process.wait_for_stderr(phase, PATIENCE)?;
        Ok(())
    }

    /// The destination has it all, and the guest has found every byte right.
    fn has_moved(&mut self) -> Result<()> {
        self.send.ends_with(0, PATIENCE)?;
        self.recv.ends_with(0, PATIENCE)?;
        let report = self.recv.report()?;
        let verified = report.verified.context("the guest was not verified")?;
        ensure!(verified.ok, "{verified:?}");
        ensure!(
            Control::connect(self.guest.control()).is_err(),
            "the source's guest is still there"
        );
        self.arrived.runs_here()
    }
}

#[test]
fn a_link_that_dies_in_precopy_leaves_the_guest_at_the_source() -> Result<()> {
    let mut it = Move::start(64, SLOW_LINK, &SHORT, &[])?;
    it.reach("pre-copy")?;
    it.relay.set_down(true);
    it.send.ends_with(4, PATIENCE)?;
    it.send
        .process
        .wait_for_stdout("the guest runs here", PATIENCE)?;
    it.arrived.is_nowhere()?;
    it.guest.runs_here()
}

#[test]
fn an_interrupt_ends_a_send_whose_link_is_dead() -> Result<()> {
    let mut it = Move::start(64, SLOW_LINK, &[], &[])?;
    it.reach("pre-copy")?;
    it.relay.set_down(true);
    it.send.process.signal(Signal::SIGINT)?;
    it.send.ends_with(4, PATIENCE)?;
    // Not the end of the link, which comes much later.
    it.send.process.wait_for_stdout("interrupted", PATIENCE)?;
    it.guest.runs_here()
}

#[test]
fn a_cut_in_postcopy_is_waited_for() -> Result<()> {
    let arguments = ["--mode", "postcopy"];
    let mut it = Move::start(16, POSTCOPY_LINK, &arguments, &["--verify"])?;
    it.reach("post-copy")?;
    it.relay.set_down(true);
    std::thread::sleep(CUT);
    it.relay.set_down(false);
    it.has_moved()
}

/// Longer than a link is kept: the source dials anew, and the destination says what it lacks.
#[test]
fn a_long_cut_in_postcopy_ends_with_a_new_link() -> Result<()> {
    let arguments = ["--mode", "postcopy", "--patience", "20s"];
    let mut it = Move::start(16, POSTCOPY_LINK, &arguments, &["--verify"])?;
    it.reach("post-copy")?;
    it.relay.set_down(true);
    it.send.process.wait_for_stderr("lost", PATIENCE)?;
    it.relay.set_down(false);
    it.has_moved()?;
    let link = it.send.report()?.link.context("no figures of the link")?;
    ensure!(link.reconnects > 0, "the link was never lost");
    Ok(())
}

/// Wherever exactly the cut falls, one side has the guest.
fn cut_at_the_handover(send: &[&str], until_lost: bool) -> Result<()> {
    let mut it = Move::start(16, LONG_LINK, send, &["--verify"])?;
    it.reach("freeze-copy")?;
    it.relay.set_down(true);
    if until_lost {
        it.send.process.wait_for_stderr("lost", PATIENCE)?;
    } else {
        std::thread::sleep(CUT);
    }
    it.relay.set_down(false);
    let status = it.send.process.wait(PATIENCE)?;
    println!("{status}: {}", it.send.process.stdout().tail(3));
    match status.code() {
        Some(0) => it.has_moved(),
        Some(3 | 4) => {
            it.recv.process.wait(PATIENCE)?;
            it.arrived.is_nowhere()?;
            it.guest.runs_here()
        }
        _ => it.send.ends_with(0, PATIENCE),
    }
}

#[test]
fn a_cut_at_the_handover_is_waited_for() -> Result<()> {
    cut_at_the_handover(&["--mode", "postcopy"], false)
}

#[test]
fn a_long_cut_at_the_handover_is_settled_over_a_new_link() -> Result<()> {
    cut_at_the_handover(&["--mode", "postcopy", "--patience", "12s"], true)
}

#[test]
fn a_destination_ends_what_it_prepared_for_a_source_that_was_killed() -> Result<()> {
    let mut it = Move::start(64, SLOW_LINK, &[], &SHORT)?;
    it.reach("pre-copy")?;
    it.send.process.kill()?;
    it.recv.process.wait_for_stderr("lost", PATIENCE)?;
    it.arrived.is_nowhere()?;
    // It stays to answer a source that comes back, until its operator is tired of it.
    it.recv.process.signal(Signal::SIGTERM)?;
    it.recv.ends_with(4, PATIENCE)?;
    it.guest.runs_here()
}

#[test]
fn a_destination_killed_in_precopy_leaves_the_guest_at_the_source() -> Result<()> {
    let mut it = Move::start(64, SLOW_LINK, &SHORT, &[])?;
    it.reach("pre-copy")?;
    it.recv.process.kill()?;
    it.send.ends_with(4, PATIENCE)?;
    it.arrived.is_nowhere()?;
    it.guest.runs_here()
}
