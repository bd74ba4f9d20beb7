//! What the disks of guests add to the report: for each cell with one, how long until the guest ran at the destination,
//! what its I/O took by phase, and whether every block was right.

use std::fmt::Write;

use super::cells::{Cell, Figure, Metric, Row};
use super::format::{figure, number, ratio};
use crate::record::Record;
use crate::storage::{Latency, Phase, PhaseLatency, Storage};

/// Appends the tables of a cell, if its guest has a disk.
pub fn tables(text: &mut String, cell: &Cell<'_>) {
    let Some(disk) = &cell.any.guest.disk else {
        return;
    };
    let _ = write!(
        text,
        "Disk of {} MiB, {} % of it incompressible; the guest uses {} MiB of it in runs of {} KiB: reads {} MB/s and \
         writes {} MB/s in blocks of 4 KiB, at random, with {} threads.\n\n",
        disk.mib,
        disk.random_percent,
        disk.hot_mib,
        disk.run_kib,
        disk.read_mb_s,
        disk.write_mb_s,
        disk.threads
    );
    text.push_str(
        "| engine | destination up s | | total s | downtime s | MB on the wire | wrong blocks | I/O errors | images \
         differ in blocks |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in &cell.rows {
        let up = row.figure(Metric::DestinationUp);
        let reference = cell.reference();
        let reference = reference.and_then(|row| row.figure(Metric::DestinationUp));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            row.engine,
            figure(up),
            ratio(up, reference),
            figure(row.figure(Metric::Total)),
            figure(row.figure(Metric::Downtime)),
            figure(row.figure(Metric::Wire)),
            most(row, |storage| Some(storage.bad_blocks)),
            most(row, |storage| Some(storage.errors)),
            most(row, |storage| {
                let compared = storage.compared?;
                Some(compared.differing + compared.broken)
            }),
        );
    }
    text.push_str(
        "\n| engine | phase | s | reads | p50 ms | p99 ms | longest ms | writes | p50 ms | p99 ms | longest ms |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in &cell.rows {
        for phase in Phase::ALL {
            let seconds = over(row, phase, |seen| Some(seen.seconds));
            let _ = write!(
                text,
                "| {} | {} | {}",
                row.engine,
                phase.name(),
                figure(seconds)
            );
            for kind in [
                |seen: &PhaseLatency| seen.reads,
                |seen: &PhaseLatency| seen.writes,
            ] {
                operations(text, row, phase, kind);
            }
            text.push_str(" |\n");
        }
    }
    text.push('\n');
}

fn operations(
    text: &mut String,
    row: &Row<'_>,
    phase: Phase,
    kind: impl Fn(&PhaseLatency) -> Latency,
) {
    let some = |seen: &PhaseLatency| Some(kind(seen)).filter(|latency| latency.count > 0);
    let count = over(row, phase, |seen| {
        some(seen).map(|latency| latency.count as f64)
    });
    let _ = write!(
        text,
        " | {}",
        count.map_or("0".to_owned(), |count| number(count.median))
    );
    for of in [
        |latency: Latency| latency.p50_ms,
        |latency: Latency| latency.p99_ms,
        |latency: Latency| latency.max_ms,
    ] {
        let _ = write!(
            text,
            " | {}",
            figure(over(row, phase, |seen| some(seen).map(of)))
        );
    }
}

/// A figure of a phase over all runs that count.
fn over(row: &Row<'_>, phase: Phase, of: impl Fn(&PhaseLatency) -> Option<f64>) -> Option<Figure> {
    let phases = row.runs.iter().filter_map(|record| record.storage.as_ref());
    let phases = phases.flat_map(|storage| &storage.phases);
    Figure::of(
        phases
            .filter(|seen| seen.phase == phase)
            .filter_map(of)
            .collect(),
    )
}

/// The most of all runs; "unknown" if a run does not say.
fn most(row: &Row<'_>, of: impl Fn(&Storage) -> Option<u64>) -> String {
    let said = |record: &&Record| record.storage.as_ref().and_then(&of);
    let all: Option<Vec<u64>> = row.runs.iter().map(said).collect();
    all.map_or("unknown".to_owned(), |all| {
        all.into_iter().max().unwrap_or_default().to_string()
    })
}
