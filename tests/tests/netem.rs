//! `hybridmig netem` as its users see it: commands at both ends of a link, what it says of links, and that
//! nothing of it stays behind.

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hybridmig_tests::{HybridmigProcess, hybridmig_binary};
use nix::sys::signal::Signal;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);

fn netem(arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(hybridmig_binary()?);
    command.arg("netem").args(arguments);
    command.output().context("hybridmig can be started")
}

fn json(output: &Output) -> Result<Value> {
    serde_json::from_slice(&output.stdout).context("its output is JSON")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Namespaces of that name that `ip netns exec` would find.
fn named(name: &str) -> usize {
    ["near", "far"]
        .iter()
        .filter(|end| Path::new(&format!("/run/netns/hybridmig-{name}-{end}")).exists())
        .count()
}

fn until(what: &str, condition: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        ensure!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A page is fetched over the link from a server at the far end, the exit code is the command's, and both
/// the figures and the clock show that it went over the link.
#[test]
fn a_command_reaches_its_twin_over_the_link() -> Result<()> {
    let place = tempfile::tempdir()?;
    std::fs::write(place.path().join("page"), "hello from afar")?;
    let stats = place.path().join("stats.json");
    let server = format!("busybox httpd -f -p 8000 -h {}", place.path().display());
    // The server may need a moment to listen.
    let fetch =
        "until busybox wget -q -O - http://$HYBRIDMIG_FAR_ADDRESS:8000/page; do :; done; exit 7";
    let start = Instant::now();
    let output = netem(&[
        "run",
        "delay 30ms rate 100mbit",
        "--far",
        &server,
        "--json",
        &stats.display().to_string(),
        "--",
        "sh",
        "-c",
        fetch,
    ])?;
    ensure!(output.status.code() == Some(7), "{}", stderr(&output));
    ensure!(String::from_utf8_lossy(&output.stdout).contains("hello from afar"));
    // A handshake and a request: two round trips.
    ensure!(start.elapsed() >= Duration::from_millis(120));
    let stats: Value = serde_json::from_str(&std::fs::read_to_string(&stats)?)?;
    for way in ["forward", "back"] {
        ensure!(
            stats[way]["delivered_packets"].as_u64() >= Some(3),
            "{stats}"
        );
    }
    Ok(())
}

#[test]
fn the_far_end_is_entered_from_the_near_one() -> Result<()> {
    let hybridmig = hybridmig_binary()?.display().to_string();
    let output = netem(&[
        "run", "lan", "--", &hybridmig, "netem", "enter", "far", "ip", "-brief", "address",
    ])?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}", stderr(&output));
    ensure!(
        said.contains("198.18.0.2/") && !said.contains("198.18.0.1/"),
        "{said}"
    );
    let outside = netem(&["enter", "far", "true"])?;
    ensure!(!outside.status.success() && stderr(&outside).contains("netem run"));
    Ok(())
}

/// However a run ends, its names go: by itself, by a signal, or at the next start after SIGKILL.
#[test]
fn nothing_stays_behind() -> Result<()> {
    let name = format!("test-{}", std::process::id());
    let run = |name: &str| {
        let words = ["netem", "run", "lan", "--name", name, "--", "sleep", "1000"];
        HybridmigProcess::spawn("netem run", words)
    };
    let mut ended = run(&name)?;
    ended.wait_for_stderr("namespaces hybridmig-", PATIENCE)?;
    ensure!(named(&name) == 2);
    ended.signal(Signal::SIGTERM)?;
    let status = ended.wait(PATIENCE)?;
    ensure!(status.code() == Some(128 + 15), "{status}");
    ensure!(named(&name) == 0);

    let mut killed = run(&name)?;
    killed.wait_for_stderr("namespaces hybridmig-", PATIENCE)?;
    killed.kill()?;
    ensure!(named(&name) == 2, "a mount outlives whoever made it");
    let next = netem(&["run", "lan", "--", "true"])?;
    ensure!(
        stderr(&next).contains(&format!("removed hybridmig-{name}-far")),
        "{}",
        stderr(&next)
    );
    ensure!(named(&name) == 0);
    Ok(())
}

/// The command at the near end goes with a run that is killed.
#[test]
fn a_killed_run_takes_its_command_with_it() -> Result<()> {
    let place = tempfile::tempdir()?;
    let pid = place.path().join("pid");
    let line = format!(
        "echo $$ > {0}.new && mv {0}.new {0}; exec sleep 1000",
        pid.display()
    );
    let mut run = HybridmigProcess::spawn(
        "netem run",
        ["netem", "run", "lan", "--", "sh", "-c", &line],
    )?;
    until("the command runs", || pid.exists())?;
    let pid = std::fs::read_to_string(&pid)?;
    let process = Path::new("/proc").join(pid.trim()).join("exe");
    ensure!(process.exists());
    run.kill()?;
    until("the command is gone", || !process.exists())
}

#[test]
fn links_are_listed_and_shown() -> Result<()> {
    let links = json(&netem(&["list", "--json"])?)?;
    let links = links.as_array().context("a list")?;
    for name in ["lan", "transatlantic", "satellite", "bad-4g", "flaky"] {
        ensure!(links.iter().any(|link| link["name"] == name), "no {name}");
    }
    let shown = json(&netem(&[
        "show",
        "--json",
        "delay 25ms rate 200mbit loss 1%; at 5s down",
    ])?)?;
    ensure!(
        shown["rtt_s"] == 0.05 && shown["forward"]["mean_loss"] == 0.01,
        "{shown}"
    );
    let tc = &shown["forward"]["tc"];
    ensure!(
        tc[0]["commands"][0]
            == "tc qdisc add dev eth0 root netem delay 25ms rate 200mbit loss random 1% limit 1251",
        "{tc}"
    );
    ensure!(tc[1]["at_s"] == 5.0, "{tc}");
    let wrong = netem(&["show", "dealy 5ms"])?;
    ensure!(wrong.status.code() == Some(2) && stderr(&wrong).contains("'dealy' is not known"));
    Ok(())
}

/// The check measures: a link is never faster than it says. How much slower it is depends on the machine's
/// other work, so the verdict is left to `hybridmig netem check` itself.
#[test]
fn the_check_measures_what_the_link_does() -> Result<()> {
    for runner in ["tun", "relay"] {
        let arguments = [
            "check",
            "--json",
            "--runner",
            runner,
            "delay 10ms loss 5% rate 20mbit",
        ];
        let checked = json(&netem(&arguments)?)?;
        let findings = checked["links"][0]["findings"]
            .as_array()
            .context("findings")?;
        let seen = |what: &str| {
            let finding = findings.iter().find(|finding| finding["what"] == what);
            finding.and_then(|finding| finding["seen"].as_f64())
        };
        let (rtt, loss, rate) = (seen("rtt"), seen("loss"), seen("rate"));
        ensure!(rtt >= Some(20.0), "{runner}: {checked}");
        ensure!(
            loss.is_some_and(|loss| (2.0..20.0).contains(&loss)),
            "{runner}: {checked}"
        );
        ensure!(
            rate.is_some_and(|rate| (1.0..20.5).contains(&rate)),
            "{runner}: {checked}"
        );
    }
    Ok(())
}
