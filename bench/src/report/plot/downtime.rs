//! Downtime against the round-trip time and against loss: a plot for each guest and rate, a panel for each value
//! of the other one, a column for each value, a mark for each engine. Whatever was not moved is a cross at
//! the top.

use anyhow::Result;
use plotters::prelude::*;

use super::{Area, FAINT, INK, color, draw, legend, problem, write};
use crate::report::cells::{Cell, Metric, Results, slug};

const PANEL_WIDTH: u32 = 340;
const PANEL_HEIGHT: u32 = 360;
const LEGEND_WIDTH: u32 = 250;
const HEAD: u32 = 34;
/// Panels beside each other.
const ACROSS: usize = 3;

/// What stands along the bottom.
#[derive(Clone, Copy)]
enum Axis {
    Rtt,
    Loss,
}

impl Axis {
    fn of(self, cell: &Cell<'_>) -> f64 {
        match self {
            Self::Rtt => cell.any.link_facts.rtt_ms,
            Self::Loss => cell.any.link_facts.loss_percent,
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Rtt => Self::Loss,
            Self::Loss => Self::Rtt,
        }
    }

    fn show(self, value: f64) -> String {
        match self {
            Self::Rtt => format!("{value} ms RTT"),
            Self::Loss => format!("{value} % loss"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Rtt => "rtt",
            Self::Loss => "loss",
        }
    }
}

pub fn plots(results: &Results<'_>) -> Result<Vec<(String, String)>> {
    let mut plots = Vec::new();
    for guest in results.guests() {
        let of_guest: Vec<_> = results
            .cells
            .iter()
            .filter(|cell| cell.any.guest.name == guest)
            .collect();
        let mut rates: Vec<_> = of_guest
            .iter()
            .map(|cell| cell.any.link_facts.rate)
            .collect();
        rates.sort_unstable();
        rates.dedup();
        for rate in rates {
            let of_rate = of_guest
                .iter()
                .copied()
                .filter(|cell| cell.any.link_facts.rate == rate);
            let cells: Vec<_> = of_rate.collect();
            let mbit = rate.map_or("no rate".to_owned(), |rate| {
                format!("{} Mbit/s", rate as f64 / 1e6)
            });
            for axis in [Axis::Rtt, Axis::Loss] {
                let name = format!(
                    "downtime-by-{}-{}-{}.svg",
                    axis.name(),
                    slug(guest),
                    slug(&mbit)
                );
                let title = format!("Downtime in seconds, medians: {guest}, {mbit}");
                plots.push((name, plot(&cells, axis, &title, &results.engines)?));
            }
        }
    }
    Ok(plots)
}

fn values(cells: &[&Cell<'_>], axis: Axis) -> Vec<f64> {
    let mut values: Vec<_> = cells.iter().map(|cell| axis.of(cell)).collect();
    values.sort_by(f64::total_cmp);
    values.dedup();
    values
}

fn plot(cells: &[&Cell<'_>], axis: Axis, title: &str, engines: &[&str]) -> Result<String> {
    let panels = values(cells, axis.other());
    let columns = panels.len().min(ACROSS);
    let lines = panels.len().div_ceil(ACROSS);
    let width = PANEL_WIDTH * columns as u32 + LEGEND_WIDTH;
    let height = (PANEL_HEIGHT * lines as u32).max(16 * (engines.len() as u32 + 3)) + HEAD;
    draw(width, height, |area| {
        write(area, title, (12, 8), 16, INK)?;
        let (_, below) = area.split_vertically(HEAD);
        let (_, side) = below.split_horizontally(PANEL_WIDTH * columns as u32);
        let used = legend(&side, engines, (10, 10))?;
        write(&side, "× at the top: not moved", (10, 18 + used), 12, INK)?;
        for (index, panel) in panels.iter().enumerate() {
            let (line, column) = (index / ACROSS, index % ACROSS);
            let (_, rest) = below.split_vertically(PANEL_HEIGHT * line as u32);
            let (rest, _) = rest.split_vertically(PANEL_HEIGHT);
            let (_, rest) = rest.split_horizontally(PANEL_WIDTH * column as u32);
            let (area, _) = rest.split_horizontally(PANEL_WIDTH);
            let of_panel = cells
                .iter()
                .copied()
                .filter(|cell| axis.other().of(cell).total_cmp(panel).is_eq());
            let of_panel: Vec<_> = of_panel.collect();
            paint(&area, &of_panel, axis, &axis.other().show(*panel), engines)?;
        }
        Ok(())
    })
}

fn paint(
    area: &Area<'_>,
    cells: &[&Cell<'_>],
    axis: Axis,
    title: &str,
    engines: &[&str],
) -> Result<()> {
    const BOTTOM: f64 = 0.01;
    const TOP: f64 = 100.0;
    let columns = values(cells, axis);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 13).into_font().color(&INK))
        .margin(8)
        .y_label_area_size(44)
        .x_label_area_size(30)
        .build_cartesian_2d(0.0..columns.len() as f64, (BOTTOM..TOP).log_scale())
        .map_err(problem)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .label_style(("sans-serif", 11))
        .x_labels(0)
        .y_labels(5)
        .y_label_formatter(&|v| format!("{v}"))
        .draw()
        .map_err(problem)?;
    // Columns are named by hand: their values are not evenly spaced.
    for (index, value) in columns.iter().enumerate() {
        let at = chart.backend_coord(&(index as f64 + 0.5, BOTTOM));
        let base = area.get_base_pixel();
        let text = axis.show(*value);
        let left = at.0 - base.0 - text.len() as i32 * 3;
        write(area, &text, (left, at.1 - base.1 + 8), 12, INK)?;
    }
    for (place, engine) in engines.iter().enumerate() {
        let shift = 0.15 + 0.7 * (place as f64 + 0.5) / engines.len() as f64;
        let color = color(engine);
        let mut line = Vec::new();
        for (index, value) in columns.iter().enumerate() {
            let cell = cells
                .iter()
                .find(|cell| axis.of(cell).total_cmp(value).is_eq());
            let row = cell.and_then(|cell| cell.rows.iter().find(|row| row.engine == *engine));
            let Some(row) = row else { continue };
            let at = index as f64 + shift;
            let Some(figure) = row.figure(Metric::Downtime) else {
                let cross = Cross::new((at, TOP * 0.8), 4, color.stroke_width(2));
                chart.draw_series([cross]).map_err(problem)?;
                continue;
            };
            let show = |value: f64| value.clamp(BOTTOM, TOP);
            line.push((at, show(figure.median)));
            let spread = [(at, show(figure.min)), (at, show(figure.max))];
            chart
                .draw_series(LineSeries::new(spread, color))
                .map_err(problem)?;
        }
        chart
            .draw_series(LineSeries::new(line.clone(), color.mix(0.4)))
            .map_err(problem)?;
        let marks = line
            .into_iter()
            .map(|at| Circle::new(at, 4, color.filled()));
        chart.draw_series(marks).map_err(problem)?;
    }
    Ok(())
}
