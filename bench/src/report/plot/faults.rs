//! How long hybridmig's demand faults took, by its own report: the share of faults answered within so many
//! round-trip times. A plot for each guest, a panel for each link.

use anyhow::Result;
use plotters::prelude::*;

use super::{Area, FAINT, INK, color, draw, legend, problem, write};
use crate::record::Record;
use crate::report::cells::{Cell, Results, slug};

const PANEL_WIDTH: u32 = 340;
const PANEL_HEIGHT: u32 = 260;
const HEAD: u32 = 34;
const ACROSS: usize = 3;

pub fn plots(results: &Results<'_>) -> Result<Vec<(String, String)>> {
    let mut plots = Vec::new();
    for guest in results.guests() {
        let of_guest = results
            .cells
            .iter()
            .filter(|cell| cell.any.guest.name == guest);
        let cells: Vec<_> = of_guest
            .filter(|cell| curves(cell).next().is_some())
            .collect();
        if !cells.is_empty() {
            plots.push((
                format!("fault-latency-{}.svg", slug(guest)),
                plot(guest, &cells)?,
            ));
        }
    }
    Ok(plots)
}

/// Engines with their curve: upper bound in round-trip times, share of the faults within.
fn curves<'a>(cell: &'a Cell<'a>) -> impl Iterator<Item = (&'a str, u64, Vec<(f64, f64)>)> {
    cell.rows.iter().filter_map(|row| {
        let mut buckets: Vec<(f64, f64)> = row.runs.iter().flat_map(|run| latency(run)).collect();
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        let total: f64 = buckets.iter().map(|(_, count)| count).sum();
        if total < 1.0 {
            return None;
        }
        let mut seen = 0.0;
        let curve = buckets.into_iter().map(|(bound, count)| {
            seen += count;
            (bound, seen / total)
        });
        Some((row.engine, total as u64, curve.collect()))
    })
}

fn latency(run: &Record) -> Vec<(f64, f64)> {
    let buckets = run.claimed["send"]["faults"]["latency"].as_array();
    let buckets = buckets.into_iter().flatten();
    buckets
        .filter_map(|bucket| Some((bucket[1].as_f64()?, bucket[2].as_f64()?)))
        .collect()
}

fn plot(guest: &str, cells: &[&Cell<'_>]) -> Result<String> {
    let mut engines: Vec<&str> = Vec::new();
    for cell in cells {
        for (engine, ..) in curves(cell) {
            if !engines.contains(&engine) {
                engines.push(engine);
            }
        }
    }
    let columns = cells.len().min(ACROSS);
    let width = (PANEL_WIDTH * columns as u32 + 190).max(720);
    let height = PANEL_HEIGHT * cells.len().div_ceil(ACROSS) as u32 + HEAD;
    draw(width, height, |area| {
        let title =
            format!("Share of demand faults answered within so many round-trip times: {guest}");
        write(area, &title, (12, 8), 16, INK)?;
        let (_, below) = area.split_vertically(HEAD);
        let (_, side) = below.split_horizontally(PANEL_WIDTH * columns as u32);
        legend(&side, &engines, (10, 10))?;
        for (index, cell) in cells.iter().enumerate() {
            let (line, column) = (index / ACROSS, index % ACROSS);
            let (_, rest) = below.split_vertically(PANEL_HEIGHT * line as u32);
            let (rest, _) = rest.split_vertically(PANEL_HEIGHT);
            let (_, rest) = rest.split_horizontally(PANEL_WIDTH * column as u32);
            let (area, _) = rest.split_horizontally(PANEL_WIDTH);
            paint(&area, cell)?;
        }
        Ok(())
    })
}

fn paint(area: &Area<'_>, cell: &Cell<'_>) -> Result<()> {
    const LEAST: f64 = 0.5;
    const MOST: f64 = 50.0;
    let mut chart = ChartBuilder::on(area)
        .caption(
            cell.any.link_facts.to_string(),
            ("sans-serif", 13).into_font().color(&INK),
        )
        .margin(8)
        .y_label_area_size(36)
        .x_label_area_size(26)
        .build_cartesian_2d((LEAST..MOST).log_scale(), 0.0..1.02)
        .map_err(problem)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .label_style(("sans-serif", 11))
        .y_label_formatter(&|v| format!("{v:.1}"))
        .draw()
        .map_err(problem)?;
    for (engine, count, curve) in curves(cell) {
        // Steps: all that is known of a fault is its bucket.
        let mut steps = vec![(LEAST, 0.0)];
        let mut share = 0.0;
        for (bound, next) in curve {
            let bound = bound.clamp(LEAST, MOST);
            steps.extend([(bound, share), (bound, next)]);
            share = next;
        }
        steps.push((MOST, share));
        let line = LineSeries::new(steps, color(engine).stroke_width(2));
        chart.draw_series(line).map_err(problem)?;
        let base = area.get_base_pixel();
        let place = cell
            .rows
            .iter()
            .position(|row| row.engine == engine)
            .unwrap_or(0) as i32;
        let at = chart.backend_coord(&(MOST, 0.5));
        let text = format!("{count} faults");
        let corner = (at.0 - base.0 - 80, at.1 - base.1 + 14 * place);
        write(area, &text, corner, 11, color(engine))?;
    }
    Ok(())
}
