//! Runs a grid, one migration after the other, and appends a line for each.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hybridmig_engine::predict::{Interval, Prediction};
use hybridmig_engine::report::Report;

use super::{Cell, Figures, Foretold, Grid, Run, Variant};
use crate::interrupt::Interrupt;

/// How often a run is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Runs all of a grid whose cells contain `cell`, and whose variants `variant` where it is given.
pub fn series(
    grid: &Grid,
    program: &Path,
    cell: &str,
    variant: Option<&str>,
    out: &Path,
    interrupt: &Interrupt,
) -> Result<()> {
    // What migrations cost is learned over the series, as it is on an operator's host.
    let remembered = tempfile::tempdir().context("cannot make a temporary directory")?;
    let mut seed = grid.seed;
    for _ in 0..grid.repetitions {
        let first = seed;
        for of in grid.cells().filter(|of| of.to_string().contains(cell)) {
            for how in grid.variants() {
                if variant.is_some_and(|wanted| how.to_string() != wanted) {
                    continue;
                }
                let times = if how == Variant::Planned {
                    grid.planned_times
                } else {
                    1
                };
                for time in 0..times {
                    if interrupt.is_set() {
                        bail!("stopped; what was measured is in {}", out.display());
                    }
                    let seed = first + u64::from(time);
                    let give_up = Duration::from_secs_f64(grid.give_up_s);
                    let order = Order {
                        grid: &grid.name,
                        cell: &of,
                        variant: how,
                        seed,
                        program,
                        remembered: remembered.path(),
                        give_up,
                    };
                    let run = order.run(interrupt)?;
                    println!("{of} | {how} | seed {seed}: {}", line(&run));
                    append(&run, out)?;
                }
            }
        }
        seed += u64::from(grid.planned_times);
    }
    Ok(())
}

fn line(run: &Run) -> String {
    match &run.seen {
        None => run.outcome.clone(),
        Some(seen) => format!(
            "total {:.2} s, downtime {:.3} s, L {:.3} s, {:.0} faults",
            seen.total, seen.downtime, seen.lost_work, seen.faults
        ),
    }
}

fn append(run: &Run, out: &Path) -> Result<()> {
    let mut text = serde_json::to_string(run).context("a run is JSON")?;
    text.push('\n');
    let file = OpenOptions::new().create(true).append(true).open(out);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", out.display()))
}

struct Order<'a> {
    grid: &'a str,
    cell: &'a Cell,
    variant: Variant,
    seed: u64,
    program: &'a Path,
    remembered: &'a Path,
    give_up: Duration,
}

impl Order<'_> {
    fn run(&self, interrupt: &Interrupt) -> Result<Run> {
        let kept = tempfile::tempdir().context("cannot make a temporary directory")?;
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = load
            .split(' ')
            .next()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0.0);
        let mut run = Run {
            grid: self.grid.to_owned(),
            cell: self.cell.clone(),
            variant: self.variant,
            seed: self.seed,
            outcome: String::new(),
            seen: None,
            remote_up: None,
            t95: None,
            bytes: None,
            working_set: None,
            at_start: None,
            at_freeze: None,
            rounds: 0,
            fractions: None,
            load,
        };
        if let Some(failed) = self.migrate(kept.path(), interrupt)? {
            run.outcome = failed;
        } else {
            fill(&mut run, &report(kept.path())?);
            "moved".clone_into(&mut run.outcome);
        }
        Ok(run)
    }

    /// Whatever went wrong, in words.
    fn migrate(&self, keep: &Path, interrupt: &Interrupt) -> Result<Option<String>> {
        let Cell {
            link,
            profile,
            memory_mib,
            disk_mib,
        } = self.cell;
        let said = std::fs::File::create(keep.join("said")).context("cannot write")?;
        // A world of processes of its own ends as one: guests at the destination lead sessions of their own.
        let child = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child=KILL", "--mount-proc"])
            .arg(self.program)
            .arg("demo")
            .args(["--link", link, "--profile", profile])
            .args(["--size", &format!("{memory_mib}M")])
            .args(["--disk-size", &format!("{disk_mib}M")])
            .args(["--seed", &self.seed.to_string()])
            .arg("--state-dir")
            .arg(self.remembered)
            .arg("--keep")
            .arg(keep)
            .args(self.variant.arguments())
            .stdout(Stdio::null())
            .stderr(said)
            // With all that it starts it is one group, to be ended as one.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.display()))?;
        let mut group = Group(child);
        let until = Instant::now() + self.give_up;
        loop {
            if let Some(status) = group.0.try_wait().context("cannot wait for the demo")? {
                if status.success() {
                    return Ok(None);
                }
                let said = std::fs::read_to_string(keep.join("said")).unwrap_or_default();
                let end: Vec<&str> = said.trim().lines().rev().take(3).collect();
                return Ok(Some(format!("failed: {}", end.join(" | "))));
            }
            if Instant::now() > until || interrupt.is_set() {
                let seconds = self.give_up.as_secs();
                return Ok(Some(format!("given up after {seconds} s")));
            }
            std::thread::sleep(POLL);
        }
    }
}

/// A process with all that it started.
struct Group(Child);

impl Drop for Group {
    fn drop(&mut self) {
        let group = rustix::process::Pid::from_child(&self.0);
        // Nobody is left of one that has ended well.
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        let _ = self.0.wait();
    }
}

fn report(kept: &Path) -> Result<Report> {
    let text = std::fs::read_to_string(kept.join("send.json")).context("there is no report")?;
    serde_json::from_str(&text).context("the report cannot be read")
}

/// What the report says. The demo has already made sure that the guest found no wrong byte.
fn fill(run: &mut Run, report: &Report) {
    let down = report.downtime.map(|downtime| downtime.total);
    let lost = report.agility.map(|agility| agility.lost_work);
    if let (Some(downtime), Some(lost_work), Some(faults)) = (down, lost, &report.faults) {
        run.seen = Some(Figures {
            total: report.times.total,
            downtime,
            lost_work,
            faults: faults.network as f64,
        });
    }
    run.remote_up = report.times.remote_up;
    run.t95 = report.agility.and_then(|agility| agility.t95);
    run.bytes = report.link.map(|link| link.sent_bytes);
    run.rounds = report.rounds.len();
    if let Some(plan) = &report.plan {
        run.working_set = (plan.working_set > 0.0).then_some(plan.working_set);
        let frozen = plan.at_freeze.as_ref();
        run.fractions = frozen.map(|plan| (plan.mem_frac, plan.disk_frac));
    }
    if let Some(predictions) = &report.prediction {
        run.at_start = predictions.at_start.as_ref().map(foretold);
        run.at_freeze = predictions.at_freeze.as_ref().map(foretold);
    }
}

fn foretold(prediction: &Prediction) -> Figures<Foretold> {
    let of = |interval: Interval| Foretold {
        p50: interval.p50,
        p10: interval.p10,
        p90: interval.p90,
    };
    Figures {
        total: of(prediction.total),
        downtime: of(prediction.downtime),
        lost_work: of(prediction.lost_work),
        faults: of(prediction.faults),
    }
}
