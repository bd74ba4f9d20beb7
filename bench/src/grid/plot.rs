//! Predicted against seen, and the planner against what was fixed.

use anyhow::Result;
use plotters::prelude::*;

use super::report::{QUANTITIES, Quantity, cells};
use super::{Run, Variant};
use crate::report::plot::{FAINT, INK, draw, problem, write};

/// Name and text of every plot.
pub fn all(runs: &[Run]) -> Result<Vec<(String, String)>> {
    let mut plots = vec![("lost-work.svg".to_owned(), lost_work(runs)?)];
    for (file, quantity) in [("predicted-total.svg", 0), ("predicted-lost-work.svg", 2)] {
        plots.push((file.to_owned(), scatter(runs, QUANTITIES[quantity])?));
    }
    Ok(plots)
}

/// Predicted at the freeze, with its interval, over what came; planned runs dark.
fn scatter(runs: &[Run], (name, seen, foretold): Quantity) -> Result<String> {
    let points: Vec<(f64, super::Foretold, bool)> = runs
        .iter()
        .filter_map(|run| {
            let came = seen(run.seen.as_ref()?);
            let predicted = foretold(run.at_freeze.as_ref()?);
            let sound = came > 0.0 && predicted.p10 > 0.0;
            sound.then_some((came, predicted, run.variant == Variant::Planned))
        })
        .collect();
    let ends = points.iter().flat_map(|(came, f, _)| [*came, f.p10, f.p90]);
    let (low, high) = ends.fold((f64::INFINITY, 0.0_f64), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    let (low, high) = if points.is_empty() {
        (0.1, 1.0)
    } else {
        (0.8 * low, 1.25 * high)
    };
    draw(560, 560, |area| {
        write(
            area,
            &format!("{name}: predicted at the freeze over what came, seconds"),
            (14, 10),
            15,
            INK,
        )?;
        let area = area.margin(34, 8, 8, 8);
        let mut chart = ChartBuilder::on(&area)
            .x_label_area_size(34)
            .y_label_area_size(52)
            .build_cartesian_2d((low..high).log_scale(), (low..high).log_scale())
            .map_err(problem)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(FAINT)
            .x_desc("came")
            .y_desc("predicted")
            .draw()
            .map_err(problem)?;
        chart
            .draw_series(LineSeries::new([(low, low), (high, high)], INK))
            .map_err(problem)?;
        for (came, predicted, planned) in points {
            let color = if planned {
                RGBColor(8, 69, 148)
            } else {
                RGBColor(160, 160, 160)
            };
            let bar = [(came, predicted.p10), (came, predicted.p90)];
            chart
                .draw_series(LineSeries::new(bar, color))
                .map_err(problem)?;
            let dot = Circle::new((came, predicted.p50), 3, color.filled());
            chart.draw_series([dot]).map_err(problem)?;
        }
        Ok(())
    })
}

/// For every cell the lost work of each variant, the planner's dark.
fn lost_work(runs: &[Run]) -> Result<String> {
    let cells = cells(runs);
    let losses = || {
        cells
            .iter()
            .flat_map(|cell| &cell.rows)
            .filter_map(super::report::Row::lost)
    };
    let low = losses().fold(f64::INFINITY, f64::min).max(1e-3) * 0.7;
    let high = losses().fold(0.0_f64, f64::max).max(2.0 * low) * 1.3;
    let (width, height) = (900, 60 + 26 * cells.len() as u32 + 40);
    draw(width, height, |area| {
        write(
            area,
            "lost work L, seconds (logarithmic): planner ●, simple rule ○, pre-copy ▌, post-copy ▲, fixed shares ·",
            (14, 10),
            15,
            INK,
        )?;
        let x = |lost: f64| 210 + ((lost / low).ln() / (high / low).ln() * 660.0) as i32;
        for decade in [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0] {
            if decade > low && decade < high {
                let line = vec![(x(decade), 46), (x(decade), height as i32 - 34)];
                area.draw(&PathElement::new(line, FAINT)).map_err(problem)?;
                write(
                    area,
                    &format!("{decade}"),
                    (x(decade) - 8, height as i32 - 28),
                    13,
                    INK,
                )?;
            }
        }
        for (number, cell) in cells.iter().enumerate() {
            let y = 60 + 26 * number as i32;
            write(area, &cell.cell.to_string(), (14, y - 7), 14, INK)?;
            for row in &cell.rows {
                let Some(lost) = row.lost() else {
                    continue;
                };
                let at = (x(lost), y);
                let (ours, warm) = (RGBColor(8, 69, 148), RGBColor(217, 95, 14));
                match row.variant {
                    Variant::Planned => area.draw(&Circle::new(at, 6, ours.filled())),
                    Variant::Observe => area.draw(&Circle::new(at, 6, ours)),
                    Variant::Precopy => {
                        let bar = [(at.0 - 2, y - 6), (at.0 + 2, y + 6)];
                        area.draw(&Rectangle::new(bar, warm.filled()))
                    }
                    Variant::Postcopy => {
                        area.draw(&TriangleMarker::new(at, 7, RGBColor(35, 139, 69).filled()))
                    }
                    Variant::Shares(..) => {
                        area.draw(&Circle::new(at, 3, RGBColor(130, 130, 130).filled()))
                    }
                }
                .map_err(problem)?;
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::run;
    use super::*;

    #[test]
    fn plots_are_drawn_with_and_without_runs_that_moved() {
        for lost in [Some(0.5), None] {
            let runs = [run(Variant::Planned, lost), run(Variant::Postcopy, lost)];
            let plots = all(&runs).unwrap();
            assert_eq!(plots.len(), 3);
            assert!(plots.iter().all(|(_, svg)| svg.contains("</svg>")));
        }
    }
}
