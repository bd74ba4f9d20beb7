//! What the runs of a grid come to: arithmetic over them. [`super::tables`] and [`super::plot`] show it.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{Cell, Figures, Foretold, Run, Variant, plot, tables};
use crate::report::Figure;

/// Faults from which on an error is given as a share: a single fault more or less is not news.
pub const MANY_FAULTS: f64 = 10.0;

/// The middle of some values.
pub fn median(values: Vec<f64>) -> Option<f64> {
    Figure::of(values).map(|figure| figure.median)
}

/// The runs of one cell under one variant.
pub struct Row<'a> {
    pub variant: Variant,
    pub runs: Vec<&'a Run>,
}

impl Row<'_> {
    pub fn figure(&self, of: fn(&Figures<f64>) -> f64) -> Option<Figure> {
        Figure::of(
            self.runs
                .iter()
                .filter_map(|run| run.seen.as_ref().map(of))
                .collect(),
        )
    }

    pub fn lost(&self) -> Option<f64> {
        self.figure(|seen| seen.lost_work)
            .map(|figure| figure.median)
    }
}

/// One cell.
pub struct CellRuns<'a> {
    pub cell: &'a Cell,
    pub rows: Vec<Row<'a>>,
}

impl<'a> CellRuns<'a> {
    pub fn row(&self, variant: Variant) -> Option<&Row<'a>> {
        self.rows.iter().find(|row| row.variant == variant)
    }

    pub fn lost(&self, variant: Variant) -> Option<f64> {
        self.row(variant).and_then(Row::lost)
    }

    /// The best of what is fixed beforehand: shares and the pure modes.
    pub fn best(&self) -> Option<(Variant, f64)> {
        let fixed = |row: &&Row<'_>| !matches!(row.variant, Variant::Planned | Variant::Observe);
        let known = |row: &Row<'_>| row.lost().map(|lost| (row.variant, lost));
        let all = self.rows.iter().filter(fixed).filter_map(known);
        all.min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// The planner's lost work over the best that could have been fixed.
    pub fn ratio(&self) -> Option<f64> {
        let (planned, best) = (self.lost(Variant::Planned)?, self.best()?.1);
        Some(planned / best.max(1e-3))
    }

    /// The planner's over that of a pure mode; 0 where that mode did not move the guest.
    pub fn over(&self, mode: Variant) -> Option<f64> {
        let planned = self.lost(Variant::Planned)?;
        let row = self.row(mode)?;
        Some(row.lost().map_or(0.0, |lost| planned / lost.max(1e-3)))
    }

    /// Demand faults of planned runs, over the working set.
    pub fn faults_of_working_set(&self) -> Option<f64> {
        let row = self.row(Variant::Planned)?;
        let share = |run: &&Run| Some(run.seen?.faults / run.working_set?);
        median(row.runs.iter().filter_map(share).collect())
    }
}

/// All cells, in the order of their first run.
pub fn cells(runs: &[Run]) -> Vec<CellRuns<'_>> {
    let mut cells: Vec<CellRuns<'_>> = Vec::new();
    for run in runs {
        let at = cells
            .iter()
            .position(|cell| *cell.cell == run.cell)
            .unwrap_or_else(|| {
                cells.push(CellRuns {
                    cell: &run.cell,
                    rows: Vec::new(),
                });
                cells.len() - 1
            });
        let rows = &mut cells[at].rows;
        match rows.iter_mut().find(|row| row.variant == run.variant) {
            Some(row) => row.runs.push(run),
            None => rows.push(Row {
                variant: run.variant,
                runs: vec![run],
            }),
        }
    }
    cells
}

/// How good predictions of one quantity were.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Accuracy {
    /// Runs looked at.
    pub runs: usize,
    /// Median of |predicted − seen| / seen.
    pub error: Option<f64>,
    /// Share of runs within the 80 % interval.
    pub within: f64,
}

/// A quantity: its name, and where it stands.
pub type Quantity = (
    &'static str,
    fn(&Figures<f64>) -> f64,
    fn(&Figures<Foretold>) -> Foretold,
);

/// Those with a goal.
pub const QUANTITIES: [Quantity; 4] = [
    ("total time", |f| f.total, |f| f.total),
    ("downtime", |f| f.downtime, |f| f.downtime),
    ("lost work L", |f| f.lost_work, |f| f.lost_work),
    ("network faults", |f| f.faults, |f| f.faults),
];

/// Compares what was predicted (`at` chooses when) with what came.
pub fn accuracy<'a>(
    runs: impl Iterator<Item = &'a Run>,
    at: fn(&Run) -> Option<&Figures<Foretold>>,
    (name, seen, foretold): Quantity,
) -> Option<Accuracy> {
    let pairs: Vec<(f64, Foretold)> = runs
        .filter_map(|run| Some((seen(run.seen.as_ref()?), foretold(at(run)?))))
        .collect();
    let least = if name == "network faults" {
        MANY_FAULTS
    } else {
        1e-6
    };
    let errors = pairs
        .iter()
        .filter(|(seen, _)| *seen >= least)
        .map(|(seen, foretold)| (foretold.p50 - seen).abs() / seen)
        .collect();
    // A fault is whole: an interval that ends between two of them contains both.
    let slack = if name == "network faults" { 1.0 } else { 0.0 };
    let within = pairs
        .iter()
        .filter(|(seen, f)| *seen >= f.p10 - slack && *seen <= f.p90 + slack)
        .count();
    (!pairs.is_empty()).then(|| Accuracy {
        runs: pairs.len(),
        error: median(errors),
        within: within as f64 / pairs.len() as f64,
    })
}

/// Writes `results.md` and the plots of it into a directory.
pub fn write(runs: &[Run], out: &Path, made_by: &str) -> Result<usize> {
    ensure!(!runs.is_empty(), "there are no runs to report");
    std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let plots = plot::all(runs)?;
    for (name, svg) in &plots {
        let path = out.join(name);
        std::fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let names: Vec<&str> = plots.iter().map(|(name, _)| name.as_str()).collect();
    let path = out.join("results.md");
    std::fs::write(&path, tables::markdown(runs, made_by, &names))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(runs.len())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn run(variant: Variant, lost_work: Option<f64>) -> Run {
        let foretold = |p50: f64| Foretold {
            p50,
            p10: 0.9 * p50,
            p90: 1.2 * p50,
        };
        Run {
            grid: "test".into(),
            cell: Cell {
                link: "continental".into(),
                profile: "web".into(),
                memory_mib: 64,
                disk_mib: 0,
            },
            variant,
            seed: 1,
            outcome: if lost_work.is_some() {
                "moved"
            } else {
                "failed"
            }
            .into(),
            seen: lost_work.map(|lost_work| Figures {
                total: 10.0,
                downtime: 0.1,
                lost_work,
                faults: 20.0,
            }),
            remote_up: None,
            t95: None,
            bytes: None,
            working_set: Some(1000.0),
            at_start: None,
            at_freeze: Some(Figures {
                total: foretold(11.0),
                downtime: foretold(0.1),
                lost_work: foretold(0.5),
                faults: foretold(30.0),
            }),
            rounds: 2,
            fractions: Some((0.99, 0.5)),
            load: 0.1,
        }
    }

    #[test]
    fn the_best_is_of_what_is_fixed_and_a_mode_that_fails_is_beaten() {
        let runs = [
            run(Variant::Planned, Some(0.6)),
            run(Variant::Planned, Some(0.4)),
            run(Variant::Observe, Some(0.1)),
            run(Variant::Precopy, None),
            run(Variant::Postcopy, Some(2.0)),
            run(Variant::Shares(1.0, 0.0), Some(0.4)),
        ];
        let cells = cells(&runs);
        assert_eq!(cells.len(), 1);
        let cell = &cells[0];
        assert_eq!(cell.best(), Some((Variant::Shares(1.0, 0.0), 0.4)));
        assert!((cell.ratio().unwrap() - 1.25).abs() < 1e-9);
        assert_eq!(cell.over(Variant::Precopy), Some(0.0));
        assert!((cell.over(Variant::Postcopy).unwrap() - 0.25).abs() < 1e-9);
        assert!((cell.faults_of_working_set().unwrap() - 0.02).abs() < 1e-9);
    }

    #[test]
    fn errors_are_shares_of_what_came_and_intervals_hold_or_do_not() {
        let runs = [
            run(Variant::Planned, Some(0.5)),
            run(Variant::Planned, Some(1.0)),
        ];
        let of = |quantity| accuracy(runs.iter(), |run| run.at_freeze.as_ref(), quantity).unwrap();
        let total = of(QUANTITIES[0]);
        assert!((total.error.unwrap() - 0.1).abs() < 1e-9);
        assert!((total.within - 1.0).abs() < 1e-9);
        let lost = of(QUANTITIES[2]);
        assert!((lost.error.unwrap() - 0.25).abs() < 1e-9);
        assert!((lost.within - 0.5).abs() < 1e-9);
        assert!((of(QUANTITIES[3]).error.unwrap() - 0.5).abs() < 1e-9);
        assert!(accuracy(runs.iter(), |run| run.at_start.as_ref(), QUANTITIES[0]).is_none());
    }
}
