//! The embedded guest with a disk, moved by `hybridmig send` and `recv` over a relayed link: memory and
//! disk by the same session. The guest checks every byte of both.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hybridmig_engine::guest::workload::control::{Control, Description};
use hybridmig_tests::HybridmigProcess;
use hybridmig_tests::migration::{Guest, Host, PATIENCE, TEST_LINK, relay};
use nix::sys::signal::Signal;

/// The rest of some ten megabytes takes some seconds in post-copy.
const SLOW_LINK: &str = "delay 10ms rate 20mbit limit 50ms";

fn describe(control: &Path) -> Result<Description> {
    Ok(Control::connect(control)?.describe()?)
}

/// The only file in a folder.
fn only_file(folder: &Path) -> Result<PathBuf> {
    let mut files = std::fs::read_dir(folder)?;
    let file = files.next().context("the folder is empty")??;
    ensure!(files.next().is_none(), "the folder has more than one file");
    Ok(file.path())
}

#[test]
fn a_guest_moves_with_its_disk() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let disk = ["--disk-size", "64M", "--profile", "db"];
    let guest = Guest::start_with(&a, 32, &disk)?;
    let folder = b.path("disks");
    std::fs::create_dir(&folder)?;
    let shown = folder.display().to_string();
    let (mut recv, arrived) = b.recv_workload(&a, &["--verify", "--disk-dir", &shown])?;
    let relay = relay(recv.address, TEST_LINK, 3)?;
    // The planner alone would move all of it first where the machine is slow.
    let words = ["--disk-frac", "0.25"];
    let mut send = a.send_workload(&guest, &b, relay.local_addr(), &words)?;
    send.ends_with(0, PATIENCE)?;
    recv.ends_with(0, PATIENCE)?;

    let verified = recv.report()?.verified.context("nothing was verified")?;
    ensure!(verified.ok, "{verified:?}");
    ensure!(verified.blocks == (32 + 64) << 8, "{verified:?}");
    let report = send.report()?;
    let kinds = report
        .kinds
        .context("memory and storage are not told apart")?;
    ensure!(kinds.memory.content_blocks > 0 && kinds.storage.content_blocks > 0);
    // Of a disk moves first what was used lately; the rest, and no hole, follows.
    ensure!(kinds.storage.content_blocks < 1024, "holes were moved");
    ensure!(kinds.storage.behind_blocks > 0, "no block stayed behind");

    // The guest needs nobody any more: `recv` has ended, and its disk is its own.
    let described = describe(arrived.control())?;
    ensure!(described.served.is_none() && !described.paged);
    ensure!(
        !a.path("guest.sock.disk").exists(),
        "the source's disk is left"
    );
    arrived.runs_here()?;
    let deadline = Instant::now() + PATIENCE;
    while describe(arrived.control())?.stats.disk_writes <= described.stats.disk_writes {
        ensure!(Instant::now() < deadline, "the guest's disk is not written");
        std::thread::sleep(Duration::from_millis(10));
    }
    let file = only_file(&folder)?;
    drop(arrived);
    ensure!(!file.exists(), "the disk outlives the guest");
    relay.stop();
    Ok(())
}

/// `recv` is killed while pages and blocks are missing; another goes on at the same address.
#[test]
fn a_killed_recv_is_taken_over() -> Result<()> {
    let (a, b) = (Host::new()?, Host::new()?);
    let disk = ["--disk-size", "16M", "--profile", "build"];
    let guest = Guest::start_with(&a, 16, &disk)?;
    let (mut recv, arrived) = b.recv_workload(&a, &[])?;
    let relay = relay(recv.address, SLOW_LINK, 3)?;
    let words = ["--mode", "postcopy", "--patience", "40s"];
    let mut send = a.send_workload(&guest, &b, relay.local_addr(), &words)?;
    send.process.wait_for_stderr("post-copy", PATIENCE)?;
    recv.process.signal(Signal::SIGKILL)?;
    recv.process.wait(PATIENCE)?;
    let described = describe(arrived.control())?;
    ensure!(
        described.paged && described.served.is_some(),
        "it was too late"
    );

    let state = b.path("state");
    let kept = std::fs::read_dir(&state)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.join("session.json").exists())
        .context("nothing was kept")?;
    let mut command = b.command("recv", &a)?;
    command
        .args(["--listen", &recv.address.to_string(), "--verify"])
        .arg("--take-over")
        .arg(&kept)
        .arg("--json")
        .arg(b.path("taken-over.json"));
    let mut second = HybridmigProcess::spawn_command("recv", command)?;
    // Not by its patience: the second one says that the first one's link is gone.
    send.process.wait_for_stderr("reset", PATIENCE)?;
    send.ends_with(0, PATIENCE)?;
    let status = second.wait(PATIENCE)?;
    ensure!(status.success(), "{status}: {}", second.stderr().tail(20));
    let text = std::fs::read_to_string(b.path("taken-over.json"))?;
    let report: hybridmig_engine::report::Report = serde_json::from_str(&text)?;
    let verified = report.verified.context("nothing was verified")?;
    ensure!(verified.ok && verified.blocks == 32 << 8, "{verified:?}");
    ensure!(!kept.exists(), "what was kept is left");
    ensure!(describe(arrived.control())?.served.is_none());
    relay.stop();
    arrived.runs_here()
}
