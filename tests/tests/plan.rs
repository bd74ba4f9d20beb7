//! `hybridmig plan` and the predictions of `send`, as an operator and other programs see them.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use hybridmig_engine::plan::dry::Advice;
use hybridmig_engine::report::Report;
use hybridmig_tests::HybridmigProcess;
use hybridmig_tests::migration::{Guest, Host, PATIENCE};
use hybridmig_tests::process::hybridmig_binary;

fn plan(host: &Host, arguments: &[&str]) -> Result<HybridmigProcess> {
    let mut command = Command::new(hybridmig_binary()?);
    command
        .arg("plan")
        .arg("--state-dir")
        .arg(host.path("state"));
    command.args(arguments);
    let mut process = HybridmigProcess::spawn_command("plan", command)?;
    process.succeed(PATIENCE)?;
    Ok(process)
}

#[test]
fn a_guest_is_planned_for_without_being_moved() -> Result<()> {
    let host = Host::new()?;
    let words = ["--profile", "web", "--threads", "1"];
    let guest = Guest::start_with(&host, 64, &words)?;
    let socket = guest.socket();
    let link = ["--bandwidth", "200mbit", "--rtt", "80ms", "--loss", "0.001"];
    let watched = [
        &["--workload", &socket, "--watch", "3s", "--json"][..],
        &link,
    ]
    .concat();
    let advice: Advice = serde_json::from_str(&plan(&host, &watched)?.stdout().tail(100_000))?;
    let lost = |index: usize| advice.alternatives[index].prediction.lost_work.p50;
    let chosen = advice.chosen.prediction;
    ensure!(
        chosen.lost_work.p50 <= 1.1 * lost(0) + 0.02 && chosen.lost_work.p50 < 0.5 * lost(1),
        "{advice:?}"
    );
    ensure!(advice.chosen.mem_frac > 0.8, "{:?}", advice.chosen);
    // Some 13000 pages, half of them text, over 25 MB/s.
    ensure!((0.5..8.0).contains(&chosen.total.p50), "{:?}", chosen.total);
    guest.runs_here()?;

    // The same from a file, for people, with limits that cannot be kept.
    let saved = host.path("profile.json").display().to_string();
    let mut command = Command::new(hybridmig_binary()?);
    command.args([
        "profile",
        "--workload",
        &socket,
        "--seconds",
        "3",
        "--json",
        &saved,
    ]);
    HybridmigProcess::spawn_command("profile", command)?.succeed(PATIENCE)?;
    let plot = host.path("plot.svg");
    let plot_word = plot.display().to_string();
    let limits = ["--max-downtime", "1ms", "--plot", &plot_word];
    let from_file = [&["--profile", &saved][..], &link, &limits].concat();
    let shown = plan(&host, &from_file)?.stdout().tail(200);
    for words in [
        "plan: ",
        "or: pre-copy",
        "or: post-copy",
        "because",
        "NO plan keeps",
        "█",
    ] {
        ensure!(shown.contains(words), "'{words}' is not in:\n{shown}");
    }
    ensure!(std::fs::read_to_string(&plot)?.contains("<polyline"));
    Ok(())
}

/// Runs the demo and returns the source's report and what was shown.
fn demo(keep: &Path, state: &Path, arguments: &[&str]) -> Result<(Report, String)> {
    let mut command = Command::new(hybridmig_binary()?);
    command.args([
        "demo",
        "--size",
        "32M",
        "--disk-size",
        "8M",
        "--profile",
        "web",
    ]);
    command.args(["--link", "delay 10ms rate 200mbit limit 50ms"]);
    command
        .arg("--keep")
        .arg(keep)
        .arg("--state-dir")
        .arg(state);
    command.args(arguments);
    let mut process = HybridmigProcess::spawn_command("demo", command)?;
    process.succeed(PATIENCE)?;
    let text = std::fs::read_to_string(keep.join("send.json"))?;
    Ok((serde_json::from_str(&text)?, process.stdout().tail(200)))
}

#[test]
fn what_was_predicted_stands_beside_what_came() -> Result<()> {
    let host = Host::new()?;
    let (keep, state) = (host.path("kept"), host.path("state"));
    std::fs::create_dir_all(&state)?;
    let mut seen = Vec::new();
    for (arguments, decided) in [
        (&[][..], "planner"),
        (&["--observe"], "simple rule"),
        (&["--mem-frac", "0.5", "--disk-frac", "1"], "shares"),
        (&["--mode", "postcopy"], "post-copy"),
    ] {
        let (report, shown) = demo(&keep, &state, arguments)?;
        let plan = report.plan.context("the report has no plan")?;
        ensure!(plan.decided_by == decided, "{plan:?}");
        let predictions = report.prediction.context("the report has no predictions")?;
        let freeze = predictions
            .at_freeze
            .context("nothing was predicted at the freeze")?;
        let frozen = plan.at_freeze.context("the freeze is not in the plan")?;
        ensure!(frozen.prediction == freeze);
        for figure in [
            freeze.total,
            freeze.downtime,
            freeze.lost_work,
            freeze.faults,
        ] {
            ensure!(
                figure.p10 <= figure.p50 && figure.p50 <= figure.p90,
                "{freeze:?}"
            );
        }
        // A loaded machine is slow; but it cannot be sooner than the pages that were left, nor sooner than half a
        // round trip.
        ensure!(
            freeze.downtime.p50 > 0.01 && freeze.total.p50 > 0.05,
            "{freeze:?}"
        );
        for words in [
            "predicted (median",
            decided,
            "at the freeze",
            "network faults",
        ] {
            ensure!(shown.contains(words), "'{words}' is not in:\n{shown}");
        }
        seen.push((frozen.mem_frac, freeze.faults.p50));
    }
    let [planned, _, half, none] = seen[..] else {
        anyhow::bail!("{seen:?}");
    };
    ensure!(
        (half.0 - 0.5).abs() < 0.02 && none.0 < 0.01 && planned.0 > 0.8,
        "{seen:?}"
    );
    ensure!(none.1 >= half.1, "{seen:?}");
    // What it cost is remembered for the next time.
    let costs = std::fs::read_to_string(state.join("costs.json"))?;
    let costs: serde_json::Value = serde_json::from_str(&costs)?;
    ensure!(costs["guests"]["workload"]["load"]["seen"] == 4, "{costs}");
    Ok(())
}
