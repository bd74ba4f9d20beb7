//! The results of a grid as Markdown.

use std::fmt::Write;

use super::report::{Accuracy, CellRuns, QUANTITIES, accuracy, cells, median};
use super::{Run, Variant};
use crate::report::figure;

/// The whole page.
pub fn markdown(runs: &[Run], made_by: &str, plots: &[&str]) -> String {
    let cells = cells(runs);
    let mut text = format!(
        "# The planner against everything that could have been chosen instead\n\nMade by `{made_by}`: {} runs of the \
         embedded guest, {} cells. Definitions and limits: [../README.md](../README.md). Figures are medians, with \
         (least – most) where there are several runs.\n\n",
        runs.len(),
        cells.len()
    );
    summary(&mut text, &cells);
    lost_work(&mut text, &cells);
    predictions(&mut text, runs);
    by_cell(&mut text, &cells);
    for plot in plots {
        let _ = writeln!(text, "![{plot}]({plot})\n");
    }
    every(&mut text, &cells);
    text
}

/// A cell in a table.
fn name(cell: &CellRuns<'_>) -> String {
    cell.cell.to_string().replace(" | ", ", ")
}

fn percent(value: Option<f64>) -> String {
    value.map_or("–".to_owned(), |value| format!("{:.0} %", 100.0 * value))
}

fn plain(value: Option<f64>) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.2}"))
}

fn summary(text: &mut String, cells: &[CellRuns<'_>]) {
    let ratios: Vec<f64> = cells.iter().filter_map(CellRuns::ratio).collect();
    let worst = ratios.iter().copied().fold(0.0, f64::max);
    let over: Vec<(f64, f64)> = cells
        .iter()
        .filter_map(|cell| Some((cell.over(Variant::Precopy)?, cell.over(Variant::Postcopy)?)))
        .collect();
    let better = over
        .iter()
        .filter(|(pre, post)| *pre < 1.0 && *post < 1.0)
        .count();
    let most = over
        .iter()
        .map(|(pre, post)| pre.max(*post))
        .fold(0.0, f64::max);
    let shares: Vec<f64> = cells
        .iter()
        .filter_map(CellRuns::faults_of_working_set)
        .collect();
    let faults = shares.iter().copied().fold(0.0, f64::max);
    let rows = [
        (
            "planner's L over the best fixed one's, median over cells",
            "≤ 1.10",
            plain(median(ratios.clone())),
        ),
        (
            "the same, worst cell",
            "≤ 1.25",
            plain((!ratios.is_empty()).then_some(worst)),
        ),
        (
            "cells in which the planner loses less than pure pre-copy and pure post-copy",
            "≥ 90 %",
            format!("{better} of {}", over.len()),
        ),
        (
            "planner's L over the better pure mode's, worst cell",
            "≤ 1.10",
            plain((!over.is_empty()).then_some(most)),
        ),
        (
            "demand faults over the working set (estimated), worst cell",
            "≤ 10 %",
            percent((!shares.is_empty()).then_some(faults)),
        ),
    ];
    text.push_str("## Against the goals\n\n| | goal | seen |\n|---|---|---|\n");
    for (what, goal, seen) in rows {
        let _ = writeln!(text, "| {what} | {goal} | {seen} |");
    }
    text.push('\n');
}

fn lost_work(text: &mut String, cells: &[CellRuns<'_>]) {
    text.push_str(
        "## Lost work L in seconds\n\n| cell | planned | best fixed | which | planned : best | \
         simple rule | pre-copy | \
         post-copy |\n|---|---|---|---|---|---|---|---|\n",
    );
    for cell in cells {
        let of = |variant| {
            cell.row(variant)
                .and_then(|row| row.figure(|seen| seen.lost_work))
        };
        let best = cell.best();
        let row = best.and_then(|(variant, _)| cell.row(variant));
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} |",
            name(cell),
            figure(of(Variant::Planned)),
            figure(row.and_then(|row| row.figure(|seen| seen.lost_work))),
            best.map_or("–".to_owned(), |(variant, _)| variant.to_string()),
            plain(cell.ratio()),
            figure(of(Variant::Observe)),
            figure(of(Variant::Precopy)),
            figure(of(Variant::Postcopy)),
        );
    }
    text.push_str(
        "\n“Which” is a pure mode, or shares of memory × disk. – : not moved, or not run.\n\n",
    );
}

fn predictions(text: &mut String, runs: &[Run]) {
    text.push_str(
        "## Predictions\n\nMedian of |predicted − came| / came, and the share of runs within the \
         80 % interval. Faults: \
         error over runs with ten or more.\n\n| | goal | planned, at the freeze | within | \
         planned, at the start | within | all, \
         at the freeze | within |\n|---|---|---|---|---|---|---|---|\n",
    );
    let goals = ["≤ 10 %", "≤ 20 %", "≤ 25 %", "≤ 30 %"];
    let planned = || runs.iter().filter(|run| run.variant == Variant::Planned);
    for (quantity, goal) in QUANTITIES.into_iter().zip(goals) {
        let freeze = accuracy(planned(), |run| run.at_freeze.as_ref(), quantity);
        let start = accuracy(planned(), |run| run.at_start.as_ref(), quantity);
        let all = accuracy(runs.iter(), |run| run.at_freeze.as_ref(), quantity);
        let shown = |accuracy: Option<Accuracy>| {
            let error = percent(accuracy.and_then(|accuracy| accuracy.error));
            format!(
                "{error} | {}",
                percent(accuracy.map(|accuracy| accuracy.within))
            )
        };
        let _ = writeln!(
            text,
            "| {} | {goal} | {} | {} | {} |",
            quantity.0,
            shown(freeze),
            shown(start),
            shown(all)
        );
    }
    text.push('\n');
}

fn by_cell(text: &mut String, cells: &[CellRuns<'_>]) {
    text.push_str(
        "## Predicted at the freeze and seen, by cell (planned runs)\n\n| cell | total | came | downtime | \
         came | L | came | faults | \
         came | of the working set |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for cell in cells {
        let Some(row) = cell.row(Variant::Planned) else {
            continue;
        };
        let mut line = format!("| {} |", name(cell));
        for (number, (_, seen, foretold)) in QUANTITIES.into_iter().enumerate() {
            let predicted = row
                .runs
                .iter()
                .filter_map(|run| run.at_freeze.as_ref().map(foretold));
            let predicted = median(predicted.map(|foretold| foretold.p50).collect());
            let came = row.figure(seen).map(|spread| spread.median);
            let digits = if number == 3 {
                0
            } else {
                2 + usize::from(number > 0)
            };
            let shown = |value: Option<f64>| {
                value.map_or("–".to_owned(), |value| format!("{value:.digits$}"))
            };
            let _ = write!(line, " {} | {} |", shown(predicted), shown(came));
        }
        let share = cell.faults_of_working_set();
        let share = share.map_or("–".to_owned(), |share| format!("{:.1} %", 100.0 * share));
        let _ = writeln!(text, "{line} {share} |");
    }
    text.push('\n');
}

fn every(text: &mut String, cells: &[CellRuns<'_>]) {
    text.push_str(
        "## Every variant\n\n| cell | variant | runs | L | downtime | total | faults | rounds | not moved |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for cell in cells {
        for row in &cell.rows {
            let failed: Vec<&str> = row
                .runs
                .iter()
                .filter(|run| run.seen.is_none())
                .map(|run| run.outcome.as_str())
                .collect();
            let rounds = median(row.runs.iter().map(|run| run.rounds as f64).collect());
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {} | {:.0} | {} |",
                name(cell),
                row.variant,
                row.runs.len(),
                figure(row.figure(|seen| seen.lost_work)),
                figure(row.figure(|seen| seen.downtime)),
                figure(row.figure(|seen| seen.total)),
                figure(row.figure(|seen| seen.faults)),
                rounds.unwrap_or(0.0),
                failed.join("; ").replace('|', "/"),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::run;
    use super::*;

    #[test]
    fn no_run_is_left_out() {
        let runs = [
            run(Variant::Planned, Some(0.5)),
            run(Variant::Precopy, None),
            run(Variant::Postcopy, Some(2.0)),
            run(Variant::Shares(0.95, 1.0), Some(0.45)),
        ];
        let text = markdown(&runs, "make bench-plan", &["a.svg"]);
        for wanted in [
            "| continental, web |",
            "1.11",
            "0.95 × 1",
            "1 of 1",
            "failed",
            "![a.svg](a.svg)",
        ] {
            assert!(text.contains(wanted), "{wanted}:\n{text}");
        }
    }
}
