//! `hybridmig profile` as an operator uses it: guests that are watched while they run, and go on as if nobody had.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hybridmig_engine::guest::workload::control::Control;
use hybridmig_engine::profile::file::{self, Saved};
use hybridmig_engine::profile::{Distinct, RegionProfile};
use hybridmig_pager::process::find_userfaultfds;
use hybridmig_tests::migration::{Guest, Host, PATIENCE};
use hybridmig_tests::process::hybridmig_binary;
use hybridmig_tests::{HybridmigProcess, Vm, VmConfig};
use nix::sys::signal::Signal;

/// Runs `hybridmig profile` to its end.
fn profile(arguments: &[&str]) -> Result<HybridmigProcess> {
    let mut command = Command::new(hybridmig_binary()?);
    command.arg("profile").args(arguments);
    let mut process = HybridmigProcess::spawn_command("profile", command)?;
    process.succeed(PATIENCE)?;
    Ok(process)
}

fn saved_at(host: &Host) -> (PathBuf, String) {
    let path = host.path("profile.json");
    let word = path.display().to_string();
    (path, word)
}

/// Of all heat, the share that lies between two shares of the region.
fn heat_within(region: &RegionProfile, from: f64, to: f64) -> f64 {
    let (first, last) = (
        from * f64::from(region.blocks),
        to * f64::from(region.blocks),
    );
    let (mut within, mut all) = (0.0, 0.0);
    for (block, count, level) in &region.heat {
        let heat = f64::from(*count) * f64::from(*level);
        all += heat;
        let block = f64::from(*block);
        if block >= first && block < last {
            within += heat;
        }
    }
    within / f64::max(all, 1.0)
}

/// The curve's point nearest to this length.
fn within(region: &RegionProfile, seconds: f64) -> Result<Distinct> {
    let distance = |point: &Distinct| (point.seconds / seconds).ln().abs();
    let nearest = region
        .distinct
        .iter()
        .min_by(|a, b| distance(a).total_cmp(&distance(b)));
    nearest.copied().context("the curve is empty")
}

fn unwatched(control: &Path) -> Result<()> {
    let pid = Control::connect(control)?.describe()?.pid;
    let left = find_userfaultfds(pid)?;
    ensure!(left.is_empty(), "the guest holds {left:?}");
    Ok(())
}

/// docs/workload.md: web draws 20000 accesses/s, 10 % of them writes, from 20 % of its data pages that begin at 10 % of
/// them; one in twenty goes through everything in order.
#[test]
fn a_web_guest_is_hot_where_it_says() -> Result<()> {
    let host = Host::new()?;
    let words = ["--profile", "web", "--threads", "1", "--disk-size", "16M"];
    let guest = Guest::start_with(&host, 64, &words)?;
    let (path, json) = saved_at(&host);
    let socket = guest.socket();
    profile(&["--workload", &socket, "--seconds", "8", "--json", &json])?;
    let Saved {
        profile: of,
        disk_rates,
    } = file::load(&path)?;
    unwatched(guest.control())?;
    guest.runs_here()?;

    ensure!(
        of.guest_kind == "workload" && of.parallelism == 1,
        "{:?}",
        of.guest
    );
    ensure!(of.seconds > 7.0 && of.work_per_second.is_some_and(|speed| speed > 1000.0));
    ensure!(of.reads_seen, "no access was sampled: {:?}", of.notes);
    let [ram, disk] = &of.regions[..] else {
        anyhow::bail!("{} regions", of.regions.len());
    };
    // The generations of disk and pages lie at both ends; a margin for them.
    let hot = heat_within(ram, 0.08, 0.32);
    ensure!(
        hot > 0.75,
        "only {hot:.2} of the heat lies in the working set"
    );
    // 20 % of some 14000 pages; the sweep adds 50 written and 1000 read pages a second. A loaded machine is slower.
    let second = within(ram, 1.0)?;
    ensure!((200.0..1700.0).contains(&second.written), "{second:?}");
    let accessed = second.accessed.context("accesses")?;
    ensure!(
        accessed > 1.5 * second.written && accessed < 9000.0,
        "{second:?}"
    );
    ensure!(within(ram, 5.0)?.written > second.written);
    // A little text, much of it in the working set.
    ensure!(
        (500.0..3500.0).contains(&ram.contents.bytes_per_page),
        "{:?}",
        ram.contents
    );
    ensure!(
        (0.05..0.3).contains(&ram.contents.duplicate),
        "{:?}",
        ram.contents
    );
    // Half of the disk was written at the start.
    ensure!(
        (1500..4000).contains(&disk.content_pages),
        "{}",
        disk.content_pages
    );
    ensure!(
        disk_rates[0].region == 1 && disk_rates[0].reads > 10.0,
        "{disk_rates:?}"
    );

    let shown = profile(&["--load", &json])?.stdout().tail(200);
    for words in [
        "ram: memory of 64.0 MiB",
        "sampled, reads included",
        "distinct within",
        "reads/s",
    ] {
        ensure!(shown.contains(words), "'{words}' is not in:\n{shown}");
    }
    let map: Vec<&str> = shown.lines().filter(|line| line.contains('│')).collect();
    ensure!(
        map.len() > 10 && map.iter().all(|line| line.chars().count() <= 120),
        "{shown}"
    );

    // As another hybridmig would write it.
    let text = std::fs::read_to_string(&path)?;
    std::fs::write(
        &path,
        text.replacen("\"profile_version\":1", "\"profile_version\":2", 1),
    )?;
    let mut command = Command::new(hybridmig_binary()?);
    let refused = command.args(["profile", "--load", &json]).output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        refused.status.code() == Some(1) && said.contains("version 2"),
        "{said}"
    );
    Ok(())
}

/// A guest that writes as fast as it can, watched until the operator has seen enough.
#[test]
fn a_guest_at_full_speed_is_left_right_when_watching_is_broken_off() -> Result<()> {
    let host = Host::new()?;
    let words = ["--profile", "db", "--threads", "2", "--rate-factor", "0"];
    let guest = Guest::start_with(&host, 32, &words)?;
    let (path, json) = saved_at(&host);
    let mut command = Command::new(hybridmig_binary()?);
    let socket = guest.socket();
    command.args([
        "profile",
        "--workload",
        &socket,
        "--seconds",
        "1h",
        "--json",
        &json,
    ]);
    let mut process = HybridmigProcess::spawn_command("profile", command)?;
    process.wait_for_stderr("watching", PATIENCE)?;
    // Five seconds without watching come first; then some scans.
    let before = std::time::Instant::now();
    while before.elapsed().as_secs() < 9 {
        ensure!(process.has_ended()?.is_none(), "it has ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    process.signal(Signal::SIGINT)?;
    process.succeed(PATIENCE)?;
    let saved = file::load(&path)?;
    ensure!(saved.profile.seconds < 60.0, "{}", saved.profile.seconds);
    ensure!(!saved.profile.regions[0].classes.is_empty());
    unwatched(guest.control())?;
    guest.runs_here()?;
    // And again, for it is not being watched any more.
    profile(&["--workload", &socket, "--seconds", "2", "--json", &json])?;
    guest.runs_here()
}

/// One that stands still may have been handed over: whatever looks at it must not let it run.
#[test]
fn a_frozen_guest_is_not_looked_at_and_stays_frozen() -> Result<()> {
    let host = Host::new()?;
    let guest = Guest::start_with(&host, 16, &[])?;
    Control::connect(guest.control())?.freeze(PATIENCE)?;
    for words in [
        &["profile"][..],
        &["plan"],
        &["check"],
        &["send", "--to", "127.0.0.1:9"],
    ] {
        let mut command = match words {
            ["send", ..] => host.command("send", &host)?,
            _ => Command::new(hybridmig_binary()?),
        };
        let skip = usize::from(words.len() > 1);
        command
            .args(&words[skip..])
            .args(["--workload", &guest.socket()]);
        let refused = command.output()?;
        let said = String::from_utf8_lossy(&refused.stderr);
        ensure!(
            refused.status.code() == Some(1) && said.contains("does not run"),
            "{words:?}: {said}"
        );
        guest.is_frozen()?;
    }
    Ok(())
}

/// Nine of ten writes of the checker go to a tenth of its pages.
#[test]
fn a_linux_guest_shows_its_hot_tenth() -> Result<()> {
    let config = VmConfig {
        name: "watched".to_owned(),
        memory_mib: 128,
        checked_mib: 48,
        dirty_rate: 8.0,
        hot_percent: 10,
        ..VmConfig::default()
    };
    let vm = Vm::start(&config)?;
    vm.console().wait_for("READY", PATIENCE)?;
    let host = Host::new()?;
    let (path, json) = saved_at(&host);
    let socket = vm.qmp_socket().display().to_string();
    profile(&["--qmp", &socket, "--seconds", "12", "--json", &json])?;
    let saved = file::load(&path)?;
    let ram = &saved.profile.regions[0];
    let checked = f64::from(48 << 8);
    // 1760 writes/s on 1229 pages, 195 on the other 11059.
    let hot: f64 = ram
        .classes
        .iter()
        .filter(|class| class.writes > 0.3)
        .map(|class| class.pages)
        .sum();
    ensure!(
        (0.05..0.2).contains(&(hot / checked)),
        "{hot} of {checked} pages are hot: {:?}",
        ram.classes
    );
    ensure!(saved.profile.reads_seen, "{:?}", saved.profile.notes);
    // It reads them all in turn.
    let five = within(ram, 5.0)?;
    ensure!(
        five.accessed
            .is_some_and(|accessed| accessed > five.written),
        "{five:?}"
    );

    vm.console()
        .wait_ticks(vm.console().ticks().len() + 5, PATIENCE)?;
    let verified = vm.verify()?;
    ensure!(verified.bad == 0 && verified.pages > 0, "{verified:?}");
    Ok(())
}
