//! Predictions for people: beside what came, and as plans.

use std::fmt::Write;
use std::time::Duration;

use hybridmig_engine::plan::planner::Planned;
use hybridmig_engine::predict::{Interval, Prediction};
use hybridmig_engine::report::Report;

use crate::units::{show_bytes, show_time};

fn seconds(value: f64) -> String {
    show_time(Duration::try_from_secs_f64(value).unwrap_or_default())
}

/// How a figure is written.
type Shown = fn(f64) -> String;

/// A figure that is predicted: its name, which, how it is written, what came.
type Row = (
    &'static str,
    fn(&Prediction) -> Interval,
    Shown,
    Option<f64>,
);

fn rows(report: &Report) -> Vec<Row> {
    let agility = report.agility.as_ref();
    let faults = report.faults.as_ref();
    vec![
        ("total time", |p| p.total, seconds, Some(report.times.total)),
        (
            "downtime",
            |p| p.downtime,
            seconds,
            report.downtime.map(|d| d.total),
        ),
        (
            "remote up time",
            |p| p.remote_up,
            seconds,
            report.times.remote_up,
        ),
        (
            "lost work L",
            |p| p.lost_work,
            seconds,
            agility.map(|a| a.lost_work),
        ),
        ("T95", |p| p.t95, seconds, agility.and_then(|a| a.t95)),
        (
            "network faults",
            |p| p.faults,
            count,
            faults.map(|f| f.network as f64),
        ),
    ]
}

fn count(value: f64) -> String {
    format!("{value:.0}")
}

fn interval(interval: &Interval, shown: Shown) -> String {
    format!(
        "{} ({} – {})",
        shown(interval.p50),
        shown(interval.p10),
        shown(interval.p90)
    )
}

/// What was predicted, at the start and at the freeze, beside what came. Empty where nothing was.
pub fn beside_outcome(report: &Report) -> String {
    let Some(predictions) = &report.prediction else {
        return String::new();
    };
    let (start, freeze) = (predictions.at_start, predictions.at_freeze);
    if freeze.is_none() {
        return String::new();
    }
    let decided = report.plan.as_ref().map_or("", |plan| &plan.decided_by);
    let mut text = format!("predicted (median, 80 % interval); decided by {decided}\n");
    let _ = writeln!(
        text,
        "  {:<16} {:<30} {:<30} outcome",
        "", "at the start", "at the freeze"
    );
    for (name, of, shown, came) in rows(report) {
        let foretold = |prediction: &Option<Prediction>| {
            prediction
                .as_ref()
                .map_or("–".to_owned(), |p| interval(&of(p), shown))
        };
        let came = came.map_or("–".to_owned(), shown);
        let _ = writeln!(
            text,
            "  {name:<16} {:<30} {:<30} {came}",
            foretold(&start),
            foretold(&freeze)
        );
    }
    text
}

/// One plan.
pub fn plan(plan: &Planned) -> String {
    let prediction = &plan.prediction;
    let mut text = format!(
        "{}\n  moves before the guest resumes: {:.1} % of its memory, {:.1} % of its disks\n",
        plan.what,
        100.0 * plan.mem_frac,
        100.0 * plan.disk_frac
    );
    let rows: [(&str, &Interval, Shown); 8] = [
        ("total time", &prediction.total, seconds),
        ("remote up time", &prediction.remote_up, seconds),
        ("downtime", &prediction.downtime, seconds),
        ("lost work L", &prediction.lost_work, seconds),
        ("T95", &prediction.t95, seconds),
        ("network faults", &prediction.faults, count),
        ("each waits", &prediction.stall, seconds),
        ("on the wire", &prediction.bytes, |bytes| {
            show_bytes(bytes as u64)
        }),
    ];
    for (name, figure, shown) in rows {
        let _ = writeln!(text, "  {name:<16} {}", interval(figure, shown));
    }
    text
}
