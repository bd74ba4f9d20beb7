//! Sweeps of fixed shares, their table, and the comparison with real runs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, anyhow};
use hybridmig_engine::guest::workload::Profile;
use hybridmig_engine::predict::{Cost, Costs};
use hybridmig_transport::message::Mode;
use serde::{Deserialize, Serialize};

use super::{Came, Setting, Steps, World};
use crate::grid::{Cell, Grid, Run, Variant};

/// Shares of memory and of the disk that are tried.
const MEMORY: [f64; 8] = [0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.995, 1.0];
const DISK: [f64; 4] = [0.0, 0.3, 0.7, 1.0];

/// One simulated run, a line of JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    /// Guest and link.
    pub cell: Cell,
    /// How it was moved.
    pub variant: Variant,
    /// Seed.
    pub seed: u64,
    /// What came; nothing where pre-copy did not converge.
    pub came: Option<Came>,
}

/// What `steps` cost, as a source that has seen many migrations knows it.
fn known(steps: &Steps) -> Costs {
    let cost = |mean: f64| Cost {
        mean,
        sd: 0.1 * mean,
        seen: 10,
    };
    Costs {
        stop: cost(steps.stop),
        scan: cost(2.0 * steps.scan + 0.006),
        save: cost(steps.save),
        overhead: cost(steps.journal + 0.004),
        load: cost(steps.arm + 0.005 + steps.load + steps.journal + steps.resume),
        finish: cost(0.01),
        start: cost(steps.prepare + 0.01),
        state_bytes: 2000.0,
    }
}

/// Simulates one migration.
pub fn simulate(cell: &Cell, variant: Variant, seed: u64) -> Result<Line> {
    let profile: Profile = cell
        .profile
        .parse()
        .map_err(|error: String| anyhow!(error))?;
    let shares = match variant {
        Variant::Shares(memory, disk) => (Some(memory), Some(disk)),
        _ => (None, None),
    };
    let setting = Setting {
        profile,
        memory_mib: cell.memory_mib,
        disk_mib: cell.disk_mib,
        threads: 2,
        rate_factor: 1.0,
        seed,
        link: cell
            .link
            .parse()
            .map_err(|error| anyhow!("{}: {error}", cell.link))?,
        mode: match variant {
            Variant::Precopy => Mode::Precopy,
            Variant::Postcopy => Mode::Postcopy,
            _ => Mode::Hybrid,
        },
        mem_frac: shares.0,
        disk_frac: shares.1,
        observe: variant == Variant::Observe,
    };
    let steps = Steps::default();
    let came = World::new(setting, steps, known(&steps))
        .run()
        .with_context(|| format!("{cell} | {variant} | seed {seed}"))?;
    Ok(Line {
        cell: cell.clone(),
        variant,
        seed,
        came,
    })
}

/// Every cell of a grid with every share, both pure modes, the simple rule and the planner, on all cores.
pub fn sweep(grid: &Grid, seeds: u64) -> Result<Vec<Line>> {
    let fixed = MEMORY
        .iter()
        .flat_map(|memory| DISK.iter().map(|disk| Variant::Shares(*memory, *disk)));
    let variants: Vec<Variant> = [
        Variant::Planned,
        Variant::Observe,
        Variant::Precopy,
        Variant::Postcopy,
    ]
    .into_iter()
    .chain(fixed)
    .collect();
    let jobs: Vec<(Cell, Variant, u64)> = grid
        .cells()
        .flat_map(|cell| variants.iter().map(move |variant| (cell.clone(), *variant)))
        .flat_map(|(cell, variant)| (1..=seeds).map(move |seed| (cell.clone(), variant, seed)))
        .collect();
    let (next, lines) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some((cell, variant, seed)) = jobs.get(number) else {
                        return;
                    };
                    let line = simulate(cell, *variant, *seed);
                    lines
                        .lock()
                        .expect("nobody panics with it")
                        .insert(number, line);
                }
            });
        }
    });
    lines
        .into_inner()
        .expect("nobody panics with it")
        .into_values()
        .collect()
}

/// Median of what `of` says of the runs of a variant.
fn median(lines: &[Line], cell: &Cell, variant: Variant, of: fn(&Came) -> f64) -> Option<f64> {
    let own = lines
        .iter()
        .filter(|line| line.cell == *cell && line.variant == variant);
    crate::grid::median(own.filter_map(|line| line.came.as_ref().map(of)).collect())
}

fn cells(lines: &[Line]) -> Vec<&Cell> {
    let mut cells: Vec<&Cell> = Vec::new();
    for line in lines {
        if !cells.contains(&&line.cell) {
            cells.push(&line.cell);
        }
    }
    cells
}

fn shown(value: Option<f64>) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.3}"))
}

/// The sweep as Markdown: for each cell the best fixed share in hindsight and the planner beside it.
pub fn table(lines: &[Line]) -> String {
    let mut text = "| cell | planned | best fixed | memory × disk | planned : best | simple rule | pre-copy | \
                    post-copy | \
                    faults / working set |\n|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    let mut ratios = Vec::new();
    let (mut better, mut all) = (0, 0);
    for cell in cells(lines) {
        let lost = |variant| median(lines, cell, variant, |came| came.lost_work);
        let mut fixed: Vec<(Variant, f64)> = Vec::new();
        for line in lines.iter().filter(|line| line.cell == *cell) {
            let pure = matches!(
                line.variant,
                Variant::Precopy | Variant::Postcopy | Variant::Shares(..)
            );
            if pure
                && !fixed.iter().any(|(variant, _)| *variant == line.variant)
                && let Some(lost) = lost(line.variant)
            {
                fixed.push((line.variant, lost));
            }
        }
        let best = fixed.iter().min_by(|a, b| a.1.total_cmp(&b.1));
        let planned = lost(Variant::Planned);
        let ratio = planned.zip(best).map(|(planned, best)| planned / best.1);
        ratios.extend(ratio);
        let (pre, post) = (lost(Variant::Precopy), lost(Variant::Postcopy));
        if let Some(planned) = planned {
            all += 1;
            let beats = |other: Option<f64>| other.is_none_or(|other| planned <= other);
            better += u32::from(beats(pre) && beats(post));
        }
        let share = median(lines, cell, Variant::Planned, |came| {
            came.faults as f64 / came.working_set.max(1) as f64
        });
        let _ = writeln!(
            text,
            "| {cell} | {} | {} | {} | {} | {} | {} | {} | {} |",
            shown(planned),
            shown(best.map(|best| best.1)),
            best.map_or("–".to_owned(), |best| best.0.to_string()),
            ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2}")),
            shown(lost(Variant::Observe)),
            shown(pre),
            shown(post),
            share.map_or("–".to_owned(), |share| format!("{:.2} %", 100.0 * share)),
        );
    }
    let worst = ratios.iter().copied().fold(0.0, f64::max);
    let _ = writeln!(
        text,
        "\nPlanner's L over the best fixed one's: median {}, worst {worst:.2}. Not worse than either pure \
         mode in {better} of {all} cells.",
        crate::grid::median(ratios).map_or("–".to_owned(), |ratio| format!("{ratio:.2}")),
    );
    text
}

/// Real runs beside simulated ones of the same cell, variant and seed, as Markdown.
///
/// # Errors
/// Where a simulation fails.
pub fn compare(runs: &[Run]) -> Result<String> {
    let mut text =
        "| cell | variant | total real | virtual | downtime real | virtual | L real | virtual | \
                    faults real | virtual |\n\
                    |---|---|---|---|---|---|---|---|---|---|\n"
            .to_owned();
    let mut off: [Vec<f64>; 4] = Default::default();
    for run in runs {
        let Some(seen) = &run.seen else {
            continue;
        };
        let Some(came) = simulate(&run.cell, run.variant, run.seed)?.came else {
            let _ = writeln!(
                text,
                "| {} | {} | {:.2} | does not converge | | | | | | |",
                run.cell, run.variant, seen.total
            );
            continue;
        };
        // Of few faults a difference of one says nothing.
        for (off, (real, model, least)) in off.iter_mut().zip([
            (seen.total, came.total, 0.0),
            (seen.downtime, came.downtime, 0.0),
            (seen.lost_work, came.lost_work, 0.0),
            (seen.faults, came.faults as f64, 10.0),
        ]) {
            if real.max(model) >= least {
                off.push((model - real).abs() / real.max(1e-3));
            }
        }
        let _ = writeln!(
            text,
            "| {} | {} | {:.2} | {:.2} | {:.3} | {:.3} | {:.3} | {:.3} | {:.0} | {} |",
            run.cell,
            run.variant,
            seen.total,
            came.total,
            seen.downtime,
            came.downtime,
            seen.lost_work,
            came.lost_work,
            seen.faults,
            came.faults
        );
    }
    let middle = off.map(|off| {
        crate::grid::median(off).map_or("–".to_owned(), |off| format!("{:.0} %", 100.0 * off))
    });
    let _ = writeln!(
        text,
        "\nMedian of |virtual − real| / real: total {}, downtime {}, L {}, faults (of ten and more) {}.",
        middle[0], middle[1], middle[2], middle[3]
    );
    Ok(text)
}
