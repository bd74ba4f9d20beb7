//! The results as Markdown: at a glance, where hybridmig is behind, and a table for every cell.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::cells::{Cell, Metric, Results, Row};
use super::format::{figure, number, ratio};
use crate::engine::REFERENCE;
use crate::measure::Measured;
use crate::record::{Outcome, Record};

/// Differences below this are not called behind or ahead.
const NOTABLE: f64 = 1.05;

/// The whole page. `plots` are the files beside it.
pub fn markdown(results: &Results<'_>, made_by: &str, plots: &[(String, String)]) -> String {
    let mut text = String::from("# Migrations side by side: results\n\n");
    let _ = writeln!(
        text,
        "Made by `{made_by}`, then `bench report`; do not edit. How to read it: [docs/bench/README.md](../README.md).\n"
    );
    facts(&mut text, results);
    glance(&mut text, results);
    behind(&mut text, results);
    text.push_str("## Every cell\n\n");
    for cell in &results.cells {
        table(&mut text, cell, plots);
    }
    overviews(&mut text, plots);
    text
}

/// Machine, versions, seeds: what a second run would need.
fn facts(text: &mut String, results: &Results<'_>) {
    let of = |what: &dyn Fn(&Record) -> String| -> String {
        let all: BTreeSet<_> = results.records.iter().map(what).collect();
        all.into_iter().collect::<Vec<_>>().join("; ")
    };
    let loads = results.records.iter().map(|record| record.machine.load);
    let lateness = results
        .records
        .iter()
        .filter_map(|record| record.traffic.as_ref());
    let latest = lateness
        .map(|traffic| {
            traffic
                .forward
                .lateness_max_us
                .max(traffic.back.lateness_max_us)
                / 1e3
        })
        .fold(0.0, f64::max);
    let invalid = results
        .records
        .iter()
        .filter(|record| !record.valid)
        .count();
    let rows = [
        (
            "machine",
            of(&|r| {
                format!(
                    "{}, {} cores, {} GiB",
                    r.machine.cpu,
                    r.machine.cores,
                    r.machine.memory >> 30
                )
            }),
        ),
        ("kernel", of(&|r| release(&r.machine.kernel))),
        (
            "load average before a run",
            format!("at most {}", number(loads.fold(0.0, f64::max))),
        ),
        (
            "software",
            of(&|r| format!("{}, {}", r.machine.hybridmig, r.machine.qemu)),
        ),
        (
            "guest",
            of(&|r| {
                format!(
                    "{} MiB of RAM, {} MiB of it checked, {} % of that incompressible; 1 vCPU, TCG",
                    r.guest.memory_mib, r.guest.checked_mib, r.guest.random_percent
                )
            }),
        ),
        ("seeds", of(&|r| r.seed.to_string())),
        (
            "given up after",
            of(&|r| format!("{} s", r.times.give_up_s)),
        ),
        (
            "TCP buffers (least, default, most)",
            of(&|r| {
                r.tcp.as_ref().map_or_else(String::new, |tcp| {
                    format!("receive {}, send {}", tcp.rmem, tcp.wmem)
                })
            }),
        ),
        (
            "runs",
            format!(
                "{}, of which the emulator spoilt {invalid}; the latest packet of all was {} ms late",
                results.records.len(),
                number(latest)
            ),
        ),
    ];
    text.push_str("| | |\n|---|---|\n");
    for (name, value) in rows {
        let _ = writeln!(text, "| {name} | {} |", value.replace('|', "/"));
    }
    text.push('\n');
}

fn glance(text: &mut String, results: &Results<'_>) {
    text.push_str(
        "## At a glance\n\nDowntime / lost work from the start of the migration, in seconds, medians. What was not \
         moved says so, with what was seen until then.\n",
    );
    for guest in results.guests() {
        let _ = write!(text, "\nGuest: **{guest}**\n\n| RTT, loss, rate |");
        for engine in &results.engines {
            let _ = write!(text, " {engine} |");
        }
        text.push_str("\n|---|");
        text.push_str(&"---|".repeat(results.engines.len()));
        text.push('\n');
        let of_guest = |cell: &&Cell<'_>| cell.any.guest.name == guest;
        for cell in results.cells.iter().filter(of_guest) {
            let _ = write!(text, "| {} |", cell.any.link_facts);
            for engine in &results.engines {
                let row = cell.rows.iter().find(|row| row.engine == *engine);
                let _ = write!(text, " {} |", row.map_or("not run".to_owned(), in_short));
            }
            text.push('\n');
        }
    }
    text.push('\n');
}

fn in_short(row: &Row<'_>) -> String {
    let pair = |get: &dyn Fn(Metric) -> Option<super::cells::Figure>| {
        let shown = |metric| get(metric).map_or("–".to_owned(), |figure| number(figure.median));
        format!("{} / {}", shown(Metric::Downtime), shown(Metric::LostWork))
    };
    let (moved, all) = (row.moved().count(), row.runs.len());
    let spoilt = if row.is_spoilt() { " †" } else { "" };
    if moved == 0 {
        return format!(
            "**{}** ({}){spoilt}",
            verdict(row),
            pair(&|metric| row.seen(metric))
        );
    }
    let share = if moved < all {
        format!(" ({moved} of {all})")
    } else {
        String::new()
    };
    format!("{}{share}{spoilt}", pair(&|metric| row.figure(metric)))
}

/// One word for a row of which no run moved the guest.
fn verdict(row: &Row<'_>) -> &'static str {
    let failed = |record: &&Record| matches!(record.outcome, Outcome::Failed { .. });
    if row.runs.iter().any(failed) {
        "failed"
    } else {
        "not finished"
    }
}

/// Where another engine does better than hybridmig's default.
fn behind(text: &mut String, results: &Results<'_>) {
    let _ = write!(
        text,
        "## Where {REFERENCE} is behind\n\nBy more than {:.0} %, against the best of the engines that are not \
         hybridmig's, of those that moved the guest in every run.\n\n",
        (NOTABLE - 1.0) * 100.0
    );
    let metrics = [
        (Metric::Downtime, "downtime", "s"),
        (Metric::LostWork, "lost work", "s"),
        (Metric::LostWorkFromFreeze, "lost work from the freeze", "s"),
        (Metric::Total, "total time", "s"),
        (Metric::DestinationUp, "destination up", "s"),
        (Metric::Wire, "on the wire", "MB"),
    ];
    let mut found = Vec::new();
    for cell in &results.cells {
        let Some(reference) = cell.reference() else {
            continue;
        };
        if reference.moved().count() < reference.runs.len() {
            found.push(format!(
                "- {}: {REFERENCE} has not moved the guest in every run",
                cell.title()
            ));
        }
        for (metric, name, unit) in metrics {
            let Some(ours) = reference.figure(metric) else {
                continue;
            };
            let theirs = cell
                .rows
                .iter()
                .filter(|row| {
                    !row.engine.starts_with("hybridmig") && row.moved().count() == row.runs.len()
                })
                .filter_map(|row| row.figure(metric).map(|figure| (row, figure.median)))
                .min_by(|a, b| a.1.total_cmp(&b.1));
            if let Some((row, best)) = theirs
                && ours.median > best.max(0.0) * NOTABLE
            {
                found.push(format!(
                    "- {}: {name} {} {unit}, {}{} {} {unit}",
                    cell.title(),
                    number(ours.median),
                    row.engine,
                    if row.is_spoilt() { " †" } else { "" },
                    number(best)
                ));
            }
        }
    }
    if found.is_empty() {
        found.push("- Nowhere in these results.".to_owned());
    }
    text.push_str(&found.join("\n"));
    text.push_str("\n\n");
}

/// What the guest does.
fn does(any: &Record) -> String {
    let checks = format!(
        "dirties {} MB/s and verifies {} MB/s",
        any.dirty_mb_s, any.guest.sweep_mb_s
    );
    match &any.guest.work {
        None => format!("the guest {checks}"),
        Some(work) if work.mib == 0 => {
            format!("{} in the guest; its checker {checks}", work.program.name())
        }
        Some(work) => format!(
            "{} in the guest, with {} MiB of values, {} % of its operations write; its checker {checks}",
            work.program.name(),
            work.mib,
            work.writes_percent
        ),
    }
}

fn table(text: &mut String, cell: &Cell<'_>, plots: &[(String, String)]) {
    let any = cell.any;
    let _ = write!(
        text,
        "### {}\n\n`{}`; {}.\n\n",
        cell.title(),
        any.link,
        does(any)
    );
    text.push_str(
        "| engine | moved | downtime s | | lost work s | | from the freeze s | destination up s | total s | \
         95 % after the freeze s | after the start s | MB on the wire | bad pages | downtime it claims s |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in &cell.rows {
        let value = |metric: Metric| match (row.figure(metric), row.seen(metric)) {
            (None, Some(seen)) => format!("({})", figure(Some(seen))),
            (moved, _) => figure(moved),
        };
        let against = |metric: Metric| {
            let reference = cell.reference().and_then(|row| row.figure(metric));
            ratio(row.figure(metric), reference)
        };
        let bad: Vec<_> = row
            .runs
            .iter()
            .map(|record| record.checked.map(|checked| checked.bad))
            .collect();
        let bad = if bad.contains(&None) {
            "unknown".to_owned()
        } else {
            bad.into_iter()
                .flatten()
                .max()
                .unwrap_or_default()
                .to_string()
        };
        let _ = writeln!(
            text,
            "| {}{} | {}/{} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {bad} | {} |",
            row.engine,
            if row.is_spoilt() { " †" } else { "" },
            row.moved().count(),
            row.runs.len(),
            value(Metric::Downtime),
            against(Metric::Downtime),
            value(Metric::LostWork),
            against(Metric::LostWork),
            value(Metric::LostWorkFromFreeze),
            value(Metric::DestinationUp),
            value(Metric::Total),
            value(Metric::T95FromFreeze),
            value(Metric::T95FromStart),
            value(Metric::Wire),
            value(Metric::ClaimedDowntime),
        );
    }
    text.push('\n');
    super::storage::tables(text, cell);
    let mut remarks = BTreeSet::new();
    for row in &cell.rows {
        for record in &row.runs {
            let (what, why) = match &record.outcome {
                Outcome::Moved => continue,
                Outcome::NotFinished { why } => ("not finished", why),
                Outcome::Failed { why } => ("**failed**", why),
            };
            remarks.insert(format!("- {}: {what}: {}", row.engine, one_line(why)));
        }
        let slow = |m: &&Measured| m.v0 < 0.95 * any.told_speed;
        let slow = row
            .runs
            .iter()
            .filter_map(|run| run.measured.as_ref())
            .filter(slow)
            .count();
        if slow > 0 {
            remarks.insert(format!(
                "- {}: in {slow} runs the guest was slower before the migration than it was told to be: the machine \
                 was busy",
                row.engine
            ));
        }
        if row.invalid > 0 {
            remarks.insert(format!(
                "- {}: {} runs spoilt by the emulator",
                row.engine, row.invalid
            ));
        }
    }
    for remark in &remarks {
        let _ = writeln!(text, "{remark}");
    }
    if !remarks.is_empty() {
        text.push('\n');
    }
    let plot = format!("speed-{}.svg", cell.slug());
    if plots.iter().any(|(name, _)| *name == plot) {
        let _ = writeln!(text, "![guest speed over time]({plot})\n");
    }
}

/// Texts of other programs, made harmless.
fn one_line(text: &str) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    let line = words.join(" ").replace(['|', '<', '`'], " ");
    line.chars().take(300).collect()
}

/// Plots over several cells.
fn overviews(text: &mut String, plots: &[(String, String)]) {
    for (prefix, title) in [
        ("downtime-by-rtt", "Downtime against the round-trip time"),
        ("downtime-by-loss", "Downtime against loss"),
        (
            "fault-latency",
            "Latency of demand faults (hybridmig, by its own report)",
        ),
        (
            "bytes-by-phase",
            "Bytes by phase (by the engines' own word; the mark is what the emulator counted)",
        ),
    ] {
        let mut of_kind = plots
            .iter()
            .filter(|(name, _)| name.starts_with(prefix))
            .peekable();
        if of_kind.peek().is_some() {
            let _ = writeln!(text, "## {title}\n");
        }
        for (name, _) in of_kind {
            let _ = writeln!(text, "![{title}]({name})\n");
        }
    }
}

/// A kernel's version without the name that its builder gave it.
fn release(kernel: &str) -> String {
    kernel.split('-').next().unwrap_or(kernel).to_owned()
}
