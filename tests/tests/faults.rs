//! What breaks while a guest moves: the link, a process, the memory or the disk of a host. The guest
//! must run on exactly one side, or on none and wait for a person; and no byte of it may be wrong.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hybridmig_engine::guest::workload::control::{Control, Standing};
use hybridmig_engine::journal;
use hybridmig_netem::RelayHandle;
use hybridmig_tests::HybridmigProcess;
use hybridmig_tests::migration::{Arrived, Guest, Host, PATIENCE, Recv, Send, relay};
use nix::libc;
use nix::sys::signal::Signal;

/// Slow enough that a migration of 64 MiB is still in pre-copy when the test acts.
const SLOW_LINK: &str = "delay 10ms rate 20mbit limit 50ms";

/// The rest of 16 MiB takes some seconds in post-copy.
const POSTCOPY_LINK: &str = "delay 10ms rate 20mbit limit 50ms";

/// The handover is under way for a third of a second.
const LONG_LINK: &str = "delay 150ms rate 100mbit limit 100ms";

/// The handover is under way for so long that it can be cut off for certain.
const FAR_LINK: &str = "delay 500ms rate 100mbit limit 200ms";

/// How long a cut lasts where the link comes back.
const CUT: Duration = Duration::from_secs(2);

/// The patience of those who wait for somebody who will not come; a link counts as lost after a
/// quarter of it.
const SHORT: [&str; 2] = ["--patience", "6s"];

/// A guest on its way from one host to another.
struct Move {
    guest: Guest,
    send: Send,
    recv: Recv,
    arrived: Arrived,
    relay: RelayHandle,
    // Last: the sockets by which guests are ended lie in their directories.
    source: Host,
    destination: Host,
}

impl Move {
    fn start(mebibytes: u64, link: &str, send: &[&str], recv: &[&str]) -> Result<Self> {
        let (source, destination) = (Host::new()?, Host::new()?);
        let guest = Guest::start(&source, mebibytes)?;
        let (recv, arrived) = destination.recv_workload(&source, recv)?;
        let relay = relay(recv.address, link, 1)?;
        let send = source.send_workload(&guest, &destination, relay.local_addr(), send)?;
        Ok(Self {
            guest,
            send,
            recv,
            arrived,
            relay,
            source,
            destination,
        })
    }

    /// Waits until the source says that it is in `phase`.
    fn reach(&self, phase: &str) -> Result<()> {
        self.send.process.wait_for_stderr(phase, PATIENCE)?;
        Ok(())
    }

    /// The session of a send that has ended.
    fn session(&self) -> Result<String> {
        Ok(self.send.report()?.session)
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

#[test]
fn a_cut_in_precopy_is_waited_for() -> Result<()> {
    let mut it = Move::start(32, SLOW_LINK, &[], &["--verify"])?;
    it.reach("pre-copy")?;
    it.relay.set_down(true);
    // Longer than a probe's patience, shorter than the link's.
    it.send
        .process
        .wait_for_stderr("link silent for", PATIENCE)?;
    it.relay.set_down(false);
    it.has_moved()?;
    let link = it.send.report()?.link.context("no figures of the link")?;
    ensure!(link.reconnects == 0, "the link was lost");
    ensure!(link.longest_silence >= 6.0, "{} s", link.longest_silence);
    Ok(())
}

/// The source comes from another port in every phase, as behind a NAT that forgets it. The link goes
/// on: nothing is dialed anew.
#[test]
fn an_address_that_changes_in_every_phase_is_followed() -> Result<()> {
    let arguments = ["--mem-frac", "0.5"];
    let mut it = Move::start(16, LONG_LINK, &arguments, &["--verify"])?;
    for phase in ["pre-copy", "freeze-copy", "post-copy"] {
        it.reach(phase)?;
        it.relay.rebind();
    }
    it.has_moved()?;
    let link = it.send.report()?.link.context("no figures of the link")?;
    ensure!(link.reconnects == 0, "the link was lost");
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
    // It stays for a while, to answer a source that comes back.
    it.arrived.is_nowhere()?;
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

/// The guest runs at the destination without its pager, and the source keeps the rest of it.
#[test]
fn a_destination_killed_in_postcopy_leaves_the_source_frozen() -> Result<()> {
    let arguments = ["--mode", "postcopy", "--patience", "6s"];
    let mut it = Move::start(16, POSTCOPY_LINK, &arguments, &[])?;
    it.reach("post-copy")?;
    it.recv.process.kill()?;
    it.send.ends_with(7, PATIENCE)?;
    it.send
        .process
        .wait_for_stdout("keep the frozen guest", PATIENCE)?;
    it.guest.is_frozen()?;
    let there = Control::connect(it.arrived.control())?.describe()?;
    ensure!(
        there.standing == Standing::Running && there.paged,
        "the guest at the destination is not to be taken over: {there:?}"
    );

    let session = it.session()?;
    says(
        it.source.resolve(&[&session])?,
        0,
        &["the guest is the destination's", "keep the frozen guest"],
    )?;
    says(
        it.destination.resolve(&[&session])?,
        0,
        &["the guest is this host's", "only at the source"],
    )?;
    let socket = it.guest.socket();
    let run_here = [&session, "--run-here", "--it-does-not-run-there"];
    let run_here = [&run_here[..], &["--workload", &socket]].concat();
    says(it.source.resolve(&run_here)?, 1, &["must not run here"])?;
    it.guest.is_frozen()
}

/// Ownership is on its way when the link is cut and the destination killed: nobody knows whether it
/// has arrived. A person looks, and decides.
#[test]
fn a_destination_lost_with_the_handover_leaves_the_guest_in_doubt() -> Result<()> {
    let arguments = ["--mode", "postcopy", "--patience", "6s"];
    let mut it = Move::start(16, FAR_LINK, &arguments, &[])?;
    let state = it.source.path("state");
    let deadline = Instant::now() + PATIENCE;
    while journal::list(&state)?.is_empty() {
        ensure!(Instant::now() < deadline, "no journal appears");
        std::thread::sleep(Duration::from_millis(2));
    }
    it.relay.set_down(true);
    it.recv.process.kill()?;
    it.send.ends_with(6, PATIENCE)?;
    it.send.process.wait_for_stdout("IN DOUBT", PATIENCE)?;
    it.guest.is_frozen()?;
    it.arrived.is_nowhere()?;

    let session = it.session()?;
    says(it.source.resolve(&[])?, 0, &[&session, "IN DOUBT"])?;
    says(it.destination.resolve(&[&session])?, 0, &["never accepted"])?;
    let socket = it.guest.socket();
    let run_here = [&session, "--run-here", "--workload", &socket];
    says(
        it.source.resolve(&run_here)?,
        1,
        &["it is not known", "--it-does-not-run-there"],
    )?;
    it.guest.is_frozen()?;
    let run_here = [&run_here[..], &["--it-does-not-run-there"]].concat();
    says(it.source.resolve(&run_here)?, 0, &["runs here"])?;
    it.guest.runs_here()?;
    says(it.source.resolve(&[])?, 0, &["every session is settled"])
}

/// A command that has ended with `code`, and said each of `words`.
fn says((ended, said): (Option<i32>, String), code: i32, words: &[&str]) -> Result<()> {
    ensure!(ended == Some(code), "ended with {ended:?}: {said}");
    for word in words {
        ensure!(said.contains(word), "no word of '{word}' in: {said}");
    }
    Ok(())
}

/// Lets a process have no file longer than this, the memory of a guest included: what a full disk or
/// tmpfs is to it, without one.
fn limit_files(process: &HybridmigProcess, bytes: u64) -> Result<()> {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    let pid = process.pid().cast_signed();
    // SAFETY: reads one rlimit, writes none.
    let set = unsafe {
        libc::prlimit(
            pid,
            libc::RLIMIT_FSIZE,
            &raw const limit,
            std::ptr::null_mut(),
        )
    };
    nix::errno::Errno::result(set).context("cannot limit a process")?;
    Ok(())
}

/// Processes started from now on are told of a file that grows too long by an error, not a signal.
fn errors_of_file_size() -> Result<()> {
    use nix::sys::signal::{SigHandler, signal};
    // SAFETY: to ignore a signal runs no code.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }?;
    Ok(())
}

#[test]
fn memory_that_cannot_be_had_at_the_destination_is_a_refusal() -> Result<()> {
    errors_of_file_size()?;
    let (a, b) = (Host::new()?, Host::new()?);
    let guest = Guest::start(&a, 64)?;
    let (recv, arrived) = b.recv_workload(&a, &[])?;
    limit_files(&recv.process, 32 << 20)?;
    let mut send = a.send_workload(&guest, &b, recv.address, &[])?;
    send.ends_with(3, PATIENCE)?;
    send.process.wait_for_stdout("File too large", PATIENCE)?;
    arrived.is_nowhere()?;
    guest.runs_here()
}

/// Puts a file where a host's state directory was.
fn lose_state(host: &Host) -> Result<()> {
    std::fs::rename(host.path("state"), host.path("state.away"))?;
    std::fs::write(host.path("state"), "not a directory")?;
    Ok(())
}

#[test]
fn a_source_without_a_journal_hands_nothing_over() -> Result<()> {
    let mut it = Move::start(16, POSTCOPY_LINK, &["--max-rounds", "1"], &[])?;
    it.reach("pre-copy")?;
    lose_state(&it.source)?;
    it.send.ends_with(4, PATIENCE)?;
    it.send
        .process
        .wait_for_stdout("handover could not be recorded", PATIENCE)?;
    it.arrived.is_nowhere()?;
    it.guest.runs_here()?;

    // And a send that begins like this does not begin.
    let words = ["--to", "127.0.0.1:9"];
    let mut command = it.source.command("send", &it.destination)?;
    command.args(words).args(["--workload", &it.guest.socket()]);
    let output = command.output()?;
    ensure!(output.status.code() == Some(1), "{}", output.status);
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("--state-dir"), "{said}");
    Ok(())
}

#[test]
fn a_check_says_what_a_send_would_say_and_changes_nothing() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let guest = Guest::start(&a, 16)?;
    let (mut recv, arrived) = b.recv_workload(&a, &["--verify"])?;
    let to = recv.address.to_string();
    let socket = guest.socket();
    let words = ["--workload", &socket, "--to", &to];
    let fits = ["reached and trusted", "this guest can be moved"];
    says(a.check(&b, &words)?, 0, &fits)?;
    let findings = |level: &str, text: &str| -> Result<()> {
        let findings: Vec<serde_json::Value> = serde_json::from_str(text)?;
        let of_level = |finding: &serde_json::Value| finding["level"] == level;
        ensure!(findings.iter().any(of_level), "nothing '{level}' in {text}");
        Ok(())
    };
    let as_json = [&words[..], &["--json"]].concat();
    let (code, text) = a.check(&b, &as_json)?;
    ensure!(code == Some(0), "ended with {code:?}: {text}");
    findings("ok", &text)?;
    guest.runs_here()?;
    ensure!(!a.path("state").exists(), "a check made a journal");

    // It goes on waiting for a guest: a send does what the checks have said.
    let mut send = a.send_workload(&guest, &b, recv.address, &[])?;
    send.ends_with(0, PATIENCE)?;
    recv.ends_with(0, PATIENCE)?;
    arrived.runs_here()
}

#[test]
fn a_check_of_a_busy_destination_is_refused() -> Result<()> {
    let mut it = Move::start(64, SLOW_LINK, &[], &[])?;
    it.reach("pre-copy")?;
    let to = it.recv.address.to_string();
    let socket = it.guest.socket();
    let words = ["--workload", &socket, "--to", &to];
    says(
        it.source.check(&it.destination, &words)?,
        3,
        &["REFUSED", "busy"],
    )?;
    it.send.process.signal(Signal::SIGINT)?;
    it.send.ends_with(4, PATIENCE)?;
    it.guest.runs_here()
}

#[test]
fn memory_that_runs_out_at_the_destination_is_a_refusal() -> Result<()> {
    errors_of_file_size()?;
    let mut it = Move::start(64, SLOW_LINK, &[], &[])?;
    it.reach("pre-copy")?;
    limit_files(&it.recv.process, 4096)?;
    it.send.ends_with(3, PATIENCE)?;
    it.send
        .process
        .wait_for_stdout("File too large", PATIENCE)?;
    it.arrived.is_nowhere()?;
    it.guest.runs_here()
}

#[test]
fn a_destination_without_a_journal_declines() -> Result<()> {
    let mut it = Move::start(16, POSTCOPY_LINK, &["--max-rounds", "1"], &[])?;
    it.reach("pre-copy")?;
    lose_state(&it.destination)?;
    it.send.ends_with(3, PATIENCE)?;
    it.send.process.wait_for_stdout("journal", PATIENCE)?;
    it.arrived.is_nowhere()?;
    it.guest.runs_here()
}

#[test]
fn a_cap_is_changed_while_a_guest_moves() -> Result<()> {
    // Under this cap it would take minutes, which is more than this test waits.
    let cap = ["--rate-limit", "1mbit", "--mode", "precopy"];
    let mut it = Move::start(64, "delay 5ms rate 500mbit limit 50ms", &cap, &["--verify"])?;
    it.reach("pre-copy")?;
    says(
        it.source.limit(&["0mbit"])?,
        2,
        &["would stop the migration"],
    )?;
    says(
        it.destination.limit(&["none"])?,
        1,
        &["no `send` is under way"],
    )?;
    says(it.source.limit(&["2mbit"])?, 0, &["at most 2.0 Mbit/s"])?;
    says(it.source.limit(&["none"])?, 0, &["no cap"])?;
    it.has_moved()?;
    says(it.source.limit(&["none"])?, 1, &["no `send` is under way"])
}
